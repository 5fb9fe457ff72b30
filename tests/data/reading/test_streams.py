"""Streams: what is read from shards, what is left out and counted, and that a resumed run passes it as well."""

import dataclasses
import gzip
import io
import json
import struct
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import case, write_tar
from PIL import Image

from capvl import recipes, train
from capvl.data.examples.image_text import ImageText
from capvl.data.images.decode import decode
from capvl.data.options import DataOptions
from capvl.data.preparing import corpus
from capvl.data.reading import sources, streams
from capvl.data.reading.loader import Host, TrainLoader
from capvl.data.reading.ranges import ChangedError
from capvl.data.reading.rejected import RejectedError
from capvl.data.scenes import making
from capvl.errors import UserError
from capvl.objectives.cappa import CapPa
from capvl.objectives.contrastive import Contrastive
from capvl.objectives.git import Git
from capvl.objectives.scst import Scst
from capvl.objectives.transfer import Transfer

FEATURES = ("image", "text")


def picture(seed=0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def options(data_dir, tmp_path):
    def make(pattern, **changes) -> DataOptions:
        tokenizer, index = making.scenes_tokenizer(data_dir), f"{tmp_path}/index"
        made = DataOptions(name=f"stream:{pattern}", tokenizer=tokenizer, window=4, max_bad=1.0, index=index)
        return dataclasses.replace(made, **changes)

    return make


class Raw:
    """A transform that keeps the text, and finds bad what can't be decoded."""

    def __call__(self, example, uniforms):
        decode(example["image"])
        text = example["text"][0] if example["text"] else b""
        return {"text": np.array(text.decode(), "U200"), "label": np.int32(example.get("label", -1))}


def read_all(stream):
    """The Examples of a stream's records, and why the others are none."""
    kept, left_out = [], []
    for record in range(len(stream)):
        try:
            kept.append(stream.read(record))
        except (RejectedError, ChangedError) as e:
            left_out.append(str(e))
    return kept, left_out


def loader(options, features=FEATURES, **changes):
    return TrainLoader(options, Raw(), features, **{"batch": 4, "seed": 0, "host": Host(), **changes})


def texts(made, count):
    return [str(text) for _ in range(count) for text in next(made)["text"]]


@pytest.mark.cases
def test_captions_in_the_json_are_streamed_as_they_are_prepared(options, tmp_path):
    path = case("stream_captions_only_in_json.tar")
    corpus.prepare("x", {"train": path}, str(tmp_path), workers=1)
    source = sources.open_source("x", "train", str(tmp_path))
    prepared = [source[i]["text"][0].decode() for i in range(len(source))]
    made = loader(options(path))
    assert sorted(texts(made, len(prepared) // 4)) == sorted(prepared)
    assert made.bad == 0
    assert all(prepared)


@pytest.mark.cases
@pytest.mark.parametrize(
    "name", ["boxes_dicts", "phrases_strings", "deep", "captions_string", "dot_slash", "apple_double"]
)
def test_streams_let_in_what_preparing_lets_in(options, tmp_path, name):
    path = case(f"{name}.tar")
    folder = corpus.prepare("x", {"train": path}, str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    source = sources.open_source("x", "train", str(tmp_path))
    kept, left_out = read_all(streams.Stream(path, options(path), FEATURES, seed=0))
    assert left_out == [r for r, v in report["rejected"].items() for _ in range(v["count"])]
    assert [item["text"] for item in kept] == [source[i]["text"] for i in range(len(source))]


@pytest.mark.cases
def test_broken_images_are_replaced_and_counted(options, tmp_path):
    path = case("two_broken_of_eight.tar")
    folder = corpus.prepare("x", {"train": path}, str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    source = sources.open_source("x", "train", str(tmp_path))
    good = {source[i]["text"][0].decode() for i in range(len(source))}
    broken = sum(v["count"] for v in report["rejected"].values())
    made = loader(options(path), batch=len(source) + broken)
    assert set(texts(made, 1)) == good
    assert made.bad >= broken


@pytest.fixture
def shards(tmp_path):
    """Four tars of ten; some samples can't be used for reasons that are seen at once, one only when it is decoded."""
    for i in range(4):
        rows = [(f"{i}-{j}", {"jpg": picture(i * 10 + j), "txt": f"text {i} {j}".encode()}) for j in range(10)]
        if i == 1:
            rows[2] = ("1-2", {"jpg": picture(), "txt": b" "})
            rows[5] = ("1-5", {"jpg": picture(), "txt": b"text", "json": b'{"boxes": "x"}'})
        if i == 2:
            rows[7] = ("2-7", {"jpg": b"rubbish", "txt": b"bad"})
        write_tar(tmp_path / f"{i}.tar", rows)
    whole = (tmp_path / "3.tar").read_bytes()
    (tmp_path / "3.tar").write_bytes(whole[: len(whole) // 2])
    return f"{tmp_path}/{{0..4}}.tar"


def test_what_is_left_out_is_told_counted_and_passed_by_a_resumed_run(options, shards, capsys):
    chosen = options(shards)
    whole = loader(chosen)
    first = [next(whole)["text"] for _ in range(16)]
    seen = {str(text) for row in first for text in row}
    good = {f"text {i} {j}" for i in range(3) for j in range(10)} - {"text 1 2", "text 1 5", "text 2 7"}
    assert good <= seen
    assert {text for text in seen - good if not text.startswith("text 3")} == set()
    said = capsys.readouterr().out
    for name, reason in (
        ("1.tar: 1-2", "no text"),
        ("1.tar: 1-5", "boxes are not x0 < x1, y0 < y1"),
        ("3.tar", "tar cut short"),
        ("4.tar", "file missing"),
    ):
        assert f"{name}: {reason}\n" in said
    assert said.count("no text") == 1, "also when it is passed in the next epoch"
    assert whole.bad >= 3
    for position in (8, 20, 44):
        resumed = loader(chosen, position=position)
        for row in first[position // 4 :]:
            np.testing.assert_array_equal(next(resumed)["text"], row)


def test_any_hosts_leave_out_the_same(options, shards):
    for readers in (1, 2, 3):
        chosen = options(shards, readers=readers)
        alone = next(loader(chosen, batch=12))["text"]
        for hosts in (2, 3, 4):
            parts = [next(loader(chosen, batch=12, host=Host(h, hosts)))["text"] for h in range(hosts)]
            np.testing.assert_array_equal(np.concatenate(parts), alone)


def test_a_stream_of_nothing(options, tmp_path):
    (tmp_path / "0.tar").write_bytes(b"rubbish")
    write_tar(tmp_path / "1.tar", [])
    with pytest.raises(UserError, match=r"No sample of .* can be used: 1 x tar cut short, 1 x no record"):
        loader(options(f"{tmp_path}/*.tar"))
    with pytest.raises(UserError, match="No file matches"):
        loader(options("/nowhere/*.tar"))


def test_too_much_left_out_ends_the_run(options, tmp_path):
    rows = [(str(i), {"jpg": picture(i), "txt": b"text" if i % 4 else b""}) for i in range(40)]
    write_tar(tmp_path / "0.tar", rows)
    made = loader(options(tmp_path / "0.tar", max_bad=0.1))
    wanted = r"bad, or without a text or label, more than data.max_bad=0.1; .*, most of all .*0.tar \(\d+\)"
    with pytest.raises(UserError, match=wanted):
        texts(made, 100)


def test_parquet_is_streamed_by_its_columns(options, tmp_path):
    table = {"image": [{"bytes": picture(i), "path": ""} for i in range(8)], "mask": [b"x"] * 8}
    table |= {"caption": [f"text {i}" for i in range(8)], "title": [f"title {i}" for i in range(8)], "label": range(8)}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "0.parquet")
    assert sorted(texts(loader(options(tmp_path / "0.parquet")), 2)) == [f"text {i}" for i in range(8)]
    assert sorted(texts(loader(options(tmp_path / "0.parquet", text="title")), 2)) == [f"title {i}" for i in range(8)]
    made = loader(options(tmp_path / "0.parquet"), ("image", "label"))
    assert sorted(y for _ in range(2) for y in next(made)["label"]) == list(range(8))
    with pytest.raises(UserError, match="No sample of .* no column 'masks'"):
        loader(options(tmp_path / "0.parquet", image="masks"))


def tfrecord(path, rows):
    from tensorflow_datasets.proto import tf_example_pb2

    data = b""
    for row in rows:
        example = tf_example_pb2.Example()
        for name, value in row.items():
            example.features.feature[name].bytes_list.value.append(value)
        record = example.SerializeToString()
        # Length and two masked CRCs, which readers may leave unchecked.
        data += struct.pack("<Q", len(record)) + b"\0" * 4 + record + b"\0" * 4
    path.write_bytes(data)


def test_odd_records_and_files_of_tfrecord(options, tmp_path, capsys):
    rows = [{"image": picture(i), "text": f"text {i}".encode()} for i in range(4)]
    rows[1] = {"image": picture()}
    tfrecord(tmp_path / "0.tfrecord", rows)
    tfrecord(tmp_path / "1.tfrecord", rows[2:])
    whole = (tmp_path / "1.tfrecord").read_bytes()
    (tmp_path / "1.tfrecord").write_bytes(whole[:-10])
    (tmp_path / "2.tfrecord").write_bytes(b"garbage" * 100)
    tfrecord(tmp_path / "3.tfrecord", [{"jpeg": picture()}])
    made = loader(options(tmp_path / "*.tfrecord"))
    assert set(texts(made, 4)) == {"text 0", "text 2", "text 3"}
    said = capsys.readouterr().out
    for words in (
        "0.tfrecord: 1: no feature 'text', but image",
        "1.tfrecord: cut short or no TFRecord after 1 records",
        "2.tfrecord: cut short or no TFRecord after 0 records",
        "3.tfrecord: 0: no feature 'image', but jpeg",
    ):
        assert words in said


@pytest.mark.parametrize("text", [{}, {"txt": b" \n"}, {"json": b'{"caption": null}'}])
@pytest.mark.parametrize("objective", [CapPa, Contrastive, Git, Scst, Transfer])
def test_a_stream_without_texts_ends_before_the_first_step(options, tmp_path, objective, text):
    write_tar(tmp_path / "0.tar", [(str(i), {"jpg": picture(i), **text}) for i in range(8)])
    with pytest.raises(UserError, match="No sample of .* can be used: 8 x no text"):
        loader(options(tmp_path / "0.tar"), objective().features())
    # Images alone are enough for who asks for no text.
    assert texts(loader(options(tmp_path / "0.tar"), ("image", "label")), 2) == [""] * 8


def test_class_names_are_texts_for_who_asks_for_them(options, tmp_path):
    write_tar(tmp_path / "0.tar", [("0", {"jpg": picture(), "json": b'{"class_name": "dog"}'})])
    assert next(loader(options(tmp_path / "0.tar"), ("image?", "text?", "class_name?")))
    with pytest.raises(UserError, match="1 x no text"):
        loader(options(tmp_path / "0.tar"), ("image?", "text?"))


def test_sides_of_a_stream_go_by_batches(options, tmp_path):
    write_tar(tmp_path / "0.tar", [("0", {"jpg": picture(), "txt": b"text"})])

    class BySides(Raw):
        def for_batch(self, number):
            return lambda example, uniforms: {"text": np.zeros(number, np.int32)}

    made = TrainLoader(options(tmp_path / "0.tar"), BySides(), FEATURES, batch=4, seed=0, position=8, host=Host())
    assert [next(made)["text"].shape[1] for _ in range(3)] == [2, 3, 4]


def test_training_on_texts_that_are_not_there_is_one_sentence(tiny, tmp_path, options):
    write_tar(tmp_path / "0.tar", [(str(i), {"jpg": picture(i)}) for i in range(8)])
    tokenizer = options("x").tokenizer
    recipe = recipes.resolve(tiny(data__name=f"stream:{tmp_path}/0.tar", data__tokenizer=tokenizer))
    with pytest.raises(UserError, match="No sample of .* can be used"):
        train.run(recipe, str(tmp_path / "run"))
    assert not (tmp_path / "run/metrics.jsonl").exists() or not (tmp_path / "run/metrics.jsonl").read_text()


def test_a_transform_gets_what_it_reads(options, tmp_path):
    """The shapes of a real one, from a tar whose members have folders in their names."""
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in (("./a.b/1.jpg", picture()), ("./a.b/1.txt", b"a red circle")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    chosen = options(tmp_path / "0.tar")
    transform = ImageText.from_options(chosen, res=16, length=12, train=True)
    batch = next(TrainLoader(chosen, transform, FEATURES, batch=2, seed=0, host=Host()))
    assert batch["image"].shape == (2, 16, 16, 3)
    assert (batch["text"] == transform.tokenizer("a red circle", 12)).all()


@pytest.fixture
def four(tmp_path):
    """Four whole tars of ten."""
    (tmp_path / "four").mkdir()
    for i in range(4):
        rows = [(f"{i}-{j}", {"jpg": picture(i * 10 + j), "txt": f"text {i} {j}".encode()}) for j in range(10)]
        write_tar(tmp_path / f"four/{i}.tar", rows)
    return tmp_path / "four"


def test_a_file_that_is_gone_is_replaced_by_others_and_counted(options, four, capsys):
    chosen = options(four / "{0..3}.tar", readers=2)
    whole = texts(loader(chosen, batch=40), 1)
    (four / "1.tar").unlink()
    made = loader(chosen, batch=8)
    found = texts(made, 5)
    assert set(found) == {text for text in whole if not text.startswith("text 1")}
    assert made.bad == 10, "each once, whatever was tried in its place"
    said = capsys.readouterr().out
    assert "1.tar' is missing: its records count as bad" in said
    assert said.count("no longer what its index says, and its records count as bad: it is gone") == 1
    parts = [loader(chosen, batch=8, host=Host(h, 4)) for h in range(4)]
    assert found == [text for _ in range(5) for part in parts for text in texts(part, 1)]
    by_ones = texts(loader(chosen, batch=1), 40)
    assert sorted(by_ones) == sorted(found)
    with pytest.raises(UserError, match=r"most of all .*1.tar \(\d+\)"):
        texts(loader(options(four / "{0..3}.tar", max_bad=0.1)), 100)


def test_a_file_that_changes_while_it_is_read(options, four, capsys):
    """Cut, longer, of other records: never records of something else."""
    made = loader(options(four / "*.tar", prefetch=1, threads=1))
    next(made)
    data = (four / "2.tar").read_bytes()
    (four / "0.tar").write_bytes(data[:5000])
    (four / "1.tar").write_bytes(data + bytes(512))
    (four / "2.tar").write_bytes(data[512:1024] + data[:-512])
    later = texts(made, 40)[40:]
    assert {text for text in later if text} <= {f"text 3 {j}" for j in range(10)}
    said = capsys.readouterr().out
    for words in ("0.tar: no longer", "1.tar: no longer", "2.tar: no longer", "doesn't begin where it should"):
        assert words in said


def test_all_records_are_bad(options, four):
    made = loader(options(four / "*.tar"))
    for i in range(4):
        (four / f"{i}.tar").unlink()
    with pytest.raises(UserError, match="200 examples in a row of 'stream:.* are bad; the last: it is gone"):
        texts(made, 200)


def test_compressed_tars(options, four):
    whole = texts(loader(options(four / "*.tar"), batch=40), 1)
    for i in range(4):
        data = (four / f"{i}.tar").read_bytes()
        (four / f"{i}.tar.gz").write_bytes(gzip.compress(data))
    found = texts(loader(options(four / "*.tar.gz", index=f"{four}/gz"), batch=40), 1)
    assert sorted(found) == sorted(whole)
