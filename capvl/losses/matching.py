"""Image-text matching (ALBEF, arXiv 2107.07651; X-VLM, 2111.08276): its loss, and hard negatives drawn on the devices.

For each text an image that isn't its own is drawn from the softmax of their similarities, and for each image a text. As
in `capvl.losses.contrastive` texts go around a ring of the data-parallel devices, so that a device holds a block of the
similarities and never all; what was drawn is fetched around the same ring (`capvl.losses.ring.take_rows`). The host is
not asked.

Letters: I the images of a device, T the texts that are with it, C a chunk of them, E width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from capvl.losses import ring
from capvl.losses.ring import CHUNK

LEAST = 1e-5
"""What the original adds to each probability, so that any negative can be drawn."""


class Negatives(NamedTuple):
    """Rows of the batch, int32 (B,), and whether there was one to draw from, bool (B,).

    Attributes:
      image, image_there: of each text a negative image.
      text, text_there: of each image a negative text.
    """

    image: jax.Array
    image_there: jax.Array
    text: jax.Array
    text_there: jax.Array


def hard_negatives(
    image_BE, text_BE, scale, mask_B, ids_B, key: jax.Array, *, among: int = 0, chunk: int = CHUNK
) -> Negatives:
    """Draws them with probabilities proportional to softmax(scale * similarity) + LEAST, no gradient.

    The draw is a function of the key and the rows' numbers alone: it is the same on any number of devices.

    Args:
      image_BE, text_BE: normalised embeddings, float32, row i of both belonging together.
      scale: float32 scalar, the inverse temperature.
      mask_B: bool; rows that are False are not drawn, and draw none.
      ids_B: int32; rows of the same id are no negatives of each other; None: only a row of itself is none.
      key: of the draw.
      among: 0: negatives come from the whole batch; else from the block of so many consecutive rows that a row is in,
        over which the softmax goes too (the original: the rows of a GPU).
      chunk: texts of a block.
    """
    rows = ring.rows()
    arguments = (image_BE, text_BE, scale, mask_B, ids_B, key)

    def local(image_IE, text_TE, scale, mask_I, ids_I, key):
        sides = _Sides(ring.own_rows(len(image_IE)), mask_I, ids_I)
        weigh = _Weighing(scale, key, among)
        sums_I, sums_T = _log_sums(image_IE, text_TE, sides, weigh, chunk)
        return _draw(image_IE, text_TE, sides, weigh, sums_I, sums_T, chunk)

    found = ring.mapped(local, (rows, rows, P(), rows, rows, P()), (rows,) * 4)(
        *jax.lax.stop_gradient(arguments[:3]), *arguments[3:]
    )
    return Negatives(*found)


class _Sides(NamedTuple):
    """What is known of rows: their numbers in the batch, whether they count, and their images' ids (or None)."""

    row: jax.Array
    mask: jax.Array
    ids: Any


class _Weighing(NamedTuple):
    scale: jax.Array
    key: jax.Array
    among: int

    def logits(self, image_IE, text_CE, a: _Sides, b: _Sides):
        """(logits (I, C), -inf for pairs that no softmax goes over; which pairs are negatives)."""
        seen_IC = a.mask[:, None] & b.mask[None]
        if self.among:
            seen_IC = seen_IC & (a.row[:, None] // self.among == b.row[None] // self.among)
        own_IC = a.row[:, None] == b.row[None]
        if a.ids is not None:
            own_IC = own_IC | (a.ids[:, None] == b.ids[None])
        return jnp.where(seen_IC, self.scale * (image_IE @ text_CE.T), -jnp.inf), seen_IC & ~own_IC


def _log_sums(image_IE, text_TE, sides, weigh, chunk):
    """Log-sums of the exponentials of each image's and each text's logits; one turn of the ring."""

    def block(image_IE, passing, _, __, carry):
        text_CE, other = passing
        logits_IC, _ = weigh.logits(image_IE, text_CE, sides, other)
        carry = jnp.logaddexp(carry, jax.nn.logsumexp(logits_IC, axis=1))
        return carry, jax.nn.logsumexp(logits_IC, axis=0)

    def visit(travelling, sums_I):
        passing, column_T, sums_T = travelling
        sums_I, added_T = ring.chunks(block, image_IE, sides.row, passing, column_T, sums_I, chunk)
        return (passing, column_T, jnp.logaddexp(sums_T, added_T)), sums_I

    empty = jnp.full(len(image_IE), -jnp.inf, jnp.float32)
    (*_, sums_T), sums_I = ring.around(visit, ((text_TE, sides), sides.row, empty), empty)
    return sums_I, sums_T


def _draw(image_IE, text_TE, sides, weigh, sums_I, sums_T, chunk):
    """Of each text an image and of each image a text: the largest log-weight with Gumbel noise; another turn."""
    keys = jax.random.split(weigh.key)

    def block(image_IE, passing, _, __, best_I):
        text_CE, other, sums_C = passing
        logits_IC, negative_IC = weigh.logits(image_IE, text_CE, sides, other)

        def weights(sums, key):
            log_IC = jnp.log(jnp.exp(logits_IC - sums) + LEAST)
            return jnp.where(negative_IC, log_IC + _gumbel(key, sides.row, other.row), -jnp.inf)

        of_image_IC = weights(sums_I[:, None], keys[0])
        place_I = of_image_IC.argmax(axis=1)
        best_I = _better(best_I, (of_image_IC.max(axis=1), other.row[place_I]))
        of_text_IC = weights(sums_C[None], keys[1])
        return best_I, (of_text_IC.max(axis=0), sides.row[of_text_IC.argmax(axis=0)])

    def visit(travelling, best_I):
        passing, column_T, best_T = travelling
        best_I, found_T = ring.chunks(block, image_IE, sides.row, passing, column_T, best_I, chunk)
        return (passing, column_T, _better(best_T, found_T)), best_I

    none = jnp.full(len(image_IE), -jnp.inf, jnp.float32), sides.row
    travelling = ((text_TE, sides, sums_T), sides.row, none)
    (*_, best_T), best_I = ring.around(visit, travelling, none)
    return best_T[1], jnp.isfinite(best_T[0]), best_I[1], jnp.isfinite(best_I[0])


def _better(a, b):
    """Of two (value, row) the larger, and of equal ones the smaller row: in whatever order they are met."""
    first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] <= b[1]))
    return tuple(jnp.where(first, x, y) for x, y in zip(a, b, strict=True))


def _gumbel(key, row_I, row_C):
    """Gumbel noise (I, C) of pairs by their numbers in the batch."""

    def one(row_key, column):
        return jax.random.gumbel(jax.random.fold_in(row_key, column))

    keys_I = jax.vmap(lambda row: jax.random.fold_in(key, row))(row_I)
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys_I, row_C)


def matching_loss(logits_3R2, weights_3R) -> dict[str, jax.Array]:
    """Two-way cross-entropy of matching (X-VLM, equation 4), and the share that is right.

    Args:
      logits_3R2: of texts with their own image, with a negative image, and of images with a negative text, float32.
      weights_3R: which of them count.
    """
    label_3R = jnp.zeros(weights_3R.shape, jnp.int32).at[0].set(1)
    nll_3R = -jnp.take_along_axis(jax.nn.log_softmax(logits_3R2), label_3R[..., None], axis=-1)[..., 0]
    right_3R = (logits_3R2.argmax(axis=-1) == label_3R).astype(jnp.float32)
    count = jnp.maximum(weights_3R.sum(), 1.0)
    return {"itm": (weights_3R * nll_3R).sum() / count, "itm_right": (weights_3R * right_3R).sum() / count}
