"""The index of a stream: what files hold, by reading them or by what stands beside them, and files that change."""

import gzip
import json
import os
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_tar

from capvl.data import prepare
from capvl.data.reading import patterns, ranges, shard_files, stream_index, tars
from capvl.errors import UserError


def rows(count, start=0):
    return [
        (f"{i:03d}", {"jpg": bytes([i % 251]) * (100 + 37 * i), "txt": b"%d" % i}) for i in range(start, start + count)
    ]


@pytest.fixture
def folder(tmp_path):
    """Two tars of three and five samples."""
    (tmp_path / "data").mkdir()
    for i, count in enumerate((3, 5)):
        write_tar(tmp_path / f"data/{i}.tar", rows(count, 10 * i))
    return tmp_path / "data"


def index(folder, pattern="*.tar", **options):
    pattern = f"{folder}/{pattern}"
    return stream_index.open_index(pattern, patterns.expand(pattern), f"{folder.parent}/index", **options)


def counts(made):
    return [entry.records for entry in made.entries]


def texts(made, file):
    shard = made.shard(file)
    return [tars.sample(raw, None)[1]["txt"] for raw in shard_files.read(shard, range(shard.records), None)]


def test_records_are_read_by_their_bytes(folder):
    made = index(folder)
    assert counts(made) == [3, 5] and made.records == 8 and made.pieces() == [3, 5]
    assert texts(made, 1) == [b"10", b"11", b"12", b"13", b"14"]
    assert [v.tolist() for v in made.place(np.array([0, 2, 3, 7]))] == [[0, 0, 1, 1], [0, 2, 0, 4]]
    shard = made.shard(1)
    assert tars.sample(*shard_files.read(shard, [2], None), None)[1]["txt"] == b"12"


def test_it_is_made_once(folder, monkeypatch, capsys):
    index(folder)
    assert not (folder.parent / "index/parts").exists()
    monkeypatch.setattr(shard_files, "scan", lambda path: 1 / 0)
    made = index(folder)
    assert counts(made) == [3, 5] and texts(made, 0) == [b"0", b"1", b"2"]
    assert capsys.readouterr().out == ""


def test_an_interrupted_one_goes_on(folder, monkeypatch):
    whole, scanned = shard_files.scan, []

    def scan(path):
        scanned.append(os.path.basename(path))
        if scanned == ["0.tar", "1.tar"]:
            raise KeyboardInterrupt
        return whole(path)

    monkeypatch.setattr(shard_files, "scan", scan)
    with pytest.raises(KeyboardInterrupt):
        index(folder)
    assert counts(index(folder)) == [3, 5] and scanned == ["0.tar", "1.tar", "1.tar"]


def test_changed_added_and_missing_files_are_said(folder, capsys):
    index(folder)
    write_tar(folder / "0.tar", rows(4))
    write_tar(folder / "2.tar", rows(1))
    (folder / "1.tar").unlink()
    made = index(folder, "{0..2}.tar")
    assert counts(made) == [4, 5, 1], "what is missing may come back, and the order is the same"
    said = capsys.readouterr().out
    for words in ("0.tar' changed, and is indexed again", "1.tar' is missing: its records", "2.tar' was added"):
        assert words in said
    made = index(folder)
    assert counts(made) == [4, 1] and "'1.tar' is no longer among the files" in capsys.readouterr().out
    for i in range(3, 9):
        write_tar(folder / f"{i}.tar", rows(1))
    index(folder)
    said = capsys.readouterr().out
    assert said.count("' was added") == 3 and "… and 3 more files: was added" in said


def test_the_index_of_other_files(folder, tmp_path):
    index(folder)
    write_tar(folder / "a.tar", rows(1))
    with pytest.raises(UserError, match="is the index of other files .'0.tar' and 1 more. than .*a.tar' names"):
        index(folder, "a.tar")
    file = tmp_path / "index/index.json"
    good = json.loads(file.read_text())
    for bad in (
        "[]",
        json.dumps(good | {"version": 2}),
        json.dumps(good | {"files": [good["files"][0] | {"records": "3"}]}),
        json.dumps(good | {"files": [good["files"][0] | {"records": -3}]}),
        json.dumps(good | {"files": [{"name": 3}]}),
    ):
        file.write_text(bad)
        with pytest.raises(UserError, match="is no index of a stream, or of another version of capvl; remove it"):
            index(folder)
    file.write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        index(folder)


def test_offsets_that_dont_fit_are_made_anew(folder, tmp_path):
    index(folder)
    for file, damage in zip(
        sorted((tmp_path / "index/offsets").iterdir()), (b"rubbish", b"\x93NUMPY\x01\x00"), strict=True
    ):
        file.write_bytes(damage)
    made = index(folder)
    assert texts(made, 0) == [b"0", b"1", b"2"] and texts(made, 1)[0] == b"10"
    assert {np.load(file).shape for file in (tmp_path / "index/offsets").iterdir()} == {(4,), (6,)}


