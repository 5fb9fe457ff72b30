"""A loop over blocks, some of it computed again, beside the same blocks as straight-line code."""

import jax
import numpy as np
import pytest
from conftest import assert_close

WAYS = [
    {},
    *(pytest.param(how, marks=pytest.mark.long) for how in (dict(remat="named"), dict(unroll=True, remat="full"))),
]
"""Options beside `unroll=True`."""


def graded(blueprint, params, image):
    """((loss, tokens of the last level), gradients) of an encoder's levels."""

    def loss(params):
        out = blueprint.bind(params).encoder.levels(image)
        return sum((level.tokens_BND**2).sum() for level in out), out[-1].tokens_BND

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def same(found, expected):
    """Both as `graded` gives them; all of the expected gradients are finite, and something."""
    ((value, tokens), gradient), ((wanted, states), slopes) = found, expected
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in slopes.values())
    assert_close(tokens, states, 1e-5)
    assert_close(value, wanted, 1e-5)
    for name in slopes:
        assert_close(gradient[name], slopes[name], 1e-4, name)
