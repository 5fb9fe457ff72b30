"""ATSS: the original's assignment, a loop's, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_glip import load

from capvl.losses.assignment import atss
from capvl.nn.anchors import anchors
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

GRIDS = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
PLACES = tuple(h * w for h, w in GRIDS)
ANCHORS = anchors(GRIDS)


assign = jax.jit(atss, static_argnums=1)


def by_loop(places, boxes, nearest=9):
    """Algorithm 1 of the paper in NumPy, box by box."""
    slots, best = np.full(len(ANCHORS), -1), np.full(len(ANCHORS), -np.inf)
    middle = (ANCHORS[:, :2] + ANCHORS[:, 2:]) / 2
    for slot, box in enumerate(boxes):
        distance, first, chosen = np.linalg.norm(middle - (box[:2] + box[2:]) / 2, axis=1), 0, []
        for count in places:
            chosen.extend(first + np.argsort(distance[first : first + count], kind="stable")[:nearest])
            first += count
        near = ANCHORS[chosen]
        sides = np.minimum(near[:, 2:], box[2:]) - np.maximum(near[:, :2], box[:2]) + 1
        inner = np.prod(np.maximum(sides, 0), axis=1)
        iou = inner / (np.prod(near[:, 2:] - near[:, :2] + 1, axis=1) + np.prod(box[2:] - box[:2] + 1) - inner)
        inside = ((middle[chosen] - box[:2] > 0.01) & (box[2:] - middle[chosen] > 0.01)).all(axis=1)
        for i, share, within in zip(chosen, iou, inside, strict=True):
            if within and share >= iou.mean() + iou.std(ddof=1) and share > best[i]:
                slots[i], best[i] = slot, share
    return slots


def some_boxes(rng, images, slots):
    corner, side = rng.uniform(0, 80, (images, slots, 2)), rng.uniform(8, 60, (images, slots, 2))
    return np.concatenate([corner, corner + side], axis=2).astype(np.float32)


@pytest.mark.golden
def test_golden():
    golden = load("atss_loss")
    level_places = tuple(h * w for h, w in golden["in/level_hw"].tolist())
    levels = [golden[f"in/anchors_lvl{i}"] for i in range(len(level_places))]
    counts = golden["in/num_gt"]
    boxes = np.zeros((len(counts), counts.max() + 2, 4), np.float32)
    for image, count in enumerate(counts):
        boxes[image, :count] = golden[f"in/boxes{image}"]
    slots = np.arange(boxes.shape[1])[None] < counts[:, None]
    found = np.asarray(assign(np.concatenate(levels), level_places, jnp.asarray(boxes), jnp.asarray(slots)))

    first = np.cumsum([0, *counts])
    for image, slot in enumerate(found):
        np.testing.assert_array_equal(slot >= 0, golden[f"out/cls_label{image}"] > 0)
        assert (slot >= 0).sum() == golden[f"out/num_pos{image}"]
        rows = golden["in/positive_map"][first[image] : first[image + 1]] > 0
        true = golden[f"out/token_label{image}"][slot >= 0] > 0
        np.testing.assert_array_equal(rows[slot[slot >= 0]], true)


def test_as_the_loop():
    boxes = some_boxes(np.random.default_rng(0), 40, 6)
    found = assign(ANCHORS, PLACES, jnp.asarray(boxes), jnp.ones((40, 6), bool))
    for slot, expected in zip(found, boxes, strict=True):
        np.testing.assert_array_equal(slot, by_loop(PLACES, expected))
        assert (np.asarray(slot) >= 0).sum() > 6


def test_slots_without_a_box_change_nothing():
    rng = np.random.default_rng(4)
    boxes = some_boxes(rng, 2, 5)
    expected = np.asarray(assign(ANCHORS, PLACES, jnp.asarray(boxes), jnp.ones((2, 5), bool)))
    more = np.concatenate([boxes, some_boxes(rng, 2, 7), np.zeros((2, 1, 4), np.float32)], axis=1)
    slots = jnp.asarray(np.arange(13)[None] < [[5], [5]])
    np.testing.assert_array_equal(atss(ANCHORS, PLACES, jnp.asarray(more), slots), expected)
    assert expected.max() == 4


def test_the_order_of_boxes_changes_nothing():
    rng = np.random.default_rng(5)
    boxes, order = some_boxes(rng, 1, 8), rng.permutation(8)
    all_there = jnp.ones((1, 8), bool)
    expected = np.asarray(assign(ANCHORS, PLACES, jnp.asarray(boxes), all_there))[0]
    found = np.asarray(assign(ANCHORS, PLACES, jnp.asarray(boxes[:, order]), all_there))[0]
    np.testing.assert_array_equal(np.where(found >= 0, order[found], -1), expected)


def test_an_image_without_boxes():
    boxes = some_boxes(np.random.default_rng(6), 2, 3)
    slots = jnp.asarray([[False] * 3, [True] * 3])
    found = np.asarray(assign(ANCHORS, PLACES, jnp.asarray(boxes), slots))
    assert (found[0] == -1).all() and (found[1] >= 0).any()


def test_the_deviation_is_unbiased():
    """Of two candidates mean + |a - b| / sqrt(2) is above both, unless they are equal."""
    two = anchors([(1, 2)], [8])
    boxes = jnp.asarray([[[-28.0, -28.0, 35.0, 35.0]], [[-24.0, -28.0, 39.0, 35.0]]])
    found = assign(two, (2,), boxes, jnp.ones((2, 1), bool))
    np.testing.assert_array_equal(found, [[-1, -1], [0, 0]])


def test_one_place():
    """A standard deviation of one IoU is 0, not NaN."""
    one = anchors([(1, 1)], [8])
    found = assign(one, (1,), jnp.asarray([[[0.0, 0.0, 30.0, 30.0]]]), jnp.ones((1, 1), bool))
    np.testing.assert_array_equal(found, [[0]])


def test_levels_that_do_not_fit():
    with pytest.raises(ValueError, match="257 anchors"):
        atss(ANCHORS, PLACES[1:], jnp.zeros((1, 1, 4)), jnp.ones((1, 1), bool))


def test_eight_devices_and_nothing_travels():
    boxes = some_boxes(np.random.default_rng(7), 8, 4)
    slots = jnp.asarray(np.random.default_rng(8).random((8, 4)) < 0.7)
    expected = assign(ANCHORS, PLACES, jnp.asarray(boxes), slots)
    mesh = make_mesh(MeshOptions(replica=2, fsdp=4, tensor=1))
    with jax.set_mesh(mesh):
        given = jax.device_put((boxes, slots), batch_sharding(mesh))
        compiled = jax.jit(lambda *given: atss(ANCHORS, PLACES, *given)).lower(*given).compile()
        np.testing.assert_array_equal(compiled(*given), expected)
    text = compiled.as_text()
    assert "all-gather" not in text and "all-reduce" not in text
