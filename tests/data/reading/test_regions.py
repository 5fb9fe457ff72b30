"""Regions of scenes, of prepared sets and of data sets of tfds."""

import json

import numpy as np
from conftest import write_tar
from handmade import picture

from capvl.data.preparing import corpus
from capvl.data.reading import sources
from capvl.data.reading.regions import Region, regions
from capvl.data.scenes import examples


def test_regions_of_scenes(data_dir):
    source = sources.open_source("scenes/tiny", "train", data_dir, features=("image", "objects"))
    for index in range(5):
        record = source.read(index, ("objects",))
        made = examples.make(0, "train", 64, 0, int(source.read(index, ("index",))["index"]))
        expected = made["objects"]
        found = regions(record)
        assert [r.phrases for r in found] == [(thing["phrase"],) for thing in expected]
        np.testing.assert_allclose([r.box for r in found], [thing["bbox"] for thing in expected], rtol=1e-6)


def test_regions_of_prepared_sets(tmp_path):
    meta = {
        "captions": ["a red dog", "one dog runs"],
        "phrases": [[0, 1, 2, "7", "animal", "red dog"], [1, 0, 2, "7", "animal", "one dog"], [0, 0, 1, "9", "", "a"]],
        "boxes": {"7": [[4, 3, 20, 15], [0, 0, 10, 10]], "8": [[1, 1, 2, 2]]},
    }
    classes = {"boxes": [[0, 0, 24, 20]], "labels": [17], "category_names": ["cat"]}
    samples = [(str(i), {"jpg": picture(), "json": json.dumps(m).encode()}) for i, m in enumerate((meta, classes, {}))]
    write_tar(tmp_path / "0.tar", [(k, m | {"txt": b"a photo"}) if k != "0" else (k, m) for k, m in samples])
    corpus.prepare("set", {"train": str(tmp_path / "0.tar")}, str(tmp_path), workers=1)
    features = ("key", "boxes", "phrases")
    source = sources.open_source("set", "train", str(tmp_path), features=("image", *features))
    found = {record["key"]: regions(record) for record in (source.read(i, features) for i in range(3))}
    dogs, cats, none = (found[key] for key in sorted(found))
    assert [r.phrases for r in dogs] == [("red dog", "one dog")] * 2 + [()]
    assert dogs[0].spans == ()  # Words are counted in captions, which were not asked for.
    index = next(i for i in range(3) if source.read(i, features)["key"] == sorted(found)[0])
    spans = [r.spans for r in regions(source.read(index, ("text", *features)))]
    assert spans == [((0, 2, 9), (1, 0, 7))] * 2 + [()]
    np.testing.assert_allclose(dogs[0].box, (4 / 24, 3 / 20, 20 / 24, 15 / 20), rtol=1e-6)
    assert cats == [Region((0.0, 0.0, 1.0, 1.0), (), 17, "cat")]
    assert none == [] and dogs[0].label == -1


def test_regions_of_tfds():
    boxes = np.array([[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]])
    record = {"objects": {"bbox": boxes, "label": np.array([3, 4]), "is_crowd": [False, True]}}
    assert regions(record) == [Region((0.2, 0.1, 0.4, 0.3), (), 3)]
    assert regions({"image": b""}) == []


def test_regions_with_attributes_and_places_in_captions():
    record = {
        "boxes": {
            "bbox": np.array([[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]]),
            "chain": [b"a", b"b"],
            "label": np.array([3, -1]),
            "category": [b"dog", b""],
        },
        "phrases": {
            "phrase": [b"a dog", b"it", b"a dog", b"all"],
            "chain": [b"a", b"a", b"a", b"b"],
            "sentence": np.array([0, 0, 2, -1]),
            "start": np.array([0, 10, 4, -1]),
            "end": np.array([5, 12, 9, -1]),
        },
        "attributes": {"attribute": [b"red", b"old"], "chain": [b"a", b"a"]},
    }
    dog, other = regions(record)
    spans = ((0, 0, 5), (0, 10, 12), (2, 4, 9))
    assert dog == Region((0.2, 0.1, 0.4, 0.3), ("a dog", "it"), 3, "dog", ("red", "old"), spans)
    assert other == Region((0.0, 0.0, 1.0, 1.0), ("all",))
