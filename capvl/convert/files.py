"""Weights in files: safetensors and NumPy archives; pickles only where the user asks for it."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np
from etils import epath

from capvl import storage
from capvl.config import Trust
from capvl.errors import UserError

PICKLES = (".bin", ".pt", ".pth", ".th", ".ckpt", ".pkl")
_MEAN = "model_ema"
_NO_MEAN = (
    "--ema reads the running mean of the parameters from a PyTorch checkpoint that holds them as 'model_ema', and {!r} "
    "holds none; leave it out."
)
_NAMES = ("model.safetensors", "open_clip_model.safetensors", "weights.safetensors")


@dataclasses.dataclass(frozen=True)
class Source:
    """What is to be read; its files are read when they are first asked for.

    Attributes:
      path: a file or a folder.
      heads: of the attention, where neither arrays nor a configuration tell; 0 for width / 64.
      allow_pickle, ema: see `read_weights`.
      trust: see `capvl.convert.folder.read_model`.
    """

    path: str
    heads: int = 0
    allow_pickle: bool = False
    trust: Trust = False
    ema: bool = False

    @functools.cached_property
    def _contents(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return read_weights(self.path, allow_pickle=self.allow_pickle, ema=self.ema)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """By name; see `read_weights`."""
        return self._contents[0]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration beside the arrays; {} where there is none."""
        return self._contents[1]

    @property
    def folder(self) -> pathlib.Path:
        """Where the arrays' file is."""
        path = pathlib.Path(self.path)
        return path if path.is_dir() else path.parent


@dataclasses.dataclass(frozen=True)
class Target:
    """What is to be written.

    Attributes:
      path: a new folder or a file.
      scan: big_vision's scanned layout.
      classes: names of what an exported detector looks for.
    """

    path: str
    scan: bool = False
    classes: tuple[str, ...] = ()


def read_weights(
    path: str, *, allow_pickle: bool = False, ema: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays by name, the folder's configuration or {}) of a file, or of a folder as Hugging Face has it.

    Args:
      path: .safetensors, .npz, a folder with model.safetensors (or its index of several files), or a pickle.
      allow_pickle: read PyTorch's pickles too, weights only.
      ema: of a pickle that holds a running mean of the parameters beside them, that.

    Raises:
      UserError: missing, unreadable, of a wrong kind, a pickle that was not asked for, or one without the running mean
        that was.
    """
    file = pathlib.Path(path)
    if not file.exists():
        raise UserError(f"Weights {path!r} do not exist.")
    if file.is_dir():
        config = _config(file)
        index = next(file.glob("*.safetensors.index.json"), None)
        if index is not None:
            if ema:
                raise UserError(_NO_MEAN.format(str(index)))
            parts = sorted(set(read_json(index)["weight_map"].values()))
            arrays = {}
            for part in parts:
                arrays |= read_safetensors(str(file / part))
            return arrays, config
        found = [file / n for n in _NAMES if (file / n).exists()] or sorted(file.glob("*.safetensors"))
        found = found or sorted(p for p in file.iterdir() if p.suffix in (".npz", *PICKLES))
        if not found:
            raise UserError(f"Folder {path!r} has no model.safetensors and no .npz file.")
        return _read_file(found[0], allow_pickle, ema), config
    return _read_file(file, allow_pickle, ema), _config(file.parent) if file.suffix != ".npz" else {}


def _config(folder: pathlib.Path) -> dict[str, Any]:
    for name in ("open_clip_config.json", "config.json"):
        if (folder / name).exists():
            return read_json(folder / name)
    return {}


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
      UserError: it is no such file.
    """
    value = storage.read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{str(file)!r} should be a JSON object.")
    return value


def _read_file(file: pathlib.Path, allow_pickle: bool, ema: bool) -> dict[str, np.ndarray]:
    if ema and file.suffix not in PICKLES:
        raise UserError(_NO_MEAN.format(str(file)))
    if file.suffix == ".npz":
        return read_npz(str(file))
    if file.suffix == ".safetensors":
        return read_safetensors(str(file))
    if file.suffix not in PICKLES:
        raise UserError(f"{str(file)!r} is neither .safetensors nor .npz.")
    if not allow_pickle:
        raise UserError(
            f"{str(file)!r} is a pickle, which can run any code when it is read; take a .safetensors file, or say "
            f"--allow_pickle if you trust it (it is then read as weights only)."
        )
    return _read_pickle(str(file), ema)


def _read_pickle(path: str, ema: bool) -> dict[str, np.ndarray]:
    try:
        import torch  # Optional, and slow to import.
    except ImportError as e:
        raise UserError("Reading a pickle needs PyTorch: pip install torch.") from e
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds.
        raise UserError(f"{path!r} can't be read as weights only: {e}") from e
    mean = state.get(_MEAN) if isinstance(state, dict) else None
    if ema:
        if not isinstance(mean, dict):
            raise UserError(_NO_MEAN.format(path))
        state = mean
    elif isinstance(mean, dict):
        from capvl.terminal import say  # Late, so that commands show their help at once: it imports JAX.

        say(f"{path} also holds a running mean of its parameters, which --ema reads instead.")
    while isinstance(state, dict) and isinstance(inner := state.get("state_dict", state.get("model")), dict):
        state = inner
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{path!r} holds no state dict.")
    return {k.removeprefix("module."): v.float().numpy() for k, v in state.items()}


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Arrays of a .safetensors file; bfloat16 and float16 become float32.

    Raises:
      UserError: missing or not such a file.
    """
    # Late, so that commands show their help at once.
    from ml_dtypes import bfloat16  # noqa: F401 - NumPy has to know it before safetensors asks.
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as e:
        raise UserError(f"{path!r} can't be read as safetensors: {e}") from e
    return {k: v if v.dtype.kind in "iub" else v.astype(np.float32) for k, v in arrays.items()}


def write_safetensors(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes a .safetensors file, whole or not at all.

    Raises:
      UserError: it can't be written.
    """
    from safetensors.numpy import save_file  # Late, so that commands show their help at once.

    try:
        with storage.new_file(path) as temporary:
            save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, temporary, metadata={"format": "pt"})
    except OSError as e:
        raise UserError(f"{path!r} can't be written: {e.strerror or e}.") from e


