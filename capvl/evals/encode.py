"""Running a function of the model over all images of a data set, or over many texts."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from capvl.data.examples.labels import ImageLabel
from capvl.data.images.crops import Crop
from capvl.data.reading import loader
from capvl.data.text.tokenizers import too_long
from capvl.errors import UserError
from capvl.evals import Context, finite, to_host
from capvl.inference.inputs import tokens
from capvl.parallel.rules import batch_sharding
from capvl.terminal import progress, say


def image_transform(context: Context) -> ImageLabel:
    """How images come to the model in evaluations: squashed where its training squashed them, else a central square."""
    return ImageLabel(Crop.of_model(context.data, context.model, train=False))


def grey_image(options) -> np.ndarray:
    """One image (or clip) without content as a model with these options sees it, in [-1, 1]: the blind control's."""
    grey = np.zeros((1, *options.image_shape()), np.float32)
    grey[..., 3:] = 1.0
    return grey


def grey_out(image: np.ndarray) -> None:
    """Makes uint8 images (…, C) grey in place; padding, where there is a fourth channel, stays what it is."""
    image[..., :3] = 127


def image_batches(context: Context, source, what: str, *, blind: bool = False) -> Iterator[dict[str, jax.Array]]:
    """Every image of a data set once, in order, on the devices: `image`, `label`, `index`, and `mask`, which is False
    for rows of padding and of images that can't be decoded.

    Args:
      context: of the run.
      source: the opened data set.
      what: for the progress bar.
      blind: the images are grey.
    """
    batches = loader.eval_batches(source, image_transform(context), context.batch)
    for host_batch in progress(batches, -(-len(source) // context.batch), what):
        if blind:
            grey_out(host_batch["image"])
        yield loader.to_device(host_batch, batch_sharding(context.mesh))


def row_batches(context: Context, rows: Any, what: str) -> Iterator[tuple[Any, int]]:
    """(batch on the devices, how many of its rows are real) of all rows, in order; the last row fills the last batch.

    Args:
      context: of the run.
      rows: arrays of equal length: one, or several in a tuple or dict.
      what: for the progress bar.
    """
    leaves, structure = jax.tree.flatten(rows)
    count, size = len(leaves[0]), context.batch
    mine = loader.Host.this().rows(size)
    for first in progress(range(0, count, size), -(-count // size), what):
        index = np.minimum(np.arange(first + mine.start, first + mine.stop), count - 1)
        part = {str(i): leaf[index] for i, leaf in enumerate(leaves)}
        batch = loader.to_device(part, batch_sharding(context.mesh))
        yield jax.tree.unflatten(structure, [batch[str(i)] for i in range(len(leaves))]), min(size, count - first)


def over_images(
    context: Context, source, function, params, what: str, *, blind: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Outputs of a compiled function for every image, and the `label` and `index` of each; see `image_batches`.

    Raises:
      UserError: an image can't be decoded.
      NotFiniteError: an output is NaN or infinite.
    """
    outputs, rest = [], {"label": [], "index": []}
    for batch in image_batches(context, source, what, blind=blind):
        mask = to_host(batch["mask"])
        outputs.append(to_host(function(params, batch["image"]))[mask])
        for key, values in rest.items():
            values.append(to_host(batch[key])[mask])
    check_decoded(source, sum(map(len, outputs)))
    return finite(np.concatenate(outputs), what), {k: np.concatenate(v) for k, v in rest.items()}


def check_decoded(source, count: int) -> None:
    """Raises UserError where fewer images could be decoded than a data set has."""
    if count < len(source):
        raise UserError(f"Data set {source.name!r} has images that can't be decoded; prepare it again.")


def over_rows(context: Context, rows: Any, function, params, what: str) -> np.ndarray:
    """Outputs of a compiled function of (params, batch) for rows; see `row_batches`.

    Raises:
      NotFiniteError: an output is NaN or infinite.
    """
    outputs = [to_host(function(params, batch))[:count] for batch, count in row_batches(context, rows, what)]
    return finite(np.concatenate(outputs), what)


def over_texts(context: Context, texts: list[str], function, params, what: str) -> np.ndarray:
    """Outputs of a compiled function of (params, tokens) for texts.

    Raises:
      UserError: there is none, or one is empty.
    """
    return over_rows(context, tokenize(context, texts), function, params, what)


def tokenize(context: Context, texts: list[str], *, whole: bool = False) -> np.ndarray:
    """Tokens (N, L) by the run's tokenizer.

    Args:
      context: of the run.
      texts: longer ones are cut as in training; how many these are is said.
      whole: they are an error: names that are chosen among.

    Raises:
      UserError: there is no text, one is empty, or doesn't fit.
    """
    if not texts or not all(t.strip() for t in texts):
        raise UserError("There is an empty text to evaluate." if texts else "There are no texts to evaluate.")
    tokenizer = context.tokenizer()
    length = context.model.length
    if whole:
        return tokens(tokenizer, texts, length, whole=True)
    if cut := len(too_long(tokenizer, texts, length)):
        say(f"{cut} of {len(texts)} texts have more than {length} tokens and are cut.")
    return tokens(tokenizer, texts, length)
