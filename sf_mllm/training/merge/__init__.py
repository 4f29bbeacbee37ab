"""A checkpoint or an adapter becomes one model directory."""
