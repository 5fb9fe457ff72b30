"""Functions of a model, compiled: for evaluators with batches of one size, and for as many rows as users bring."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capvl.models.parameters import Blueprint
from capvl.objectives.images import unit_range

MOST = 64

Function = Callable[[Any, Any], Any]
"""(model, rows) -> arrays with a row for each; rows are an array, or several in a tuple or dict."""


def compiled(blueprint: Blueprint, function: Function):
    """jitted (params, rows) -> function(model, rows), with images, which come as uint8, in [-1, 1]."""

    def call(params, rows):
        ready = jax.tree.map(lambda x: unit_range(x) if x.dtype == jnp.uint8 else x, rows)
        return function(blueprint.bind(params), ready)

    return jax.jit(call)


def in_buckets(call, params, rows: Any) -> Any:
    """What a compiled function gives for any number of rows, on the host.

    Rows go in parts of MOST at most; a part is padded to a power of two, so that few sizes are compiled.

    Args:
      call: of `compiled`.
      params: by path.
      rows: NumPy arrays of equal length, at least one row.
    """
    leaves = jax.tree.leaves(rows)
    outputs = []
    for first in range(0, len(leaves[0]), MOST):
        part = jax.tree.map(lambda x, first=first: x[first : first + MOST], rows)
        count = len(jax.tree.leaves(part)[0])
        bucket = 1 << (count - 1).bit_length()
        padded = jax.tree.map(lambda x, n=bucket - count: np.concatenate([x, np.repeat(x[-1:], n, axis=0)]), part)
        found = jax.device_get(call(params, padded))
        outputs.append(jax.tree.map(lambda x, n=count: x[:n], found))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)
