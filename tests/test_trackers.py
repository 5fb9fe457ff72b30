"""TensorBoard and wandb get the numbers, and can neither stop nor hold a run."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
import types

import pytest
from conftest import ROOT

from capvl import metrics, trackers
from capvl.errors import UserError


class FakeRun:
    def __init__(self, fails_at=None):
        self.lines, self.finished, self._fails_at = [], False, fails_at

    def log(self, values, step):
        if step == self._fails_at:
            raise ConnectionError("wandb is away")
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    """Puts a module in wandb's place; returns a function of what `init` does, and the arguments it got."""
    arguments = {}

    def install(init):
        module = types.ModuleType("wandb")
        module.__spec__ = types.SimpleNamespace()
        module.util = types.SimpleNamespace(generate_id=lambda: "abc")
        module.init = lambda **kw: arguments.update(kw) or init()
        monkeypatch.setitem(sys.modules, "wandb", module)
        return arguments

    return install


def write_three(workdir, **options):
    writer = metrics.MetricWriter(workdir, 0, **options)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1.0 / step})
    writer.close()
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_wandb_gets_every_number_and_resumes_under_its_name(tmp_path, fake_wandb):
    run = FakeRun()
    arguments = fake_wandb(lambda: run)
    assert write_three(tmp_path, wandb="project", recipe={"steps": 3}) == [1, 2, 3]
    assert [step for step, _ in run.lines] == [1, 2, 3]
    assert run.lines[1][1] == {"loss": 0.5}
    assert run.finished
    assert arguments["project"] == "project" and arguments["config"] == {"steps": 3}
    arguments["id"] = None
    write_three(tmp_path, wandb="project")
    assert arguments["id"] == "abc" == (tmp_path / "wandb_id").read_text()


def fail(error):
    def init():
        raise error

    return init


@pytest.mark.parametrize("init", [fail(ConnectionError("no network")), fail(SystemExit(1)), lambda: FakeRun(2)])
def test_wandb_that_fails_stops_nothing(tmp_path, fake_wandb, capsys, init):
    fake_wandb(init)
    assert write_three(tmp_path, wandb="project") == [1, 2, 3]
    assert capsys.readouterr().out.count("wandb is left out from here on") == 1


def test_wandb_that_hangs_holds_nothing(tmp_path, fake_wandb, monkeypatch, capsys):
    released = threading.Event()
    fake_wandb(lambda: released.wait() and FakeRun())
    monkeypatch.setattr(trackers, "LONGEST_CLOSE", 0.1)
    assert write_three(tmp_path, wandb="project") == [1, 2, 3]
    assert "wandb did not end within" in capsys.readouterr().out
    released.set()


def test_tensorboard_that_fails_stops_nothing(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    assert write_three(tmp_path) == [1, 2, 3]
    assert capsys.readouterr().out.count("TensorBoard is left out from here on") == 1


def test_numbers_that_nobody_takes_are_dropped(monkeypatch):
    monkeypatch.setattr(trackers, "LONGEST_QUEUE", 2)
    monkeypatch.setattr(trackers, "LONGEST_CLOSE", 0.1)
    begun, released, written = threading.Event(), threading.Event(), []

    @contextlib.contextmanager
    def session():
        begun.set()
        released.wait()
        yield lambda step, values: written.append(step)

    tracker = trackers.Tracker("slow", session)
    begun.wait()
    for step in range(9):
        tracker.write(step, {})  # Returns at once, full or not.
    released.set()
    tracker.close()
    deadline = time.time() + 10
    while len(written) < 2 and time.time() < deadline:
        time.sleep(0.01)
    assert written == [0, 1]


def test_wandb_wanted_but_not_installed(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        trackers.check("project")
    trackers.check("")


def events_of(folder) -> list:
    """The events of TensorBoard's files, in order."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in sorted(folder.glob("events*")):
        data = file.read_bytes()
        while data:  # Length, its checksum, the record, its checksum.
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_what_tensorboard_gets(tmp_path):
    (tracker,) = trackers.start(tmp_path, 4, "", {})
    for step in (5, 6):
        tracker.write(step, {"loss": step / 8, "lr": 0.5})
    tracker.close()
    events = events_of(tmp_path / "tensorboard")
    assert [e.step for e in events if e.HasField("session_log")] == [5]  # What came after step 4 before is dropped.
    found = [(e.step, v.tag, v.simple_value) for e in events if e.HasField("summary") for v in e.summary.value]
    assert found == [(5, "loss", 0.625), (5, "lr", 0.5), (6, "loss", 0.75), (6, "lr", 0.5)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_does_not_hold_the_process(tmp_path):
    code = f"""
import time
from etils import epath
from tensorboardX import record_writer
record_writer.open_file = lambda path: open("/dev/full", "wb")
from capvl import trackers
(tracker,) = trackers.start(epath.Path({str(tmp_path)!r}), 0, "", {{}})
for step in range(3000):
    tracker.write(step, {{"loss": 1.0}})
    time.sleep(0.001)
tracker.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.returncode == 0 and "TensorBoard is left out from here on (OSError: the disk is full)" in done.stdout
