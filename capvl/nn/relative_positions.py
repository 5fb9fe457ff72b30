"""Relative positions within a window of a grid (Swin, arXiv 2103.14030, section 3.2): one bias a head and offset.

A table has a row for each offset (rows, then columns) between two places of a window: (2 R - 1)(2 C - 1) rows.
"""

import numpy as np
from scipy.interpolate import RectBivariateSpline


def offset_index(window: tuple[int, int]) -> np.ndarray:
    """Row of the table for each query and key of a window, row by row: (R C, R C) int32.

    Args:
      window: rows R and columns C.
    """
    rows, columns = window
    y, x = np.mgrid[:rows, :columns].reshape(2, -1)
    down, right = y[:, None] - y[None] + rows - 1, x[:, None] - x[None] + columns - 1
    return (down * (2 * columns - 1) + right).astype(np.int32)


def resize_offsets(table_OH: np.ndarray, old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
    """The table of a window for one of another size, by cubic splines over offsets that grow geometrically (BEiT).

    Near offsets, which attention tells apart most, keep their values; far ones are stretched to the new window's edge.

    Args:
      table_OH: (offsets, heads).
      old, new: rows and columns of the windows, at least 2 each.

    Raises:
      ValueError: the table is not of the old window.
    """
    if len(table_OH) != (2 * old[0] - 1) * (2 * old[1] - 1):
        raise ValueError(f"a table of {len(table_OH)} offsets is not that of a window of {old}")
    if old == new:
        return np.asarray(table_OH)
    sources = [_stretched(o, n) for o, n in zip(old, new, strict=True)]
    wanted = [np.arange(-(n - 1.0), n) for n in new]
    heads = np.asarray(table_OH, np.float64).T.reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1)
    degrees = [min(3, 2 * o - 2) for o in old]
    resized = [RectBivariateSpline(*sources, head, kx=degrees[0], ky=degrees[1])(*wanted).ravel() for head in heads]
    return np.stack(resized, axis=1).astype(table_OH.dtype)


def _stretched(old: int, new: int) -> np.ndarray:
    """Where the old offsets lie among the new: 0, ±1, ±(1 + q), ±(1 + q + q²) …, the last about new - 1; q is found
    by halving, to the same digits as in BEiT's code."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old - 1)) / (1 - q) > new - 1 else (q, high)
    far = np.cumsum(q ** np.arange(old - 1.0))
    return np.concatenate([-far[::-1], [0.0], far])
