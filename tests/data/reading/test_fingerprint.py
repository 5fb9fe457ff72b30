"""Data that was made anew under the same name is noticed; data that is the same passes wherever it lies."""

import json
import os
import shutil

import jax
import pytest
from conftest import write_tar

from capvl import recipes, train
from capvl.checkpoint import Checkpointer
from capvl.data.options import DataOptions
from capvl.data.reading import fingerprint, sources
from capvl.errors import UserError
from capvl.parallel.mesh import make_mesh


@pytest.fixture
def prepared(data_dir, tmp_path):
    """A copy of a prepared data set."""
    folder = tmp_path / "here/mine/1.0.0"
    shutil.copytree(sources.find("scenes/tiny", data_dir), folder)
    return folder


def of(folder, **options) -> dict:
    """As a checkpoint keeps it."""
    return json.loads(json.dumps(fingerprint.fingerprint(DataOptions(name="mine", data_dir=str(folder), **options))))


def test_moved_or_touched_is_the_same(prepared, tmp_path):
    before = of(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for file in (tmp_path / "there").rglob("*"):
        os.utime(file, (1, 1))
    assert fingerprint.check(before, of(tmp_path / "there"), consent=False) == []
    assert fingerprint.check(None, before, consent=False) == []  # Of a checkpoint from before there were fingerprints.


@pytest.mark.parametrize("kind", ["byte", "size", "fewer", "labels"])
def test_another_data_set_of_the_same_name(prepared, tmp_path, kind):
    before = of(tmp_path / "here")
    shard = next(prepared.glob("*-train.*"))
    data = shard.read_bytes()
    if kind == "byte":
        shard.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif kind == "size":
        shard.write_bytes(data + b"\0")
    elif kind == "fewer":
        info = json.loads((prepared / "dataset_info.json").read_text())
        split = next(s for s in info["splits"] if s["name"] == "train")
        split["shardLengths"] = [str(int(n) - 1) for n in split["shardLengths"]]
        (prepared / "dataset_info.json").write_text(json.dumps(info))
    else:
        labels = next(prepared.glob("*.labels.txt"))
        labels.write_text("\n".join(reversed(labels.read_text().split())) + "\n")
    now = of(tmp_path / "here")
    with pytest.raises(UserError, match=r"The data is not what this run was trained on so far \(.*mine.*--new_data"):
        fingerprint.check(before, now, consent=False)
    assert fingerprint.check(before, now, consent=True)


def test_only_the_split_that_is_trained_on_counts(prepared, tmp_path):
    before = of(tmp_path / "here", split="train[:90%]")
    shard = next(prepared.glob("*-val.*"))
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert of(tmp_path / "here", split="train[:90%]") == before
    shutil.copy(shard, str(shard).replace("00000-of", "00001-of"))  # No shard of the data set.
    assert of(tmp_path / "here", split="train[:90%]") == before
    assert of(tmp_path / "here", split="train+val") != before


def test_class_names(prepared, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    before = of(tmp_path / "here", class_names=str(names))
    names.write_text("b\na\n")
    with pytest.raises(UserError, match="class_names differ"):
        fingerprint.check(before, of(tmp_path / "here", class_names=str(names)), consent=False)


@pytest.fixture
def stream(tmp_path):
    """A function that gives the fingerprint of a stream, and its shards."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(4):
        write_tar(folder / f"{i}.tar", [(f"{i}", {"jpg": bytes([i]) * 10, "txt": b"text"})])

    def make(place=folder, pattern="{0..3}.tar"):
        return json.loads(json.dumps(fingerprint.fingerprint(DataOptions(name=f"stream:{place}/{pattern}"))))

    return make, folder


def test_streams(stream, tmp_path):
    make, folder = stream
    before = make()
    shutil.copytree(folder, tmp_path / "moved")
    # The name of a stream is its pattern, which the recipe has too.
    assert list(make(tmp_path / "moved").values()) == list(before.values())
    (folder / "2.tar").unlink()
    assert fingerprint.check(before, make(), consent=False) == ["shard 2.tar is gone and passed over"]
    write_tar(folder / "2.tar", [("2", {"jpg": b"other", "txt": b"text"})])
    with pytest.raises(UserError, match="2.tar of stream:.* has other contents"):
        fingerprint.check(before, make(), consent=False)


def test_a_shard_that_is_gone_may_come_back(stream):
    """Also when a checkpoint was written meanwhile."""
    make, folder = stream
    before = make()
    data = (folder / "2.tar").read_bytes()
    (folder / "2.tar").unlink()
    meanwhile = json.loads(json.dumps(fingerprint.with_gone(before, make())))
    assert meanwhile == before
    assert fingerprint.check(meanwhile, make(), consent=False) == ["shard 2.tar is gone and passed over"]
    (folder / "2.tar").write_bytes(data)
    assert fingerprint.check(meanwhile, make(), consent=False) == []
    assert fingerprint.with_gone(None, make()) == before


def test_a_shard_that_is_gone_does_not_change_what_is_read_of_others(stream, monkeypatch):
    make, folder = stream
    size = (folder / "2.tar").stat().st_size
    monkeypatch.setattr(fingerprint, "BLOCK", 512)
    monkeypatch.setattr(fingerprint, "BYTES", 3 * size)  # All is more, and all without one is not.
    before = make()
    (folder / "2.tar").unlink()
    assert fingerprint.check(before, make(), consent=False) == ["shard 2.tar is gone and passed over"]


def test_a_glob_that_grew_is_said_as_that(stream):
    make, folder = stream
    before = make(pattern="*.tar")
    write_tar(folder / "4.tar", [("4", {"jpg": b"4", "txt": b"text"})])
    with pytest.raises(UserError, match=r"so far \(stream:.* has 5 files, and had 4\); bring"):
        fingerprint.check(before, make(pattern="*.tar"), consent=False)


def test_shards_without_a_common_folder(stream, tmp_path, monkeypatch):
    _, folder = stream
    monkeypatch.chdir(folder)
    found = fingerprint.fingerprint(DataOptions(name=f"stream:{{{folder}/0.tar,1.tar}}"))
    assert [entry["count"] for entry in found.values()] == [2]


@pytest.mark.parametrize("split", ["trian", "train[:5%", "", " ", "train+vall", "train[:1x]"])
def test_a_split_that_is_not_there(prepared, tmp_path, split):
    with pytest.raises(UserError, match="has no split|can't be read"):
        of(tmp_path / "here", split=split)


def test_shards_of_any_name(prepared, tmp_path):
    """Data sets say themselves what their files are called."""
    file = prepared / "dataset_info.json"
    info = json.loads(file.read_text())
    for split in info["splits"]:
        split["filepathTemplate"] = "{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    file.write_text(json.dumps(info))
    for shard in prepared.glob("scenes-*"):
        shard.rename(prepared / shard.name.removeprefix("scenes-"))
    before = of(tmp_path / "here")
    shard = next(prepared.glob("train.array_record*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    with pytest.raises(UserError, match="train.array_record-00000-of-00001 of mine has other contents"):
        fingerprint.check(before, of(tmp_path / "here"), consent=False)
    shard.unlink()
    with pytest.raises(UserError, match="train.array_record-00000-of-00001 of mine is gone"):
        fingerprint.check(before, of(tmp_path / "here"), consent=False)


def test_large_and_many_files(tmp_path, monkeypatch):
    """Blocks of some files: the first and the last byte of those are among them."""
    monkeypatch.setattr(fingerprint, "FILES", 8)
    monkeypatch.setattr(fingerprint, "BYTES", 64)
    monkeypatch.setattr(fingerprint, "BLOCK", 4)
    for i in range(20):
        (tmp_path / f"{i:02}.tar").write_bytes(bytes(range(100)))
    options = DataOptions(name=f"stream:{tmp_path}/*.tar")
    before = fingerprint.fingerprint(options)
    (entry,) = before.values()
    assert entry["count"] == 20 and len(entry["files"]) == 8
    chosen = tmp_path / sorted(entry["files"])[3]
    for place in (0, 99):
        data = bytearray(range(100))
        data[place] += 1
        chosen.write_bytes(data)
        with pytest.raises(UserError, match="has other contents"):
            fingerprint.check(before, fingerprint.fingerprint(options), consent=False)


def test_a_run_notices(prepared, tmp_path, tiny, monkeypatch, capsys):
    monkeypatch.setattr(train, "make_mesh", lambda options: make_mesh(options, jax.devices()[:1]))
    values = tiny(data__name=str(prepared), schedule__warmup=1, steps=4, data__tokenizer="{data_dir}/mine.model")
    shutil.copy(sources_tokenizer(values), tmp_path / "mine.model")
    values["data"]["data_dir"] = str(tmp_path)
    workdir = str(tmp_path / "run")
    monkeypatch.setattr(train.Stop, "now", lambda self, step: step == 2)
    train.run(recipes.resolve(values), workdir)
    monkeypatch.undo()
    monkeypatch.setattr(train, "make_mesh", lambda options: make_mesh(options, jax.devices()[:1]))
    labels = next(prepared.glob("*.labels.txt"))
    labels.write_text("\n".join(reversed(labels.read_text().split())) + "\n")
    with pytest.raises(UserError, match="label.labels.txt of .* has other contents"):
        train.run(recipes.resolve(values), workdir)
    assert Checkpointer(workdir).steps() == [2]
    train.run(recipes.resolve(values), workdir, new_data=True)
    assert "The data is other than it was: label.labels.txt" in capsys.readouterr().out
    train.run(recipes.resolve(values), workdir)


def sources_tokenizer(values) -> str:
    from capvl.data.scenes import making

    return making.scenes_tokenizer(values["data"]["data_dir"])
