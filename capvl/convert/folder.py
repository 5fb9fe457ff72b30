"""A model in a folder of ours: weights.safetensors, model.json, and its tokenizer's file.

This is what `capvl.convert` writes; `capvl.load`, `capvl.evaluate` and `config.init_from` take it
wherever they take a run's workdir.
"""

import dataclasses
import json

import numpy as np

from capvl import config, recipes, storage, workdirs
from capvl.checkpoint import Checkpointer, check_leaves
from capvl.convert import big_vision, tokens
from capvl.convert.files import Source, Target, new_folder, read_safetensors, write_safetensors
from capvl.convert.kinds import KINDS, kind_of
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.weights import CHOICES, Weights

FORMAT = 1


def write_folder(folder: str, weights: Weights) -> None:
    """Writes weights.safetensors, the tokenizer's file and, last, model.json.

    Raises:
      UserError: the folder is there already with something in it, or can't be written.
    """
    kind = kind_of(weights.options)
    if not kind or type(weights.options) is not KINDS[kind].options:
        raise UserError(
            f"Folders hold models of the kinds {', '.join(KINDS)}, and this one has {type(weights.options).__name__}."
        )
    path = new_folder(folder)
    write_safetensors(path / "weights.safetensors", weights.params)
    tokenizer = ""
    if weights.tokenizer:
        tokenizer = tokens.copy(weights.tokenizer, path, tokenizers.name_of_copy(weights.tokenizer), weights.clean)
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
        return big_vision.read(Source(path))
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
    try:
        values = storage.read_json(place / "model.json")
        cls, options = KINDS[values["kind"]].options, values["options"]
        known = all(values.get(name, choices[0]) in choices for name, choices in CHOICES.items())
        if not known or not isinstance(values.get("tokenizer", ""), str):
            raise TypeError
        if not 0 < values.get("crop_fraction", 1) <= 1:
            raise TypeError
    except (KeyError, TypeError) as e:
        raise UserError(f"{str(place / 'model.json')!r} is not the description of a model.") from e
    options = config.build(cls, options, "options")
    params = read_safetensors(str(place / "weights.safetensors"))
    stored = {k: [list(v.shape), str(v.dtype)] for k, v in params.items()}
    check_leaves(stored, Blueprint(options).shapes, str(place))
    kept = {name: values[name] for name in ("tokenizer", "crop_fraction", *CHOICES) if name in values}
    if kept.pop("tokenizer", ""):
        copy = place / values["tokenizer"]
        kept["tokenizer"] = tokenizers.local(copy) if copy.is_file() else ""
    return Weights(params, options, **kept)


def _read_workdir(place, step: int | None, trust: config.Trust) -> Weights:
    values = recipes.read_values(place / "config.json")
    values.pop("evals", None)  # Nobody asks them here, and they may name code.
    recipe = recipes.resolve(values, trust)
    params, _ = Checkpointer(str(place)).read_params(recipe.train_step().param_shapes(), step=step)
    params = {k: np.asarray(v, np.float32) for k, v in params.items()}
    pixels = dict(
        crop=recipe.data.still_crop, crop_fraction=recipe.data.crop_fraction, interpolation=recipe.data.interpolation
    )
    tokenizer = workdirs.tokenizer_of(place, recipe)
    return Weights(params, recipe.model, "big_vision", tokenizer, **pixels, objective=recipe.objective)


def read(source: Source) -> Weights:
    """See `read_model`."""
    return read_model(source.path, trust=source.trust)


def write(weights: Weights, target: Target) -> None:
    """See `write_folder`."""
    write_folder(target.path, weights)
