"""Files of the official GLIP, in and out."""

import dataclasses
import pathlib

from capvl.convert import files, glip, tokens
from capvl.convert.assembling import assemble
from capvl.convert.files import Source, Target
from capvl.convert.glip import Told
from capvl.convert.pixels import Pixels
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.glip import GlipOptions
from capvl.weights import Weights

_INTERPOLATION = "bilinear"


def read(source: Source) -> Weights:
    """A GLIP with the tokenizer beside it, if there is one. What its arrays don't tell is as in the released models,
    unless config.json says otherwise, as that which `write` wrote.

    Raises:
      UserError: it is another model, or config.json says what can't be.
    """
    said = {field.name: source.config.get(field.name, field.default) for field in dataclasses.fields(Told)}
    for name, value in said.items():
        if type(value) is not type(getattr(Told(), name)):
            raise UserError(f"{source.path!r} has {name}={value!r} in config.json.")
    told = Told(**said)
    told = dataclasses.replace(told, text_heads=told.text_heads or source.heads)
    options, params = glip.read_official(source.arrays, told)
    pixels = Pixels(options.pixels, interpolation=source.config.get("interpolation", _INTERPOLATION))
    tokenizer = tokens.find(source.path)
    return assemble(source, options, params, resize="hugging_face", pixels=pixels, tokenizer=tokenizer)


def write(weights: Weights, target: Target) -> None:
    """Writes a folder with model.safetensors by the official names and config.json, or for a name that ends with .pth
    the file that the official code loads.

    Raises:
      UserError: the model is not of a form that the official code has, or can't be written.
    """
    options = weights.options
    if not isinstance(options, GlipOptions):
        raise UserError(f"The official GLIP has no form of this model, which has {type(options).__name__}.")
    state = glip.write_official(options, weights.params)
    if target.path.endswith(".pth"):
        files.write_torch(target.path, {"model": {f"module.{name}": value for name, value in state.items()}})
        return
    told = {field.name: getattr(options, field.name, 0) for field in dataclasses.fields(Told)}
    told |= {"text_heads": sizes.parse_size(options.text).heads, "interpolation": weights.interpolation}
    folder = files.write_model(target.path, state, {"model_type": "glip"} | told)
    if weights.tokenizer:
        own = pathlib.Path(weights.tokenizer)
        tokens.copy(weights.tokenizer, folder, tokens.NAMES_BY_SUFFIX.get(own.suffix, own.name), weights.clean)
