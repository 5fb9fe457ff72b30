"""Test-wide rules: 8 CPU devices, strict dtypes and ranks, warnings are errors, no network."""

import atexit
import gc
import io
import os
import shutil
import socket
import tarfile
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One cache for all workers and the processes that tests start; made by the first to come here.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="capvl-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
# Tiny models compile far longer than they run, those of processes that tests start too: as little optimisation as
# there is.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes millions of small objects and hardly any cycle.
gc.set_threshold(50_000, 20, 20)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _shared(variable: str, name: str) -> str:
    return os.environ.get(variable) or os.path.join(os.path.dirname(ROOT), "shared", name)


GOLDEN = _shared("CAPVL_GOLDEN", "golden")
REAL_DATA = _shared("CAPVL_DATA", "data")
CASES = _shared("CAPVL_CASES", "cases")


# Those that take longest, which come first: no worker shall have one to itself at the end.
LONGEST = (
    "end_to_end/test_processes.py",
    "objectives/test_git.py",
    "objectives/test_glip_whole_golden.py",
    "inference/test_finding.py",
    "evals/test_detection_evaluators.py",
    "objectives/test_glip.py",
    "end_to_end/test_watched_runs.py",
    "end_to_end/test_recipes.py",
    "end_to_end/test_train.py",
    "objectives/test_micro_batches.py",
    "test_step.py",
    "objectives/test_cappa_golden.py",
    "test_checkpoint.py",
    "test_workdirs.py",
)


def pytest_collection_modifyitems(items):
    places = {os.path.join(ROOT, "tests", name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


def pytest_collection_finish():
    """What is imported by now stays, and need not be looked through again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Any connection to another machine fails the test."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def load_golden(*parts: str) -> dict[str, np.ndarray]:
    """One golden file as a dict of arrays; skips where it is absent."""
    path = os.path.join(GOLDEN, *parts)
    if not os.path.exists(path):
        pytest.skip(f"golden file {path} is absent (set CAPVL_GOLDEN)")
    with np.load(path) as z:
        return {k: z[k] for k in z.files}


def real_data(*parts: str) -> str:
    """Path of real data; skips where it is absent."""
    path = os.path.join(REAL_DATA, *parts)
    if not os.path.exists(path):
        pytest.skip(f"real data {path} is absent (set CAPVL_DATA)")
    return path


def case(*parts: str) -> str:
    """Path of an odd input with a known answer; skips where it is absent."""
    path = os.path.join(CASES, *parts)
    if not os.path.exists(path):
        pytest.skip(f"case {path} is absent (set CAPVL_CASES)")
    return path


def under(arrays: dict, prefix: str) -> dict:
    """The entries below `prefix/`, without it."""
    return {k[len(prefix) + 1 :]: v for k, v in arrays.items() if k.startswith(prefix + "/")}


def assert_close(actual, expected, tolerance: float, name: str = "") -> None:
    """Largest difference at most `tolerance` of the expected array's largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, expected {expected.shape}"
    scale = max(np.abs(expected).max(initial=0), 1e-7)
    worst = np.abs(actual - expected).max(initial=0)
    assert worst <= tolerance * scale, f"{name}: off by {worst:.3g} where the largest value is {scale:.3g}"


def drawn(shapes: dict, scale: float = 0.3) -> dict:
    """Random parameters of a blueprint's shapes. NumPy draws them: JAX would compile programs for each shape, as it
    does for jnp.asarray without a dtype or with another one than the array has."""
    rng = np.random.default_rng(0)
    arrays = {name: scale * rng.normal(size=shape.shape) for name, shape in shapes.items()}
    return jax.device_put({name: x.astype(np.float32) for name, x in arrays.items()})


def write_tar(path, samples) -> None:
    """A tar of (key, {suffix: bytes}) samples."""
    with tarfile.open(path, "w") as archive:
        for key, members in samples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


TINY_MODEL = {
    "encoder": "w16d2h2m32/16",
    "res": 32,
    "decoder_layers": 2,
    "vocab": 128,
    "length": 12,
    "dtype": "float32",
}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """A folder with the embedded data set in its smallest configuration."""
    from capvl.data.scenes import making

    folder = str(tmp_path_factory.mktemp("data"))
    making.scenes("tiny", folder)
    making.scenes_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def one_device():
    """Runs use one of the eight devices: several compile longer and are tested elsewhere."""
    from capvl import evaluation, train
    from capvl.parallel.mesh import make_mesh

    with pytest.MonkeyPatch.context() as patch:
        for module in (train, evaluation):
            patch.setattr(module, "make_mesh", lambda options: make_mesh(options, jax.devices()[:1]))
        yield


def tiny_values(data_dir: str) -> dict:
    """The plain values of a recipe that trains in seconds."""
    return {
        "steps": 6,
        "batch_size": 16,
        "objective": {"name": "cappa"},
        "model": dict(TINY_MODEL),
        "data": {"name": "scenes/tiny", "data_dir": data_dir},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup": 2},
        "log_every": 1,
        "checkpoint": {"every": 2},
        "evals": {},
    }


class _Object(io.BytesIO):
    """What is written to a bucket: it is there, whole, when it is closed."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path

    def close(self):
        if not self.closed:
            with open(f"{self._path}.{id(self)}", "wb") as file:
                file.write(self.getvalue())
            os.replace(file.name, self._path)
        super().close()


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs://bucket/…, as files below tmp_path that can't be appended to or renamed; and how many were written."""
    from etils.epath import backend
    from fsspec.implementations.local import LocalFileSystem

    from capvl import storage

    written = []

    class Bucket(LocalFileSystem):
        protocol = ("gs", "gcs")

        @classmethod
        def _strip_protocol(cls, path):
            return str(path).replace("gs://", f"{tmp_path}/objects/").rstrip("/")

        def makedirs(self, path, exist_ok=False):
            super().makedirs(self._strip_protocol(path), exist_ok=True)

        def open(self, path, mode="rb", **options):
            assert "a" not in mode and "+" not in mode
            written.extend([path] if "w" in mode and path.startswith("gs://") else [])
            if mode == "wb":
                return _Object(self._strip_protocol(path))
            return super().open(self._strip_protocol(path), mode, **options)

        def rename(self, *_, **__):
            raise AssertionError("an object can't be renamed")

    monkeypatch.setattr(backend._FileSystemSpecBackend, "_get_filesystem", lambda self, name: Bucket())
    monkeypatch.setitem(storage.BUCKETS, "gs", "fsspec")
    (tmp_path / "objects/bucket").mkdir(parents=True)
    return written


@pytest.fixture
def tiny(data_dir):
    """A function that gives the plain values of a tiny recipe, with some of them changed."""

    def make(**changes) -> dict:
        values = tiny_values(data_dir)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                values[section] = {**values[section], name: value}
            else:
                values[section] = value
        return values

    return make


@pytest.fixture
def tiny_recipe(tiny):
    """As `tiny`, resolved."""
    from capvl import recipes

    return lambda **changes: recipes.resolve(tiny(**changes))
