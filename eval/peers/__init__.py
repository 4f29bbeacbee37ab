"""How others make few visual tokens of many: one small module a file, for `eval.compare_encoders` only.

Each takes the frozen tokens of a vision encoder and has `out_width`, the width D' of what it returns, and `num_tokens`,
their number M: [B, N, D] -> [B, M, D'].
"""
