"""Encoder, projector and language model as one transformers LLaVA."""
