"""Dense layer, layer normalisation and MLP, in the activations' dtype with float32 weights."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.nn import weights
from capvl.nn.weights import weight


class Dense(nnx.Module):
    """An einsum with a kernel and an optional bias; the caller states the equation."""

    def __init__(self, shape, axes, init, *, bias=None, bias_init=weights.zeros, rngs: nnx.Rngs):
        self.kernel = weight(rngs, shape, axes, init)
        # Biases are small and stay whole on every device.
        self.bias = None if bias is None else weight(rngs, bias, (None,) * len(bias), bias_init)

    def __call__(self, equation: str, x: jax.Array) -> jax.Array:
        y = jnp.einsum(equation, x, self.kernel[...].astype(x.dtype))
        if self.bias is None:
            return y
        bias = self.bias[...].astype(y.dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis; statistics in float32."""

    def __init__(self, width: int, *, bias: bool = True, eps: float = 1e-6, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = weight(rngs, (width,), (None,), weights.ones)
        self.bias = weight(rngs, (width,), (None,), weights.zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        z = x.astype(jnp.float32)
        mean = z.mean(-1, keepdims=True)
        variance = jnp.square(z - mean).mean(-1, keepdims=True)
        shape = (1,) * (x.ndim - 1) + (-1,)
        z = (z - mean) * (jax.lax.rsqrt(variance + self.eps) * self.scale[...].reshape(shape))
        if self.bias is not None:
            z = z + self.bias[...].reshape(shape)
        return z.astype(x.dtype)


class Mlp(nnx.Module):
    """Dense, tanh-approximated GELU, Dense: (..., D) -> (..., D)."""

    def __init__(self, width: int, hidden: int, *, bias: bool = True, rngs: nnx.Rngs):
        init = weights.xavier_uniform(width, hidden)
        tiny = weights.normal(1e-6)
        self.up = Dense(
            (width, hidden), ("embed", "mlp"), init, bias=(hidden,) if bias else None, bias_init=tiny, rngs=rngs
        )
        self.down = Dense(
            (hidden, width), ("mlp", "embed"), init, bias=(width,) if bias else None, bias_init=tiny, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = checkpoint_name(self.up("...d,dm->...m", x), "mlp_up")
        return self.down("...m,md->...d", jax.nn.gelu(hidden, approximate=True))
