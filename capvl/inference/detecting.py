"""Boxes of what texts name, in images: the path from pixels and prompts to detections (GLIP, arXiv 2112.03857).

An image is encoded once, whatever number of texts it is asked for: a list of classes that is longer than one text
becomes several prompts (`capvl.data.text.category_prompts`), whose detections are put together here.

Letters: B images, R rows of texts (B, or 1: the same texts for all images), P texts of an image, L tokens, K classes or
phrases of a text, D width of its states, M detections.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capvl.data.images.buckets import Bucket
from capvl.data.images.crops import Crop
from capvl.data.images.geometry import Geometry, Size
from capvl.data.randomness import Uniforms
from capvl.data.text.category_prompts import Prompt
from capvl.data.text.spans import class_weights
from capvl.errors import UserError, nearest
from capvl.models.postprocess import KINDS, Detections, detections
from capvl.nn import suppression
from capvl.nn.anchors import inclusive

MULTIPLE = 32
"""Sides of images in pixels are multiples of this: the stride of the coarsest level that isn't rounded up (P5)."""


class Prompts(NamedTuple):
    """What images are asked for.

    Attributes:
      tokens_RPL: int32; R is 1 where all images are asked for the same.
      weights_RPLK: float32, which tokens are whose (`capvl.data.text.spans.class_weights`).
      label_RPK: int32, the number that what is found for a column has; -1 where there is none.
    """

    tokens_RPL: Any
    weights_RPLK: Any
    label_RPK: Any


def prompts_of(listed: Sequence[Prompt]) -> Prompts:
    """The same prompts for all images; R is 1. K is the number of classes of the longest, made a power of two, so that
    lists of nearly as many classes are compiled once.

    Args:
      listed: of one list of classes.
    """
    most = 1 << (max(len(prompt.classes) for prompt in listed) - 1).bit_length()
    weights = [class_weights(prompt.positive, range(len(prompt.classes)), most) for prompt in listed]
    label_PK = np.full((len(listed), most), -1, np.int32)
    for row, prompt in zip(label_PK, listed, strict=True):
        row[: len(prompt.classes)] = prompt.classes
    return Prompts(np.stack([prompt.tokens for prompt in listed])[None], np.stack(weights)[None], label_PK[None])


@dataclasses.dataclass(frozen=True)
class How:
    """How detections come from what the model says; GLIP's values.

    Attributes:
      kind: class scores from those of tokens: "mean", "max" or "power" (`capvl.models.postprocess.class_scores`).
      threshold: the least class score.
      per_level: candidates of a level.
      overlap: IoU above which the better box of a class leaves another out.
      most: detections of one text in an image.
      kept: detections of an image from all its texts; 0 for all.
      across: IoU above which the best box leaves others out whatever their classes, from all texts of an image; 0 for
        never. What two texts name of one thing is found twice without it.
    """

    kind: str = "mean"
    threshold: float = 0.05
    per_level: int = 1000
    overlap: float = 0.6
    most: int = 100
    kept: int = 100
    across: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"A class score of kind {self.kind!r} is unknown." + nearest(self.kind, KINDS))
        if min(self.per_level, self.most) < 1 or self.kept < 0:
            raise UserError("per_level and most should be at least 1, and kept not negative (0 is for all).")
        if (
            not 0
            <= min(self.threshold, self.overlap, self.across)
            <= max(self.overlap, self.threshold, self.across)
            <= 1
        ):
            raise UserError("threshold, overlap and across should be between 0 and 1.")


def states_of(model, tokens_RPL) -> jax.Array:
    """Texts by themselves, (R, P, L, D): computed once for all images where R is 1."""
    rows, texts, length = tokens_RPL.shape
    states_BLD = model.states(jnp.asarray(tokens_RPL).reshape(-1, length))
    return states_BLD.reshape(rows, texts, length, -1)


