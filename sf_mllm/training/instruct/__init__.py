"""Stage two: projector and LoRA learn from conversations."""
