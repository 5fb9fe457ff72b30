"""Real processes: kills, signals, exit codes."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from launching import finish, losses_of, start, wait_for

from capvl.checkpoint import Checkpointer


def params_of(workdir):
    return Checkpointer(str(workdir)).read_params(None)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    code, out = finish(start(workdir))
    assert code == 0, out
    return workdir


def assert_same_run(workdir, undisturbed):
    expected, found = losses_of(undisturbed), losses_of(workdir)
    assert {s: expected[s] for s in found} == found
    (a, step), (b, other) = params_of(undisturbed), params_of(workdir)
    assert step == other
    for name, value in a.items():
        np.testing.assert_array_equal(b[name], value, err_msg=name)


@pytest.mark.long
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(start, tmp_path, undisturbed):
    """SIGKILL at a random step, then in the middle of a save, then to the end."""
    rng = np.random.default_rng(int(time.time()))
    steps = tmp_path / "checkpoints"

    def logged(step):
        return lambda: (tmp_path / "metrics.jsonl").exists() and max(losses_of(tmp_path) or {0: 0}) >= step

    def committed():
        return any(f.name.isdigit() for f in steps.glob("*"))

    process = start(tmp_path)
    assert wait_for(process, logged(int(rng.integers(2, 6))))
    assert wait_for(process, committed)
    process.send_signal(signal.SIGKILL)
    process.communicate()

    process = start(tmp_path)
    in_save = wait_for(process, lambda: any("tmp" in f.name for f in steps.glob("*")) if steps.exists() else False)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert in_save, "it was over before a save could be caught"
    assert any("tmp" in f.name for f in steps.glob("*")), "the save was not interrupted"

    code, out = finish(start(tmp_path))
    assert code == 0, out
    assert "Resumed after step" in out
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.long
def test_sigterm_saves_and_leaves_with_zero(start, tmp_path, undisturbed):
    process = start(tmp_path, checkpoint={"every": 100})
    assert wait_for(process, lambda: (tmp_path / "metrics.jsonl").exists() and losses_of(tmp_path))
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert code == 0, out
    assert "Stopped by a signal and saved after step" in out
    assert len(Checkpointer(str(tmp_path)).steps()) == 1
    code, out = finish(start(tmp_path, checkpoint={"every": 100}))
    assert code == 0, out
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--config=configs/cappa_dmo.py"], "Did you mean 'configs/cappa_demo.py'"),
        pytest.param(
            ["--config=configs/cappa_demo.py", "--config.step=1"],
            "Unknown key 'step'. Did you mean 'steps'?",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["--config=configs/cappa_l16.py", "--config.data.data_dir=/nowhere"],
            "capvl.data.prepare tfds --name=laion400m",
            marks=pytest.mark.long,
        ),
    ],
)
def test_one_sentence_and_exit_code_2(arguments, words, tmp_path):
    command = [sys.executable, "-m", "capvl.main", *arguments, f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert words in done.stderr


def test_import_is_quick_and_loads_no_tensorflow():
    script = (
        "import time; t = time.time(); import capvl; print(time.time() - t); import sys; print('jax' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    seconds, jax_loaded = out.split()
    assert jax_loaded == "False"
    script = "import sys, capvl.train, capvl.data.prepare, capvl.evaluate; print('tensorflow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip() == "False", "TensorFlow is loaded at run time"


@pytest.mark.long
def test_two_starts_on_one_workdir(start, tmp_path, undisturbed):
    """The second says who has it, leaves with 2 and changes nothing; the first is as if alone."""
    first = start(tmp_path)
    assert wait_for(first, (tmp_path / "lock.json").exists)
    before = (tmp_path / "lock.json").read_text()
    code, out = finish(start(tmp_path))
    assert code == 2 and out.startswith("error: "), out
    assert f"in use by process {first.pid} on " in out and "since 20" in out
    assert json.loads(before)["id"] == json.loads((tmp_path / "lock.json").read_text())["id"]
    code, out = finish(first)
    assert code == 0, out
    lines = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(lines)
    assert_same_run(tmp_path, undisturbed)
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.long
def test_two_make_the_embedded_data_at_once(tmp_path):
    command = [sys.executable, "-m", "capvl.data.prepare", "scenes", "--config=tiny", f"--data_dir={tmp_path}"]
    makers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(3)]
    assert [finish(maker)[0] for maker in makers] == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["scenes"]
