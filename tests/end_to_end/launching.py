"""Training processes for tests: started, waited for, and read."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, tiny_values

CONFIG = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict({values!r})
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory, data_dir):
    """A function that starts a training process of a tiny recipe."""
    folder = tmp_path_factory.mktemp("configs")

    def make(workdir, *arguments, devices=1, environment=None, **changes):
        values = tiny_values(data_dir) | {"steps": 12} | changes
        file = folder / f"{abs(hash(str(values)))}.py"
        file.write_text(CONFIG.format(values=values))
        command = [sys.executable, "-m", "capvl.main", f"--config={file}", f"--workdir={workdir}", *arguments]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        # Most processes compile what another one compiled, down to the smallest function.
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | (environment or {})
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return make


def finish(process, timeout=400):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def losses_of(workdir):
    lines = [json.loads(line) for line in pathlib.Path(workdir, "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for(process, happened, timeout=300):
    deadline = time.time() + timeout
    while not happened():
        assert time.time() < deadline
        if process.poll() is not None:
            print(process.communicate()[0])
            return False
        time.sleep(0.002)
    return True


def free_port() -> int:
    """A port that nobody listens at just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
