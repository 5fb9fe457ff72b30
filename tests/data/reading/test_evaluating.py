"""Evaluation batches are those of a plain loop, made ahead, and end with whoever reads them."""

import contextlib
import dataclasses
import threading
import time

import numpy as np
import pytest

from capvl.data.examples.labels import ImageLabel
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.randomness import Uniforms
from capvl.data.reading import evaluating, sources
from capvl.data.reading.evaluating import Numbers, eval_batches
from capvl.data.reading.loader import Host

LABEL = ImageLabel(Crop(16))


@dataclasses.dataclass(frozen=True)
class Some:
    """`ImageLabel` that finds the images of some labels bad."""

    bad: tuple[int, ...] = ()

    def __call__(self, example, uniforms):
        if example["label"] in self.bad:
            raise BadImageError("bad by design")
        return LABEL(example, uniforms)


def plain_loop(source, transform, batch, host, limit):
    """The same batches, one example after another."""
    size = min(len(source), limit or len(source))
    whole = next(LABEL(source[n], Uniforms(0, n)) for n in range(len(source)))
    for first in range(0, size, batch):
        rows = []
        for n in (first + row for row in host.rows(batch)):
            row = {key: np.zeros_like(value) for key, value in whole.items()}
            row |= {"mask": np.bool_(False), "index": np.int32(-1)}
            if n < size:
                with contextlib.suppress(BadImageError):
                    row = transform(source[n], Uniforms(0, n)) | {"mask": np.bool_(True), "index": np.int32(n)}
            rows.append(row)
        yield {key: np.stack([row[key] for row in rows]) for key in rows[0]}


def assert_same_batches(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert a[key].dtype == value.dtype and a[key].tobytes() == value.tobytes(), key


@pytest.fixture(scope="module")
def source(data_dir):
    return sources.open_source("scenes/tiny", "val", data_dir, features=("image", "label"))


@pytest.mark.parametrize("threads, prefetch", [(1, 1), (2, 4), (5, 2)])
@pytest.mark.parametrize("batch, hosts, limit", [(20, 1, 0), (20, 2, 0), (64, 4, 0), (12, 1, 30), (200, 2, 0)])
def test_the_same_bytes_as_a_plain_loop(source, threads, prefetch, batch, hosts, limit):
    transform = Some(bad=(int(source[0]["label"]),))
    for host in (Host(h, hosts) for h in range(hosts)):
        found = eval_batches(source, transform, batch, host, limit, threads=threads, prefetch=prefetch)
        assert_same_batches(found, plain_loop(source, transform, batch, host, limit))


def test_a_first_batch_of_bad_images_only(source):
    labels = {int(source[n]["label"]) for n in range(2)}
    found = list(eval_batches(source, Some(bad=tuple(labels)), 2, limit=4))
    assert not found[0]["mask"].any() and (found[0]["index"] == -1).all()
    assert_same_batches(found, plain_loop(source, Some(bad=tuple(labels)), 2, Host(), 4))
    with pytest.raises(evaluating.NoImageError, match="no image that can be decoded"):
        next(eval_batches(source, Some(bad=tuple(range(1000))), 2))


class Counting:
    """Rows of numbers; it counts how many were made."""

    def __init__(self):
        self.made, self._lock = 0, threading.Lock()

    def __call__(self, n, uniforms):
        with self._lock:
            self.made += 1
        return {"x": np.float32(n)}


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition()


def makers():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_are_made_ahead_and_not_more_of_them(prefetch):
    wait_for(lambda: not makers())
    count = Counting()
    with contextlib.closing(eval_batches(Numbers("numbers", 1000), count, 40, prefetch=prefetch)) as batches:
        first = next(batches)
        wait_for(lambda: count.made >= 40 * (1 + prefetch))
        time.sleep(0.05)
        assert count.made == 40 * (1 + prefetch), "so many are ahead, and no more"
        assert makers()
    np.testing.assert_array_equal(first["x"], np.arange(40))
    wait_for(lambda: not makers())
    assert count.made < 400


def test_an_error_is_the_readers_and_ends_the_threads():
    def broken(n, uniforms):
        if n == 50:
            raise ValueError("row 50 is broken")
        return {"x": np.float32(n)}

    wait_for(lambda: not makers())
    batches = eval_batches(Numbers("numbers", 1000), broken, 40)
    assert len(next(batches)["x"]) == 40
    with pytest.raises(ValueError, match="row 50 is broken"):
        next(batches)
    wait_for(lambda: not makers())


def test_what_no_worker_can_have_is_read_in_threads(monkeypatch, capsys):
    monkeypatch.setattr(evaluating, "WORKERS_FROM", 1)
    found = list(eval_batches(Numbers("numbers", 50), Counting(), 20, workers=2))  # It has a lock.
    assert [int(batch["mask"].sum()) for batch in found] == [20, 20, 10]
    said = capsys.readouterr().out
    assert said.count("numbers can't be sent to worker processes") == 1 and "read in threads" in said


@pytest.mark.long
def test_worker_processes_make_the_same_bytes(source, monkeypatch):
    monkeypatch.setattr(evaluating, "WORKERS_FROM", 1)
    found = eval_batches(source, Some(bad=(0,)), 20, workers=2, prefetch=2)
    assert_same_batches(found, plain_loop(source, Some(bad=(0,)), 20, Host(), 0))
