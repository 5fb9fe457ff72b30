"""Regions of scenes, of prepared sets and of data sets of tfds."""

import json

import numpy as np
import pytest
from conftest import write_tar
from handmade import picture

from capvl.data.options import DataOptions
from capvl.data.preparing import corpus
from capvl.data.reading import sources, streams
from capvl.data.reading.regions import FEATURES, Region, regions
from capvl.data.reading.rejected import RejectedError
from capvl.data.scenes import examples
from capvl.errors import UserError


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


def streamed(pattern: str, features=("image", "text", *FEATURES)):
    """The Examples of a stream's records, or why they are none."""
    stream = streams.Stream(pattern, DataOptions(index=pattern + ".index"), features, seed=0)
    found = []
    for i in range(len(stream)):
        try:
            found.append(stream.read(i))
        except RejectedError as e:
            found.append((str(e), e.key))
    return found


def test_streams_have_the_regions_of_prepared_sets(tmp_path):
    meta = {
        "captions": ["a red dog"],
        "phrases": [[0, 1, 2, "7", "animal", "red dog"]],
        "boxes": {"7": [[4, 3, 99, 15]]},
    }
    far = {"boxes": [[90, 0, 99, 20]]}
    samples = [
        (str(i), {"jpg": picture(), "json": json.dumps(m).encode(), "txt": b"x"}) for i, m in enumerate((meta, {}, far))
    ]
    write_tar(tmp_path / "0.tar", samples)
    folder = corpus.prepare("set", {"train": str(tmp_path / "0.tar")}, str(tmp_path), workers=1)
    source = sources.open_source("set", "train", str(tmp_path), features=("image", "text", *FEATURES))
    (record,) = folder.glob("*.array_record*")
    of_tar, of_records = streamed(str(tmp_path / "0.tar")), streamed(str(record))
    assert of_tar.pop() == ("box outside of the image", "2")
    assert len(source) == len(of_tar) == len(of_records) == 2
    for i in range(2):
        assert of_records[i]["image"] == of_tar[i]["image"] == source[i]["image"]
        assert of_records[i]["key"] == of_tar[i]["key"] == str(i)
        assert regions(of_records[i]) == regions(source[i])
        for a, b in zip(regions(of_tar[i]), regions(source[i]), strict=True):
            np.testing.assert_allclose(a.box, b.box, rtol=1e-6)
            assert (a.phrases, a.label, a.spans) == (b.phrases, b.label, b.spans) == (("red dog",), -1, ((0, 2, 9),))
    assert "has no questions feature" in streamed(str(record), ("image", "questions"))[0][0]
    (tmp_path / "set/1.0.0/set-train.array_record-00001-of-00001").write_bytes(b"rubbish" * 1000)
    with pytest.raises(UserError, match="can't be read"):
        streamed(str(tmp_path / "set/1.0.0/set-train.array_record-00001-of-00001"))


def test_tables_are_what_tfds_reads(data_dir, tmp_path):
    import tensorflow_datasets as tfds

    meta = {"boxes": [[0, 0, 24, 20]], "labels": [17], "category_names": ["cat"]}
    write_tar(tmp_path / "0.tar", [("0", {"jpg": picture(), "json": json.dumps(meta).encode(), "txt": b"x"})])
    corpus.prepare("set", {"train": str(tmp_path / "0.tar")}, str(tmp_path), workers=1)
    for name, folder, keys in (("set", str(tmp_path), ("boxes", "phrases")), ("scenes/tiny", data_dir, ("objects",))):
        source = sources.open_source(name, "train", folder, features=("image", *keys))
        assert not source._decoder._rest
        decoder = tfds.features.FeaturesDict({key: source.info.features[key] for key in keys})
        ours, theirs = source[0], decoder.deserialize_example_np(source._data[0])
        for key in keys:
            assert ours[key].keys() == theirs[key].keys()
            for column, values in theirs[key].items():
                assert ours[key][column].tolist() == np.asarray(values, ours[key][column].dtype).tolist()
                assert ours[key][column].shape == np.shape(values)


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
