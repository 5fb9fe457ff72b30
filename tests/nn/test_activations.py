"""Activations beside their formulas in float64, with gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capvl.nn.layers import ACTIVATIONS


def _cubic(x):
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


FORMULAS = {
    "gelu": lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(_cubic(x))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
}
X = np.linspace(-9, 9, 181)


def test_every_activation_is_tested():
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_values_and_gradients(name, dtype, tolerance):
    x = jnp.asarray(X, dtype)
    given, step = np.asarray(x, np.float64), 1e-5
    values = [FORMULAS[name](v) for v in given]
    slopes = [(FORMULAS[name](v + step) - FORMULAS[name](v - step)) / (2 * step) for v in given]
    found, back = jax.vjp(ACTIVATIONS[name], x)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), values, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(
        np.asarray(back(jnp.ones_like(x))[0], np.float64), slopes, rtol=5 * tolerance, atol=5 * tolerance
    )
