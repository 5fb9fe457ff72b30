"""Dense layer, layer normalisation and MLP, in the activations' dtype with float32 weights."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.nn import weights
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain


def merge_leading(x: jax.Array, keep: int = 1) -> jax.Array:
    """x with all but its last `keep` dimensions merged if it is float32 or on a GPU, else x itself.

    CPUs train in float32, and XLA's CPU backend needs up to three times as long for the gradients
    of a dot with two leading dimensions; on an H200 a block of L/16 takes 5 % longer. In bfloat16
    they stay elsewhere: merging (B, 196) breaks the tiles of a TPU and costs a copy.
    """
    merges = x.dtype == jnp.float32 or jax.default_backend() == "gpu"
    return x.reshape(-1, *x.shape[x.ndim - keep :]) if merges else x


def drop(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Dropout (Srivastava et al., 2014): each value is 0 with probability `rate`, the others grow by 1 / (1 - rate).

    Without a key, which means not training, x itself.
    """
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))


def clip(x: jax.Array, limit: float) -> jax.Array:
    """x within ±limit; 0 for no limit."""
    return jnp.clip(x, -limit, limit) if limit else x


def path_factors(rate: float, depth: int, batch: int, key: jax.Array) -> jax.Array:
    """Stochastic depth (arXiv 1603.09382): what the two branches of every layer are multiplied by, float32 (L, 2, B).

    Each is 0 for a share of the examples that grows from 0 at the first layer to `rate` at the last, else
    1 / (1 - share).
    """
    kept_L11 = 1 - jnp.linspace(0.0, rate, depth, dtype=jnp.float32)[:, None, None]
    drawn_L2B = jax.random.uniform(key, (depth, 2, batch))
    return constrain(jnp.where(drawn_L2B < kept_L11, 1 / kept_L11, 0.0), None, None, "batch")


def keep_paths(branch: jax.Array, factor_B: jax.Array | None) -> jax.Array:
    """A branch (B, …) of a layer times the factors of its examples; None for 1."""
    if factor_B is None:
        return branch
    return branch * factor_B.astype(branch.dtype).reshape(-1, *(1,) * (branch.ndim - 1))


