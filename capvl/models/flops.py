"""Matmul FLOPs of what models are made of; each model's options put their own together from these.

A multiply-add counts as two. Only matmuls count; softmax, norms and activations don't.
"""

from capvl.models.sizes import Size


def dense(rows: int, inputs: int, outputs: int) -> int:
    """A linear layer over `rows` vectors."""
    return 2 * rows * inputs * outputs


def attention(queries: int, keys: int, width: int) -> int:
    """Scores and weighted sum of all heads together; no projections."""
    return 2 * 2 * queries * keys * width


def layer(tokens: int, size: Size) -> int:
    """Self-attention with its four projections, and MLP, of one layer."""
    projections = 4 * dense(tokens, size.width, size.width)
    return projections + attention(tokens, tokens, size.width) + 2 * dense(tokens, size.width, size.mlp)


def cross_attention(queries: int, keys: int, width: int) -> int:
    """Cross-attention with its query and output projections, to keys and values that are there."""
    return 2 * dense(queries, width, width) + attention(queries, keys, width)
