"""Command-line chat: `python -m sf_mllm.cli`."""
