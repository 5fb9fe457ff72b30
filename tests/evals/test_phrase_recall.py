"""Recall of phrases' boxes against golden/glip/glip_flickr_recall.json, and known cases."""

import json
import os

import numpy as np
import pytest
from conftest import GOLDEN

from capvl.evals.phrase_recall import merged, place, recalls


@pytest.mark.golden
@pytest.mark.parametrize("protocol", ["any", "merged"])
def test_recall_is_golden(protocol):
    path = os.path.join(GOLDEN, "glip", "glip_flickr_recall.json")
    if not os.path.exists(path):
        pytest.skip(f"golden file {path} is absent (set CAPVL_GOLDEN)")
    with open(path) as file:
        case = json.load(file)
    found = {(row["image_id"], row["sentence_id"]): row["boxes"] for row in case["predictions"]}
    places, kinds = [], []
    for row in case["gt"]:
        for phrase, boxes in zip(row["phrases"], found[row["image_id"], row["sentence_id"]], strict=True):
            right = np.array(phrase["boxes"], float)
            places.append(place(np.array(boxes), merged(right) if protocol == "merged" else right))
            kinds.append([phrase["type"]] if isinstance(phrase["type"], str) else phrase["type"])
    values = recalls(places, kinds)
    expected = {}
    for rank, row in case["recall"][protocol].items():
        for kind, value in row.items():
            name = f"R@{'all' if rank == '-1' else rank}"
            expected[name if kind == "all" else f"{kind}/{name}"] = value
    assert values == pytest.approx(expected, abs=1e-12)


def test_places_and_recalls():
    found = np.array([[0, 0, 1, 1], [0.5, 0.5, 1, 1], [0, 0, 0.2, 0.2]])
    right = np.array([[0, 0, 0.2, 0.21], [0.5, 0.55, 1, 1]])
    assert place(found, right) == 1 and place(found, right[:1]) == 2
    assert place(found, merged(right)) == 0 and place(found[1:], merged(right)) == -1
    assert place(found[:0], right) == -1
    values = recalls([0, 4, 9, 12, -1], [["people"], ["people", "animals"], ["animals"], [], ["people"]])
    assert [values[f"R@{k}"] for k in (1, 5, 10, "all")] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert values["people/R@1"] == pytest.approx(1 / 3) and values["animals/R@10"] == 1
    with pytest.raises(ValueError, match="no phrases"):
        recalls([])
