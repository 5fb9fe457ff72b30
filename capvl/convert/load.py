"""Parameters to begin with: from a run, a converted folder or an .npz, positions resized where need be."""

import dataclasses
import os
import re

import jax
import numpy as np

from capvl import workdirs
from capvl.checkpoint import check_leaves
from capvl.config import Trust
from capvl.convert.folder import read_model
from capvl.convert.kinds import adapted
from capvl.convert.tokens import of_vocabulary
from capvl.data.text import tokenizers
from capvl.errors import UserError, nearest
from capvl.models.parameters import Blueprint
from capvl.models.pixels import PIXELS
from capvl.nn.positions import resize_grid
from capvl.nn.relative_positions import resize_tables
from capvl.recipes import own_code
from capvl.terminal import say
from capvl.weights import Weights


def load_parameters(
    path: str, model_options, only: tuple[str, ...] = (), *, tokenizer: str = "", trust: Trust = False
) -> dict[str, np.ndarray]:
    """float32 parameters by path for a model; encoder positions of another resolution are resized.

    Args:
      path: see `capvl.convert.folder.read_model`; several with + between them, the later ones adding what they have. A
        converted BERT gives the decoder of a GIT, the text tower of two towers, or an X-VLM's texts' encoders.
      model_options: of the model that they are for.
      only: regexes of the parameters to take; () for all.
      tokenizer: path of the one that the model's texts go through; "" for any.
      trust: see `capvl.convert.folder.read_model`.

    Raises:
      UserError: missing, unreadable, of another model, or of another vocabulary.
    """
    blueprint = Blueprint(model_options)
    shapes = blueprint.shapes
    for pattern in only:
        if not any(re.fullmatch(pattern, name) for name in shapes):
            raise UserError(f"init_only: {pattern!r} matches no parameter." + nearest(pattern, shapes))
    params: dict[str, np.ndarray] = {}
    for part in path.split("+"):
        try:
            weights = _for_pixels(read_model(part.strip(), trust=trust), getattr(model_options, "pixels", ""))
        except UserError as e:
            raise UserError(f"init_from: {e}") from e
        fitting = _fitting(weights, model_options, shapes, part.strip())
        params |= fitting
        taken = [n for n in fitting if n in shapes and (not only or any(re.fullmatch(p, n) for p in only))]
        _check_computed(weights.options, model_options, taken, part.strip())
        if tokenizer and of_vocabulary(blueprint.axes[name] for name in taken):
            _check_vocabulary(weights.tokenizer, tokenizer, part.strip())
    if only:
        params, shapes = (
            {k: v for k, v in named.items() if any(re.fullmatch(p, k) for p in only)} for named in (params, shapes)
        )
    check_leaves({k: [list(v.shape), str(v.dtype)] for k, v in params.items()}, shapes, path)
    return params


# What a tower does with its parameters, and no shape tells.
_COMPUTED = {
    "encoder/": ("activation", "eps", "pixels"),
    "text/": ("text_activation", "text_eps", "text_norm", "text_causal", "first_position"),
    "decoder/": ("norm", "text_activation", "text_eps", "embedding_eps"),
}


def _check_computed(theirs, ours, taken: list[str], path: str) -> None:
    """Raises UserError where the model would compute something else from the parameters of a tower."""
    for tower, names in _COMPUTED.items():
        if not any(name.startswith(tower) for name in taken):
            continue
        pairs = {n: (_option(ours, n), _option(theirs, n)) for n in names if hasattr(ours, n) and hasattr(theirs, n)}
        different = [f"model.{n}={there!r} (here {here!r})" for n, (here, there) in pairs.items() if here != there]
        if different:
            raise UserError(
                f"init_from: the parameters of {path!r} under {tower} were trained with {', '.join(different)}."
            )


def _option(options, name: str):
    """A value; a text tower's own "" or 0 stands for the image tower's."""
    value = getattr(options, name)
    return value or getattr(options, name.removeprefix("text_")) if name in ("text_activation", "text_eps") else value


def _check_vocabulary(theirs: str, ours: str, path: str) -> None:
    if not os.path.isfile(theirs):
        say(f"{path} has no tokenizer: whether its ids mean what those of {ours} do is not known.")
        return
    tokenizers.check_same_texts(ours, theirs)


def _fitting(weights: Weights, model_options, shapes, path: str) -> dict[str, np.ndarray]:
    """Parameters by the names of the model that they are for; its encoder's positions resized, absolute or relative."""
    params = dict(adapted(weights, model_options, path))
    first = int(getattr(weights.options, "class_position", False))
    resized = {}
    for name, value in params.items():
        if name not in shapes or value.shape == shapes[name].shape:
            continue
        if name == "encoder/positions":
            resized[name] = resize_grid(value, shapes[name].shape[0], weights.resize, first)
        elif re.fullmatch(r"encoder/stages/\d+/offsets", name):
            resized[name] = resize_tables(value, shapes[name].shape[1])
    return params | resized


def _for_pixels(weights: Weights, pixels: str) -> Weights:
    """The weights of an encoder of patches that sees pixels normalised otherwise, and computes the same of an image.

    What pixels of one kind are in another is linear in each channel, so it becomes part of the patches' embedding.
    """
    own, name = getattr(weights.options, "pixels", pixels), "encoder/stem/kernel"
    if own == pixels or name not in weights.params or weights.options.stem != "patch":
        return weights
    (mean, std), (own_mean, own_std) = (np.asarray(PIXELS[kind], np.float64) for kind in (pixels, own))
    kernel_PQcD = np.asarray(weights.params[name], np.float64) / own_std[None, None, :, None]
    offset_D = np.einsum("pqcd,c->d", kernel_PQcD, mean - own_mean)
    stem = {
        name: kernel_PQcD * std[None, None, :, None],
        "encoder/stem/bias": weights.params["encoder/stem/bias"] + offset_D,
    }
    params = weights.params | {key: value.astype(np.float32) for key, value in stem.items()}
    return dataclasses.replace(weights, params=params, options=dataclasses.replace(weights.options, pixels=pixels))


def initial_state(recipe, step, mesh):
    """A fresh state, created where it belongs; parameters from `init_from` where it is set."""
    if not recipe.init_from:
        return step.make_state(mesh)
    shardings = step.blueprint.shardings(mesh)
    named = workdirs.tokenizer_named(recipe)
    loaded = load_parameters(
        recipe.init_from, recipe.model, recipe.init_only, tokenizer=named, trust=own_code(recipe.source)
    )
    say(f"{len(loaded)} of {len(shardings)} parameters from {recipe.init_from}.")
    return step.make_state(mesh, {k: jax.device_put(v, shardings[k]) for k, v in loaded.items()})
