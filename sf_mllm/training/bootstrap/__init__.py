"""Stage one: a SparseFormer learns from a frozen ViT."""