class Dense(nnx.Module):
    """x @ kernel + bias over the last `contract` dimensions of x: (..., in) -> (..., out)."""

    def __init__(self, shape, axes, init, *, contract: int = 1, bias=None, bias_init=weights.zeros, rngs: nnx.Rngs):
        self.contract = contract
        self.kernel = weight(rngs, shape, axes, init)
        # Biases are small and stay whole on every device.
        self.bias = None if bias is None else weight(rngs, bias, (None,) * len(bias), bias_init)

    def columns(self, x: jax.Array, first: int, last: int) -> jax.Array:
        """Columns `first` to `last` - 1 of the first output dimension, without computing the others."""
        cut = (slice(None),) * self.contract + (slice(first, last),)
        bias = None if self.bias is None else self.bias[...][first:last]
        return self._apply(x, self.kernel[...][cut], bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._apply(x, self.kernel[...], None if self.bias is None else self.bias[...])

    def _apply(self, x, kernel, bias) -> jax.Array:
        kernel = kernel.astype(x.dtype)
        rows = merge_leading(x, self.contract)
        outer = rows.ndim - self.contract
        axes = tuple(range(outer, rows.ndim)), tuple(range(self.contract))
        y = jax.lax.dot_general(rows, kernel, (axes, ((), ())))
        if bias is not None:
            bias = bias.astype(y.dtype)
            y = y + bias.reshape((1,) * outer + bias.shape)
        return y.reshape(*x.shape[: x.ndim - self.contract], *kernel.shape[self.contract :])


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x Φ(x) in its tanh approximation (arXiv 1606.08415); the backward pass keeps x and nothing else."""
    return jax.nn.gelu(x, approximate=True)


_SQRT_2_OVER_PI = 0.7978845608028654
_CUBIC = 0.044715


def _gelu_backward(x, gradient):
    tanh = jnp.tanh(_SQRT_2_OVER_PI * (x + _CUBIC * x * x * x))
    slope = 0.5 * _SQRT_2_OVER_PI * (1 + 3 * _CUBIC * x * x)
    return (gradient * (0.5 * (1 + tanh) + x * (1 - tanh * tanh) * slope),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


@jax.custom_vjp
def exact_gelu(x: jax.Array) -> jax.Array:
    """x Φ(x), Φ by the error function in float32; the backward pass keeps x and nothing else.

    1 + erf instead of erfc: as in PyTorch, and several times as fast on CPUs.
    """
    z = x.astype(jnp.float32)
    return (z * _normal_cdf(z)).astype(x.dtype)


def _normal_cdf(z):
    return 0.5 * (1 + jax.lax.erf(z * _SQRT_HALF))


_SQRT_HALF = 0.7071067811865476
_NORMAL_PEAK = 0.3989422804014327


def _exact_gelu_backward(x, gradient):
    z = x.astype(jnp.float32)
    slope = _normal_cdf(z) + z * (_NORMAL_PEAK * jnp.exp(-0.5 * z * z))
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


exact_gelu.defvjp(lambda x: (exact_gelu(x), x), _exact_gelu_backward)

ACTIVATIONS = {
    "gelu_tanh": gelu,
    "gelu": exact_gelu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Layer normalisation over the last axis (arXiv 1607.06450), statistics in float32.

    The backward pass keeps x and two float32 numbers a row; without it a loop over layers saves
    three float32 copies of x.
    """
    return _layer_norm_forward(x, scale, bias, eps)[0]


def as_row(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A vector (D,) as (1, …, 1, D), of as many dimensions as x."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def _layer_norm_forward(x, scale, bias, eps):
    z = x.astype(jnp.float32)
    mean = z.mean(-1, keepdims=True)
    # E[z²] - E[z]², as in flax and so in the reference: both sums in one pass over x.
    variance = jnp.maximum(0.0, jnp.square(z).mean(-1, keepdims=True) - jnp.square(mean))
    inverse = jax.lax.rsqrt(variance + eps)
    y = (z - mean) * (inverse * as_row(scale, x))
    if bias is not None:
        y = y + as_row(bias, x)
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _layer_norm_backward(eps, saved, gradient):
    x, scale, bias, mean, inverse = saved
    if jax.default_backend() == "gpu":
        # XLA then fuses otherwise what comes before: a stack of L/16's blocks takes 6 % less on an H200.
        gradient = jax.lax.optimization_barrier(gradient)
    g = gradient.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    leading = tuple(range(x.ndim - 1))
    scaled = g * as_row(scale, x)
    along = scaled.mean(-1, keepdims=True) + normal * (scaled * normal).mean(-1, keepdims=True)
    dx = ((scaled - along) * inverse).astype(x.dtype)
    return dx, (g * normal).sum(leading), None if bias is None else g.sum(leading)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis; statistics in float32."""

    def __init__(self, width: int, *, bias: bool = True, eps: float = 1e-6, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = weight(rngs, (width,), (None,), weights.ones)
        self.bias = weight(rngs, (width,), (None,), weights.zeros) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # Parameters that don't train may be kept in bfloat16.
        bias = None if self.bias is None else self.bias[...].astype(jnp.float32)
        return layer_norm(x, self.scale[...].astype(jnp.float32), bias, self.eps)


class InstanceNorm(nnx.Module):
    """Images (B, H, W, C), each channel normalised over its positions (arXiv 1607.08022); statistics in float32.

    What batch norm does, from one image. A layer norm at every position would turn the noise of even surfaces into a
    signal as strong as an edge.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = weight(rngs, (width,), (None,), weights.ones)
        self.bias = weight(rngs, (width,), (None,), weights.zeros)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        z = x_BHWC.astype(jnp.float32)
        mean = z.mean((1, 2), keepdims=True)
        variance = jnp.square(z - mean).mean((1, 2), keepdims=True)
        y = (z - mean) * (jax.lax.rsqrt(variance + self.eps) * as_row(self.scale[...].astype(jnp.float32), z))
        return (y + as_row(self.bias[...].astype(jnp.float32), z)).astype(x_BHWC.dtype)


class Mlp(nnx.Module):
    """Dense, activation (a key of ACTIVATIONS), Dense: (..., D) -> (..., D)."""

    def __init__(
        self, width: int, hidden: int, *, bias: bool = True, activation: str = "gelu_tanh", init=None, rngs: nnx.Rngs
    ):
        self.activation = activation
        init = init or weights.xavier_uniform(width, hidden)
        tiny = weights.normal(1e-6)
        self.up = Dense(
            (width, hidden), ("embed", "mlp"), init, bias=(hidden,) if bias else None, bias_init=tiny, rngs=rngs
        )
        self.down = Dense(
            (hidden, width), ("mlp", "embed"), init, bias=(width,) if bias else None, bias_init=tiny, rngs=rngs
        )

    def __call__(self, x: jax.Array, limit: float = 0.0) -> jax.Array:
        """limit: what both Denses give is clipped to ±limit; 0 for not."""
        up = checkpoint_name(clip(self.up(x), limit), "mlp_up")
        return clip(self.down(ACTIVATIONS[self.activation](up)), limit)
