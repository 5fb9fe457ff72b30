"""Relative positions within windows: the index of Swin, and tables of one window for another."""

import re

import numpy as np
import pytest
from conftest import assert_close, load_golden

from capvl.nn.relative_positions import offset_index, resize_offsets


def test_the_index_tells_offsets_apart():
    """Two pairs of places of a 2 x 3 window have one row of the table if, and only if, they are as far apart."""
    index = offset_index((2, 3))
    y, x = np.mgrid[:2, :3].reshape(2, -1)
    offsets = {}
    for query in range(6):
        for key in range(6):
            offset = (y[query] - y[key], x[query] - x[key])
            assert offsets.setdefault(index[query, key], offset) == offset
    assert sorted(offsets) == list(range(3 * 5)) and len(set(offsets.values())) == 15
    assert index[0, 0] == 7 and index[0, 5] == 0 and index[5, 0] == 14


def test_near_offsets_keep_their_values():
    """In a larger window too; what is linear in one direction stays so there, and the heads stay apart."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(5 * 7, 2)).astype(np.float32)
    larger = resize_offsets(table, (3, 4), (5, 6))
    assert larger.shape == (9 * 11, 2) and larger.dtype == np.float32
    middle = np.ix_([1, 2, 3], [2, 3, 4]), np.ix_([3, 4, 5], [4, 5, 6])
    assert_close(larger.reshape(9, 11, 2)[middle[1]], table.reshape(5, 7, 2)[middle[0]], 1e-5)
    assert_close(resize_offsets(table[:, :1], (3, 4), (5, 6)), larger[:, :1], 1e-6)
    np.testing.assert_array_equal(resize_offsets(table, (3, 4), (3, 4)), table)
    with pytest.raises(ValueError, match=re.escape("a table of 35 offsets is not that of a window of (3, 3)")):
        resize_offsets(table, (3, 3), (5, 5))


@pytest.mark.golden
def test_golden_tables():
    golden = load_golden("xvlm", "xvlm_relpos_interp.npz")
    names = [re.fullmatch(r"out\.win(\d+)_to_(\d+)", name) for name in golden]
    assert any(names)
    for name in filter(None, names):
        old, new = (2 * (int(n),) for n in name.groups())
        assert_close(resize_offsets(golden[f"in.win{name[1]}"], old, new), golden[name[0]], 1e-6, name[0])


@pytest.mark.golden
def test_golden_index():
    golden = load_golden("xvlm", "xvlm_swin.npz")
    indices = [v for k, v in golden.items() if k.endswith("relative_position_index")]
    assert indices
    for expected in indices:
        side = round(len(expected) ** 0.5)
        np.testing.assert_array_equal(offset_index((side, side)), expected)
