"""From logits of places and tokens to boxes (GLIP, arXiv 2112.03857, section 3.1), with static shapes, on the device.

Class scores from tokens, a threshold, the best places and classes of each level, boxes, suppression, the best of all.

Nothing of the size (places, classes) is sorted, nor is it there at once where classes are many: of a level's k best
(place, class) pairs, all are in the k places with the best best class, so that places are ranked first, a chunk of
classes at a time, and classes are looked at again in k places only.

Letters: B images, N places of all levels or of one, L tokens, C classes, K candidates, M boxes that are given.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from capvl.nn import suppression
from capvl.nn.anchors import STRIDES, anchors, clip, decode, fractions

KINDS = ("mean", "max", "power")
CHUNK = 128


class Detections(NamedTuple):
    """Boxes found in images, by falling score.

    Attributes:
      box_BM4: fractions of the padded image, float32; 0 where there is none.
      score_BM: float32 in 0 to 1; 0 where there is none.
      label_BM: int32 number of the class; -1 where there is none.
      valid_BM: which there are, bool: the first.
    """

    box_BM4: jax.Array
    score_BM: jax.Array
    label_BM: jax.Array
    valid_BM: jax.Array


def class_scores(logits_BNL, weights_BLC, kind: str = "mean"):
    """Scores of classes from those of their tokens, float32 (B, N, C) in 0 to 1; 0 for a class without tokens.

    Args:
      logits_BNL: of places and tokens.
      weights_BLC: the share of each token in each class, float32, each class's adding up to 1; not 0 for its tokens.
        The identity gives tokens as classes ("ONEHOT" of GLIP's code).
      kind: "mean" of the tokens' probabilities by these shares; "max"; or "power", their geometric mean.

    Raises:
      ValueError: no such kind.
    """
    logits_BNL = logits_BNL.astype(jnp.float32)
    # Float32 on all chips: of scores near the threshold three digits would not do.
    highest = jax.lax.Precision.HIGHEST
    if kind == "mean":
        return jnp.einsum("bnl,blc->bnc", jax.nn.sigmoid(logits_BNL), weights_BLC, precision=highest)
    if kind == "power":
        log_BNC = jnp.einsum("bnl,blc->bnc", jax.nn.log_sigmoid(logits_BNL), weights_BLC, precision=highest)
        return jnp.where((weights_BLC > 0).any(axis=1, keepdims=True), jnp.exp(log_BNC), 0.0)
    if kind != "max":
        raise ValueError(f"no kind of class score {kind!r}; there are {', '.join(KINDS)}")
    probability_BNL = jax.nn.sigmoid(logits_BNL)

    def of_class(weights_BL):
        return jnp.where(weights_BL[:, None] > 0, probability_BNL, 0.0).max(axis=2)

    return jnp.moveaxis(jax.lax.map(of_class, jnp.moveaxis(weights_BLC, 2, 0)), 0, 2)


def detections(
    aligned,
    token_to_class,
    sizes_B2,
    padded: tuple[int, int],
    *,
    kind: str = "mean",
    threshold: float = 0.05,
    per_level: int = 1000,
    overlap: float = 0.6,
    most: int = 100,
    strides: Sequence[int] = STRIDES,
    chunk: int = CHUNK,
) -> Detections:
    """The boxes of images, best first.

    A pair of a place and a class counts if its class score is above `threshold`; then scores are the square root of
    that times centerness. Of each level the best go on; boxes are clipped to the image without its padding; those of
    one class that overlap are left out over all levels.

    Args:
      aligned: with `logits_BNL`, `deltas_BN4`, `centerness_BN` and `grids` (`capvl.models.glip.Aligned`).
      token_to_class: float32 (L, C) or (B, L, C), see `class_scores`.
      sizes_B2: (height, width) of each image in pixels, without padding, int32.
      padded: (height, width) of the padded images.
      kind: of `class_scores`.
      threshold: of class scores, before centerness.
      per_level: candidates of each level at most.
      overlap: IoU of which a better box of the same class leaves another out, strictly above it.
      most: M; 100 for COCO, 300 for LVIS.
      strides: of the levels.
      chunk: classes whose scores of all places are there at once.
    """
    batch = len(sizes_B2)
    weights_BLC = token_to_class if token_to_class.ndim == 3 else jnp.asarray(token_to_class)[None]
    weights_BLC = jnp.broadcast_to(weights_BLC, (batch, *weights_BLC.shape[1:]))
    anchors_N4 = jnp.asarray(anchors(aligned.grids, strides))

    found, first = [], 0
    for rows, columns in aligned.grids:
        level = slice(first, first + rows * columns)
        maps = aligned.logits_BNL[:, level], aligned.centerness_BN[:, level], aligned.deltas_BN4[:, level]
        found.append(_of_level(*maps, anchors_N4[level], weights_BLC, kind, threshold, per_level, chunk))
        first += rows * columns
    score_BK, label_BK, box_BK4 = (jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))
    box_BK4 = clip(box_BK4, sizes_B2)

    kept_BM, valid_BM = suppression.suppress(
        box_BK4, score_BK, label_BK, score_BK > 0, overlap=overlap, most=min(most, score_BK.shape[1])
    )
    missing = ((0, 0), (0, most - kept_BM.shape[1]))
    kept_BM, valid_BM = jnp.pad(kept_BM, missing), jnp.pad(valid_BM, missing)
    score_BM, label_BM = (jnp.take_along_axis(x, kept_BM, axis=1) for x in (score_BK, label_BK))
    box_BM4 = fractions(jnp.take_along_axis(box_BK4, kept_BM[..., None], axis=1), padded)
    return Detections(
        jnp.where(valid_BM[..., None], box_BM4, 0.0),
        jnp.where(valid_BM, score_BM, 0.0),
        jnp.where(valid_BM, label_BM, -1),
        valid_BM,
    )


def _of_level(logits_BNL, centerness_BN, deltas_BN4, anchors_N4, weights_BLC, kind, threshold, per_level, chunk):
    """The best pairs of a level: scores (0: none), classes and boxes (B, K), (B, K), (B, K, 4)."""
    near_BN = jax.nn.sigmoid(centerness_BN.astype(jnp.float32))
    classes = weights_BLC.shape[2]

    def scores(logits_BNL, near_BN, weights_BLC):
        score_BNC = class_scores(logits_BNL, weights_BLC, kind)
        return jnp.where(score_BNC > threshold, score_BNC * near_BN[..., None], 0.0)

    places = min(per_level, anchors_N4.shape[0])
    best_BN = _best_class(lambda weights: scores(logits_BNL, near_BN, weights), weights_BLC, chunk)
    place_BK = jax.lax.top_k(best_BN, places)[1]
    logits_BKL, deltas_BK4 = (jnp.take_along_axis(x, place_BK[..., None], axis=1) for x in (logits_BNL, deltas_BN4))
    score_BKC = scores(logits_BKL, jnp.take_along_axis(near_BN, place_BK, axis=1), weights_BLC)

    count = min(per_level, places * classes)
    score_BK, pair_BK = jax.lax.top_k(score_BKC.reshape(len(score_BKC), -1), count)
    among_BK, label_BK = pair_BK // classes, pair_BK % classes
    box_BK4 = decode(deltas_BK4.astype(jnp.float32), anchors_N4[place_BK])
    return jnp.sqrt(score_BK), label_BK, jnp.take_along_axis(box_BK4, among_BK[..., None], axis=1)


def _best_class(scores, weights_BLC, chunk: int):
    """The largest of scores(weights_BLC) (B, N, C) over classes, (B, N), so many of them at a time."""
    batch, length, classes = weights_BLC.shape
    if classes <= chunk:
        return scores(weights_BLC).max(axis=2)
    padded_BLC = jnp.pad(weights_BLC, ((0, 0), (0, 0), (0, -classes % chunk)))
    chunks = jnp.moveaxis(padded_BLC.reshape(batch, length, -1, chunk), 2, 0)

    def body(best_BN, weights_BLC):
        return jnp.maximum(best_BN, scores(weights_BLC).max(axis=2)), None

    return jax.lax.scan(body, scores(chunks[0]).max(axis=2), chunks[1:])[0]
