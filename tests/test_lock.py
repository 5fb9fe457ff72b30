"""One run at a time in a workdir, and never one too few."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from capvl import lock, metrics
from capvl.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Seconds become hundredths; who lost its lock asks itself to stop: the list of these signals."""
    asked = []
    monkeypatch.setattr(lock.os, "kill", lambda pid, number: asked.append((pid, number)))
    for name, seconds in (("BEAT", 0.05), ("WATCH", 0.5), ("LEAVE", 1.5), ("SETTLE", 0.1), ("LOOK", 0.02)):
        monkeypatch.setattr(lock, f"{name}_SECONDS", seconds)
    return asked


@pytest.fixture(params=["local", "bucket"])
def workdir(request, tmp_path):
    if request.param == "bucket":
        request.getfixturevalue("bucket")
        return metrics.open_workdir("gs://bucket/run")
    return metrics.open_workdir(str(tmp_path / "run"))


def leave(workdir, **changes) -> lock.Holder:
    """A lock that some process left."""
    holder = dataclasses.replace(lock._myself(workdir), **changes)
    lock._write(workdir / lock.NAME, holder)
    return holder


def take(workdir, leaving=lambda: False) -> float:
    """Seconds until the workdir is held; it is given back at once."""
    begun = time.monotonic()
    with lock.held(workdir, leaving):
        return time.monotonic() - begun


@pytest.fixture
def renewed(workdir):
    """A function that renews a holder's lock from another thread, as the holder would, and a list of its changes."""
    end, threads = threading.Event(), []

    def begin(holder, changes):
        def beat():
            count = 0
            while not end.wait(0.02):
                if changes.get("gone"):
                    (workdir / lock.NAME).unlink(missing_ok=True)
                    return
                count += 1
                lock._write(workdir / lock.NAME, dataclasses.replace(holder, beat=count, **changes))

        threads.append(threading.Thread(target=beat))
        threads[-1].start()

    yield begin
    end.set()
    for thread in threads:
        thread.join()


def test_held_and_given_back(workdir):
    with lock.held(workdir, lambda: False) as check:
        mine = json.loads((workdir / lock.NAME).read_text())
        assert mine["pid"] == os.getpid() and mine["beat"] == 0
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on .*, since 20.*; choose another"):
            take(workdir)
        time.sleep(0.3)
        assert json.loads((workdir / lock.NAME).read_text())["beat"] > 0
        check()
    assert not (workdir / lock.NAME).exists()


def test_errors_give_it_back(workdir):
    with pytest.raises(ZeroDivisionError), lock.held(workdir, lambda: False):
        1 / 0  # noqa: B018
    assert not (workdir / lock.NAME).exists()


@pytest.mark.parametrize("dead", ["gone", "another process has its number", "zombie"])
def test_a_dead_process_of_this_machine_is_no_hindrance(workdir, dead, capsys):
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        began = lock._began(process.pid)
        process.stdin.close()
        if dead == "zombie":
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        else:
            process.wait()
        changes = {"pid": process.pid, "began": began} if dead != "another process has its number" else {"began": 1.0}
        leave(workdir, **changes)
        assert take(workdir) < lock.WATCH_SECONDS
    assert "is dead" in capsys.readouterr().out


@pytest.mark.parametrize("machine", ["elsewhere", ""])
def test_a_dead_process_elsewhere_is_no_hindrance(workdir, machine):
    leave(workdir, machine=machine, host="elsewhere")
    assert lock.WATCH_SECONDS < take(workdir) < 10 * lock.WATCH_SECONDS


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b'{"id": 1}', b"\xff\xfe", b"[" * 100_000])
def test_a_broken_lock_is_no_hindrance(workdir, data):
    (workdir / lock.NAME).write_bytes(data)
    assert take(workdir) > lock.WATCH_SECONDS


@pytest.mark.parametrize("changes", [{"pid": "1"}, {"pid": -1}, {"began": None}, {"beat": [1]}, {"machine": 3}])
def test_a_lock_of_odd_values_is_no_hindrance(workdir, changes):
    leave(workdir, **changes)
    assert take(workdir) > lock.WATCH_SECONDS


def test_a_lock_that_cannot_be_read(tmp_path):
    """Nobody knows whether another run is there, so the user has to say."""
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(UserError, match=r"lock.json' can't be read .Is a directory.*remove it if none has"):
        take(metrics.open_workdir(str(tmp_path)))


def test_a_clock_that_is_set_kills_nobody(workdir, monkeypatch):
    """A process's beginning on the wall clock moves with the clock."""
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as process:
        leave(workdir, pid=process.pid, began=lock._began(process.pid))
        create_time = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: create_time(self) + 3600)
        with pytest.raises(UserError, match="in use by process"):
            take(workdir)
        process.stdin.close()


