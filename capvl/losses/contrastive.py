"""Contrastive losses of a global batch whose similarity matrix no device ever holds.

Each device keeps its own images and sees all texts pass by: the texts go around a ring of the
data-parallel devices (`jax.lax.ppermute` under `jax.shard_map`), and each block of similarities
is used and thrown away. A device needs memory for its own rows and one block, however many
devices there are. Gradients are computed the same way: the gradient of a text travels with it.

Sigmoid: SigLIP, equation 1 (arXiv 2303.15343). Softmax: CLIP, figure 3 (arXiv 2103.00020).

Letters: I the images of a device, T the texts that are with it, C a chunk of them, D width.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from capvl.losses import ring
from capvl.losses.ring import CHUNK


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sigmoid_loss(image_BD, text_BD, scale, bias, chunk=CHUNK, mask_B=None):
    """Sum over all pairs of -log sigmoid(±(scale * image . text + bias)), + on the diagonal, divided by B.

    Args:
      image_BD, text_BD: normalised embeddings, float32, row i of both belonging together.
      scale, bias: float32 scalars; scale is the inverse temperature.
      chunk: texts of a block.
      mask_B: bool; rows and columns that are False take no part, nor in B; None for none such.

    Returns:
      The scalar loss.
    """
    return _sigmoid(image_BD, text_BD, scale, bias, chunk, mask_B, False)[0]


def _sigmoid(image_BD, text_BD, scale, bias, chunk, mask_B, with_gradient):
    """(loss, gradients or None) in one turn of the ring."""

    def local(image_ID, text_TD, scale, bias, mask_I):
        each = 1.0 / jnp.maximum(ring.sum_over_devices(mask_I.sum().astype(jnp.float32)), 1.0)

        def block(image_ID, passing, row, column, carry):
            text_CD, mask_C = passing
            weight = jnp.where(mask_I[:, None] & mask_C[None], each, 0.0)
            dots_IC = image_ID @ text_CD.T
            logits_IC = scale * dots_IC + bias
            sign_IC = jnp.where(row[:, None] == column[None], 1.0, -1.0)
            total, dimage_ID, dscale, dbias = carry
            total = total - (weight * jax.nn.log_sigmoid(sign_IC * logits_IC)).sum()
            if not with_gradient:
                return (total, dimage_ID, dscale, dbias), ()
            dlogits_IC = -weight * sign_IC * jax.nn.sigmoid(-sign_IC * logits_IC)
            dimage_ID = dimage_ID + scale * (dlogits_IC @ text_CD)
            dtext_CD = scale * (dlogits_IC.T @ image_ID)
            return (total, dimage_ID, dscale + (dlogits_IC * dots_IC).sum(), dbias + dlogits_IC.sum()), (dtext_CD,)

        zero = jnp.zeros((), jnp.float32)
        own = ring.own_rows(len(text_TD))
        travelling = ((text_TD, mask_I), own, *((jnp.zeros_like(text_TD),) if with_gradient else ()))

        def visit(travelling, carry):
            passing, column_T, *sums = travelling
            carry, added = ring.chunks(block, image_ID, own, passing, column_T, carry, chunk)
            return (passing, column_T, *(s + a for s, a in zip(sums, added, strict=True))), carry

        (_, _, *dtext), (total, dimage_ID, dscale, dbias) = ring.around(
            visit, travelling, (zero, jnp.zeros_like(image_ID), zero, zero)
        )
        total, dscale, dbias = (ring.sum_over_devices(x) for x in (total, dscale, dbias))
        return total, (dimage_ID, dtext[0], dscale, dbias) if with_gradient else None

    rows, mask_B = ring.rows(), jnp.ones(len(image_BD), bool) if mask_B is None else mask_B
    return ring.mapped(local, (rows, rows, P(), P(), rows), (P(), (rows, rows, P(), P()) if with_gradient else None))(
        image_BD, text_BD, scale, bias, mask_B
    )


def _sigmoid_forward(image_BD, text_BD, scale, bias, chunk, mask_B):
    return _sigmoid(image_BD, text_BD, scale, bias, chunk, mask_B, True)


def _sigmoid_backward(chunk, gradients, cotangent):
    return (*(cotangent * g for g in gradients), None)


sigmoid_loss.defvjp(_sigmoid_forward, _sigmoid_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def softmax_loss(image_BD, text_BD, scale, mask_B, chunk=CHUNK, ids_B=None):
    """Mean over the batch of half the sum of both cross-entropies: image -> its text, text -> its image.

    Args:
      image_BD, text_BD: normalised embeddings, float32, row i of both belonging together.
      scale: float32 scalar, the inverse temperature.
      mask_B: bool; rows and columns that are False take no part.
      chunk: texts of a block.
      ids_B: int32 of each row's image: rows of one image belong together, and share what is right evenly (ALBEF,
        arXiv 2107.07651, official code); None: each row is an image of its own.

    Returns:
      The scalar loss (differentiable), and how many images are most similar to a text of their own (not).
    """
    return _softmax(image_BD, text_BD, scale, mask_B, chunk, ids_B)[0]


def _softmax(image_BD, text_BD, scale, mask_B, chunk, ids_B):
    """((loss, correct), both log-sums, rows of each row's image, number of rows) in one turn."""

    def local(image_ID, text_TD, scale, mask_I, ids_I):
        own = ring.own_rows(len(image_ID)) if ids_I is None else ids_I

        def block(image_ID, passing, row, column, carry):
            text_CD, mask_C = passing
            logits_IC = _masked(scale * (image_ID @ text_CD.T), mask_I, mask_C)
            total_I, peak_I, own_I, *of_image = carry
            total_I, peak_I = _add_exponentials(total_I, peak_I, logits_IC)
            same_IC = row[:, None] == column[None]
            if ids_I is not None:
                same_IC = same_IC & mask_I[:, None] & mask_C[None]
                best_I, count_I = of_image
                best_I = jnp.maximum(best_I, jnp.where(same_IC, logits_IC, _LOW).max(axis=1))
                of_image = best_I, count_I + same_IC.sum(axis=1).astype(jnp.float32)
            own_I = own_I + jnp.where(same_IC, logits_IC, 0.0).sum(axis=1)
            total_C, peak_C = _add_exponentials(jnp.zeros(len(mask_C)), jnp.full(len(mask_C), _LOW), logits_IC.T)
            return (total_I, peak_I, own_I, *of_image), (total_C, peak_C)

        rows = jnp.zeros(len(image_ID), jnp.float32)
        low = jnp.full(len(image_ID), _LOW, jnp.float32)
        travelling = ((text_TD, mask_I), own, rows, low)

        def visit(travelling, carry):
            passing, column_T, total_T, peak_T = travelling
            carry, (total, peak) = ring.chunks(block, image_ID, own, passing, column_T, carry, chunk)
            return (passing, column_T, *_join(total_T, peak_T, total, peak)), carry

        carry = (rows, low, rows) if ids_I is None else (rows, low, rows, low, rows)
        (_, _, total_T, peak_T), (total_I, peak_I, own_I, *of_image) = ring.around(visit, travelling, carry)
        along_I, along_T = (peak_I + jnp.log(total_I), peak_T + jnp.log(total_T))
        count = jnp.maximum(ring.sum_over_devices(mask_I.sum().astype(jnp.float32)), 1.0)
        best_I, each_I = of_image or (own_I, None)
        if each_I is not None:
            each_I = jnp.maximum(each_I, 1.0)
            own_I = own_I / each_I
        loss = jnp.where(mask_I, 0.5 * (along_I + along_T) - own_I, 0.0).sum()
        correct = (mask_I & (best_I >= peak_I)).sum().astype(jnp.float32)
        return ring.sum_over_devices(loss) / count, ring.sum_over_devices(correct), along_I, along_T, each_I, count

    rows = ring.rows()
    loss, correct, *sums = ring.mapped(local, (rows, rows, P(), rows, rows), (P(), P(), rows, rows, rows, P()))(
        image_BD, text_BD, scale, mask_B, ids_B
    )
    return (loss, correct), sums


def _softmax_forward(image_BD, text_BD, scale, mask_B, chunk, ids_B):
    outputs, sums = _softmax(image_BD, text_BD, scale, mask_B, chunk, ids_B)
    return outputs, (image_BD, text_BD, scale, mask_B, ids_B, *sums)


def _softmax_backward(chunk, saved, cotangents):
    """A second turn: the weights of both softmaxes are recomputed from their log-sums."""

    def local(image_ID, text_TD, scale, mask_I, ids_I, along_I, along_T, each_I, weight):
        own = ring.own_rows(len(image_ID)) if ids_I is None else ids_I

        def block(image_ID, passing, row, column, carry):
            text_CD, mask_C, along_C = passing
            dots_IC = image_ID @ text_CD.T
            logits_IC = _masked(scale * dots_IC, mask_I, mask_C)
            both_IC = jnp.exp(logits_IC - along_I[:, None]) + jnp.exp(logits_IC - along_C[None])
            right_IC = (row[:, None] == column[None]).astype(jnp.float32)
            both_IC = both_IC - 2.0 * (right_IC if each_I is None else right_IC / each_I[:, None])
            dlogits_IC = jnp.where(mask_I[:, None] & mask_C[None], 0.5 * weight * both_IC, 0.0)
            dimage_ID, dscale = carry
            dimage_ID = dimage_ID + scale * (dlogits_IC @ text_CD)
            return (dimage_ID, dscale + (dlogits_IC * dots_IC).sum()), scale * (dlogits_IC.T @ image_ID)

        travelling = ((text_TD, mask_I, along_T), own, jnp.zeros_like(text_TD))

        def visit(travelling, carry):
            passing, column_T, dtext_TD = travelling
            carry, added_TD = ring.chunks(block, image_ID, own, passing, column_T, carry, chunk)
            return (passing, column_T, dtext_TD + added_TD), carry

        start = (jnp.zeros_like(image_ID), jnp.zeros((), jnp.float32))
        (_, _, dtext_TD), (dimage_ID, dscale) = ring.around(visit, travelling, start)
        return dimage_ID, dtext_TD, ring.sum_over_devices(dscale)

    image_BD, text_BD, scale, mask_B, ids_B, along_I, along_T, each_B, count = saved
    rows = ring.rows()
    dimage, dtext, dscale = ring.mapped(local, (rows, rows, P(), *(rows,) * 5, P()), (rows, rows, P()))(
        image_BD, text_BD, scale, mask_B, ids_B, along_I, along_T, each_B, cotangents[0] / count
    )
    return dimage, dtext, dscale, None, None


softmax_loss.defvjp(_softmax_forward, _softmax_backward)

_LOW = -1e30


def _masked(logits_IC, mask_I, mask_C):
    return jnp.where(mask_I[:, None] & mask_C[None], logits_IC, _LOW)


def _add_exponentials(total_I, peak_I, logits_IC):
    """Sums of exp(logits - peak) over the columns so far, and the peaks."""
    peak_of_block_I = logits_IC.max(axis=1)
    total_of_block_I = jnp.exp(logits_IC - peak_of_block_I[:, None]).sum(axis=1)
    return _join(total_I, peak_I, total_of_block_I, peak_of_block_I)


def _join(total_a, peak_a, total_b, peak_b):
    peak = jnp.maximum(peak_a, peak_b)
    return total_a * jnp.exp(peak_a - peak) + total_b * jnp.exp(peak_b - peak), peak
