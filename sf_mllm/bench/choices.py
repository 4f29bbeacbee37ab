"""What the command line offers, by name; needs no library, so that --help answers at once."""

PRECISIONS = {
    "float32": "float32, TF32 off",
    "tf32": "float32 weights, matrix products in TF32 (CUDA)",
    "bfloat16": "weights and activations in bfloat16",
    "float16": "weights and activations in float16",
    "bfloat16-autocast": "float32 weights, bfloat16 autocast",
    "float16-autocast": "float32 weights, float16 autocast",
    "float8": "bfloat16, products of the transformer blocks in float8, scales fixed on other drawings (CUDA)",
    "int8": "float32, products of the transformer blocks in int8 by torchao",
}
"""Of an encoder. Coordinates of a SparseFormer stay in float32 in each of them."""

MODES = {
    "eager": "PyTorch as it is",
    "compiled": "torch.compile for fixed shapes",
    "cuda-graphs": "the same, replayed as a CUDA graph",
}

CHAT_MODES = {
    "eager": "transformers as it is",
    "cuda-graphs": "forward passes recorded as CUDA graphs, as the chat does it with --cuda-graphs",
    "compiled-cuda-graphs": "the same, compiled before, as with --compile",
}

COMPILE_MODES = {"compiled": "default", "cuda-graphs": "reduce-overhead"}
"""`mode` of torch.compile."""

DEFAULT_TOWERS = ("sparseformer:base", "open_clip:ViT-B-16-quickgelu")
"""A published size and its teacher."""
DEFAULT_CHATS = ("demo",)

TOWER_FORMS = (
    "demo (the shipped encoder), demo:clip (its teacher), sparseformer:base, sparseformer:large, another published "
    "SparseFormer as sparseformer:NAME, a directory with an encoder of yours, open_clip:NAME[:TAG], timm:NAME[.TAG] "
    "or hf:DIR_OR_HUB_ID; behind an encoder of ours @triton has it compute by kernels for CUDA devices"
)
RANDOM_CHATS = {
    "random:sparseformer-7b": ("full", "sparseformer"),
    "random:llava-1.5-7b": ("full", "patches"),
    "random:sparseformer-tiny": ("tiny", "sparseformer"),
    "random:llava-tiny": ("tiny", "patches"),
}
"""Chat models with random weights, as keys of `random_models`: our encoder or all 576 patches, and a language model of
Llama-7B's shape; tiny ones rehearse the measurement."""
