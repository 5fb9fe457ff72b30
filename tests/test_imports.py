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
