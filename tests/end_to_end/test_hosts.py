"""Several processes as the hosts of one run: joined by gloo on this machine, stopped, killed, started wrongly."""

import json
import signal
import time

import numpy as np
import pytest
from launching import finish, free_port, losses_of, start, wait_for

from capvl.checkpoint import Checkpointer

LONG = {"steps": 2000, "log_every": 1, "checkpoint": {"every": 5}, "mesh": {"fsdp": -1}}


@pytest.fixture
def hosts(start):
    """A function that starts `count` processes of one run, process i with `arguments[i]` as well."""

    def make(workdir, count, devices, arguments=None, **changes):
        port = free_port()
        return [
            start(
                workdir,
                *(arguments or {}).get(i, ()),
                devices=devices,
                environment={
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(count),
                    "JAX_PROCESS_ID": str(i),
                },
                **changes,
            )
            for i in range(count)
        ]

    return make


def first_loss(workdir):
    return lambda: (workdir / "metrics.jsonl").exists() and losses_of(workdir)


@pytest.fixture(scope="module")
def one_host(start, tmp_path_factory):
    """The losses of 1 process with 8 devices."""
    workdir = tmp_path_factory.mktemp("one")
    code, out = finish(start(workdir, devices=8, **SAME))
    assert code == 0, out
    return losses_of(workdir)


SAME = {"steps": 4, "mesh": {"replica": 2, "fsdp": 4}, "evals": {"perplexity": {"limit": 20}}}


@pytest.mark.parametrize(
    ("count", "devices"), [pytest.param(2, 4, marks=pytest.mark.long), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_several_hosts_equal_one(hosts, start, tmp_path, one_host, count, devices):
    for process in hosts(tmp_path, count, devices, **SAME):
        code, out = finish(process)
        assert code == 0, out
    found = losses_of(tmp_path)
    assert found.keys() == one_host.keys()
    np.testing.assert_allclose([found[s] for s in one_host], list(one_host.values()), rtol=1e-5)
    # The processes' checkpoint is whole for one process.
    code, out = finish(start(tmp_path, devices=2, **(SAME | {"mesh": {"fsdp": 2}})))
    assert code == 0, out
    assert "Resumed after step 4" in out


@pytest.mark.long
def test_two_hosts_go_by_the_same_evaluations(hosts, start, tmp_path):
    """Perplexity falls, so where more is better no evaluation but the first is a new best."""
    told = {"metric": "perplexity/cap/perplexity", "stop_patience": 2}
    changes = SAME | {"steps": 20, "eval_every": 2, "watch": told, "checkpoint": {"every": 100}}
    changes["schedule"] = {"kind": "plateau", "warmup": 0, "patience": 1}
    kept = []
    runs = {"one": lambda path: [start(path, devices=8, **changes)], "two": lambda path: hosts(path, 2, 4, **changes)}
    for name, begin in runs.items():
        for process in begin(tmp_path / name):
            code, out = finish(process)
            assert code == 0, out
            assert "no later evaluation of 2 is better" in out or name == "two"
        assert Checkpointer(str(tmp_path / name)).steps() == [2, 6]
        leaves, _ = Checkpointer(str(tmp_path / name)).read_all()
        kept.append({k: v.item() for k, v in leaves.items() if k.startswith("watched.")})
    (best, *one), (best_of_two, *two) = (values.values() for values in kept)
    assert one == two
    np.testing.assert_allclose(best_of_two, best, rtol=1e-5)
    assert kept[0]["watched.drops"] == 2


@pytest.mark.long
def test_two_hosts_equal_one_with_negatives_of_both(hosts, start, tmp_path, data_dir):
    """X-VLM's hard negatives come from the whole batch, whichever host has them; so do the evaluators' candidates."""
    values = {
        "steps": 4,
        "mesh": {"fsdp": -1},
        "objective": {"name": "xvlm", "share": 0.5, "group": [1, 2], "slots": 3, "masks": 3},
        "model": {
            "encoder": "w16d2h2m32/8",
            "res": 32,
            "text": "w16d2h2m32",
            "cross_layers": 1,
            "vocab": 256,
            "length": 12,
            "text_positions": 12,
            "projection": 8,
            "dtype": "float32",
        },
        "data": {
            "name": "pairs=scenes/tiny + regions=scenes/tiny",
            "data_dir": data_dir,
            "tokenizer": "{data_dir}/scenes/wordpiece.txt",
        },
        "evals": {"retrieval": {"name": "scenes/tiny", "rerank": 4}, "grounding": {"name": "scenes/tiny", "limit": 32}},
    }
    found = []
    runs = {
        "one": lambda workdir: [start(workdir, devices=8, **values)],
        "two": lambda workdir: hosts(workdir, 2, 4, **values),
    }
    for name, begin in runs.items():
        for process in begin(tmp_path / name):
            code, out = finish(process)
            assert code == 0, out
        found.append([json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    compared = 0
    for one, two in zip(*found, strict=True):
        for key in one.keys() & two.keys():
            if key.startswith(("pairs_", "regions_", "retrieval/", "grounding/", "loss")):
                np.testing.assert_allclose(two[key], one[key], rtol=2e-4, atol=1e-5, err_msg=key)
                compared += 1
    assert compared > 60


@pytest.mark.long
def test_sigterm_to_one_host_stops_all_at_the_same_step(hosts, tmp_path):
    processes = hosts(tmp_path, 2, 2, **(LONG | {"checkpoint": {"every": 5000}}))
    assert wait_for(processes[0], first_loss(tmp_path))
    processes[1].send_signal(signal.SIGTERM)
    outs = []
    for process in processes:
        code, out = finish(process)
        assert code == 0, out
        outs.append(out)
    (step,) = Checkpointer(str(tmp_path)).steps()
    assert f"Stopped by a signal and saved after step {step}" in outs[0]


@pytest.mark.long
def test_a_killed_host_ends_the_others_and_fewer_go_on_with_the_same_examples(hosts, start, tmp_path):
    changes = LONG | {"steps": 120}
    code, out = finish(start(tmp_path / "undisturbed", devices=2, **changes))
    assert code == 0, out
    workdir = tmp_path / "killed"
    processes = hosts(workdir, 2, 2, **changes)
    assert wait_for(processes[0], lambda: first_loss(workdir)() and max(losses_of(workdir)) > 6)
    begin = time.monotonic()
    processes[1].send_signal(signal.SIGKILL)
    code, out = finish(processes[0])
    assert time.monotonic() - begin < 60
    assert code not in (0, 2)
    assert "lost another one" in out or "another task died" in out, out
    # One process goes on where two were, and sees what an undisturbed one sees.
    code, out = finish(start(workdir, devices=2, **changes))
    assert code == 0, out
    assert "Resumed after step" in out
    expected, found = losses_of(tmp_path / "undisturbed"), losses_of(workdir)
    assert len(found) > 100  # The step that a process compiles in is not logged.
    np.testing.assert_allclose(list(found.values()), [expected[s] for s in found], rtol=1e-3)


def test_a_host_with_another_recipe_is_refused_by_all(hosts, tmp_path):
    for process in hosts(tmp_path, 2, 2, arguments={1: ["--config.optimizer.lr=0.1"]}, **LONG):
        code, out = finish(process)
        assert code == 2, out
        assert "Process 1 of 2 has another configuration than the others" in out
    assert not list(tmp_path.iterdir()), "nothing was begun"
