"""A model's functions as StableHLO with a free batch size, parameters inside, for programs that don't have capvl."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from capvl import storage
from capvl.convert.files import Target
from capvl.data.examples.grounded import vocabulary
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.inference.detecting import buckets, detect, prompts_of, states_of
from capvl.models.abilities import Ability, abilities
from capvl.models.parameters import Blueprint
from capvl.objectives.images import unit_range
from capvl.weights import Weights

PLATFORMS = ("cpu", "cuda", "tpu")


class Exported(NamedTuple):
    """A function that is exported.

    Attributes:
      call: the function.
      arguments: shape without the batch and dtype of each of its arguments.
    """

    call: Callable
    arguments: tuple[tuple[tuple[int, ...], type], ...]


def functions(weights: Weights) -> dict[str, Exported]:
    """What a model with an image tower can do, by name; the first has no name of its own in files.

    `image`: uint8 images -> embeddings (two towers, normalised) or pooled features. `text`: tokens -> embeddings.

    Raises:
      UserError: the model has no image tower.
    """
    options, able = weights.options, abilities(weights.options)
    if Ability.IMAGES not in able:
        raise UserError("Only models with an image tower, and detectors, are exported to StableHLO.")
    blueprint = Blueprint(options)
    params = {k: jnp.asarray(v) for k, v in weights.params.items()}

    def image(pixels):
        model = blueprint.bind(params)
        embed = model.embed_image if Ability.TEXTS in able else model.features
        return embed(unit_range(pixels))

    def text(tokens):
        return blueprint.bind(params).embed_text(tokens)

    out = {"image": Exported(image, ((options.image_shape(), jnp.uint8),))}
    if Ability.TEXTS in able:
        out["text"] = Exported(text, (((options.length,), jnp.int32),))
    return out


def detectors(weights: Weights, classes: tuple[str, ...]) -> dict[str, Exported]:
    """Detection of classes, from pixels to boxes: what they are called is encoded here, and no text is read later.

    `wide` takes images that are no higher than wide, `tall` the others; a model of squares has `wide` alone. Arguments:
    images (B, H, W, 3) uint8, each at the upper left of its place, in the model's resolution; (height, width) of each
    in pixels without what is around it, int32 (B, 2). Results, best first: boxes (B, M, 4) in fractions of the image
    without what is around it, scores (B, M), numbers of classes (B, M) or -1, and which of them there are (B, M).
    Scores of an image for which the model gives NaN or infinity are NaN.

    Args:
      weights: of a model that detects.
      classes: their names; () for all of a closed list.

    Raises:
      UserError: there are no classes, or no tokenizer; or see `capvl.data.examples.grounded.vocabulary`.
    """
    options = weights.options
    names = classes or options.classes
    if not names:
        raise UserError("A detector is exported with what it looks for: give names, one a line, by --classes=FILE.")
    if not (options.classes or weights.tokenizer):
        raise UserError("The model has no tokenizer, which its classes need; give one by --tokenizer=FILE.")
    tokenizer = None if options.classes else tokenizers.load(weights.tokenizer, options.reads_start)
    listed = vocabulary(options, tokenizer, names, prefix=getattr(weights.objective, "prefix", ""))
    blueprint, prompts = Blueprint(options), prompts_of(listed.prompts())
    params = {k: jnp.asarray(v) for k, v in weights.params.items()}
    states = jax.jit(lambda params: states_of(blueprint.bind(params), prompts.tokens_RPL))(params)

    def one(image_HWC, size_2):
        inside = [jnp.arange(side) < size_2[i] for i, side in enumerate(image_HWC.shape[:2])]
        alpha_HW = (inside[0][:, None] & inside[1][None]).astype(jnp.uint8)
        seen = jnp.concatenate([image_HWC * alpha_HW[..., None], 255 * alpha_HW[..., None]], axis=-1)
        rows = {"image": unit_range(seen)[None], "size": size_2[None], "whole": size_2[None]}
        found = detect(blueprint.bind(params), rows, prompts, states)
        return found.box_BM4[0], found.score_BM[0], found.label_BM[0], found.valid_BM[0]

    def found(images, sizes):
        # One after another: an image of a detector fills a chip, and the memory is that of one.
        return jax.lax.map(lambda row: one(*row), (images, sizes))

    shapes = dict(zip(("wide", "tall"), buckets(options), strict=False))
    return {name: Exported(found, (((*bucket, 3), jnp.uint8), ((2,), jnp.int32))) for name, bucket in shapes.items()}


def export(path: str, weights: Weights, classes: tuple[str, ...] = ()) -> list[str]:
    """Writes one file a function; returns their paths.

    The first function goes to `path`; others to the same name with theirs, such as `.text`, before its suffix.
    `jax.export.deserialize(file.read()).call(images)` runs one, on a CPU, a GPU or a TPU.

    Args:
      path: of the first file.
      weights: the model.
      classes: what a detector looks for.

    Raises:
      UserError: the model has no image tower, a detector has no classes or another model has, or the file can't be
        written.
    """
    if Ability.DETECTS in abilities(weights.options):
        made = detectors(weights, classes)
    elif classes:
        raise UserError("--classes are what a detector looks for, and this model is none; leave them out.")
    else:
        made = functions(weights)
    written = []
    for name, function in made.items():
        (batch,) = jax.export.symbolic_shape("batch")
        arguments = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in function.arguments]
        exported = jax.export.export(jax.jit(function.call), platforms=PLATFORMS)(*arguments)
        file = pathlib.Path(path)
        file = file.with_name(f"{file.stem}.{name}{file.suffix}") if written else file
        try:
            with storage.new_file(epath.Path(file)) as temporary:
                pathlib.Path(temporary).write_bytes(exported.serialize())
        except OSError as e:
            raise UserError(f"{str(file)!r} can't be written: {e.strerror or e}.") from e
        written.append(str(file))
    return written


def write(weights: Weights, target: Target) -> None:
    """See `export`."""
    export(target.path, weights, target.classes)
