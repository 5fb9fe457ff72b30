"""Convolution and group normalisation of maps (B, Y, X, C), channels last.

Letters beside those of `capvl.nn.weights`: Y, X rows and columns of a map; C, D channels in and out.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.nn import weights
from capvl.nn.layers import as_row
from capvl.nn.weights import weight


class Conv(nnx.Module):
    """A size x size convolution with size // 2 zeros around the map; `kernel` is (size, size, C, D).

    For odd sizes (B, Y, X, C) becomes (B, ⌈Y / stride⌉, ⌈X / stride⌉, D).
    """

    def __init__(
        self, width: int, out: int, size: int = 3, *, stride: int = 1, init=None, bias: bool = True, rngs: nnx.Rngs
    ):
        self.stride = stride
        init = init or weights.lecun_normal(size * size * width)
        self.kernel = weight(rngs, (size, size, width, out), (None, None, "embed", None), init)
        self.bias = weight(rngs, (out,), (None,), weights.zeros) if bias else None

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x, kernel = x_BYXC, self.kernel[...].astype(x_BYXC.dtype)
        if kernel.shape[0] == 1 and self.stride == 1:
            # A product of matrices, which CPUs do faster than a convolution.
            y = jnp.einsum("bc,cd->bd", x.reshape(-1, x.shape[-1]), kernel[0, 0]).reshape(*x.shape[:-1], -1)
        else:
            around = ((kernel.shape[0] // 2,) * 2, (kernel.shape[1] // 2,) * 2)
            layout = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, kernel, (self.stride,) * 2, around, dimension_numbers=layout)
        return y if self.bias is None else y + as_row(self.bias[...].astype(y.dtype), y)


class GroupNorm(nnx.Module):
    """Maps (B, Y, X, C), normalised over the places and the C / groups channels of each group (arXiv 1803.08494).

    Statistics are float32, the variance is the biased one.

    Raises:
      ValueError: `groups` doesn't divide the channels.
    """

    def __init__(self, width: int, groups: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        if width % groups:
            raise ValueError(f"{width} channels can't be divided into {groups} groups")
        self.groups, self.eps = groups, eps
        self.scale = weight(rngs, (width,), (None,), weights.ones)
        self.bias = weight(rngs, (width,), (None,), weights.zeros)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        z = x_BYXC.astype(jnp.float32)
        centred = z - self._of_groups(z)
        inverse = jax.lax.rsqrt(self._of_groups(jnp.square(centred)) + self.eps)
        y = centred * (inverse * as_row(self.scale[...].astype(jnp.float32), z))
        return (y + as_row(self.bias[...].astype(jnp.float32), z)).astype(x_BYXC.dtype)

    def _of_groups(self, z_BYXC) -> jax.Array:
        """Means of the groups, (B, 1, 1, C).

        First over places: a map reshaped to (B, Y, X, groups, C / groups) fills few of a TPU's 128 lanes.
        """
        mean_BC = z_BYXC.mean((1, 2))
        of_groups = mean_BC.reshape(len(z_BYXC), self.groups, -1).mean(-1)
        return jnp.repeat(of_groups, z_BYXC.shape[-1] // self.groups, axis=-1)[:, None, None]
