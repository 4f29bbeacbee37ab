"""Names that the implementations of an operation share."""

REFERENCE = "torch"
"""The one by PyTorch's own operations: it works on every device, and the others must agree with it."""
