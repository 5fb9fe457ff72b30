"""Files of the official X-VLM, in and out: which model's names they have, and what goes with them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

from capvl.convert import files, tokens, xvlm, xvlm_judge, xvlm_writing
from capvl.convert.assembling import assemble
from capvl.convert.files import Source, Target
from capvl.convert.pixels import Pixels
from capvl.data.text.cleaning import CLEANERS, settings
from capvl.errors import UserError, nearest
from capvl.models import sizes
from capvl.models.xvlm import XVlmOptions
from capvl.models.xvlm_answers import XVlmAnswersOptions
from capvl.models.xvlm_captioner import XVlmCaptionerOptions
from capvl.models.xvlm_judge import JudgeOptions
from capvl.terminal import say
from capvl.weights import CHOICES, Weights


@dataclasses.dataclass(frozen=True)
class Form:
    """A model of the official code.

    Attributes:
      has: beginnings of names that its state dict has, and others don't have together.
      options: class of ours.
      read, write: (state dict, image_heads=, text_heads=) -> (options, parameters), and back.
    """

    has: tuple[str, ...]
    options: type
    read: Callable
    write: Callable


_WRITE = xvlm_writing.write_official
# The first whose names are there reads.
FORMS = (
    Form(("text_encoder.", "text_decoder."), XVlmAnswersOptions, xvlm_writing.read_answers, _WRITE),
    Form(("text_decoder.",), XVlmCaptionerOptions, xvlm_writing.read_captioner, _WRITE),
    Form(("text_encoder.", "cls_head."), JudgeOptions, xvlm_judge.read_official, xvlm_judge.write_official),
    Form(("text_encoder.", "ta_head."), JudgeOptions, xvlm_judge.read_official, xvlm_judge.write_official),
    Form(("text_encoder.",), XVlmOptions, xvlm.read_official, xvlm.write_official),
)


def form_of(names: Iterable[str]) -> Form:
    """The form whose names are in a state dict.

    Raises:
      UserError: there is none.
    """
    names = list(names)
    for form in FORMS:
        if all(any(name.startswith(prefix) for name in names) for prefix in form.has):
            return form
    raise UserError("The weights have no text_encoder and no text_decoder, so they are not X-VLM's official ones.")


OFFICIAL = {"reads_end": True, "crop": "squash", "crop_fraction": 1.0, "interpolation": "bicubic", "clean": "xvlm"}
"""How the official code reads images and texts; `reads_end` is what the arrays say where a file doesn't."""


def read(source: Source) -> Weights:
    """An X-VLM with a tokenizer where there is one beside it. Images and texts are read as by the official code, or as
    config.json says that `write` wrote.

    Raises:
      UserError: the file is of no known form, or config.json says something else.
    """
    heads = {f"{part}_heads": source.config.get(f"{part}_heads", source.heads) for part in ("image", "text")}
    options, params = form_of(source.arrays).read(source.arrays, **heads)
    told = {name: source.config.get(name, value) for name, value in OFFICIAL.items()}
    for name, known in (CHOICES | {"clean": ("", *CLEANERS), "reads_end": (True, False)}).items():
        if name in told and told[name] not in known:
            raise UserError(f"{source.path!r} has {name}={told[name]!r} in config.json." + nearest(told[name], known))
    if "reads_end" in source.config and hasattr(options, "reads_end"):
        options = dataclasses.replace(options, reads_end=told["reads_end"])
    pixels = Pixels(options.pixels, told["crop"], told["crop_fraction"], told["interpolation"])
    tokenizer = tokens.find(source.path)
    return assemble(
        source, options, params, resize="hugging_face", pixels=pixels, tokenizer=tokenizer, clean=told["clean"]
    )


def write(weights: Weights, target: Target) -> None:
    """Writes a folder with model.safetensors by the official names and config.json, or for a name that ends with .th or
    .pth the file that the official code loads.

    Raises:
      UserError: the model is not of a form that the official code has, or can't be written.
    """
    options = weights.options
    form = next((form for form in FORMS if type(options) is form.options), None)
    if form is None:
        raise UserError(f"The official X-VLM has no form of this model, which has {type(options).__name__}.")
    state = form.write(options, weights.params)
    how = {name: getattr(weights, name, getattr(options, name, True)) for name in OFFICIAL}
    how["clean"] = (settings(weights.tokenizer) if weights.tokenizer else {}).get("clean", weights.clean)
    other = [f"{name}={how[name]!r}" for name in ("crop", "interpolation", "clean") if how[name] != OFFICIAL[name]]
    if other:
        say(f"The official code reads images and texts in its own way, without this model's {', '.join(other)}.")
    if target.path.endswith((".th", ".pth")):
        files.write_torch(target.path, {"model": state})
        return
    folder = files.write_model(target.path, state, _config(options) | how)
    if weights.tokenizer:
        own = pathlib.Path(weights.tokenizer)
        tokens.copy(weights.tokenizer, folder, tokens.NAMES_BY_SUFFIX.get(own.suffix, own.name), weights.clean)


def _config(options: Any) -> dict[str, Any]:
    """What the arrays don't tell."""
    text = sizes.parse_size(options.text)
    return {"model_type": "xvlm", "image_heads": options.encoder_size.heads, "text_heads": text.heads}
