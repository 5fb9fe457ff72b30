"""Faults made on purpose: the schedule, what is compared, and one short run under them."""

import collections
import json
import subprocess
import sys

import pytest
from conftest import ROOT, tiny_values

from capvl.chaos import __main__ as chaos
from capvl.chaos import faults, inside
from capvl.checkpoint import Checkpointer
from capvl.errors import UserError

EVERY = [*faults.KINDS, *inside.KINDS]


@pytest.mark.parametrize("count", [1, 14, 100])
@pytest.mark.parametrize("kinds", [EVERY, ["hang"], ["reads_fail", "kill"], ["saves_fail"]])
def test_schedule_has_every_fault_as_often_as_the_others(count, kinds):
    plan = chaos.schedule(kinds, count, 1000, seed=3)
    found = collections.Counter(kind for each in plan for kind in (each.within, each.end) if kind in kinds)
    wanted = collections.Counter(kinds[i % len(kinds)] for i in range(count))
    extra = found - wanted  # A process with a fault that passes needs something that ends it.
    assert not wanted - found
    assert set(extra) <= {"kill"}
    assert all(each.end or each.within == "hang" for each in plan)
    steps = [each.step for each in plan]
    assert steps == sorted(steps)
    assert steps[0] >= 1 and steps[-1] <= 900
    assert plan == chaos.schedule(kinds, count, 1000, seed=3)


class Finished:
    """What `compare` asks of a fleet."""

    def __init__(self, workdir, losses):
        self.workdir, self._losses = workdir, losses

    def losses(self):
        return self._losses


def test_compare_sees_a_loss_and_a_leaf_that_differ(tmp_path, monkeypatch):
    import numpy as np

    leaves = {"a": np.ones(3), "b": np.zeros(2)}
    stored = {"one": leaves, "other": leaves, "changed": leaves | {"b": np.array([0.0, 1e-9])}}
    monkeypatch.setattr(Checkpointer, "__init__", lambda self, workdir: setattr(self, "name", workdir))
    monkeypatch.setattr(Checkpointer, "read_all", lambda self: (stored[self.name], 2))
    losses = {1: 0.5, 2: 0.25}
    alone = Finished("one", losses)
    assert chaos.compare(alone, Finished("other", losses)) == (2, 2)
    with pytest.raises(UserError, match="1 leaves differ, b first"):
        chaos.compare(alone, Finished("changed", losses))
    with pytest.raises(UserError, match="Losses differ, first at step 2"):
        chaos.compare(alone, Finished("other", losses | {2: 0.250001}))
    with pytest.raises(UserError, match="Losses differ, first at step 1; 1 steps were logged"):
        chaos.compare(alone, Finished("other", {2: 0.25}))


def test_bad_arguments(tmp_path):
    with pytest.raises(UserError, match="unknown kind 'kil'. Did you mean 'kill'"):
        chaos.main(["--config=configs/cappa_demo.py", "--kinds=kil", f"--workdir={tmp_path}"])
    with pytest.raises(UserError, match="must be at least 1"):
        chaos.main(["--config=configs/cappa_demo.py", "--faults=0", f"--workdir={tmp_path}"])
    (tmp_path / "something").touch()
    with pytest.raises(UserError, match="is not empty; take a new folder"):
        chaos.main(["--config=configs/cappa_demo.py", f"--workdir={tmp_path}"])


@pytest.mark.parametrize(
    ("count", "options"),
    [
        pytest.param(2, ["--kinds=saves_fail,fill_disk"], marks=pytest.mark.long),
        pytest.param(14, ["--seed=1"], marks=pytest.mark.slow),
        pytest.param(6, ["--kinds=kill,cut_file,fill_disk", "--processes=2"], marks=pytest.mark.slow),
    ],
)
def test_a_disturbed_run_equals_the_one_left_alone(tmp_path, data_dir, count, options):
    values = tiny_values(data_dir) | {"steps": 60}
    config = tmp_path / "tiny.py"
    config.write_text(f"from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict({values!r})\n")
    command = [sys.executable, "-m", "capvl.chaos", f"--config={config}", f"--workdir={tmp_path / 'out'}"]
    command += [f"--faults={count}", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out/chaos.json").read_text())
    assert result["survived"] >= count
    assert result["steps"] == 60
