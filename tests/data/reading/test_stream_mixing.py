"""Whatever interrupts a run, whatever hosts and batches it has: each example once, with the same pixels."""

import dataclasses
import glob
import hashlib
import io
import os
import struct

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_tar
from PIL import Image

from capvl.data.images.decode import decode
from capvl.data.options import DataOptions
from capvl.data.reading import sources
from capvl.data.reading.loader import Host, Order, TrainLoader
from capvl.errors import UserError

FEATURES = ("image", "text")


def picture(seed) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tfrecord(path, images):
    from tensorflow_datasets.proto import tf_example_pb2

    data = b""
    for i, image in enumerate(images):
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(image)
        example.features.feature["text"].bytes_list.value.append(b"record %d" % i)
        record = example.SerializeToString()
        data += struct.pack("<Q", len(record)) + b"\0" * 4 + record + b"\0" * 4
    path.write_bytes(data)


@pytest.fixture(scope="module")
def streams(tmp_path_factory, data_dir):
    """Patterns of files of all kinds, with a few records that can't be used."""
    folder = tmp_path_factory.mktemp("streams")
    for i, count in enumerate((7, 12, 1)):
        rows = [(f"{i}-{j}", {"jpg": picture(100 * i + j), "txt": b"text"}) for j in range(count)]
        if i == 1:
            rows[3] = ("1-3", {"jpg": picture(1), "txt": b" "})
            rows[8] = ("1-8", {"jpg": b"rubbish", "txt": b"text"})
        write_tar(folder / f"{i}.tar", rows)
    for i, count in enumerate((9, 14)):
        tfrecord(folder / f"{i}.tfrecord", [picture(1000 + 100 * i + j) for j in range(count)])
        table = {"image": [picture(2000 + 100 * i + j) for j in range(count)], "caption": ["text"] * count}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{i}.parquet", 4)
    (records,) = {file.rpartition("-train")[0] for file in glob.glob(f"{data_dir}/scenes/tiny/*/*-train.array_record*")}
    kinds = {kind: f"stream:{folder}/*.{kind}" for kind in ("tar", "tfrecord", "parquet")}
    return kinds | {"array_record": f"stream:{records}-train.array_record*"}


MIXTURE = "{tar}*0.3 + {tfrecord} + scenes/tiny*0.5 + {parquet}*2 + {array_record}*0.4"


class Seen:
    """A transform that keeps which example it is, by its first random number, of which record and with which pixels."""

    def __call__(self, example, uniforms):
        pixels = decode(example["image"])[:12, :16]
        drawn = uniforms()
        return {
            "drawn": np.float64(drawn),
            "record": np.array(hashlib.md5(example["image"]).hexdigest(), "U32"),
            "pixels": (pixels * np.float32(drawn)).astype(np.uint8),
        }


def options(data_dir, name, **changes):
    made = DataOptions(name=name, data_dir=data_dir, readers=3, window=12, max_bad=1.0)
    return dataclasses.replace(made, **changes)


def take(chosen, batches, *, batch, position=0, hosts=1):
    """What hosts make together, a row an example."""
    made = [
        TrainLoader(chosen, Seen(), FEATURES, batch=batch, seed=5, position=position, host=Host(h, hosts))
        for h in range(hosts)
    ]
    parts = [next(m) for _ in range(batches) for m in made]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def by_number(rows):
    """Rows by their first random number."""
    order = np.argsort(rows["drawn"])
    return {key: value[order] for key, value in rows.items()}


