"""Storage that fails for a moment is asked again; what stays is one sentence; a torn line harms no other."""

import errno
import io

import numpy as np
import pytest
from conftest import write_tar
from etils import epath

from capvl import recipes, reporting, storage
from capvl.checkpoint import Checkpointer
from capvl.data.options import DataOptions
from capvl.data.preparing import shards
from capvl.data.preparing.filters import Filters
from capvl.data.reading import streams
from capvl.errors import UserError

EIO = OSError(errno.EIO, "Input/output error")
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def slept(monkeypatch):
    """The pauses that would have been made."""
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    return pauses


class Failing:
    """Raises the errors one by one, then returns its argument."""

    def __init__(self, *errors):
        self.errors = list(errors)

    def __call__(self, value):
        if self.errors:
            raise self.errors.pop(0)
        return value


@pytest.mark.parametrize(
    "error, expected",
    [
        (EIO, True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (TimeoutError("The read operation timed out"), True),
        (RuntimeError("UNAVAILABLE: the service is away"), True),
        (ValueError("Error 503: backend"), True),
        (FULL, False),
        (RuntimeError("RESOURCE_EXHAUSTED: No space left"), False),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (PermissionError(errno.EACCES, "Permission denied"), False),
        (ValueError("Service Unavailable, 503"), True),
        (ValueError("503, message='Service Unavailable'"), True),
        (ValueError("HTTP response code: 502"), True),
        (ValueError("HTTP/1.1 500 Internal Server Error"), True),
        (ValueError("record 5030 is malformed"), False),
        (ValueError("DATA_LOSS: '/runs/a/checkpoints/500/state': checksum"), False),
        (ValueError("503 of 504 rows differ in run-429"), False),
        (UserError("said already"), False),
        (None, False),
    ],
)
def test_which_errors_may_pass(error, expected):
    assert storage.passes(error) is expected


def test_asked_again_ever_later(slept):
    assert storage.retry(Failing(EIO, EIO, EIO), 7, what="Reading it") == 7
    assert len(slept) == 3
    for pause, real in zip(storage.PAUSES, slept, strict=False):
        assert 0.75 * pause <= real <= 1.25 * pause


def test_one_that_stays_is_one_sentence(slept):
    with pytest.raises(UserError, match="^Reading it failed 8 times; the last time: Input/output error.$"):
        storage.retry(Failing(*[EIO] * 99), 7, what="Reading it")
    assert len(slept) == len(storage.PAUSES)


def test_one_that_cannot_pass_is_not_asked_again(slept):
    with pytest.raises(OSError, match="No space"):
        storage.retry(Failing(FULL), 7, what="Writing it")
    assert not slept


def test_an_iterator_goes_on_where_it_failed(slept):
    fails = iter([3, 3, 5])

    def items():
        end = next(fails, None)
        for i in range(8):
            if i == end:
                raise EIO
            yield i

    assert list(storage.resume(items, what="Reading")) == list(range(8))
    assert len(slept) == 3


@pytest.fixture
def tar(tmp_path):
    from PIL import Image

    path, rng = tmp_path / "00000.tar", np.random.default_rng(0)
    samples = []
    for i in range(5):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "PNG")
        samples.append((str(i), {"png": buffer.getvalue(), "txt": b"a %d" % i}))
    write_tar(path, samples)
    return path


@pytest.fixture
def moody(monkeypatch, slept):
    """Opened files fail at some of their reads, as a network's file system does."""
    left = [4, 2]

    class File(io.FileIO):
        reads = 0

        def read(self, *size):
            self.reads += 1
            if left and self.reads > left[0]:
                left.pop(0)
                raise OSError(errno.EIO, "Input/output error")
            return super().read(*size)

    whole = type(epath.Path("/x")).open

    def open_(self, mode="r", **options):
        return File(str(self)) if str(self).endswith(".tar") else whole(self, mode, **options)

    monkeypatch.setattr(type(epath.Path("/x")), "open", open_)
    return slept


def test_a_stream_loses_and_repeats_nothing(tar, moody):
    options = DataOptions(name=f"stream:{tar}", index=f"{tar}.index")
    stream = streams.Stream(str(tar), options, ("text",), seed=0)
    assert [stream.read(i)["text"][0] for i in range(5)] == [b"a %d" % i for i in range(5)]
    assert len(moody) == 2


