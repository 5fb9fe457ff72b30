"""The Adafactor variant of "Scaling Vision Transformers" (arXiv 2106.04560, section 3.4).

Adafactor (arXiv 1804.04235) with a factored second moment, a cap on its decay, momentum kept
in bfloat16, and neither relative steps nor parameter scaling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

EPS = 1e-30
MIN_FACTORED = 32
DECAY_EXPONENT = 0.8


class FactoredState(NamedTuple):
    """Second moments: rows and columns where factored (the reduced dimension has size 1), else full."""

    count: jax.Array
    row: dict
    column: dict
    full: dict


def factored_axes(shape: tuple[int, ...], batch_dims: int = 0) -> tuple[int, int] | None:
    """(second largest, largest) dimension to factor over, or None; `batch_dims` leading ones don't count.

    A leaf is factored when its second-largest dimension is at least 32.
    """
    if len(shape) - batch_dims < 2:
        return None
    order = np.argsort(shape[batch_dims:], kind="stable") + batch_dims
    if shape[order[-2]] < MIN_FACTORED:
        return None
    return int(order[-2]), int(order[-1])


def scale_by_factored_rms(beta2_cap: float = 0.999, batch_dims: dict[str, int] | None = None):
    """u = g / sqrt(v) with v factored over the two largest dimensions.

    The decay of v is min(beta2_cap, 1 - (t + 1)^-0.8), so v is g² at the first step.

    Args:
      beta2_cap: upper bound of the decay.
      batch_dims: leading dimensions of a path (stacked layers) that are never factored over.

    Returns:
      An optax transformation over a flat dict of arrays.
    """
    batch_dims = batch_dims or {}

    def init(params):
        placeholder = jnp.zeros((1,), jnp.float32)
        row, column, full = {}, {}, {}
        for path, p in params.items():
            axes = factored_axes(p.shape, batch_dims.get(path, 0))
            row[path] = column[path] = full[path] = placeholder
            if axes is None:
                full[path] = jnp.zeros(p.shape, jnp.float32)
            else:
                row[path] = jnp.zeros([1 if i == axes[1] else n for i, n in enumerate(p.shape)], jnp.float32)
                column[path] = jnp.zeros([1 if i == axes[0] else n for i, n in enumerate(p.shape)], jnp.float32)
        return FactoredState(jnp.zeros((), jnp.int32), row, column, full)

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        decay = jnp.minimum(beta2_cap, 1 - count.astype(jnp.float32) ** -DECAY_EXPONENT)
        updates, row, column, full = {}, dict(state.row), dict(state.column), dict(state.full)
        for path, g in grads.items():
            square = jnp.square(g) + EPS
            axes = factored_axes(g.shape, batch_dims.get(path, 0))
            if axes is None:
                full[path] = decay * full[path] + (1 - decay) * square
                updates[path] = g * jax.lax.rsqrt(full[path])
                continue
            row[path] = decay * row[path] + (1 - decay) * square.mean(axes[1], keepdims=True)
            column[path] = decay * column[path] + (1 - decay) * square.mean(axes[0], keepdims=True)
            mean = row[path].mean(axes[0], keepdims=True)
            updates[path] = g * jax.lax.rsqrt(row[path] / mean) * jax.lax.rsqrt(column[path])
        return updates, FactoredState(count, row, column, full)

    return optax.GradientTransformation(init, update)


class MomentumState(NamedTuple):
    """Running mean of the updates."""

    mean: dict


def momentum(decay: float, dtype) -> optax.GradientTransformation:
    """m = decay * m + (1 - decay) * u, not debiased; the state is rounded to `dtype`, the output is not.

    With a bfloat16 state the decay acts as bfloat16(decay), as in the reference, where optax
    multiplies a Python scalar with a bfloat16 array.
    """
    kept = float(np.asarray(decay, dtype))

    def init(params):
        return MomentumState(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params))

    def update(updates, state, params=None):
        del params
        mean = jax.tree.map(lambda u, m: (1 - decay) * u + kept * m.astype(jnp.float32), updates, state.mean)
        return mean, MomentumState(jax.tree.map(lambda m: m.astype(dtype), mean))

    return optax.GradientTransformation(init, update)
