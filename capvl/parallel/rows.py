"""Batches put together so that nothing moves between devices, and taken apart again.

Where rows are divided over devices, plain concatenation sends half of them to other devices. Here rows of the first
batch alternate with those of the second, as finely as their counts allow: each device's stay with it, and their order
is the same on any number of devices.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from capvl.parallel.rules import constrain


def interleave(batches: Sequence[jax.Array]) -> jax.Array:
    """One batch of the rows of several: (B, …), (C, …), … -> (B + C + …, …)."""
    groups = _groups([len(x) for x in batches])
    joined = jnp.concatenate([_grouped(x, groups) for x in batches], axis=1)
    return _flat(joined)


def part(x: jax.Array, counts: Sequence[int]) -> list[jax.Array]:
    """The batches of so many rows each that `interleave` put together."""
    groups = _groups(counts)
    ends = itertools.accumulate(count // groups for count in counts)
    return [_flat(own) for own in jnp.split(_grouped(x, groups), list(ends)[:-1], axis=1)]


def _groups(counts: Sequence[int]) -> int:
    return math.gcd(*counts)


def _grouped(x, groups: int):
    return constrain(x.reshape(groups, len(x) // groups, *x.shape[1:]), "groups", *(None,) * x.ndim)


def _flat(x):
    return constrain(x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))
