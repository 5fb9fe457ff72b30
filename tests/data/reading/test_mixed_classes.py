"""In a mixture every Example says the closed list of classes of the data set that it is from."""

import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from capvl.data.options import DataOptions
from capvl.data.preparing import region_sets
from capvl.data.reading import sources
from capvl.data.reading.loader import Host, TrainLoader
from capvl.data.reading.regions import FEATURES, regions
from capvl.errors import UserError

ASKED = ("image", "text?", "classes?", *FEATURES)
KINDS = {"animals": ("dog", "cat"), "tools": ("saw", "axe", "cat")}


class Named:
    """A transform that keeps what an Example says of its classes."""

    def __call__(self, example, uniforms):
        classes, found = example.get("classes", ()), regions(example)
        assert all(classes[region.label] == region.category for region in found if region.label >= 0)
        assert example.get("classes") is not None or example["text"]
        return {"classes": np.array(" ".join(classes), "U40"), "count": np.int32(len(found))}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two data sets with classes, half of whose images have none of them, and captions that ground a phrase."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(8):
        image = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        (root / f"{i}.png").write_bytes(buffer.getvalue())
    images = [{"id": i, "file_name": f"{i}.png", "height": 30, "width": 40} for i in range(8)]
    for name, kinds in KINDS.items():
        rows = [{"image_id": i, "category_id": i % len(kinds), "bbox": [1, 2, 9, 9]} for i in range(4)]
        value = {
            "images": images,
            "annotations": rows,
            "categories": [{"id": i, "name": n} for i, n in enumerate(kinds)],
        }
        prepare(root, name, "objects365", json.dumps(value))
    line = {"filename": "7.png", "height": 30, "width": 40}
    grounding = {"caption": "a red dog", "regions": [{"bbox": [1, 2, 9, 9], "phrase": "red dog"}]}
    prepare(root, "captions", "odvg", json.dumps(line | {"grounding": grounding}))
    return root


def prepare(root: pathlib.Path, name: str, format: str, text: str):
    (root / f"{name}.json").write_text(text)
    splits = {"train": [str(root / f"{name}.json")]}
    return region_sets.prepare(name, format, splits, str(root), str(root), workers=1, allow_leaks=True)


def batches(root, name, count=6, **options):
    made = TrainLoader(
        DataOptions(name=name, data_dir=str(root), max_bad=0.0, **options), Named(), ASKED, batch=8, seed=0, host=Host()
    )
    rows = [next(made) for _ in range(count)]
    assert made.bad == 0  # Images without anything are no bad ones.
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("workers", [0, 1])
def test_each_example_has_the_classes_of_its_own(folder, workers):
    found = batches(folder, "animals + tools*0.5 + captions", workers=workers)
    assert set(found["classes"]) == {"dog cat", "saw axe cat", ""}
    shares = [np.mean(found["classes"] == kinds) for kinds in ("dog cat", "saw axe cat", "")]
    np.testing.assert_allclose(shares, (0.4, 0.2, 0.4), atol=0.05)
    assert set(found["count"][found["classes"] == "dog cat"]) == {0, 1}
    assert set(found["count"][found["classes"] == ""]) == {1}


def test_streams_of_prepared_sets(folder):
    found = batches(folder, f"stream:{folder}/tools/*/*.array_record*", 2, window=2, index=f"{folder}/a")
    assert set(found["classes"]) == {"saw axe cat"} and set(found["count"]) == {0, 1}
    found = batches(folder, f"stream:{folder}/captions/*/*.array_record*", 1, window=1, index=f"{folder}/b")
    assert set(found["classes"]) == {""}


def test_who_asks_for_classes_is_told_where_there_are_none(folder):
    with pytest.raises(UserError, match="'captions' has no closed list of classes"):
        sources.open_source("captions", "train", str(folder), features=("image", "classes"))
    assert sources.open_source("tools", "train", str(folder), features=("classes",))[0] == {"classes": KINDS["tools"]}
