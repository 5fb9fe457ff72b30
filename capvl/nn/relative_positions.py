"""Relative positions within a window of a grid (Swin, arXiv 2103.14030, section 3.2): one bias a head and offset.

A table has a row for each offset (rows, then columns) between two places of a window: (2 R - 1)(2 C - 1) rows.
"""

import math

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
      old, new: rows and columns of the windows. Where one has a single row or column, along which there is but one
        bias, the new table has that of the offset 0 everywhere.

    Raises:
      ValueError: the table is not of the old window.
    """
    if len(table_OH) != (2 * old[0] - 1) * (2 * old[1] - 1):
        raise ValueError(f"a table of {len(table_OH)} offsets is not that of a window of {old}")
    if old == new:
        return np.asarray(table_OH)
    if min(*old, *new) < 2:
        middle = np.asarray(table_OH)[(2 * old[0] - 1) // 2 * (2 * old[1] - 1) + (2 * old[1] - 1) // 2]
        return np.broadcast_to(middle, ((2 * new[0] - 1) * (2 * new[1] - 1), table_OH.shape[1])).copy()
    sources = [_stretched(o, n) for o, n in zip(old, new, strict=True)]
    wanted = [np.arange(-(n - 1.0), n) for n in new]
    heads = np.asarray(table_OH, np.float64).T.reshape(-1, 2 * old[0] - 1, 2 * old[1] - 1)
    degrees = [min(3, 2 * o - 2) for o in old]
    resized = [RectBivariateSpline(*sources, head, kx=degrees[0], ky=degrees[1])(*wanted).ravel() for head in heads]
    return np.stack(resized, axis=1).astype(table_OH.dtype)


def resize_tables(tables_LOH: np.ndarray, offsets: int) -> np.ndarray:
    """Tables of square windows for windows with so many offsets; see `resize_offsets`.

    Args:
      tables_LOH: (layers, offsets, heads).
      offsets: of the new windows.

    Raises:
      ValueError: either number of offsets is not that of a square window.
    """
    old, new = ((math.isqrt(count) + 1) // 2 for count in (tables_LOH.shape[1], offsets))
    if (2 * old - 1) ** 2 != tables_LOH.shape[1] or (2 * new - 1) ** 2 != offsets:
        raise ValueError(f"{tables_LOH.shape[1]} and {offsets} offsets are not both of square windows")
    return np.stack([resize_offsets(table_OH, (old, old), (new, new)) for table_OH in tables_LOH])


def _stretched(old: int, new: int) -> np.ndarray:
    """Where the old offsets lie among the new: 0, ±1, ±(1 + q), ±(1 + q + q²) …, the last about new - 1; q is found
    by halving, to the same digits as in BEiT's code."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q ** (old - 1)) / (1 - q) > new - 1 else (q, high)
    far = np.cumsum(q ** np.arange(old - 1.0))
    return np.concatenate([-far[::-1], [0.0], far])
