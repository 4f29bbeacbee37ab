"""Measure speed and memory on the machine at hand: `python -m sf_mllm.bench`."""
