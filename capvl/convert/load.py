"""Parameters to begin with: from a workdir or a big_vision .npz, positions resized where need be."""

import pathlib
import re

import numpy as np
from etils import epath

from capvl.convert.big_vision import from_big_vision
from capvl.errors import UserError, nearest
from capvl.models.parameters import Blueprint
from capvl.nn.positions import resize_grid


def load_parameters(path: str, model_options, only: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """float32 parameters by path for a model, from a run's workdir or a flat big_vision .npz.

    Encoder positions of another resolution are resized. Nothing is unpickled.

    Args:
      path: the workdir or file.
      model_options: of the model that they are for.
      only: regexes of the parameters to take; () for all.

    Raises:
      UserError: missing, unreadable, or of another model.
    """
    shapes = Blueprint(model_options).shapes
    for pattern in only:
        if not any(re.fullmatch(pattern, name) for name in shapes):
            raise UserError(f"init_only: {pattern!r} matches no parameter." + nearest(pattern, shapes))
    if (epath.Path(path) / "checkpoints").is_dir():
        from capvl.checkpoint import Checkpointer

        params, _ = Checkpointer(path).read_params(None)
    elif path.endswith(".npz"):
        params = from_big_vision(read_npz(path))
    else:
        raise UserError(f"Parameters {path!r} are neither a workdir nor an .npz file.")
    from capvl.checkpoint import check_leaves

    if only:
        params, shapes = (
            {k: v for k, v in named.items() if any(re.fullmatch(p, k) for p in only)} for named in (params, shapes)
        )
    params = {k: np.asarray(v, np.float32) for k, v in _resize_positions(params, shapes).items()}
    check_leaves({k: [list(v.shape), str(v.dtype)] for k, v in params.items()}, shapes, path)
    return params


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


def _resize_positions(params: dict, shapes: dict) -> dict:
    name = "encoder/positions"
    old, new = params.get(name), shapes.get(name)
    if old is None or new is None or old.shape[0] == new.shape[0] or old.shape[1] != new.shape[1]:
        return params
    return params | {name: resize_grid(old, new.shape[0])}
