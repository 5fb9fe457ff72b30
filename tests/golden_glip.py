"""The golden files of GLIP (golden/glip)."""

import json
import os

import pytest
from conftest import GOLDEN, assert_close, load_golden


def load(name: str):
    """A file by its name without "glip_" and suffix: arrays by name, or what a JSON file holds."""
    path = os.path.join(GOLDEN, "glip", f"glip_{name}.json")
    if os.path.exists(path):
        with open(path) as file:
            return json.load(file)
    arrays = os.path.join(GOLDEN, "glip", f"glip_{name}.npz")
    if not os.path.exists(arrays):
        pytest.skip(f"golden file {arrays} is absent (set CAPVL_GOLDEN)")
    return load_golden("glip", f"glip_{name}.npz")


def close(actual, expected, tolerance: float = 1e-4, name: str = "") -> None:
    """See `conftest.assert_close`; the README suggests 1e-4 for outputs and 1e-3 for gradients."""
    assert_close(actual, expected, tolerance, name)