def write_torch(path: str, contents: dict[str, Any]) -> None:
    """Writes a file as torch.save does, whole or not at all; nested dictionaries of arrays become those of tensors.

    Raises:
      UserError: PyTorch is not there, or the file can't be written.
    """
    try:
        import torch  # Optional, and slow to import.
    except ImportError as e:
        raise UserError(f"Writing {path!r} needs PyTorch: pip install torch.") from e

    def tensors(value):
        if isinstance(value, dict):
            return {name: tensors(each) for name, each in value.items()}
        return torch.from_numpy(np.array(value))

    try:
        with storage.new_file(epath.Path(path)) as temporary:
            torch.save(tensors(contents), temporary)
    except OSError as e:
        raise UserError(f"{path!r} can't be written: {e.strerror or e}.") from e


def read_npz(path: str) -> dict[str, np.ndarray]:
    """A flat .npz, with pickles refused.

    Raises:
      UserError: missing, not an .npz, or with pickled objects in it.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"File {path!r} does not exist.")
    try:
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    except (ValueError, OSError, EOFError) as e:
        raise UserError(f"{path!r} can't be read as an .npz of plain arrays: {e}") from e


def write_npz(path: str, arrays: dict[str, np.ndarray]) -> None:
    """Writes a flat .npz, whole or not at all.

    Raises:
      UserError: it can't be written.
    """
    try:
        with storage.new_file(epath.Path(path)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except OSError as e:
        raise UserError(f"{path!r} can't be written: {e.strerror or e}.") from e


def new_folder(folder: str) -> epath.Path:
    """An empty folder to write to.

    Raises:
      UserError: there is something in it, or it can't be made.
    """
    path = storage.folder(folder)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{folder!r} is there already; choose another name or remove it.")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"Folder {folder!r} can't be made: {e.strerror or e}.") from e
    return path


def write_model(folder: str, state: dict[str, np.ndarray], config: dict[str, Any]) -> epath.Path:
    """Writes model.safetensors and config.json to a new folder, as transformers and timm read them.

    Returns:
      The folder.

    Raises:
      UserError: there is something in it, or it can't be written.
    """
    path = new_folder(folder)
    write_safetensors(path / "model.safetensors", state)
    (path / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return path
