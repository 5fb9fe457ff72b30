"""Detection on two hosts: the numbers of one, on both."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from conftest import ROOT
from launching import free_port

sys.path.append(os.path.join(ROOT, "tests", "evals"))

from test_detection_evaluators import make_sets

SCRIPT = pathlib.Path(__file__).with_name("detecting_host.py")


def evaluated(count, data, out):
    """What each of `count` hosts of 8 devices in all yields."""
    port, processes = free_port(), []
    for i in range(count):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(8 // count), "PYTHONPATH": str(ROOT)}
        if count > 1:
            env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
            env |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        command = [sys.executable, str(SCRIPT), os.path.join(ROOT, "tests"), data, str(out)]
        how = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(subprocess.Popen(command, **how))
    for process in processes:
        told, _ = process.communicate(timeout=500)
        assert process.returncode == 0, told
    return [json.loads(pathlib.Path(f"{out}.{i}").read_text()) for i in range(count)]


@pytest.mark.long
def test_two_hosts_find_what_one_does(tmp_path):
    data = make_sets(tmp_path)
    (one,) = evaluated(1, data, tmp_path / "one")
    results = (tmp_path / "submissions/things_val.json").read_text()
    two = evaluated(2, data, tmp_path / "two")
    assert two == [one, one]
    assert 0 < one["detection"]["AP"] < 1 and 0 < one["lvis"]["AP"] < 1 and 0 < one["phrases"]["R@1"] < 1
    assert (tmp_path / "submissions/things_val.json").read_text() == results
