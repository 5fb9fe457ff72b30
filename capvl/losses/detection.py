"""Losses of GLIP (arXiv 2112.03857, section 3.1): focal loss of each place and token, GIoU and centerness (ATSS).

What the losses are divided by are sums over the whole batch, known before the model runs, so that no division over
devices or micro-batches changes them. The original divides a device's sums by max(1, mean of the counts per device) and
averages over devices: the same, (1/G) sum_g S_g / (T/G) = S/T of G devices, but where there is less than one positive
place a device.

Letters: B images, N places of all levels, S slots of true boxes of an image, L tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from capvl.nn.anchors import decode, encode

ALPHA, GAMMA = 0.25, 2.0
_EPS = 1e-7
_LOW = -1e30


class Targets(NamedTuple):
    """What places are trained on.

    Attributes:
      slot_BN: the slot of the box that a place is assigned to, or -1; int32.
      box_BN4: that box, in pixels with inclusive ends; the place's anchor where there is none.
      centerness_BN: in 0 to 1, 0 where there is no box; float32.
    """

    slot_BN: jax.Array
    box_BN4: jax.Array
    centerness_BN: jax.Array

    @property
    def positive_BN(self) -> jax.Array:
        """Which places have a box, bool."""
        return self.slot_BN >= 0


class Divisors(NamedTuple):
    """What losses are divided by: over the whole batch the places that have a box, and their centerness."""

    positives: jax.Array
    centerness: jax.Array


class DetectionLosses(NamedTuple):
    """float32 scalars: focal loss of tokens, 1 - GIoU weighted by centerness, cross-entropy of centerness."""

    token: jax.Array
    box: jax.Array
    centerness: jax.Array


def targets(anchors_N4, slot_BN, boxes_BS4) -> Targets:
    """Of places that `capvl.losses.assignment.atss` has assigned.

    Args:
      anchors_N4, boxes_BS4: pixels with inclusive ends, float32.
      slot_BN: int32, or -1.
    """
    anchors_1N4 = jnp.asarray(anchors_N4)[None]
    box_BN4 = jnp.take_along_axis(boxes_BS4, jnp.maximum(slot_BN, 0)[..., None], axis=1)
    # The original compares with boxes that went through the coder, which limits how large they are.
    box_BN4 = decode(encode(box_BN4, anchors_1N4), anchors_1N4)
    box_BN4 = jnp.where((slot_BN >= 0)[..., None], box_BN4, anchors_1N4)
    return Targets(slot_BN, box_BN4, jnp.where(slot_BN >= 0, centerness(box_BN4, anchors_1N4), 0.0))


def divisors(found: Targets) -> Divisors:
    """Of a whole batch; at least 1, and at least what is no division by 0."""
    positives = found.positive_BN.sum().astype(jnp.float32)
    return Divisors(jnp.maximum(positives, 1.0), jnp.maximum(found.centerness_BN.sum(), _EPS))


def detection_losses(
    logits_BNL, deltas_BN4, centerness_BN, anchors_N4, found: Targets, positive_BSL, tokens_BL, by: Divisors, **focal
) -> DetectionLosses:
    """The three losses, unweighted (GLIP doubles that of boxes); of parts of a batch they add up.

    Without any box those of boxes and of centerness are 0, and all tokens are negative.

    Args:
      logits_BNL: of places and tokens, float32 or bfloat16.
      deltas_BN4: boxes as seen from the anchors.
      centerness_BN: logits.
      anchors_N4: pixels with inclusive ends, float32.
      found: of the same images.
      positive_BSL: the tokens that name each box, bool.
      tokens_BL: which tokens are real, bool; the others count nowhere.
      by: of the whole batch.
      focal: `alpha` and `gamma` of `token_focal`.
    """
    token = token_focal(logits_BNL, found.slot_BN, positive_BSL, tokens_BL, **focal)
    box_BN4 = decode(deltas_BN4.astype(jnp.float32), jnp.asarray(anchors_N4)[None])
    box = (found.centerness_BN * (1.0 - giou(box_BN4, found.box_BN4))).sum()
    bce_BN = cross_entropy(centerness_BN.astype(jnp.float32), found.centerness_BN)
    near = jnp.where(found.positive_BN, bce_BN, 0.0).sum()
    return DetectionLosses(token / by.positives, box / by.centerness, near / by.positives)


def token_focal(logits_BNL, slot_BN, positive_BSL, tokens_BL, *, alpha: float = ALPHA, gamma: float = GAMMA):
    """Sum of the focal loss over places and real tokens, a float32 scalar (GLIP, equation 3 with sigmoids).

    A place's positive tokens are those of its box; one without a box has none. (The original then calls the last of 256
    tokens positive, which is padding unless the text fills all places.)

    The backward pass computes the loss again from the logits: nothing else of the size (B, N, L) is kept but one byte
    of each, and the gradient has the type of the logits.
    """

    # What a loss keeps for its gradient would be several float32 arrays of this size.
    @jax.checkpoint
    def total(logits_BNL, positive_BNL):
        each_BNL = focal(logits_BNL.astype(jnp.float32), positive_BNL, alpha, gamma)
        return jnp.where(tokens_BL[:, None], each_BNL, 0.0).sum()

    return total(logits_BNL, of_places(slot_BN, positive_BSL))


def of_places(slot_BN, positive_BSL):
    """The tokens that name the box of each place, bool (B, N, L); none where there is no box."""
    positive_BNL = jnp.take_along_axis(positive_BSL, jnp.maximum(slot_BN, 0)[..., None], axis=1)
    return positive_BNL & (slot_BN >= 0)[..., None]


def focal(logits, positive, alpha: float = ALPHA, gamma: float = GAMMA):
    """Sigmoid focal loss of each logit, float32 (arXiv 1708.02002, equation 5).

    a (1 - p)^gamma * -log p, with p the probability of the true answer, and a = alpha for positives, 1 - alpha for
    others; a negative alpha: a = 1.
    """
    wrong = jnp.where(positive, -logits, logits)  # log p = -softplus(wrong), 1 - p = sigmoid(wrong).
    each = jax.nn.sigmoid(wrong) ** gamma * jax.nn.softplus(wrong)
    return each if alpha < 0 else each * jnp.where(positive, alpha, 1 - alpha)


def cross_entropy(logits, share):
    """-share * log p - (1 - share) * log(1 - p) with p = sigmoid(logits)."""
    return jax.nn.softplus(logits) - share * logits


def giou(found, true):
    """Generalised IoU (arXiv 1902.09630) of boxes (…, 4), of which those found may be the wrong way round.

    As in GLIP's code sides are differences here, without the pixel that inclusive ends have more.
    """
    low = found[..., :2]
    high = jnp.maximum(low, found[..., 2:])
    inner = _product(jnp.maximum(jnp.minimum(high, true[..., 2:]) - jnp.maximum(low, true[..., :2]), 0.0))
    union = _product(high - low) + _product(true[..., 2:] - true[..., :2]) - inner + _EPS
    hull = _product(jnp.maximum(high, true[..., 2:]) - jnp.minimum(low, true[..., :2])) + _EPS
    return inner / union - (hull - union) / hull


def _product(sides):
    return sides[..., 0] * sides[..., 1]


def centerness(boxes, anchors):
    """How near the centres of anchors are to those of boxes that hold them (FCOS, arXiv 1904.01355, equation 3)."""
    middle = (anchors[..., :2] + anchors[..., 2:]) / 2
    low, high = middle - boxes[..., :2], boxes[..., 2:] - middle
    share = jnp.minimum(low, high) / jnp.maximum(jnp.maximum(low, high), _EPS)
    return jnp.sqrt(jnp.maximum(_product(share), 0.0))


def contrastive(logits_BNL, positive_BNL, tokens_BL):
    """Alignment of regions and tokens (MDETR, arXiv 2104.12763, section 2.2.1), the sum over both; a float32 scalar.

    Of each region that has tokens: minus the mean logit of its tokens, plus the log-sum of exponentials over all
    tokens; of each token the same over regions; half of each.

    Args:
      logits_BNL: cosines over a temperature, float32 or bfloat16.
      positive_BNL: bool.
      tokens_BL: which tokens are real, bool; the others are in no sum.
    """

    @jax.checkpoint
    def total(logits_BNL, positive_BNL):
        logits_BNL = logits_BNL.astype(jnp.float32)
        positive_BNL = positive_BNL & tokens_BL[:, None]
        low_BNL = jnp.where(tokens_BL[:, None], logits_BNL, _LOW)

        def side(axis, log_sums):
            count = positive_BNL.sum(axis=axis).astype(jnp.float32)
            mean = jnp.where(positive_BNL, logits_BNL, 0.0).sum(axis=axis) / jnp.maximum(count, 1.0)
            return jnp.where(count > 0, log_sums - mean, 0.0).sum()

        of_regions_BN = jax.nn.logsumexp(low_BNL, axis=2)
        return (side(2, of_regions_BN) + side(1, jax.nn.logsumexp(logits_BNL, axis=1))) / 2

    return total(logits_BNL, positive_BNL)
