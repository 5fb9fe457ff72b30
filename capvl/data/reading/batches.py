"""Rows become batches."""

from typing import Any

import numpy as np


def stack(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Rows of equal keys and shapes -> arrays with a leading batch dimension."""
    out = {}
    for key in rows[0]:
        first = np.asarray(rows[0][key])
        out[key] = np.empty((len(rows), *first.shape), first.dtype)
        for i, row in enumerate(rows):
            out[key][i] = row[key]
    return out
