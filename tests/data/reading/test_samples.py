"""Samples of tars and parquet files: one rule for keys, columns by their names."""

import io
import json
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import case, write_tar
from PIL import Image

from capvl.data import prepare
from capvl.data.images.decode import decode
from capvl.data.preparing import corpus
from capvl.data.preparing.filters import Filters
from capvl.data.reading import samples, sources, tars
from capvl.data.reading.samples import Names
from capvl.errors import UserError


def picture(color=(255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = picture(), picture((0, 0, 255))


def read(path, **options):
    """(samples, {reason: names})."""
    left_out = {}
    found = list(samples.samples(str(path), 10_000, lambda r, n: left_out.setdefault(r, []).append(n), **options))
    return found, left_out


@pytest.mark.parametrize(
    "name, key, suffix",
    [
        ("000.jpg", "000", "jpg"),
        ("./000.jpg", "000", "jpg"),
        (".//x/./000.JPG", "x/000", "jpg"),
        ("a.b/000.jpg", "a.b/000", "jpg"),
        ("v1.0/000.seg.PNG", "v1.0/000", "seg.png"),
        ("000", "000", ""),
    ],
)
def test_keys(name, key, suffix):
    assert tars.key_and_suffix(name) == (key, suffix)


@pytest.mark.parametrize("name", ["._000.jpg", "./x/._000.jpg", ".DS_Store", "a/.hidden.txt"])
def test_hidden_files_have_no_key(name):
    assert tars.key_and_suffix(name) is None


def test_members_of_a_tar(tmp_path):
    rows = [("a/1", {"jpg": b"x"}), ("b/1", {"jpg": b"y"}), ("a/._1", {"jpg": b"junk"}), ("b/1", {"txt": b"t"})]
    rows += [
        ("../out", {"jpg": b"x"}),
        ("big", {"jpg": b"x" * 20_000}),
        ("twice", {"txt": b"1"}),
        ("twice", {"txt": b"2"}),
    ]
    write_tar(tmp_path / "0.tar", rows)
    found, left_out = read(tmp_path / "0.tar")
    assert found == [
        ("a/1", {"jpg": b"x"}),
        ("b/1", {"jpg": b"y", "txt": b"t"}),
        ("twice", {"txt": b"1"}),
        ("twice", {"txt": b"2"}),
    ]
    assert left_out == {"path climbs out": ["../out.jpg"], "member too large": ["big"]}


def test_names_that_are_not_utf8(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", encoding="latin-1", format=tarfile.GNU_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("café.txt"), io.BytesIO())
    assert read(tmp_path / "0.tar") == ([("caf\\xe9", {"txt": b""})], {})


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_cut_tar_gives_what_is_whole(tmp_path, mode):
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "0.tar", mode) as archive:
        for i in range(40):
            for suffix, data in (("txt", b"text"), ("jpg", rng.bytes(5000))):
                info = tarfile.TarInfo(f"{i:02d}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: len(whole) * 3 // 4])
    found, left_out = read(tmp_path / "0.tar")
    assert left_out == {"tar cut short": [str(tmp_path / "0.tar")]}
    assert [key for key, members in found if len(members) == 2] == [f"{i:02d}" for i in range(len(found))]
    # The blocks of the other two are larger than this file.
    assert len(found) > 20 or mode in ("w:bz2", "w:xz")


def test_tar_whose_end_is_missing(tmp_path):
    """Cut between two members, or at a damaged header, where nothing is wrong with what can be read."""
    write_tar(tmp_path / "0.tar", [(str(i), {"txt": b"x" * 512}) for i in range(8)])
    whole = (tmp_path / "0.tar").read_bytes()
    for data in (whole[: 4 * 1024], whole[: 4 * 1024 + 100], whole[: 4 * 1024] + b"?" * 512 + whole[4 * 1024 + 512 :]):
        (tmp_path / "1.tar").write_bytes(data)
        found, left_out = read(tmp_path / "1.tar")
        assert [key for key, _ in found] == ["0", "1", "2"]
        assert left_out == {"tar cut short": [str(tmp_path / "1.tar")]}


def test_tars_behind_each_other(tmp_path):
    write_tar(tmp_path / "0.tar", [("0", {"txt": b"x"})])
    write_tar(tmp_path / "1.tar", [("1", {"txt": b"y"})])
    (tmp_path / "2.tar").write_bytes(b"".join((tmp_path / f"{i}.tar").read_bytes() for i in range(2)))
    assert read(tmp_path / "2.tar") == ([("0", {"txt": b"x"}), ("1", {"txt": b"y"})], {})


@pytest.mark.cases
@pytest.mark.parametrize("name", ["dot_slash.tar", "apple_double.tar"])
def test_tars_of_other_systems(tmp_path, name):
    path = case(name)
    with tarfile.open(path) as archive:
        names = [m.name.rpartition("/")[2] for m in archive if m.isfile()]
    keys = sorted({n.partition(".")[0] for n in names if not n.startswith(".")})
    folder = corpus.prepare("x", {"train": path}, str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    assert (report["examples"], report["rejected"]) == (len(keys), {})
    source = sources.open_source("x", "train", str(tmp_path), features=("key",))
    assert sorted(source[i]["key"].decode() for i in range(len(source))) == keys


def write_parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.mark.parametrize(
    "columns, names, image, text",
    [
        ({"jpg": [RED], "caption": ["a"]}, Names(), "jpg", "caption"),
        ({"mask": [BLUE], "image": [RED], "text": ["a"]}, Names(), "image", "text"),
        ({"image": [{"bytes": RED, "path": "x"}], "mask": [{"bytes": BLUE}], "text": ["a"]}, Names(), "image", "text"),
        ({"picture_of_it": [RED], "TEXT": ["a"]}, Names(), "picture_of_it", "TEXT"),
        ({"one": [BLUE], "two": [RED], "title": ["a"]}, Names("two", "title"), "two", "title"),
        ({"image": [BLUE], "jpg": [RED], "text": ["b"], "title": ["a"]}, Names("jpg", "title"), "jpg", "title"),
        ({"image": [RED], "text": ["b"], "captions": [["a"]]}, Names(), "image", "captions"),
    ],
)  # fmt: skip
def test_columns_are_chosen_by_name_and_said(tmp_path, capsys, columns, names, image, text):
    path = write_parquet(tmp_path / "0.parquet", **columns)
    command = ["tars", "--name=x", f"--train={path}", f"--data_dir={tmp_path}", "--workers=1"]
    prepare.main([*command, f"--image={names.image}", f"--text={names.text}"])
    assert json.loads((tmp_path / "x/1.0.0/report.json").read_text())["train"]["columns"] == {
        "image": image,
        "text": text,
    }
    assert "image from column" in " ".join(capsys.readouterr().out.split())
    example = sources.open_source("x", "train", str(tmp_path))[0]
    assert example["text"] == [b"a"]
    assert decode(example["image"])[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "columns, names, words",
    [
        ({"one": [RED], "two": [BLUE], "text": ["a"]}, Names(), "several columns of bytes, one, two.*--image=COLUMN"),
        ({"jpg": [RED], "png": [BLUE], "text": ["a"]}, Names(), "several columns of bytes"),
        ({"url": ["http"], "caption": ["a"]}, Names(), "no column of bytes that could be the image"),
        ({"image": [RED], "title": ["a"]}, Names(), "no column that is called as captions are.*--text=COLUMN"),
        ({"image": [RED], "text": ["a"]}, Names(image="imag"), "no column 'imag' for --image.*Did you mean 'image'"),
        ({"image": [RED], "text": ["a"]}, Names(text="txet"), "no column 'txet' for --text.*Did you mean 'text'"),
    ],
)
def test_columns_that_say_nothing_end_before_work(tmp_path, columns, names, words):
    path = write_parquet(tmp_path / "0.parquet", **columns)
    with pytest.raises(UserError, match=words):
        corpus.prepare("x", {"train": path}, str(tmp_path / "data"), names=names)
    assert not (tmp_path / "data").exists()


def test_rows_of_a_parquet_file(tmp_path):
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"\xff\xfe"]).buffers())
    texts = pyarrow.concat_arrays([pyarrow.array(["a", None, ""]), bad, pyarrow.array(["e"])])
    images = [{"bytes": RED, "path": None}] * 4 + [{"bytes": None, "path": "elsewhere.png"}]
    label = pyarrow.array([2**63, 1, 2, 3, 4], pyarrow.uint64())
    path = write_parquet(tmp_path / "0.parquet", image=images, text=texts, label=label)
    with pytest.raises(UserError) as error:
        corpus.prepare("x", {"train": path}, str(tmp_path / "data"), workers=1)
    for words in ("1 x label is no whole number", "2 x empty text", "1 x text is not UTF-8", "1 x no image"):
        assert words in str(error.value)


def test_captions_of_a_parquet_file(tmp_path):
    for name, column, captions in (
        ("texts", ["one text"], [b"one text"]),
        ("lists", [["two", "texts"]], [b"two", b"texts"]),
        ("languages", [{"en": "a dog", "de": "ein Hund"}], [b"a dog", b"ein Hund"]),
    ):
        path = write_parquet(tmp_path / f"{name}.parquet", image=[RED], captions=column, nothing=pyarrow.nulls(1))
        corpus.prepare(name, {"train": path}, str(tmp_path), workers=1)
        assert sources.open_source(name, "train", str(tmp_path))[0]["text"] == captions


def test_one_file_with_other_columns_is_left_out(tmp_path):
    write_parquet(tmp_path / "0.parquet", image=[RED], text=["a"])
    write_parquet(tmp_path / "1.parquet", one=[RED], two=[BLUE], text=["b"])
    (tmp_path / "2.parquet").write_bytes(b"PAR1 and nothing else PAR1")
    folder = corpus.prepare("x", {"train": str(tmp_path / "*.parquet")}, str(tmp_path / "data"), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    assert report["examples"] == 1
    reasons = sorted(report["rejected"])
    assert "several columns of bytes" in reasons[0]
    assert reasons[1] == "parquet can't be read"
    assert report["files"][reasons[1]] == [str(tmp_path / "2.parquet")]


@pytest.mark.cases
def test_image_and_mask(tmp_path):
    path = case("hf_image_and_mask.parquet")
    rows = pyarrow.parquet.read_table(path).to_pylist()
    corpus.prepare("x", {"train": path}, str(tmp_path), workers=1)
    source = sources.open_source("x", "train", str(tmp_path))
    assert [source[i]["image"] for i in range(len(source))] == [row["image"]["bytes"] for row in rows]


def test_names_of_a_tar(tmp_path):
    meta = json.dumps({"captions": ["generated"], "title": "by hand"}).encode()
    write_tar(tmp_path / "0.tar", [("1", {"input.png": RED, "png": BLUE, "json": meta})])
    corpus.prepare("x", {"train": str(tmp_path / "0.tar")}, str(tmp_path), workers=1, names=Names("input.png", "title"))
    example = sources.open_source("x", "train", str(tmp_path))[0]
    assert (example["image"], example["text"]) == (RED, [b"by hand"])
    assert Filters().check_image(RED).shape == (30, 40, 3)