@pytest.mark.parametrize(
    "name, text",
    [
        ("0_stats.json", json.dumps({"count": 9, "successes": 3, "status_dict": {}})),
        ("0.idx", "v1.2 3\njpg 512 100 000.jpg txt 1536 1 000.txt\n"),
        ("sizes.json", '{"0.tar": 3}'),
    ],
)
def test_counts_beside_a_file(folder, monkeypatch, name, text, capsys):
    (folder / name).write_text(text)
    whole, scanned = shard_files.scan, []
    monkeypatch.setattr(shard_files, "scan", lambda path: scanned.append(os.path.basename(path)) or whole(path))
    made = index(folder)
    assert counts(made) == [3, 5] and scanned == ["1.tar"]
    assert texts(made, 0) == [b"0", b"1", b"2"] and scanned == ["1.tar", "0.tar"]
    assert texts(index(folder), 0) and scanned == ["1.tar", "0.tar"], "its offsets are kept"
    (folder / name).write_text(text.replace("3", "4", 2).replace("v1.2 4", "v1.2 4"))
    shutil.rmtree(folder.parent / "index")
    made = index(folder)
    assert counts(made) == [4, 5] and made.shard(0).records == 3
    assert f"0.tar' has 3 records and not 4, as {folder / name} says" in capsys.readouterr().out
    made = index(folder, scan=True)
    assert counts(made) == [3, 5] and made.entries[0].source == ""


def test_what_stands_beside_and_says_nothing(folder):
    (folder / "0_stats.json").write_text('{"successes": "3"}')
    (folder / "0.idx").write_text("0 1536\n")
    (folder / "1_stats.json").write_text("[")
    (folder / "sizes.json").write_text('{"0.tar": -1}')
    assert counts(index(folder)) == [3, 5]


def test_kinds(folder):
    (folder / "a.tar").write_bytes(gzip.compress((folder / "0.tar").read_bytes()))
    (folder / "b.tar.gz").write_bytes(gzip.compress((folder / "1.tar").read_bytes()))
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"] * 7, "caption": ["y"] * 7}), folder / "c.parquet", 3)
    made = index(folder, "[abc].*")
    kinds = [(entry.kind, entry.records, entry.pieces()) for entry in made.entries]
    assert kinds == [("compressed tar", 3, [3]), ("compressed tar", 5, [5]), ("parquet", 7, [3, 3, 1])]


def test_longnames_hidden_files_and_archives_behind_archives(tmp_path):
    """Samples are read alike one by one and as a whole, whatever stands between them."""
    (tmp_path / "data").mkdir()
    long = [("a" * 150 + str(i), {"jpg": b"x" * 700, "txt": "ü".encode()}) for i in range(2)]
    odd = [("ü", {"jpg": b"x"}), ("._d", {"jpg": b"hidden"}), ("../e", {"jpg": b"x"}), ("f", {"jpg": b"x", "": b"y"})]
    for i, samples in enumerate((long, odd, rows(2))):
        write_tar(tmp_path / f"{i}.tar", samples)
    (tmp_path / "data/0.tar").write_bytes(b"".join((tmp_path / f"{i}.tar").read_bytes() for i in range(3)))
    made = index(tmp_path / "data")
    shard = made.shard(0)
    one_by_one = [
        tars.sample(raw, lambda *said: None) for i in range(shard.records) for raw in shard_files.read(shard, [i], None)
    ]
    with open(shard.path, "rb") as file:
        assert one_by_one == list(tars.samples(file, "", tars.MAX_BYTES, lambda *said: None))
    assert len(one_by_one) == 6


def test_ranges(tmp_path):
    begins = [0, 100, 200, 1000, 1004, 5000]
    ends = [100, 200, 300, 1001, 1100, 5100]
    assert ranges.merged(begins, ends) == [(0, 3), (3, 5), (5, 6)], "3 bytes between 497, and not 700"
    assert ranges.merged(begins[:3], ends[:3], largest=200) == [(0, 2), (2, 3)]
    assert ranges.merged([5], [9]) == [(0, 1)]
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    assert ranges.read(str(path), 2, 5, 10) == b"234"
    with pytest.raises(ranges.ChangedError, match="it has 10 bytes and had 11"):
        ranges.read(str(path), 2, 5, 11)
    path.unlink()
    with pytest.raises(ranges.ChangedError, match="it is gone"):
        ranges.read(str(path), 2, 5, 10)


def test_where_it_cant_be_kept(folder, tmp_path, capsys):
    (tmp_path / "index").write_text("a file")
    made = index(folder)
    assert counts(made) == [3, 5] and texts(made, 1)[0] == b"10"
    assert "is not kept and will be made at each start" in capsys.readouterr().out
    with pytest.raises(UserError, match="can't be made"):
        index(folder, must_keep=True)


def test_in_processes(folder, monkeypatch, capsys):
    monkeypatch.setattr(stream_index, "SLOW", -1.0)
    assert counts(index(folder, workers=2)) == [3, 5]
    assert "2 files (0.0 GB) are read once for their index in 2 processes, for about 1 min" in capsys.readouterr().out


def test_the_command(folder, tmp_path, capsys):
    (folder / "2.tar").write_bytes(b"rubbish")
    prepare.main(["index", f"--stream=stream:{folder}/*.tar", f"--out={tmp_path}/out"])
    said = capsys.readouterr().out
    assert f"{tmp_path}/out: 8 records of 3 files" in said and "2.tar: tar cut short" in said
    assert (tmp_path / "out/index.json").exists()
    prepare.main(["index", f"--stream={folder}/0.tar", f"--stream={folder}/1.tar", f"--data_dir={tmp_path}/d"])
    assert len(list((tmp_path / "d/stream_index").glob("*/index.json"))) == 2


def test_the_command_on_beam(folder, tmp_path, capsys):
    pytest.importorskip("apache_beam")
    prepare.main(["index", f"--stream={folder}/*.tar", f"--out={tmp_path}/out", "--beam=--runner=DirectRunner"])
    assert "8 records of 2 files" in capsys.readouterr().out
