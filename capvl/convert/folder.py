"""A model in a folder of ours: weights.safetensors, model.json, and its tokenizer's file.

This is what `capvl.convert` writes; `capvl.load`, `capvl.evaluate` and `config.init_from` take it
wherever they take a run's workdir.
"""

import dataclasses
import json
from typing import Any

import numpy as np

from capvl import config, recipes, storage, workdirs
from capvl.convert import tokens
from capvl.convert.files import read_npz, read_safetensors, write_safetensors
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.models.bert import BertOptions
from capvl.models.captioner import CaptionerOptions
from capvl.models.encoder import EncoderOptions
from capvl.models.git import GitOptions
from capvl.models.two_towers import TwoTowersOptions

KINDS = {
    "captioner": CaptionerOptions,
    "two_towers": TwoTowersOptions,
    "git": GitOptions,
    "encoder": EncoderOptions,
    "bert": BertOptions,
}
FORMAT = 1
CHOICES = {
    "resize": ("big_vision", "hugging_face", "timm"),
    "crop": ("center", "center_floor", "squash"),
    "interpolation": ("fast", "bilinear", "bicubic"),
}
"""Values of Weights' attributes."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's parameters with what is needed to use them.

    Attributes:
      params: float32 by path.
      options: of the model; a value of KINDS.
      resize: how its positions are resized; see CHOICES.
      tokenizer: path of its tokenizer; "" where it has none.
      clean: how texts are cleaned for it, where the files beside it don't say; `capvl.data.text.cleaning.CLEANERS`.
      crop, crop_fraction, interpolation: how images are brought to its resolution; `capvl.data.images.crops.Crop`.
      objective: that it was trained with, for its prompts; None for what models of its kind usually have.
    """

    params: dict[str, np.ndarray]
    options: Any
    resize: str = "big_vision"
    tokenizer: str = ""
    clean: str = ""
    crop: str = "center"
    crop_fraction: float = 1.0
    interpolation: str = "fast"
    objective: Any = None


def write_folder(folder: str, weights: Weights) -> None:
    """Writes weights.safetensors, the tokenizer's file and, last, model.json.

    Raises:
      UserError: the folder is there already with something in it, or can't be written.
    """
    path = new_folder(folder)
    write_safetensors(path / "weights.safetensors", weights.params)
    tokenizer = ""
    if weights.tokenizer:
        tokenizer = tokens.copy(weights.tokenizer, path, tokenizers.name_of_copy(weights.tokenizer), weights.clean)
    kind = next(name for name, cls in KINDS.items() if type(weights.options) is cls)
    description = {
        "format": FORMAT,
        "kind": kind,
        "options": dataclasses.asdict(weights.options),
        "resize": weights.resize,
        "tokenizer": tokenizer,
        "crop": weights.crop,
        "crop_fraction": weights.crop_fraction,
        "interpolation": weights.interpolation,
    }
    storage.replace_text(path / "model.json", json.dumps(description, indent=1))


def new_folder(folder: str):
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


def read_model(path: str, *, step: int | None = None, trust: config.Trust = False) -> Weights:
    """Weights of a run's workdir, a converted folder, or a flat big_vision .npz.

    Args:
      path: where they are.
      step: of a workdir's checkpoint; None for the newest.
      trust: which code a workdir's recipe may import, for an objective of one's own.

    Raises:
      UserError: missing, unreadable, none of these, or in need of code that is not trusted.
    """
    if path.endswith(".npz"):
        from capvl.convert.big_vision import from_big_vision
        from capvl.convert.shapes import options_of

        params = from_big_vision(read_npz(path))
        return Weights(params, options_of(params), "big_vision", crop="squash")
    place = storage.folder(path)
    if (place / "model.json").exists():
        return _read_folder(place)
    if (place / "checkpoints").is_dir() and (place / "config.json").exists():
        return _read_workdir(place, step, trust)
    raise UserError(
        f"{path!r} is neither a run's workdir (config.json, checkpoints), nor a converted folder (model.json, "
        f"weights.safetensors), nor an .npz file."
    )


def _read_folder(place) -> Weights:
    from capvl.checkpoint import check_leaves
    from capvl.models.parameters import Blueprint

    try:
        values = storage.read_json(place / "model.json")
        kind, options = KINDS[values["kind"]], values["options"]
        known = all(values.get(name, choices[0]) in choices for name, choices in CHOICES.items())
        if not known or not isinstance(values.get("tokenizer", ""), str):
            raise TypeError
        if not 0 < values.get("crop_fraction", 1) <= 1:
            raise TypeError
    except (KeyError, TypeError) as e:
        raise UserError(f"{str(place / 'model.json')!r} is not the description of a model.") from e
    options = config.build(kind, options, "options")
    params = read_safetensors(str(place / "weights.safetensors"))
    stored = {k: [list(v.shape), str(v.dtype)] for k, v in params.items()}
    check_leaves(stored, Blueprint(options).shapes, str(place))
    kept = {name: values[name] for name in ("tokenizer", "crop_fraction", *CHOICES) if name in values}
    if kept.pop("tokenizer", ""):
        copy = place / values["tokenizer"]
        kept["tokenizer"] = tokenizers.local(copy) if copy.is_file() else ""
    return Weights(params, options, **kept)


def _read_workdir(place, step: int | None, trust: config.Trust) -> Weights:
    from capvl.checkpoint import Checkpointer

    values = recipes.read_values(place / "config.json")
    values.pop("evals", None)  # Nobody asks them here, and they may name code.
    recipe = recipes.resolve(values, trust)
    params, _ = Checkpointer(str(place)).read_params(recipe.train_step().param_shapes(), step=step)
    params = {k: np.asarray(v, np.float32) for k, v in params.items()}
    crop = "center" if recipe.data.crop == "random" else recipe.data.crop
    pixels = dict(crop=crop, crop_fraction=recipe.data.crop_fraction, interpolation=recipe.data.interpolation)
    tokenizer = workdirs.tokenizer_of(place, recipe)
    return Weights(params, recipe.model, "big_vision", tokenizer, **pixels, objective=recipe.objective)
