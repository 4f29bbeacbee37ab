"""Load a model and talk to it."""
