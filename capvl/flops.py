"""Matmul FLOPs on paper.

A multiply-add counts as two. Only matmuls count; softmax, norms and activations don't.
"""

from capvl.models import sizes


def _layer(tokens: int, width: int, mlp: int) -> float:
    """Self-attention and MLP of one layer, forward."""
    projections = 4 * 2 * tokens * width * width
    scores = 2 * 2 * tokens * tokens * width
    return projections + scores + 2 * 2 * tokens * width * mlp


def captioner(options) -> float:
    """Forward matmul FLOPs of one image and its text (`capvl.models.captioner.CaptionerOptions`)."""
    size, patch = sizes.parse(options.encoder)
    width, length = size.width, options.length
    patches = (options.res // patch) ** 2
    kept = max(1, round(patches * (1 - options.patch_dropout)))
    tokens = kept + options.registers + (options.pool == "cls")
    encoder = 2 * patches * patch * patch * 3 * width + size.depth * _layer(tokens, width, size.mlp)
    seen = kept + (options.pool == "cls")
    cross = 2 * 2 * length * width * width + 2 * 2 * seen * width * width + 2 * 2 * length * seen * width
    decoder = options.decoder_layers * (_layer(length, width, size.mlp) + cross)
    return encoder + decoder + 2 * length * width * options.vocab