def detect(
    model, rows: dict[str, Any], prompts: Prompts, states_RPLD=None, *, how: How = How(), threshold=None
) -> Detections:
    """What texts name, in images, best first: boxes (B, M, 4) in fractions of the upright images, and labels that
    `prompts` gives. Scores of an image for which the model gives NaN or infinity are NaN.

    Args:
      model: has Ability.DETECTS.
      rows: `image` (B, H, W, 4) in [-1, 1], and what `Seen` says of each: `size` int32 (B, 2), `whole` int32 (B, 2).
      prompts: what images are asked for.
      states_RPLD: of `states_of`; None: they are computed here.
      how: see `How`.
      threshold: instead of `how.threshold`; may be an array, so that each value needs no compilation of its own.
    """
    image, size_B2 = rows["image"], rows["size"]
    batch, padded = len(image), image.shape[1:3]
    if states_RPLD is None:
        states_RPLD = states_of(model, prompts.tokens_RPL)
    maps = model.encode(image)
    least = how.threshold if threshold is None else threshold
    numbers = dict(threshold=least, per_level=how.per_level, overlap=how.overlap, most=how.most)

    def of_text(part) -> tuple[Detections, jax.Array]:
        tokens_BL, weights_BLK, label_BK, states_BLD = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in part)
        aligned = model.align(maps, states_BLD, tokens_BL)
        found = detections(aligned, weights_BLK, size_B2, padded, kind=how.kind, **numbers)
        label_BM = jnp.take_along_axis(label_BK, jnp.maximum(found.label_BM, 0), axis=1)
        bad_B = ~(jnp.isfinite(aligned.logits_BNL).all(axis=(1, 2)) & jnp.isfinite(aligned.deltas_BN4).all(axis=(1, 2)))
        return found._replace(label_BM=jnp.where(found.valid_BM, label_BM, -1)), bad_B

    parts = tuple(jnp.moveaxis(jnp.asarray(x), 1, 0) for x in (*prompts, states_RPLD))
    if len(parts[0]) == 1:
        found, bad_B = of_text(tuple(x[0] for x in parts))
    else:
        found, bad_PB = jax.lax.map(of_text, parts)
        found = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:]), found)
        bad_B = bad_PB.any(axis=0)
    found = _upright(_together(found, padded, how), rows["whole"], padded)
    # What isn't finite is above no threshold, and would pass for an image without anything.
    return found._replace(score_BM=jnp.where(bad_B[:, None], jnp.nan, found.score_BM))


def _together(found: Detections, padded: Size, how: How) -> Detections:
    """The best of all texts' detections, perhaps without those of one place."""
    count = found.score_BM.shape[1]
    kept = min(how.kept, count) if how.kept else count
    if how.across:
        boxes_BM4, same_BM = inclusive(found.box_BM4, padded), jnp.zeros_like(found.label_BM)
        arguments = (boxes_BM4, found.score_BM, same_BM, found.valid_BM)
        best_BM, valid_BM = suppression.suppress(*arguments, overlap=how.across, most=kept)
    else:
        _, best_BM = jax.lax.top_k(jnp.where(found.valid_BM, found.score_BM, -1.0), kept)
        valid_BM = jnp.take_along_axis(found.valid_BM, best_BM, axis=1)
    score_BM, label_BM = (jnp.take_along_axis(x, best_BM, axis=1) for x in (found.score_BM, found.label_BM))
    box_BM4 = jnp.take_along_axis(found.box_BM4, best_BM[..., None], axis=1)
    return Detections(
        jnp.where(valid_BM[..., None], box_BM4, 0.0),
        jnp.where(valid_BM, score_BM, 0.0),
        jnp.where(valid_BM, label_BM, -1),
        valid_BM,
    )


def _upright(found: Detections, whole_B2, padded: Size) -> Detections:
    """Boxes from fractions of the padded image to those of the upright one, cut at its edges."""
    height, width = padded
    scale_B2 = jnp.asarray([width, height], jnp.float32)[None] / whole_B2[:, ::-1].astype(jnp.float32)
    scale_B14 = jnp.concatenate([scale_B2, scale_B2], axis=1)[:, None]
    return found._replace(box_BM4=jnp.clip(found.box_BM4 * scale_B14, 0.0, 1.0))


def buckets(options: Any) -> tuple[Bucket, ...]:
    """(height, width) of padded images that a model with these options looks at: one for images that are wider than
    high and one for the others, or one square for all."""
    short, long = -(-options.res // MULTIPLE) * MULTIPLE, max(options.image_shape()[:2])
    return (Bucket(long, long),) if short >= long else (Bucket(short, long), Bucket(long, short))


def bucket_of(options: Any, size: Size) -> Bucket:
    """Which of `buckets` an upright image of (height, width) goes to."""
    several = buckets(options)
    return several[0] if size[0] <= size[1] else several[-1]


@dataclasses.dataclass(frozen=True)
class Seen:
    """Images as a detector sees them: a transform of Examples. Nothing is cut off, and the aspect stays.

    Attributes:
      crop: of kind "aspect", in one of the model's `buckets`: its sides are those that the levels of a pyramid divide.
    """

    crop: Crop

    def __call__(self, example: dict[str, Any], uniforms: Uniforms) -> dict[str, np.ndarray]:
        """image uint8 (H, W, 4), 255 in its last channel where the image is; size int32 (2,): height and width of
        that; whole int32 (2,): of all of the upright image, which rounding may make longer than its place.

        Raises:
          BadImageError: the image can't be used.
        """
        geometry: Geometry = self.crop.draw(example, uniforms)
        pixels = self.crop.pixels(example, uniforms, geometry)
        size, whole = (np.array(sides, np.int32) for sides in (geometry.resized, geometry.whole))
        return {"image": pixels, "size": size, "whole": whole}
