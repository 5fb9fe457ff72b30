"""Running a function of the model over all images of a data set, or over many texts."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from capvl.data.examples.labels import ImageLabel
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.reading import loader
from capvl.data.reading.evaluating import NoImageError, Numbers, eval_batches
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


def over_batches(
    context: Context, source, transform, function, what: str, *, after=None, limit: int = 0, blind: bool = False
) -> list:
    """What a function gives for every example of a source, batch by batch, on the host.

    All evaluators that look at images come here. Batches are made ahead (`capvl.data.reading.evaluating`), a batch is
    on its way to the devices while they compute the one before, and what is computed is fetched a batch late, so that
    the devices don't wait for the host.

    Args:
      context: of the run.
      source: of examples: it has a length, and a name for messages.
      transform: the evaluation form of a transform.
      function: batch on the devices -> device arrays, one or several in a tuple or dict. Beside the transform's arrays
        a batch has `index`, and `mask`, which is False for rows of padding and of images that can't be decoded.
      what: for the progress bar.
      after: makes what is kept of a batch of its arrays, now NumPy arrays; None to keep these.
      limit: the first so many examples; 0 for all.
      blind: the images are grey.
    """
    data, sharding, kept, waiting = context.data, batch_sharding(context.mesh), [], None
    how = {"threads": data.threads, "workers": data.workers, "prefetch": data.prefetch}
    host_batches = eval_batches(source, transform, context.batch, limit=limit, **how)

    def fetch(arrays) -> None:
        found = jax.tree.map(to_host, arrays)
        kept.append(after(found) if after else found)

    with contextlib.closing(host_batches):
        count = min(len(source), limit or len(source))
        for host_batch in progress(host_batches, -(-count // context.batch), what):
            if blind:
                grey_out(host_batch["image"])
            late, waiting = waiting, function(loader.to_device(host_batch, sharding))
            if late is not None:
                fetch(late)
        if waiting is not None:
            fetch(waiting)
    return kept


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


def over_made(context: Context, make, count: int, function, what: str, *, blind: bool = False) -> tuple[Any, dict]:
    """What a function gives for rows that are made one by one, each with an image.

    Args:
      context: of the run.
      make: number of a row -> its arrays; it raises BadImageError where its image can't be used.
      count: of the rows.
      function: batch on the devices -> device array.
      what: they are, for messages and the progress bar.
      blind: the images are grey.

    Returns:
      the outputs of the rows whose images can be used, None where there are none; and number -> why of the others,
      which is told of the first only.

    Raises:
      NotFiniteError: an output is NaN or infinite.
    """

    def outputs(batch):
        index, mask = batch.pop("index"), batch.pop("mask")
        return function(batch), index, mask

    def real(found):
        output, index, mask = found
        return output[mask], index[mask]

    rows = Numbers(what, count)
    try:
        kept = over_batches(context, rows, lambda n, _: make(n), outputs, what, after=real, blind=blind)
    except NoImageError:
        kept = []
    numbers = np.concatenate([index for _, index in kept]) if kept else np.zeros(0, int)
    bad = dict.fromkeys(np.setdiff1d(np.arange(count), numbers).tolist(), "")
    for n in list(bad)[:1]:
        try:
            make(n)
        except BadImageError as e:
            bad[n] = str(e)
    return (finite(np.concatenate([output for output, _ in kept]), what) if kept else None), bad


def over_images(
    context: Context, source, function, params, what: str, *, blind: bool = False
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Outputs of a compiled function for every image, and the `label` and `index` of each; see `over_batches`.

    Raises:
      UserError: an image can't be decoded.
      NotFiniteError: an output is NaN or infinite.
    """

    def outputs(batch):
        return function(params, batch["image"]), {key: batch[key] for key in ("label", "index", "mask")}

    def real(found):
        output, rest = found
        mask = rest.pop("mask")
        return output[mask], {key: values[mask] for key, values in rest.items()}

    kept = over_batches(context, source, image_transform(context), outputs, what, after=real, blind=blind)
    found, rest = zip(*kept, strict=True)
    check_decoded(source, sum(map(len, found)))
    return finite(np.concatenate(found), what), {k: np.concatenate([part[k] for part in rest]) for k in rest[0]}


def check_decoded(source, count: int) -> None:
    """Raises UserError where fewer images could be decoded than a data set has."""
    if count < len(source):
        raise UserError(f"Data set {source.name!r} has images that can't be decoded; prepare it again.")


def over_rows(context: Context, rows: Any, function, params, what: str) -> np.ndarray:
    """Outputs of a compiled function of (params, batch) for rows; see `row_batches`.

    Raises:
      NotFiniteError: an output is NaN or infinite.
    """
    outputs, waiting = [], None
    for batch, count in row_batches(context, rows, what):
        late, waiting = waiting, (function(params, batch), count)
        if late is not None:  # One batch behind, as in `over_batches`.
            outputs.append(to_host(late[0])[: late[1]])
    outputs.append(to_host(waiting[0])[: waiting[1]])
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