def same(a, b):
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("kind", ["tar", "tfrecord", "parquet", "array_record", MIXTURE])
def test_any_interruptions_hosts_and_batches(streams, data_dir, kind):
    name = MIXTURE.format(**streams) if kind == MIXTURE else streams[kind]
    chosen, rng = options(data_dir, name), np.random.default_rng(len(kind))
    whole = take(chosen, 120, batch=1)
    for _ in range(2):
        position, found = 0, []
        while position < 80:
            hosts, each, batches = (int(n) for n in (rng.integers(1, 5), rng.integers(1, 8), rng.integers(1, 4)))
            batches = min(batches, (120 - position) // (hosts * each))
            if batches:
                found.append(take(chosen, batches, batch=hosts * each, position=position, hosts=hosts))
                position += batches * hosts * each
        found = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
        same(by_number(found), by_number({key: value[:position] for key, value in whole.items()}))


@pytest.mark.parametrize("kind, size", [("tfrecord", 23), ("parquet", 23), ("tar", 20)])
def test_every_record_of_an_epoch_once(streams, data_dir, kind, size):
    chosen = options(data_dir, streams[kind])
    for epoch in range(2):
        rows = take(chosen, 1, batch=size, position=epoch * size)
        # Two of the tars' can't be used, and others are in their places.
        assert len(set(rows["record"])) == size - 2 * (kind == "tar")


def test_a_batch_is_laid_out_by_lanes(streams, data_dir):
    """So that hosts read their own ones."""
    rows = take(options(data_dir, streams["tar"]), 1, batch=9)
    alone = take(options(data_dir, streams["tar"]), 9, batch=1)
    np.testing.assert_array_equal(rows["drawn"], alone["drawn"].reshape(3, 3).T.ravel())


def test_only_what_is_needed_is_read(streams, data_dir, monkeypatch):
    from capvl.data.reading import ranges

    whole, read = ranges.read, []
    monkeypatch.setattr(ranges, "read", lambda *a: read.append(a[2] - a[1]) or whole(*a))
    chosen = options(data_dir, streams["tfrecord"], prefetch=1, threads=1, window=6)
    first = TrainLoader(chosen, Seen(), FEATURES, batch=3, seed=5, position=0, host=Host())
    read.clear()  # What was looked at to begin with.
    for _ in range(8):  # An epoch has 23.
        next(first)
    files = sum(map(os.path.getsize, glob.glob(streams["tfrecord"].removeprefix("stream:"))))
    ahead = 3 * (1 + 1) + 6 + 6
    assert sum(read) < files * (24 + ahead) / 23
    # In the middle of an epoch: the rest of a block of each lane, and what is read ahead.
    read.clear()
    next(TrainLoader(chosen, Seen(), FEATURES, batch=3, seed=5, position=12, host=Host()))
    assert sum(read) < files * (3 + ahead + 1) / 23


def test_prepared_parts_have_the_order_that_they_have_alone(streams, data_dir):
    source = sources.open_source("scenes/tiny", "train", data_dir)
    name = f"scenes/tiny*0.5 + {streams['parquet']}*0.5"
    rows = take(options(data_dir, name), 40, batch=1)
    names = [hashlib.md5(source[i]["image"]).hexdigest() for i in range(len(source))]
    order = Order([len(source)], [1.0], 5)
    assert [r for r in rows["record"] if r in names] == [names[order[n][1]] for n in range(20)]


def test_shares_and_epochs_are_told(streams, data_dir, capsys):
    chosen = options(data_dir, f"{streams['tar']}*3 + scenes/tiny", window=10_000)
    TrainLoader(chosen, Seen(), FEATURES, batch=4, seed=0, host=Host(), examples=80)
    said = capsys.readouterr().out
    assert f"Data: 75.0% of the examples from {streams['tar']} (20 records, 3.00 epochs)." in said
    assert "Data: 25.0% of the examples from scenes/tiny" in said
    assert f"data.window=10,000 is more than an epoch of {streams['tar']}" in said


def test_a_part_that_lacks_what_is_needed_is_named(streams, data_dir, tmp_path):
    write_tar(tmp_path / "0.tar", [(str(i), {"jpg": picture(i)}) for i in range(3)])
    chosen = options(data_dir, f"{streams['tar']} + stream:{tmp_path}/0.tar*0.1")
    with pytest.raises(UserError, match=f"No sample of '{tmp_path}/0.tar' can be used: 3 x no text"):
        TrainLoader(chosen, Seen(), FEATURES, batch=4, seed=0, host=Host())


@pytest.mark.parametrize(
    "name, parts",
    [
        ("stream:/x/*0.5", [("stream:/x/*0.5", 1)]),
        ("stream:/x/*.tar*0.7 + scenes/64*0.3", [("stream:/x/*.tar", 0.7), ("scenes/64", 0.3)]),
        ("a + stream:/x/{0..9}.tar *2 + stream:/y/*", [("a", 1), ("stream:/x/{0..9}.tar", 2), ("stream:/y/*", 1)]),
        ("stream:/x/*-of-00010 + a", [("stream:/x/*-of-00010", 1), ("a", 1)]),
        ("stream:/x/part-*0*1 + a", [("stream:/x/part-*0", 1), ("a", 1)]),
        ("stream:/x/a+b/*.tar", [("stream:/x/a+b/*.tar", 1)]),
        ("a*0.5+b", [("a", 0.5), ("b", 1)]),
    ],
)
def test_names_of_mixtures(name, parts):
    assert DataOptions(name=name).parts() == parts


def test_what_is_no_mixture():
    for name in ("a+stream:/x", "a b + stream:/x", "stream:/x*0 + a", "stream:/x*1.2.3 + a"):
        with pytest.raises(UserError, match="should (read NAME|have blanks)"):
            DataOptions(name=name).parts()


def test_a_folder_with_a_plus_in_its_name_is_what_it_was(tmp_path):
    (tmp_path / "a + b").mkdir()
    write_tar(tmp_path / "a + b/0.tar", [("0", {"jpg": picture(0), "txt": b"x"})])
    name = f"stream:{tmp_path}/a + b/*.tar"
    assert DataOptions(name=name).parts() == [(name, 1.0)]
