"""What people read in the terminal and in the report."""

import math

import numpy as np
import pytest

from capvl.terminal import result


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (500.0, "500"),
        (np.float32(24), "24"),
        (0.5, "0.5000"),
        (1.0, "1.0000"),
        (0.0, "0.0000"),
        (-3.0, "-3.0000"),
        (2.5, "2.5000"),
        (math.inf, "inf"),
        (math.nan, "nan"),
    ],
)
def test_counts_have_no_digits_behind_the_point(value, text):
    assert result(value) == text
