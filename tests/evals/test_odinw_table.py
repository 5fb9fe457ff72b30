"""The table of ODinW: means over data sets and seeds, in JSON and in Markdown."""

import json

import pytest

from capvl.evals import odinw

RESULTS = {
    "all": {"aquarium": [0.5], "pothole": [0.7]},
    "3": {"aquarium": [0.2, 0.4, 0.3], "pothole": [0.4, 0.6, 0.2]},
    "0": {"aquarium": [0.1]},
}


def test_rows():
    zero, three, whole = json.loads(odinw.as_json(RESULTS))["rows"]
    assert zero == {"shots": "0", "mean": None, "std": None, "sets": {"aquarium": 0.1}}
    assert three["mean"] == pytest.approx(0.35) and three["std"] == pytest.approx(0.1080123)  # Of 0.3, 0.5 and 0.25.
    assert three["sets"] == pytest.approx({"aquarium": 0.3, "pothole": 0.4})
    assert whole["mean"] == pytest.approx(0.6) and whole["std"] == 0


def test_the_table():
    assert odinw.table(RESULTS).splitlines() == [
        "| shots | mean | aquarium | pothole |",
        "|---|---|---|---|",
        "| 0 | – | 10.0 | – |",
        "| 3 | 35.0 ± 10.8 | 30.0 | 40.0 |",
        "| all | 60.0 | 50.0 | 70.0 |",
    ]


def test_seeds_that_differ():
    with pytest.raises(ValueError, match="3 shots: the data sets have"):
        odinw.rows({"3": {"a": [0.1, 0.2], "b": [0.1]}})
