"""Running a function of the model over all images of a data set, or over many texts."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from capvl.data.examples.labels import ImageLabel
from capvl.data.images.crops import Crop
from capvl.data.reading import loader
from capvl.data.text.tokenizers import check_whole, too_long
from capvl.errors import UserError
from capvl.evals import Context, finite, to_host
from capvl.objectives.images import unit_range
from capvl.parallel.rules import batch_sharding
from capvl.terminal import progress, say


def image_transform(context: Context) -> ImageLabel:
    """How images come to the model in evaluations: squashed where its training squashed them, else a central square."""
    return ImageLabel(Crop.of_model(context.recipe.data, context.recipe.model, train=False))


def compile_images(context: Context, function: Callable[[Any, jax.Array], jax.Array]):
    """jitted (params, uint8 images) -> function(model, images in [-1, 1])."""
    return jax.jit(lambda params, image: function(context.blueprint.bind(params), unit_range(image)))


def compile_texts(context: Context, function: Callable[[Any, jax.Array], jax.Array]):
    """jitted (params, tokens) -> function(model, tokens)."""
    return jax.jit(lambda params, text: function(context.blueprint.bind(params), text))


def over_images(context: Context, source, function, params, what: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Outputs of a compiled function for every image, and the `label` and `index` of each.

    Raises:
      UserError: an image can't be decoded.
      NotFiniteError: an output is NaN or infinite.
    """
    outputs, rest = [], {"label": [], "index": []}
    batches = loader.eval_batches(source, image_transform(context), context.batch)
    for host_batch in progress(batches, -(-len(source) // context.batch), what):
        batch = loader.to_device(host_batch, batch_sharding(context.mesh))
        mask = to_host(batch["mask"])
        outputs.append(to_host(function(params, batch["image"]))[mask])
        for key, values in rest.items():
            values.append(to_host(batch[key])[mask])
    if sum(map(len, outputs)) < len(source):
        raise UserError(f"Data set {source.name!r} has images that can't be decoded; prepare it again.")
    return finite(np.concatenate(outputs), what), {k: np.concatenate(v) for k, v in rest.items()}


def over_rows(context: Context, rows: dict[str, np.ndarray], function, params, what: str) -> np.ndarray:
    """Outputs of a compiled function of (params, batch) for rows of arrays of equal length.

    Raises:
      NotFiniteError: an output is NaN or infinite.
    """
    count, size = len(next(iter(rows.values()))), context.batch
    mine = loader.Host.this().rows(size)
    outputs = []
    for first in progress(range(0, count, size), -(-count // size), what):
        index = np.minimum(np.arange(first + mine.start, first + mine.stop), count - 1)
        batch = loader.to_device({k: v[index] for k, v in rows.items()}, batch_sharding(context.mesh))
        outputs.append(to_host(function(params, batch))[: count - first])
    return finite(np.concatenate(outputs), what)


def over_texts(context: Context, texts: list[str], function, params, what: str) -> np.ndarray:
    """Outputs of a compiled function of (params, tokens) for texts.

    Raises:
      UserError: there is none, or one is empty.
    """
    tokens = tokenize(context, texts)
    return over_rows(context, {"text": tokens}, lambda p, batch: function(p, batch["text"]), params, what)


def tokenize(context: Context, texts: list[str], *, whole: bool = False) -> np.ndarray:
    """Tokens (N, L) by the recipe's tokenizer.

    Args:
      context: of the run.
      texts: longer ones are cut as in training; how many these are is said.
      whole: they are an error: names that are chosen among.

    Raises:
      UserError: there is no text, one is empty, or doesn't fit.
    """
    if not texts or not all(t.strip() for t in texts):
        raise UserError("There is an empty text to evaluate." if texts else "There are no texts to evaluate.")
    tokenizer = context.recipe.tokenizer()
    length = context.recipe.model.length
    if whole:
        check_whole(tokenizer, texts, length)
    elif cut := len(too_long(tokenizer, texts, length)):
        say(f"{cut} of {len(texts)} texts have more than {length} tokens and are cut.")
    return np.stack([tokenizer(text, length) for text in texts])
