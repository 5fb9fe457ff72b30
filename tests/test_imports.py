"""Importing the package leaves the user's process as it was."""

import os
import subprocess
import sys

from conftest import ROOT

SCRIPT = """
import importlib, locale, logging, os, pkgutil, signal, sys
import cv2, jax, numpy
from PIL import Image
def state():
    jax_values = {k: v for k, v in jax.config.values.items()}
    signals = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    return dict(threads=cv2.getNumThreads(), limit=Image.MAX_IMAGE_PIXELS, environment=dict(os.environ), jax=jax_values,
        signals=signals, level=logging.getLogger().level, path=list(sys.path),
        locale=locale.getlocale(), cwd=os.getcwd(), numpy=numpy.geterr())
# What others change is not ours.
for name in ("tensorflow_datasets", "orbax.checkpoint.experimental.v1", "flax.nnx", "grain", "matplotlib.pyplot"):
    importlib.import_module(name)
before = state()
import capvl
for module in pkgutil.walk_packages(capvl.__path__, "capvl."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as e:  # What an extra brings.
            assert not e.name.startswith("capvl"), e
after = state()
assert before == after, {k: (before[k], after[k]) for k in before if before[k] != after[k]}
"""


def test_importing_changes_nothing_global():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": ROOT}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


HELP = """
import contextlib, io, runpy, sys
for name in {commands}:
    sys.argv, out = ["python -m capvl." + name, "--help"], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        runpy.run_module("capvl." + name, run_name="__main__", alter_sys=True)
    assert "usage" in out.getvalue().lower(), (name, out.getvalue())
    slow = {{"jax", "tensorflow_datasets", "orbax", "flax"}} & set(sys.modules)
    assert not slow, f"{{name}} --help imports {{slow}}"
"""


def test_help_waits_for_nothing_slow():
    """Every command answers --help before JAX is imported."""
    commands = ["main", "evaluate", "plan", "report", "embeddings", "bench", "chaos", "convert", "sweep"]
    commands += [f"data.{name}" for name in ("prepare", "tokenizer", "tsv", "frequencies")]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    script = HELP.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
