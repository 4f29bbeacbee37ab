"""Values that several parts must agree on; nothing else lives here."""

IGNORE_INDEX = -100
"""Label of positions that carry no loss (PyTorch's cross-entropy default)."""

MAX_SEED = 2**32 - 1
"""Largest seed that NumPy takes; Python and PyTorch take it too."""

IMAGE_TOKEN = "<image>"
"""Placeholder of one image in a prompt; the processor repeats it once per visual token."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
