"""The numerics of V4, one file an operation.

Each file defines the right answer in plain PyTorch, which runs on every device. Faster kernels stand beside it and
are tested against it. Shapes: T tokens (any batch flattened), B sequences, S positions, D hidden, h streams of mHC,
H heads, d head_dim, r rotary dims, W window, N compressed entries, K selected ones, E experts, k experts a token.
"""
