"""Image-text shards: what is kept, what is rejected, and going on after a kill."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import case, real_data, write_tar
from PIL import Image

from capvl.data.examples.image_text import ImageText
from capvl.data.options import DataOptions
from capvl.data.preparing import corpus, shards
from capvl.data.preparing.filters import Filters
from capvl.data.reading import patterns, samples, sources
from capvl.data.reading.loader import Host, TrainLoader
from capvl.data.scenes import world
from capvl.errors import UserError


def picture(seed=0, size=(40, 30), kind="JPEG"):
    rng = np.random.default_rng(seed)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


GOOD = {"jpg": picture(), "txt": b"a photo"}


def harmful():
    wide = picture(size=(400, 20))
    return [
        ("0001", GOOD, None),
        ("0002", {"png": picture(kind="PNG"), "txt": "שלום 🌍 مرحبا".encode()}, None),
        ("0003", {"webp": picture(kind="WEBP"), "txt": b"word " * 10_000}, None),
        ("0004", GOOD | {"jpg": b"rubbish"}, "undecodable image"),
        ("0005", GOOD | {"jpg": picture()[: len(picture()) * 3 // 4]}, "truncated image"),
        ("0006", GOOD | {"jpg": picture(size=(1, 1))}, "image too small"),
        ("0007", GOOD | {"jpg": wide}, "extreme aspect ratio"),
        ("0008", GOOD | {"txt": b"  \n"}, "empty text"),
        ("0009", GOOD | {"txt": b"\xff\xfe\xfa"}, "text is not UTF-8"),
        ("0001", GOOD, "duplicate key"),
        ("0011", {"txt": b"a photo"}, "no image"),
        ("0012", GOOD | {"json": b"{"}, "unreadable JSON"),
        ("../../0013", GOOD, "path climbs out"),
        ("/0014", GOOD, "path climbs out"),
    ]


def test_rejections_are_counted_by_reason(tmp_path):
    write_tar(tmp_path / "0.tar", [(k, m) for k, m, _ in harmful()])
    folder = corpus.prepare("web", {"train": str(tmp_path / "*.tar")}, str(tmp_path / "data"), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    expected = {}
    for _, members, reason in harmful():
        if reason:
            # A path that climbs out is counted for each of its members.
            expected[reason] = expected.get(reason, 0) + (len(members) if reason == "path climbs out" else 1)
    assert {r: v["count"] for r, v in report["rejected"].items()} == expected
    assert report["rejected"]["empty text"]["first"] == ["0008"]
    source = sources.open_source("web", "train", str(tmp_path / "data"))
    assert len(source) == report["examples"] == 3
    assert source[1]["text"][0].decode() == "שלום 🌍 مرحبا"


def test_bomb_is_rejected(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (20_000, 20_000)).save(buffer, "PNG")
    write_tar(tmp_path / "0.tar", [("1", GOOD), ("2", {"png": buffer.getvalue(), "txt": b"big"})])
    shards.write_shard(str(tmp_path / "0.tar"), str(tmp_path / "part"), Filters())
    assert shards.read_report(str(tmp_path / "part"))["rejected"]["decompression bomb"][0] == 1


def test_captions_boxes_and_phrases_are_kept(tmp_path):
    meta = {
        "captions": ["a red dog", "one dog"],
        "phrases": [[0, 1, 2, "7", "animals", "red dog"]],
        "boxes": {"7": [[4, 3, 20, 15]]},
        "label": 5,
        "class_name": "dog",
    }
    flat = {"boxes": [[0, 0, 40, 30]], "labels": [17], "category_names": ["cat"]}
    samples = [("1", GOOD | {"json": json.dumps(meta).encode()}), ("2", GOOD | {"json": json.dumps(flat).encode()})]
    write_tar(tmp_path / "0.tar", samples)
    corpus.prepare("boxes", {"train": str(tmp_path / "0.tar")}, str(tmp_path), workers=1)
    source = sources.open_source(
        "boxes", "train", str(tmp_path), features=("image", "text", "label", "boxes", "phrases", "class_name")
    )
    first, second = source[0], source[1]
    assert first["text"] == [b"a red dog", b"one dog"]
    assert (first["label"], first["class_name"]) == (5, b"dog")
    np.testing.assert_allclose(first["boxes"]["bbox"][0], [3 / 30, 4 / 40, 15 / 30, 20 / 40], rtol=1e-6)
    assert list(first["phrases"]["phrase"]) == [b"red dog"]
    assert list(first["boxes"]["chain"]) == list(first["phrases"]["chain"]) == [b"7"]
    assert list(second["boxes"]["label"]) == [17]
    assert list(second["boxes"]["category"]) == [b"cat"]
    assert second["text"] == [b"a photo"]


def test_keys_that_two_tars_share(tmp_path):
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", [("same", GOOD), (f"own{i}", GOOD)])
    folder = corpus.prepare("twice", {"train": str(tmp_path / "*.tar")}, str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    assert report["examples"] == 3
    assert report["rejected"] == {"duplicate key": {"count": 1, "first": ["same"]}}


@pytest.mark.cases
def test_same_keys_of_two_folders(tmp_path):
    paths = [case("samekeys_a.tar"), case("samekeys_b.tar")]
    found = [members["txt"] for path in paths for members in samples.tar_samples(path)]
    pattern = paths[0].replace("_a.tar", "_{a,b}.tar")
    folder = corpus.prepare("same", {"train": pattern}, str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    assert report == {"examples": len(found), "rejected": {}}
    source = sources.open_source("same", "train", str(tmp_path))
    assert sorted(source[i]["text"][0] for i in range(len(source))) == sorted(found)


def test_same_key_of_another_picture_is_another_sample(tmp_path):
    rows = [GOOD | {"jpg": picture(seed)} for seed in range(3)]
    write_tar(tmp_path / "0.tar", [("same", rows[0]), ("a/same", rows[0]), ("b/same", rows[1]), ("same", rows[2])])
    write_tar(tmp_path / "1.tar", [("same", rows[1]), ("a/same", rows[0])])
    folder = corpus.prepare("twice", {"train": str(tmp_path / "*.tar")}, str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    assert report["examples"] == 4
    # Within a file a key is one sample; in another file only the very same sample is.
    assert report["rejected"] == {"duplicate key": {"count": 2, "first": ["same", "a/same"]}}
    assert report["files"]["duplicate key"] == [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]


@pytest.mark.cases
@pytest.mark.parametrize("name", ["boxes_dicts", "phrases_strings", "deep"])
def test_odd_json_is_left_out_alone(tmp_path, name):
    path = case(f"{name}.tar")
    members = list(samples.tar_samples(path))
    folder = corpus.prepare("odd", {"train": path}, str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    assert report["examples"] == sum("json" not in sample for sample in members) == len(members) - 1
    assert sum(reason["count"] for reason in report["rejected"].values()) == 1
    assert [files for files in report["files"].values()] == [[path]]


@pytest.mark.cases
def test_a_text_is_one_caption(tmp_path):
    path = case("captions_string.tar")
    said = [json.loads(members["json"])["captions"] for members in samples.tar_samples(path) if "json" in members]
    corpus.prepare("one", {"train": path}, str(tmp_path), workers=1)
    source = sources.open_source("one", "train", str(tmp_path))
    texts = [source[i]["text"] for i in range(len(source))]
    assert all(len(row) == 1 for row in texts)
    assert {text.encode() for text in said} <= {row[0] for row in texts}


def test_boxes_end_at_the_image(tmp_path):
    boxes = [[[-5, 3, 20, 99]], [[50, 3, 60, 15]], [[4, -9, 20, -1]], {"1": [[0, 0, 40, 30]], "2": [[39, 0, 41, 1]]}]
    samples = [(str(i), GOOD | {"json": json.dumps({"boxes": rows}).encode()}) for i, rows in enumerate(boxes)]
    write_tar(tmp_path / "0.tar", samples)
    folder = corpus.prepare("boxes", {"train": str(tmp_path / "0.tar")}, str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    assert report["rejected"] == {"box outside of the image": {"count": 2, "first": ["1", "2"]}}
    source = sources.open_source("boxes", "train", str(tmp_path), features=("boxes",))
    np.testing.assert_allclose(source[0]["boxes"]["bbox"], [[3 / 30, 0, 1, 20 / 40]], rtol=1e-6)
    assert len(source[1]["boxes"]["bbox"]) == 2


def test_the_report_names_files_and_reasons_whatever_their_signs(tmp_path, capsys, monkeypatch):
    from capvl.data import prepare

    monkeypatch.setenv("COLUMNS", "400")
    (tmp_path / "[red] old").mkdir()
    write_tar(tmp_path / "[red] old/0.tar", [("[/x]", GOOD | {"txt": b""}), ("1", GOOD)])
    prepare.main(["tars", "--name=x", f"--train={tmp_path}/[red] old/*.tar", f"--data_dir={tmp_path}", "--workers=1"])
    said = "".join(capsys.readouterr().out.split())
    assert "[/x]" in said
    assert "[red]" in said


def test_killed_preparation_goes_on(tmp_path, monkeypatch):
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", [(f"{i}-{j}", GOOD | {"jpg": picture(i * 100 + j)}) for j in range(120)])
    command = [sys.executable, "-m", "capvl.data.prepare", "tars", "--name=killed", "--workers=1"]
    command += [f"--train={tmp_path}/*.tar", f"--data_dir={tmp_path}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    parts = tmp_path / "killed" / "incomplete"
    deadline = time.time() + 60
    while not list(parts.glob("train-?????.json")):
        assert time.time() < deadline, "no shard was finished in a minute"
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / corpus.VERSION).exists(), "nothing half-made is shown"
    finished = [f for f in parts.glob("train-?????") if (f.parent / (f.name + ".json")).exists()]
    assert finished
    made = []
    write = shards.write_shard
    monkeypatch.setattr(
        corpus.concurrent.futures, "ProcessPoolExecutor", lambda *a: corpus.concurrent.futures.ThreadPoolExecutor(1)
    )
    monkeypatch.setattr(shards, "write_shard", lambda tar, *a: made.append(tar) or write(tar, *a))
    corpus.prepare("killed", {"train": f"{tmp_path}/*.tar"}, str(tmp_path))
    assert len(made) == 4 - len(finished)
    source = sources.open_source("killed", "train", str(tmp_path), features=("image", "key"))
    assert sorted(source[i]["key"] for i in range(len(source))) == sorted(
        f"{i}-{j}".encode() for i in range(4) for j in range(120)
    )


def test_errors(tmp_path):
    with pytest.raises(UserError, match="No file matches"):
        corpus.prepare("none", {"train": str(tmp_path / "*.tar")}, str(tmp_path))
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(UserError, match="no example left; rejected: 1 x tar cut short"):
        corpus.prepare("empty", {"train": str(tmp_path / "bad.tar")}, str(tmp_path), workers=1)
    write_tar(tmp_path / "good.tar", [("1", GOOD)])
    with pytest.raises(UserError, match="other files or filters"):
        corpus.prepare("empty", {"train": str(tmp_path / "good.tar")}, str(tmp_path), workers=1)
    corpus.prepare("done", {"train": str(tmp_path / "good.tar")}, str(tmp_path), workers=1)
    with pytest.raises(UserError, match="already prepared"):
        corpus.prepare("done", {"train": str(tmp_path / "good.tar")}, str(tmp_path))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    for i in range(4):
        texts = [f"{c} {s}".encode() for c in world.COLORS for s in world.SHAPES][i * 10 :]
        samples = [(f"{i}-{j}", {"jpg": picture(i * 10 + j), "txt": texts[j]}) for j in range(10)]
        if i == 1:
            samples[3] = ("bad", {"jpg": b"rubbish", "txt": b"bad"})
        write_tar(folder / f"{i:05d}.tar", samples)
    return str(folder / "{00000..00003}.tar")


def stream(data_dir, pattern, batches, *, batch=8, position=0, hosts=1, readers=4):
    from capvl.data.scenes import making

    options = DataOptions(
        name="stream:" + pattern,
        tokenizer=making.scenes_tokenizer(data_dir),
        window=4,
        readers=readers,
        max_bad=1.0,
        index=f"{pathlib.PurePath(pattern).parent}/index",
    )
    transform = ImageText.from_options(options, res=16, length=12, train=True)
    made = [
        TrainLoader(options, transform, ("image", "text"), batch=batch, seed=0, position=position, host=Host(h, hosts))
        for h in range(hosts)
    ]
    rows = [[next(m) for m in made] for _ in range(batches)]
    return [{k: np.concatenate([r[k] for r in row]) for k in row[0]} for row in rows]


@pytest.mark.parametrize("hosts", [2, 4])
def test_stream_on_any_hosts_and_resumed(data_dir, tars, hosts):
    whole = stream(data_dir, tars, 10)
    for a, b in zip(whole, stream(data_dir, tars, 10, hosts=hosts), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    for a, b in zip(whole[6:], stream(data_dir, tars, 4, position=48, hosts=hosts), strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def test_stream_epoch_has_every_record_once_but_bad_ones(data_dir, tars):
    """Their places are filled by others, as in prepared data."""
    batches = stream(data_dir, tars, 10, batch=4)
    texts = [tuple(t) for b in batches for t in b["text"]]
    assert tuple([0] * 12) not in texts
    assert len(set(texts)) == 39
    larger = stream(data_dir, tars, 5, batch=8)
    assert sorted(texts) == sorted(tuple(t) for b in larger for t in b["text"])


@pytest.mark.realdata
def test_real_photos(tmp_path):
    pattern = real_data("flickr8k", "val") + "/*.tar"
    folder = corpus.prepare("photos", {"val": pattern}, str(tmp_path))
    members = [s for path in patterns.expand(pattern) for s in samples.tar_samples(path)]
    report = json.loads((folder / "report.json").read_text())["val"]
    assert report == {"examples": len(members), "rejected": {}}
    source = sources.open_source("photos", "val", str(tmp_path))
    for i in (0, len(source) - 1):
        assert source[i]["image"] == members[i]["jpg"]
        assert [t.decode() for t in source[i]["text"]] == json.loads(members[i]["json"])["captions"]


def test_a_preparation_does_not_go_on_with_other_contents(tmp_path, monkeypatch):
    """A shard that was written anew between the kill and the next start."""
    for i in range(2):
        write_tar(tmp_path / f"{i}.tar", [(f"{i}", GOOD | {"jpg": picture(i)})])
    splits = {"train": f"{tmp_path}/*.tar"}
    monkeypatch.setattr(corpus, "find_duplicates", lambda plan: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        corpus.prepare("cut", splits, str(tmp_path), workers=1)
    monkeypatch.undo()
    before = (tmp_path / "1.tar").read_bytes()
    write_tar(tmp_path / "1.tar", [("1", GOOD | {"jpg": picture(2) + bytes(100_000)})])
    with pytest.raises(UserError, match="files that have changed since; remove it"):
        corpus.prepare("cut", splits, str(tmp_path), workers=1)
    (tmp_path / "1.tar").write_bytes(before)
    assert corpus.prepare("cut", splits, str(tmp_path), workers=1)
