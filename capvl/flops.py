"""Matmul FLOPs on paper, and the peak rates of chips.

A multiply-add counts as two. Only matmuls count; softmax, norms and activations don't.
"""

from capvl.models import sizes

# Dense bfloat16 FLOP/s a chip, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by its `device_kind`, the longest known prefix winning; None if unknown."""
    known = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] if known else None


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