def test_a_prepared_shard_is_whole(tar, moody, tmp_path):
    shards.write_shard(str(tar), str(tmp_path / "part"), Filters())
    report = shards.read_report(str(tmp_path / "part"))
    assert report["examples"] == 5
    assert not report["rejected"]
    assert len(moody) == 2


def test_a_torn_line_harms_no_other(tmp_path):
    path = epath.Path(tmp_path / "lines.jsonl")
    storage.Lines(path).append("one")
    with path.open("a") as file:
        file.write("tw")
    storage.Lines(path).append("three")
    assert path.read_text().splitlines() == ["one", "tw", "three"]


def test_metrics_and_goodput_in_a_bucket(bucket, tmp_path, monkeypatch):
    from capvl import goodput, metrics

    path = metrics.open_workdir("gs://bucket/runs/a")
    assert str(storage.absolute(path)) == "gs://bucket/runs/a"
    writer, ledger = metrics.MetricWriter(path), goodput.Ledger(path)
    for tracker in writer._trackers:
        tracker.close()
    writer._trackers = []
    del bucket[:]
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0})
        ledger.write(step)
    assert bucket == []  # Gathered: an object can be written about once a second.
    writer.flush()
    ledger.flush()
    assert len(bucket) == 2
    monkeypatch.setattr(storage, "BUCKET_SECONDS", -1.0)
    writer.write(6, {"loss": 1.0})
    assert len(bucket) == 3
    assert [line["step"] for line in metrics.read(path)] == [1, 2, 3, 4, 5, 6]
    assert goodput.summary(path)["wall"] > 0
    resumed = metrics.MetricWriter(path, 2)
    resumed.close()
    assert [line["step"] for line in metrics.read(path)] == [1, 2]
    assert (tmp_path / "objects/bucket/runs/a/metrics.jsonl").exists()


def test_a_bucket_that_refuses_is_one_sentence(bucket, tmp_path, monkeypatch):
    class HttpError(Exception):
        """What a bucket's client raises is its own."""

    path = storage.folder("gs://bucket/x.json")
    monkeypatch.setattr(type(path), "write_bytes", lambda *_: (_ for _ in ()).throw(HttpError("Forbidden, 403")))
    with pytest.raises(UserError, match="'gs://bucket/x.json' can't be written: Forbidden, 403."):
        storage.replace_text(path, "new")


def test_a_profile_is_copied_up(bucket, tmp_path):
    local = tmp_path / "local/plugins"
    local.mkdir(parents=True)
    (local / "trace.pb").write_bytes(b"trace")
    storage.copy_up(str(tmp_path / "local"), storage.folder("gs://bucket/profile"))
    assert (tmp_path / "objects/bucket/profile/plugins/trace.pb").read_bytes() == b"trace"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("ftp://host/run", "'ftp://host/run' is neither a local folder nor gs://… nor s3://…."),
        ("gs://bucket/run", "'gs://bucket/run' needs the package gcsfs: pip install gcsfs."),
    ],
)
def test_workdirs_that_nothing_here_can_read(text, sentence, monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        storage.folder(text)
    assert str(error.value) == sentence


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "replace", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(UserError, match="can't be written: the disk is full"):
        storage.replace_text(epath.Path(tmp_path / "x.json"), "new")
    assert not list(tmp_path.iterdir())


def test_home(monkeypatch, tmp_path):
    """Shells leave ~ as it is in --workdir=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(storage.folder("~/run")) == str(tmp_path / "run")
    assert DataOptions(data_dir="~/data").directory() == str(tmp_path / "data")
    assert DataOptions(tokenizer="~/a.model").tokenizer_path() == str(tmp_path / "a.model")


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="'.*/file/a/b' can't be made: Not a directory"):
        storage.make_folder(tmp_path / "file/a/b")
    storage.make_folder(tmp_path / "a/b")
    storage.make_folder(tmp_path / "a/b")
    with pytest.raises(UserError, match="can't be made"):
        reporting.save_shown(epath.Path(tmp_path / "file"), 1, {"captions": []})


def test_things_in_the_place_of_files_and_folders(tmp_path):
    path = epath.Path(tmp_path)
    (path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl' can't be read: Is a directory"):
        storage.Lines(path / "metrics.jsonl", lambda line: True)
    (path / "checkpoints").write_text("x")
    with pytest.raises(UserError, match="checkpoints' can't be made: File exists"):
        Checkpointer(str(path), recipes.CheckpointOptions())
