"""GLIP's losses: the original's numbers and gradients, images without boxes, divided batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_glip import close, load

from capvl.losses import detection
from capvl.losses.assignment import atss
from capvl.losses.detection import DetectionLosses, detection_losses, divisors, targets
from capvl.nn.anchors import anchors, decode
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

assign = jax.jit(atss, static_argnums=1)
BOX = 2.0
"""GLIP's weight of the loss of boxes."""


class Golden:
    """The batch of golden atss_loss in our shapes."""

    def __init__(self):
        golden = self.arrays = load("atss_loss")
        places = tuple(h * w for h, w in golden["in/level_hw"].tolist())
        levels = range(len(places))
        self.anchors = np.concatenate([golden[f"in/anchors_lvl{i}"] for i in levels])
        counts, tokens = golden["in/num_gt"], golden["in/dot_logits0"].shape[2]
        assert not golden["in/text_mask"][:, tokens:].any()
        shape = len(counts), counts.max() + 1
        boxes, positive = np.zeros((*shape, 4), np.float32), np.zeros((*shape, tokens), bool)
        first = np.cumsum([0, *counts])
        for i, count in enumerate(counts):
            boxes[i, :count] = golden[f"in/boxes{i}"]
            positive[i, :count] = golden["in/positive_map"][first[i] : first[i + 1], :tokens] > 0
        slots = np.arange(shape[1])[None] < counts[:, None]
        slot = assign(self.anchors, places, jnp.asarray(boxes), jnp.asarray(slots))
        self.targets = targets(self.anchors, slot, jnp.asarray(boxes))
        self.truth = jnp.asarray(positive), jnp.asarray(golden["in/text_mask"][:, :tokens] > 0)
        self.predictions = self.of_levels("in")
        self.gradients = self.of_levels("grad")

    def of_levels(self, kind):
        """Logits, deltas and centerness of all levels; torch's maps come as (B, channels, Y, X)."""
        levels = range(len(self.arrays["in/level_hw"]))
        logits = np.concatenate([self.arrays[f"{kind}/dot_logits{i}"] for i in levels], axis=1)
        maps = ([self.arrays[f"{kind}/{name}{i}"] for i in levels] for name in ("reg", "ctr"))
        deltas, near = (np.concatenate([m.reshape(*m.shape[:2], -1) for m in each], axis=2) for each in maps)
        return jnp.asarray(logits), jnp.asarray(deltas.swapaxes(1, 2)), jnp.asarray(near[:, 0])

    def losses(self, predictions) -> DetectionLosses:
        by = divisors(self.targets)
        return detection_losses(*predictions, self.anchors, self.targets, *self.truth, by)


@pytest.mark.golden
def test_losses_and_gradients_golden():
    golden = Golden()

    @jax.jit
    def total(predictions):
        found = golden.losses(predictions)
        return found.token + BOX * found.box + found.centerness, found

    (_, found), gradients = jax.value_and_grad(total, has_aux=True)(golden.predictions)
    close(found.token, golden.arrays["out/loss_dot_product_token"], 1e-5)
    close(BOX * found.box, golden.arrays["out/loss_reg"], 1e-5)
    close(found.centerness, golden.arrays["out/loss_centerness"], 1e-5)
    for name, actual, expected in zip(("token", "box", "centerness"), gradients, golden.gradients, strict=True):
        close(actual, expected, 1e-4, name)


@pytest.mark.golden
def test_mean_over_devices_golden():
    """The original's devices divide by the mean of their counts, and their gradients are averaged: the same as one."""
    golden, losses = Golden(), jax.jit(detection_losses)
    devices = len(golden.targets.slot_BN)
    sums = []
    for i in range(devices):
        part = jax.tree.map(lambda x: x[i : i + 1], (golden.predictions, golden.targets, golden.truth))  # noqa: B023
        by = detection.Divisors(jnp.float32(1), jnp.float32(1))
        sums.append(losses(*part[0], golden.anchors, part[1], *part[2], by))
    by = divisors(golden.targets)
    mean = jax.tree.map(lambda *x: sum(x) / devices, *sums)
    token, near = (x / (by.positives / devices) for x in (mean.token, mean.centerness))
    close(token, golden.arrays["out/loss_dot_product_token"], 1e-5)
    close(near, golden.arrays["out/loss_centerness"], 1e-5)
    close(BOX * mean.box / (by.centerness / devices), golden.arrays["out/loss_reg"], 1e-5)


