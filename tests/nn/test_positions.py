"""Position tables of grids: sine-cosine ones, and learned ones resized on the host and on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden

from capvl.nn import positions


def test_sine_cosine_positions_of_any_grid():
    """All differ; those of a place are the same in every grid that has it."""
    table = positions.sincos_2d(2, 3, 16)
    assert table.shape == (6, 16) and len(np.unique(table.round(5), axis=0)) == 6
    np.testing.assert_array_equal(positions.sincos_2d(5, 4, 16).reshape(5, 4, 16)[:2, :3].reshape(6, 16), table)
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        positions.sincos_2d(2, 2, 6)


def planes(rows, columns):
    """Positions that are linear in row and column."""
    y, x = np.mgrid[:rows, :columns].astype(np.float32)
    return np.stack([y, x, y + 2 * x], axis=-1).reshape(rows * columns, 3)


def test_resized_positions_keep_corners_and_planes():
    grid = planes(4, 4)
    resized = positions.resize_grid(grid, 49).reshape(7, 7, 3)
    assert_close(resized[[0, 0, -1, -1], [0, -1, 0, -1]], grid.reshape(4, 4, 3)[[0, 0, -1, -1], [0, -1, 0, -1]], 1e-6)
    assert_close(resized[..., 0], np.repeat(np.linspace(0, 3, 7)[:, None], 7, axis=1), 1e-6)
    with pytest.raises(ValueError, match="16 and 50 positions are not both of square grids"):
        positions.resize_grid(grid, 50)


@pytest.mark.parametrize("rule", ["big_vision", "hugging_face", "timm"])
def test_grids_that_are_not_square(rule):
    """Rows become rows and columns columns: a table turned by 90 degrees gives the turned result; others stay."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2 + 3 * 5, 4)).astype(np.float32)
    found = positions.resize_table(table, (3, 5), (6, 2), rule, first=2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:2], table[:2])
    turned = np.concatenate([table[:2], table[2:].reshape(3, 5, 4).transpose(1, 0, 2).reshape(15, 4)])
    expected = positions.resize_table(turned, (5, 3), (2, 6), rule, first=2)[2:].reshape(2, 6, 4).transpose(1, 0, 2)
    assert_close(found[2:].reshape(6, 2, 4), expected, 1e-6)
    np.testing.assert_array_equal(positions.resize_table(table, (3, 5), (3, 5), rule, first=2), table)
    with pytest.raises(ValueError, match=r"17 positions are not those of a grid of \(3, 4\) behind 2 others"):
        positions.resize_table(table, (3, 4), (6, 2), rule, first=2)


def test_on_the_device_as_on_the_host():
    """Each image's own grid, at the beginning of a common one."""
    table = np.random.default_rng(1).normal(size=(3 * 5, 4)).astype(np.float32)
    grids, shape = [(3, 5), (6, 2), (1, 7), (2, 3)], (6, 7)
    rows, columns = (jnp.asarray(sides, jnp.int32) for sides in zip(*grids, strict=True))
    resize = jax.jit(lambda table: positions.resize_on_device(table, (3, 5), (rows, columns), shape))
    found = np.asarray(resize(table)).reshape(-1, *shape, 4)
    for own, grid in zip(found, grids, strict=True):
        expected = positions.resize(table, (3, 5), grid, "hugging_face")
        assert_close(own[: grid[0], : grid[1]].reshape(-1, 4), expected, 1e-5)


@pytest.mark.golden
def test_golden_positions():
    golden = load_golden("xvlm", "xvlm_boxes.npz")
    table = golden["in.pos_embed"][0]
    for name in (n for n in golden if n.startswith("out.pos_embed_")):
        expected = golden[name][0]
        assert_close(positions.resize_grid(table, len(expected), "hugging_face", first=1), expected, 1e-6, name)
