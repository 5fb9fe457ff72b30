"""Convolutions and group norms against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import nnx

from capvl.nn.convolution import Conv, GroupNorm


def maps(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def filled(module, seed=1):
    """All parameters random."""
    state = nnx.state(module, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    leaves = [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    nnx.update(module, jax.tree.unflatten(tree, leaves))
    return module


@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 1), (1, 2), (5, 3)])
def test_a_convolution_is_its_sum(size, stride):
    conv = filled(Conv(3, 4, size, stride=stride, rngs=nnx.Rngs(0)))
    x = np.asarray(maps(2, 5, 6, 3))
    y = conv(jnp.asarray(x))
    kernel, bias = np.asarray(conv.kernel[...]), np.asarray(conv.bias[...])
    padded = np.pad(x, ((0, 0), (size // 2, size // 2), (size // 2, size // 2), (0, 0)))
    rows, columns = -(-5 // stride), -(-6 // stride)
    expected = np.zeros((2, rows, columns, 4)) + bias
    for i in range(size):
        for j in range(size):
            seen = padded[:, i : i + 5 : stride, j : j + 6 : stride]
            expected += np.einsum("byxc,cd->byxd", seen, kernel[i, j])
    assert_close(y, expected, 1e-5)


def test_a_convolution_without_bias_and_in_bfloat16():
    conv = filled(Conv(3, 4, bias=False, rngs=nnx.Rngs(0)))
    x = maps(1, 4, 4, 3)
    low = conv(x.astype(jnp.bfloat16))
    assert conv.bias is None and low.dtype == jnp.bfloat16
    assert_close(low.astype(jnp.float32), conv(x), 0.02)


def test_group_norm():
    """Also where the mean is far larger than the spread."""
    norm = filled(GroupNorm(6, 3, rngs=nnx.Rngs(0)))
    x = np.asarray(maps(2, 4, 5, 6), np.float64) + 300.0
    parts = x.reshape(2, 20, 3, 2)
    mean, variance = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    normal = ((parts - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
    expected = normal * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    y = norm(jnp.asarray(x, jnp.float32))
    assert_close(y, expected, 2e-4)
    low = norm(jnp.asarray(x - 300.0, jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    assert_close(low.astype(jnp.float32), expected, 0.02)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="6 channels can't be divided into 4 groups"):
        GroupNorm(6, 4, rngs=nnx.Rngs(0))