@pytest.mark.golden
def test_elements_golden():
    golden, focal = (
        jax.device_put(load("losses")),
        jax.jit(detection.focal, static_argnums=(2, 3)),
    )
    logits, positive = golden["in/logits"], golden["in/targets"] > 0
    close(focal(logits, positive), golden["out/elem_nomask"], 1e-5)
    close(focal(logits, positive, -1, 1.5), golden["out/elem_alpha-1_gamma1.5"], 1e-5)
    # That one adds 1e-8 to probabilities, which float32 hardly sees.
    close(focal(logits, positive), golden["out/elem_v2"], 1e-5)
    slot = jnp.broadcast_to(jnp.arange(logits.shape[1], dtype=jnp.int32)[None], logits.shape[:2])
    close(
        detection.token_focal(logits, slot, positive, golden["in/text_mask"] > 0),
        golden["out/sum_masked"],
        1e-5,
    )

    classes = golden["in/cls_targets"]
    hot = classes[:, None] == 1 + jnp.arange(golden["in/cls_logits"].shape[1])[None]
    each = jnp.where(classes[:, None] >= 0, focal(golden["in/cls_logits"], hot), 0.0)
    close(each, golden["out/cls_elem"], 1e-5)

    places = golden["in/giou_anchor"]
    found, true = (decode(golden[f"in/giou_{name}"], places) for name in ("pred", "target"))
    each = 1 - detection.giou(found, true)
    close(each, golden["out/giou_each"], 1e-5)
    close((golden["in/giou_weight"] * each).sum(), golden["out/giou_weighted_sum"], 1e-5)
    near = detection.centerness(decode(golden["in/ctr_reg_targets"], places), places)
    close(near, golden["out/centerness"], 1e-5)

    logits = golden["in/ca_logits"]
    real = jnp.ones((logits.shape[0], logits.shape[2]), bool)
    close(jax.jit(detection.contrastive)(logits, golden["in/ca_map"], real), golden["out/contrastive_align"], 1e-5)


def test_giou_of_a_box_the_wrong_way_round():
    """It is the empty box at its first corner, here inside the true one: 0 / 16 - (16 - 16) / 16."""
    true, wrong = jnp.asarray([0.0, 0.0, 4.0, 4.0]), jnp.asarray([3.0, 3.0, 1.0, 1.0])
    assert float(detection.giou(wrong, true)) == pytest.approx(0, abs=1e-6)
    assert float(detection.giou(true, true)) == pytest.approx(1)
    assert float(detection.giou(true + 8, true)) == pytest.approx(-(144 - 32) / 144)


GRIDS = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
PLACES = tuple(h * w for h, w in GRIDS)
ANCHORS = anchors(GRIDS)


def batch(images, slots=3, tokens=6, seed=0):
    """(predictions, boxes, slots, tokens of slots, real tokens); the first image has no box."""
    rng = np.random.default_rng(seed)
    corner, side = rng.uniform(0, 30, (images, slots, 2)), rng.uniform(10, 34, (images, slots, 2))
    boxes = np.concatenate([corner, corner + side], axis=2).astype(np.float32)
    there = rng.random((images, slots)) < 0.7
    there[0] = False
    positive = rng.random((images, slots, tokens)) < 0.3
    real = np.arange(tokens)[None] < rng.integers(3, tokens, (images, 1))
    shapes = (images, len(ANCHORS), tokens), (images, len(ANCHORS), 4), (images, len(ANCHORS))
    predictions = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return predictions, *map(jnp.asarray, (boxes, there, positive, real))


def total(predictions, boxes, slots, positive, real, by=None):
    found = targets(ANCHORS, assign(ANCHORS, PLACES, boxes, slots), boxes)
    by = divisors(found) if by is None else by
    losses = detection_losses(*predictions, ANCHORS, found, positive, real, by)
    return losses.token + BOX * losses.box + losses.centerness, losses


summed = jax.jit(total)
graded = jax.jit(jax.value_and_grad(total, has_aux=True))


def all_finite(tree):
    return all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(tree))


def test_no_box_in_the_batch():
    predictions, boxes, slots, positive, real = batch(2)
    (_, losses), gradients = graded(predictions, boxes, jnp.zeros_like(slots), positive, real)
    assert all_finite((losses, gradients))
    assert losses.box == losses.centerness == 0 < losses.token
    assert (gradients[0] >= 0).all() and not gradients[1].any() and not gradients[2].any()


