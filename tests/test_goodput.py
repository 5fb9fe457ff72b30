"""The ledger's buckets add up to the wall time, also over kills; the watchdog ends a process that hangs."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from capvl import goodput


class Time:
    """A clock that a test turns."""

    def __init__(self, at):
        self.at = at

    def __call__(self):
        return self.at


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """A function that makes the ledger of a process started at a given time, and its clock."""

    def make(begin):
        clock = Time(begin)
        monkeypatch.setattr(goodput.psutil.Process, "create_time", lambda self: begin)
        return goodput.Ledger(tmp_path, now=clock), clock

    return make


def spend(ledger, clock, **seconds):
    for bucket, amount in seconds.items():
        with ledger.spend(bucket):
            clock.at += amount


def test_every_second_is_in_one_bucket(ledger, tmp_path):
    one, clock = ledger(1000.0)
    clock.at += 7
    one.enter("compile")
    clock.at += 5
    one.enter("step")
    for step in (1, 2, 3):
        spend(one, clock, data_wait=1)
        clock.at += 2
        one.write(step)
    spend(one, clock, evaluation=4, checkpoint=3)
    one.write(3)
    found = goodput.summary(tmp_path)
    expected = {"start_up": 7, "compile": 5, "data_wait": 3, "step": 6, "evaluation": 4, "checkpoint": 3}
    assert found == expected | {"lost": 0, "down": 0, "wall": 28}


def test_steps_done_twice_are_lost_and_the_pause_is_down(ledger, tmp_path):
    one, clock = ledger(0.0)
    one.enter("step")
    one.write(0)
    for step in (2, 4, 6):
        clock.at += 10
        one.write(step)
    # Killed after step 6; the newest checkpoint is of step 3. The next process comes 20 seconds later.
    two, clock = ledger(50.0)
    clock.at += 5
    two.enter("step")
    two.write(3)
    clock.at += 30
    two.write(9)
    found = goodput.summary(tmp_path)
    assert found["lost"] == 15  # Half of the interval from 2 to 4, and all of that from 4 to 6.
    assert found["step"] == 30 + 30 - 15
    assert found["down"] == 20
    assert found["start_up"] == 5
    assert sum(value for name, value in found.items() if name != "wall") == found["wall"] == 85
    assert goodput.describe(found).startswith("Goodput 52.9% of 85 s: start_up 5.9%, step 52.9%")


def test_a_line_cut_by_a_kill_is_left_out(ledger, tmp_path):
    one, clock = ledger(0.0)
    clock.at += 1
    one.write(1)
    with (tmp_path / "goodput.jsonl").open("a") as file:
        file.write(json.dumps({"begin": 0.0})[:7])
    assert goodput.summary(tmp_path)["wall"] == 1


def test_nothing_known(tmp_path):
    assert goodput.summary(tmp_path) == {}


HANG = """
import time
from capvl.train import Watchdog


def a_step_that_hangs():
    time.sleep(60)


dog = Watchdog({seconds})
dog.beat()
dog.{call}
a_step_that_hangs() if {hangs} else time.sleep(1.5)
"""


@pytest.mark.parametrize(
    ("seconds", "call", "hangs", "code"),
    [(1.0, "beat()", True, 1), (1.0, "close()", False, 0), (0, "beat()", False, 0)],
)
def test_watchdog(seconds, call, hangs, code):
    script = HANG.format(seconds=seconds, call=call, hangs=hangs)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == code, done.stderr
    assert ("a_step_that_hangs" in done.stderr) == hangs
