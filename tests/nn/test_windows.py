"""Windows of grids: who meets whom by painting, attention and its gradients by plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.nn import windows

SHIFTED = [(3, (6, 9), (1, 1)), (2, (4, 6), (1, 1)), (4, (8, 4), (2, 0)), (4, (8, 8), (2, 2))]


@pytest.mark.parametrize("window, grid, by", SHIFTED)
def test_windows_are_squares_of_the_grid(window, grid, by):
    x = jnp.arange(2 * grid[0] * grid[1] * 3.0).reshape(2, *grid, 3)
    parts = windows.split(x, window)
    np.testing.assert_array_equal(parts[1, 0].reshape(window, window, 3), x[1, :window, :window])
    np.testing.assert_array_equal(parts[0, -1].reshape(window, window, 3), x[0, -window:, -window:])
    np.testing.assert_array_equal(windows.join(parts, window, grid), x)
    back = tuple(-n for n in by)
    rolled = windows.shift(parts, window, grid, back)
    np.testing.assert_array_equal(windows.join(rolled, window, grid)[0, 0, 0], x[0, by[0], by[1]])
    np.testing.assert_array_equal(windows.shift(rolled, window, grid, by), parts)


@pytest.mark.parametrize("window, grid, by", SHIFTED)
def test_who_sees_whom_in_shifted_windows(window, grid, by):
    """Places of one shifted window that are as far apart in the grid as in the window, and no others."""
    y, x = np.mgrid[: grid[0], : grid[1]].astype(np.float32)
    place = windows.split(jnp.asarray(np.stack([y, x], axis=-1))[None], window)
    there = np.asarray(windows.shift(place, window, grid, tuple(-n for n in by)))[0]
    own = np.asarray(place)[0, 0]
    near = (there[:, :, None] - there[:, None] == (own[:, None] - own[None])[None]).all(axis=-1)
    mask = windows.shift_mask(window, grid, by)
    np.testing.assert_array_equal(mask, np.where(near, 0.0, -100.0))
    assert (mask[0] == 0).all() and (mask[-1] < 0).any()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients(masked):
    """As a plain softmax has them; the bias' gradient too."""
    batch, count, places, heads, width = 2, 4, 4, 3, 5
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, upstream = (jax.random.normal(key, (batch, count, places, heads, width)) for key in keys[:4])
    bias = jax.random.normal(keys[4], (heads, places, places))
    mask = jnp.asarray(windows.shift_mask(2, (4, 4), (1, 1))) if masked else None

    def plain(q, k, v, bias):
        logits = jnp.einsum("bwnhk,bwmhk->bwhnm", q, k) / width**0.5 + bias[None, None]
        logits = logits if mask is None else logits + mask[None, :, None]
        return jnp.einsum("bwhnm,bwmhk->bwnhk", jax.nn.softmax(logits), v)

    def ours(q, k, v, bias):
        return windows.attend(q, k, v, bias, mask)

    assert_close(ours(q, k, v, bias), plain(q, k, v, bias), 1e-6)
    found, expected = (
        jax.grad(lambda *a, f=f: (f(*a) * upstream).sum(), argnums=(0, 1, 2, 3))(q, k, v, bias) for f in (ours, plain)
    )
    for name, a, b in zip(("q", "k", "v", "bias"), found, expected, strict=True):
        assert_close(a, b, 1e-5, name)
