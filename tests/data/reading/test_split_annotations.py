"""What a split says of its images comes from a file beside it, which knows the split's files, and from no image."""

import itertools
import os
import pathlib
import shutil

import numpy as np
import pytest

from capvl import storage
from capvl.data.images.decode import image_size
from capvl.data.reading import annotations, sources
from capvl.errors import UserError

FEATURES = ("text", "objects", "label", "height?", "width?")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Nothing is kept in memory, or where this machine's data sets are."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "home"))
    monkeypatch.setattr(annotations, "_READ", {})
    return tmp_path / "home"


@pytest.fixture
def scenes(data_dir, tmp_path):
    """A data set of one's own, by its folder."""
    folder = shutil.copytree(sources.find("scenes/tiny", data_dir), tmp_path / "scenes/tiny/1.0.0")
    for file in folder.glob("*.npz"):
        file.unlink()
    return folder


def opened(folder, split="train", features=("image", *FEATURES[:3])):
    return sources.open_source(str(folder), split, features=features, fields=sources.FIELDS["scenes"])


class Forbidden:
    """Records that nobody may read."""

    def __init__(self, data):
        self._data = data

    def __len__(self):
        return len(self._data)


@pytest.mark.parametrize("split", ["val", "train[30%:60%]+val", "train[5:9]+train[:3]"])
def test_it_says_what_the_records_say(scenes, split):
    source = opened(scenes, split)
    assert len(opened(scenes).labels()) == len(opened(scenes))  # So that a few records of it are worth while, too.
    found = list(source.annotations(FEATURES))
    assert len(found) == len(source)
    for i, example in enumerate(found):
        size = dict(zip(("height", "width"), image_size(source[i]["image"]), strict=True))
        np.testing.assert_equal(example, source.read(i, FEATURES) | size)
    np.testing.assert_array_equal(source.labels(), [source[i]["label"] for i in range(len(source))])
    subset = sources.Subset(source, np.arange(len(source))[::-2])
    texts = [example["text"] for example in subset.annotations(("text",))]
    assert texts == [subset[i]["text"] for i in range(len(subset))]
    assert [e["text"] for e in subset.annotations(("text",), range(2))] == texts[:2]


def test_no_image_is_read_for_it_twice(scenes, monkeypatch, capsys):
    labels = opened(scenes).labels()
    assert capsys.readouterr().out.count("once") == 1 and (scenes / "train.annotations.npz").exists()
    open_split = sources._open_split
    monkeypatch.setattr(sources, "_open_split", lambda *arguments: Forbidden(open_split(*arguments)))
    for forget in (False, True):  # From memory; from the file.
        if forget:
            annotations._READ.clear()
        np.testing.assert_array_equal(opened(scenes).labels(), labels)
        assert len(list(opened(scenes).annotations(FEATURES))) == len(labels)
    with pytest.raises((AttributeError, TypeError)):
        opened(scenes)[0]


def test_few_records_are_no_reason_to_read_all(scenes, monkeypatch):
    source = opened(scenes)
    monkeypatch.setattr(annotations, "FEW", 0.5)
    assert len(list(source.annotations(("text",), range(3)))) == 3
    assert len(list(itertools.islice(source.annotations(("text",), likely=3), 3))) == 3
    assert not list(scenes.glob("*.npz"))
    assert len(list(source.annotations(("text",)))) == len(source)
    assert list(scenes.glob("*.npz"))


def test_other_files_are_noticed(scenes, tmp_path, capsys):
    first = opened(scenes, "val").labels()
    shard = next(scenes.glob("*-val.array_record*"))
    status = os.stat(shard)
    for change in (status.st_mtime_ns + 1, status.st_mtime_ns):  # Of a moment, in a file of the same size.
        os.utime(shard, ns=(status.st_atime_ns, change))
        capsys.readouterr()
        np.testing.assert_array_equal(opened(scenes, "val").labels(), first)
        said = capsys.readouterr().out
        assert "is of other files than data set" in said and "made again" in said
    # The same file is that of another set's split no more.
    shutil.copy(scenes / "val.annotations.npz", scenes / "train.annotations.npz")
    assert len(opened(scenes).labels()) == len(opened(scenes)) != len(first)
    assert "is of other files" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["cut", "nothing", "pickled", "ends", "counts"])
def test_a_file_that_is_not_whole_is_made_again(scenes, harm, capsys):
    labels, file = opened(scenes, "val").labels(), scenes / "val.annotations.npz"
    with np.load(file) as arrays:
        values = dict(arrays)
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif harm == "nothing":
        file.write_bytes(b"")
    else:
        changed = {
            "pickled": {"ends": np.array([print, "code"], object)},
            "ends": {"ends": values["ends"][::-1]},
            "counts": {"column/label": values["column/label"][1:]},
        }[harm]
        np.savez(file, **values | changed)
    annotations._READ.clear()
    capsys.readouterr()
    np.testing.assert_array_equal(opened(scenes, "val").labels(), labels)
    assert "it is made again" in capsys.readouterr().out
    annotations._READ.clear()
    np.testing.assert_array_equal(opened(scenes, "val").labels(), labels)
    assert not capsys.readouterr().out


def test_folders_that_can_not_be_written(scenes, home, monkeypatch, capsys):
    replace, closed = storage.replace_bytes, [str(scenes)]

    def guarded(path, data):
        if any(str(path).startswith(folder) for folder in closed):
            raise UserError(f"{str(path)!r} can't be written: Read-only file system.")
        replace(path, data)

    monkeypatch.setattr(storage, "replace_bytes", guarded)
    labels = opened(scenes, "val").labels()
    kept = list(home.rglob("val.annotations.npz"))
    assert len(kept) == 1 and "can't be kept" not in capsys.readouterr().out
    annotations._READ.clear()
    np.testing.assert_array_equal(opened(scenes, "val").labels(), labels)
    assert not capsys.readouterr().out, "it is found there"
    closed.append(str(home))
    for _ in range(3):
        opened(scenes, "train").labels()
    said = capsys.readouterr().out
    assert said.count("can't be kept") == said.count("Reading what") == 1 and "Read-only file system" in said


def test_what_is_no_image_is_told_apart(data_dir):
    features = opened(sources.find("scenes/tiny", data_dir)).info.features
    assert {key for key in features if annotations.is_large(features[key])} == {"image"}


def test_a_file_that_is_gone(scenes):
    source = opened(scenes, "val")
    pathlib.Path(next(scenes.glob("*-val.array_record*"))).unlink()
    with pytest.raises(UserError, match="split 'val' can't be read: No such file"):
        source.labels()


def test_an_image_without_a_size():
    assert annotations._size([b"no image"]) == annotations._size([]) == (0, 0)
