"""Patch embeddings: one linear layer (arXiv 2010.11929), or 3 x 3 convolutions (arXiv 2106.14881)."""

import jax
from flax import nnx

from capvl.models import flops as formulas
from capvl.nn import weights
from capvl.nn.layers import ACTIVATIONS, Dense, InstanceNorm
from capvl.nn.weights import weight


def convolutions(patch: int, width: int) -> list[tuple[int, int]]:
    """Stride and channels of the 3 x 3 convolutions of `ConvStem`: channels double from 32 or more up to the width
    while the side halves; the last convolution only looks around."""
    halvings = patch.bit_length() - 1
    doubling = [(2, max(min(32, width), width >> (halvings - 1 - i))) for i in range(halvings)]
    return [*doubling, (1, width)]


class ConvStem(nnx.Module):
    """Patch embedding by convolutions: 3 x 3, instance norm, GELU; then 1 x 1.

    All have stride 2 but the last 3 x 3, which sees twice as far. Instance norm stands for the paper's batch norm.
    Small models learn from fewer images than with one linear layer.
    """

    def __init__(self, patch: int, width: int, rngs: nnx.Rngs):
        layers, channels = convolutions(patch, width), 3
        self.strides = tuple(stride for stride, _ in layers)
        for i, (_, out) in enumerate(layers):
            shape, init = (3, 3, channels, out), weights.lecun_normal(9 * channels)
            setattr(self, f"conv{i}", weight(rngs, shape, (None,) * 4, init))
            setattr(self, f"norm{i}", InstanceNorm(out, rngs=rngs))
            channels = out
        init = weights.lecun_normal(channels)
        self.out = Dense((channels, width), (None, "embed"), init, bias=(width,), rngs=rngs)

    def __call__(self, image_BHWC) -> jax.Array:
        """Tokens (B, N, D), row by row, of images whose sides are multiples of the patch."""
        x = image_BHWC
        for i, stride in enumerate(self.strides):
            kernel = getattr(self, f"conv{i}")[...].astype(x.dtype)
            x = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = ACTIVATIONS["gelu_tanh"](getattr(self, f"norm{i}")(x))
        return self.out(x.reshape(len(x), -1, x.shape[-1]))


def patches(image_BHWC, patch: int) -> jax.Array:
    """Patches (B, N, P, P, C), row by row, of images whose sides are multiples of the patch."""
    batch, height, width, channels = image_BHWC.shape
    split = image_BHWC.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, patch, patch, channels)


def make_stem(kind: str, patch: int, width: int, rngs: nnx.Rngs) -> Dense | ConvStem:
    """The patch embedding of a kind: "patch" reads patches (B, N, P, P, 3), "conv" whole images."""
    if kind == "conv":
        return ConvStem(patch, width, rngs)
    shape, init = (patch, patch, 3, width), weights.lecun_normal(patch * patch * 3)
    return Dense(shape, (None, None, None, "embed"), init, contract=3, bias=(width,), rngs=rngs)


def flops(kind: str, patch: int, width: int, grid: tuple[int, int]) -> float:
    """Forward matmul FLOPs of embedding one image of a grid of patches (rows, columns)."""
    patches = grid[0] * grid[1]
    if kind == "patch":
        return formulas.dense(patches, patch * patch * 3, width)
    height, across = (side * patch for side in grid)
    total, channels = formulas.dense(patches, width, width), 3
    for stride, out in convolutions(patch, width):
        height, across = height // stride, across // stride
        total, channels = total + formulas.dense(height * across, 9 * channels, out), out
    return total