def test_a_copy_of_a_workdir_is_not_in_use(tmp_path):
    """The process that its lock names lives, and renews the lock of the first one only."""
    with lock.held(metrics.open_workdir(str(tmp_path / "run")), lambda: False):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        assert take(metrics.open_workdir(str(tmp_path / "copy"))) > lock.WATCH_SECONDS


def test_a_living_process_elsewhere(workdir, renewed):
    renewed(leave(workdir, machine="elsewhere", host="elsewhere"), {})
    begun = time.monotonic()
    with pytest.raises(UserError, match="in use by process .* on elsewhere"):
        take(workdir)
    assert time.monotonic() - begun < lock.WATCH_SECONDS


def test_a_process_elsewhere_that_begins_again_and_dies(workdir, renewed):
    """A newer lock than the one that was watched is watched anew."""
    leave(workdir, machine="elsewhere")
    timer = threading.Timer(0.3, lambda: leave(workdir, machine="elsewhere", id="another"))
    timer.start()
    assert take(workdir) > 0.3 + lock.WATCH_SECONDS


@pytest.mark.parametrize("machine", [None, "elsewhere"])
def test_who_is_leaving_is_waited_for(workdir, renewed, machine, capsys):
    changes = {"leaving": True}
    renewed(leave(workdir, **({"machine": machine} if machine else {})), changes)
    time.sleep(0.1)
    threading.Timer(0.3, lambda: changes.update(gone=True)).start()
    assert take(workdir) >= 0.2
    assert "is saving; waiting until it is done" in capsys.readouterr().out


def test_but_not_for_ever(workdir, renewed):
    renewed(leave(workdir, machine="elsewhere"), {"leaving": True})
    begun = time.monotonic()
    with pytest.raises(UserError, match="in use"):
        take(workdir)
    assert time.monotonic() - begun >= lock.LEAVE_SECONDS


def test_a_run_that_is_asked_to_stop_says_so(workdir):
    with lock.held(workdir, lambda: True):
        time.sleep(0.3)
        assert json.loads((workdir / lock.NAME).read_text())["leaving"]


def test_and_says_so_before_the_next_beat(workdir, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 60.0)
    asked = threading.Event()
    with lock.held(workdir, asked.is_set):
        asked.set()
        time.sleep(0.3)
        assert json.loads((workdir / lock.NAME).read_text())["leaving"]


def test_a_start_that_was_suspended_hangs_nobody(tmp_path):
    """It looks at the lock for ever, and keeps others from looking."""
    path = metrics.open_workdir(str(tmp_path))
    with lock._alone(path) as alone:
        assert alone
        assert lock.WATCH_SECONDS < take(path) < 10 * lock.WATCH_SECONDS


def test_waiting_can_be_interrupted(workdir):
    leave(workdir, machine="elsewhere")
    with pytest.raises(KeyboardInterrupt):
        take(workdir, leaving=lambda: True)


def test_a_run_that_was_silent_ends_and_saves_nothing(workdir, quick):
    """A suspended machine wakes up, and finds that the workdir is another one's."""
    with lock.held(workdir, lambda: False) as check:
        other = leave(workdir, id="another", host="elsewhere")
        with pytest.raises(UserError, match="was taken over by process .* on elsewhere.*saves nothing more"):
            check()
        deadline = time.monotonic() + 5
        while not quick and time.monotonic() < deadline:
            time.sleep(0.02)
        assert quick == [(os.getpid(), signal.SIGTERM)]
    assert lock._read(workdir / lock.NAME) == other


def test_only_one_of_many_at_once(workdir, monkeypatch):
    """They look at the same moment; a dead holder's lock is there."""
    leave(workdir, pid=2**22 + 1)
    monkeypatch.setattr(lock, "_runs", lambda holder: holder.pid != 2**22 + 1)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.6)
    write = lock._write
    monkeypatch.setattr(lock, "_write", lambda *arguments: (time.sleep(0.05), write(*arguments)))
    barrier, got, lost = threading.Barrier(6), [], []
    end = threading.Event()

    def contend():
        barrier.wait()
        try:
            with lock.held(workdir, lambda: False):
                got.append(1)
                end.wait(20)
        except UserError:
            lost.append(1)

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(lost) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    end.set()
    for thread in threads:
        thread.join()
    assert (len(got), len(lost)) == (1, 5)


def test_storage_that_fails_ends_no_run(workdir, monkeypatch):
    with lock.held(workdir, lambda: False) as check:
        monkeypatch.setattr(lock, "_write", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        time.sleep(0.2)
        check()
        monkeypatch.undo()