def test_padding_slots_and_tokens_change_nothing():
    predictions, boxes, slots, positive, real = batch(3)
    expected = graded(predictions, boxes, slots, positive, real)
    more = [jnp.pad(x, ((0, 0), (0, 4)) + ((0, 0),) * (x.ndim - 2)) for x in (boxes, slots, positive)]
    wide = (jnp.pad(predictions[0], ((0, 0), (0, 0), (0, 2)), constant_values=9.0), *predictions[1:])
    more[2] = jnp.pad(more[2], ((0, 0), (0, 0), (0, 2)), constant_values=True)
    found = graded(wide, *more, jnp.pad(real, ((0, 0), (0, 2))))
    close(found[0][0], expected[0][0], 1e-6)
    assert not found[1][0][..., -2:].any()
    for actual, other in zip((found[1][0][..., :-2], *found[1][1:]), expected[1], strict=True):
        close(actual, other, 1e-6)


def test_the_order_of_boxes_changes_nothing():
    predictions, boxes, slots, positive, real = batch(3)
    order = jnp.asarray([2, 0, 1])
    expected = graded(predictions, boxes, slots, positive, real)
    found = graded(predictions, boxes[:, order], slots[:, order], positive[:, order], real)
    jax.tree.map(lambda a, b: close(a, b, 1e-6), found, expected)


@pytest.mark.parametrize("size", [-50_000.0, 50_000.0, -300.0, 300.0])
def test_extreme_logits_are_finite(size):
    predictions, *rest = batch(2)
    found = graded(tuple(jnp.full_like(x, size) for x in predictions), *rest)
    assert all_finite(found)


def test_half_precision_logits():
    """The loss is computed in float32, the gradient comes in the type of the logits."""
    predictions, *rest = batch(2)
    half = tuple(x.astype(jnp.bfloat16) for x in predictions)
    (loss, _), gradients = graded(half, *rest)
    (expected, _), expected_gradients = graded(tuple(x.astype(jnp.float32) for x in half), *rest)
    assert loss.dtype == jnp.float32 and {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}
    close(loss, expected, 1e-6)
    jax.tree.map(lambda a, b: close(a.astype(jnp.float32), b, 5e-3), gradients, expected_gradients)


def test_the_gradient_keeps_no_second_array_of_the_size_of_the_logits():
    predictions, boxes, slots, positive, real = batch(2, tokens=64)
    slot = assign(ANCHORS, PLACES, boxes, slots)
    _, kept = jax.vjp(lambda logits: detection.token_focal(logits, slot, positive, real), predictions[0])
    size = predictions[0].size
    kept = [x for x in jax.tree.leaves(kept) if getattr(x, "size", 0) == size]
    assert sorted(x.dtype.itemsize for x in kept) == [1, 4]


def test_eight_devices_give_the_losses_of_one():
    given = batch(8)
    expected = graded(*given)
    mesh = make_mesh(MeshOptions(replica=2, fsdp=4, tensor=1))
    with jax.set_mesh(mesh):
        found = graded(*jax.device_put(given, batch_sharding(mesh)))
    jax.tree.map(lambda a, b: close(a, b, 1e-5), found, expected)


def test_parts_of_a_batch_add_up():
    predictions, boxes, slots, positive, real = batch(4)
    by = divisors(targets(ANCHORS, assign(ANCHORS, PLACES, boxes, slots), boxes))
    parts = []
    for i in range(4):
        part = jax.tree.map(lambda x: x[i : i + 1], (predictions, boxes, slots, positive, real))  # noqa: B023
        parts.append(summed(*part, by)[1])
    expected = summed(predictions, boxes, slots, positive, real)[1]
    jax.tree.map(lambda a, *b: close(sum(b), a, 1e-5), expected, *parts)


def test_contrast_sees_no_padding_token():
    rng = np.random.default_rng(1)
    logits, positive = jnp.asarray(rng.normal(size=(2, 9, 5)), jnp.float32), jnp.asarray(rng.random((2, 9, 5)) < 0.3)
    graded = jax.jit(jax.value_and_grad(detection.contrastive))
    expected, _ = graded(logits, positive, jnp.ones((2, 5), bool))
    wide = jnp.pad(logits, ((0, 0), (0, 0), (0, 3)), constant_values=7.0)
    marked = jnp.pad(positive, ((0, 0), (0, 0), (0, 3)), constant_values=True)
    loss, gradient = graded(wide, marked, jnp.arange(8)[None] < jnp.full((2, 1), 5))
    close(loss, expected, 1e-6)
    assert not gradient[..., 5:].any() and gradient[..., :5].any()
    none = graded(logits, jnp.zeros_like(positive), jnp.zeros((2, 5), bool))
    assert all_finite(none) and none[0] == 0
