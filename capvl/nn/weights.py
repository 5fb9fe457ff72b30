"""One line a weight: shape, logical axes, initialiser.

A weight carries the names of its logical axes as metadata. `capvl.parallel.rules`
is the only place that turns those names into mesh axes.

Letters used in tensor names: B batch, N image tokens, L text positions, T and S query
and key positions, D width, H heads, K head width, M MLP width, V vocabulary, G groups.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, Sequence[int]], jax.Array]


def weight(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], init: Initializer) -> nnx.Param:
    """A float32 parameter of `shape` whose dimensions have the logical names `axes`."""
    if len(shape) != len(axes):
        raise ValueError(f"a weight of shape {tuple(shape)} needs as many axis names, not {tuple(axes)}")
    return nnx.Param(init(rngs.params(), tuple(shape)), axes=tuple(axes))


def zeros(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """All zeros."""
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """All ones."""
    return jnp.ones(shape, jnp.float32)


def constant(value: float) -> Initializer:
    """One value everywhere."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


def normal(stddev: float) -> Initializer:
    """Gaussian of a given standard deviation."""
    return lambda key, shape: stddev * jax.random.normal(key, shape, jnp.float32)


def xavier_uniform(fan_in: int, fan_out: int) -> Initializer:
    """Uniform in ±sqrt(6 / (fan_in + fan_out)); the fans are stated, so fused kernels keep their parts' scale."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def lecun_normal(fan_in: int) -> Initializer:
    """Truncated Gaussian of variance 1 / fan_in."""
    stddev = math.sqrt(1 / fan_in) / 0.87962566103423978
    return lambda key, shape: stddev * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
