"""Suppression is the greedy loop's, for any number of boxes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_glip import load

from capvl.nn.suppression import suppress
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding


def greedy(boxes, scores, labels, valid, overlap):
    """The loop, in NumPy: numbers of what is kept, by falling score, the first of equals first."""
    side = np.maximum(boxes[:, 2:] - boxes[:, :2] + 1, 0)
    area = side[:, 0] * side[:, 1]
    kept, left = [], [i for i in np.argsort(-scores, kind="stable") if valid[i]]
    left = np.asarray(left, int)
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        low, high = np.maximum(boxes[best, :2], boxes[left, :2]), np.minimum(boxes[best, 2:], boxes[left, 2:])
        inner = np.prod(np.maximum(high - low + 1, 0), axis=1)
        share = inner / (area[best] + area[left] - inner)
        left = left[~((share > np.float32(overlap)) & (labels[left] == labels[best]))]
    return kept


def scene(rng, count, *, labels=3, whole=False, scores=None):
    """Many boxes around few objects."""
    middle = rng.uniform(0, 200, (max(count // 40, 2), 2))[rng.integers(0, max(count // 40, 2), count)]
    middle, side = middle + rng.normal(0, 4, (count, 2)), rng.uniform(20, 50, (count, 2))
    boxes = np.concatenate([middle - side / 2, middle + side / 2], axis=1)
    boxes = np.round(boxes) if whole else boxes
    score = rng.uniform(0, 1, count) if scores is None else rng.integers(0, scores, count) / scores
    return boxes.astype(np.float32), score.astype(np.float32), rng.integers(0, labels, count).astype(np.int32)


def found(*arrays, **options):
    index, there = suppress(*(jnp.asarray(x)[None] for x in arrays), **options)
    assert not np.diff(np.asarray(there[0]).astype(int)).max(initial=-1) > 0  # Those that are there come first.
    return np.asarray(index[0])[np.asarray(there[0])].tolist()


@pytest.mark.golden
def test_golden():
    golden = load("nms")
    arrays = [golden[f"in/{name}"] for name in ("boxes", "scores", "labels")]
    kept = found(*arrays, np.ones(len(arrays[1]), bool), overlap=float(golden["in/thresh"]))
    assert kept == golden["out/keep_by_score"].tolist()


@pytest.mark.parametrize("tile", [7, 256])
@pytest.mark.parametrize("seed", range(3))
def test_as_the_loop(seed, tile):
    rng = np.random.default_rng(seed)
    arrays = scene(rng, 500)
    valid = rng.random(500) < 0.8
    expected = greedy(*arrays, valid, 0.6)
    assert 20 < len(expected) < 300
    assert found(*arrays, valid, tile=tile) == expected


def test_thousands_of_boxes():
    arrays = scene(np.random.default_rng(3), 5000, labels=2)
    expected = greedy(*arrays, np.ones(5000, bool), 0.6)
    assert found(*arrays, np.ones(5000, bool)) == expected
    assert found(*arrays, np.ones(5000, bool), most=100) == expected[:100]


def test_equal_scores_and_boxes_at_the_threshold():
    """Whole pixels and few scores: equal scores everywhere, and IoUs of exactly 0.6, which stay."""
    arrays = scene(np.random.default_rng(4), 800, labels=1, whole=True, scores=4)
    valid = np.ones(800, bool)
    assert found(*arrays, valid) == greedy(*arrays, valid, 0.6)
    pair = np.float32([[0, 0, 9, 9], [0, 0, 9, 5]])
    assert found(pair, np.float32([0.9, 0.8]), np.int32([1, 1]), np.ones(2, bool)) == [0, 1]
    assert found(pair, np.float32([0.9, 0.8]), np.int32([1, 1]), np.ones(2, bool), overlap=0.59) == [0]


def test_a_chain_stays_at_both_ends():
    """A box that is left out leaves nothing out itself."""
    boxes = np.float32([[i * 3, 0, i * 3 + 11, 9] for i in range(300)])
    arrays = boxes, np.linspace(1, 0.1, 300, dtype=np.float32), np.zeros(300, np.int32)
    kept = found(*arrays, np.ones(300, bool), overlap=0.5)
    assert kept == greedy(*arrays, np.ones(300, bool), 0.5) == list(range(0, 300, 2))


def test_labels_keep_apart_what_is_far_from_the_origin():
    """Adding label * offset to boxes would round these to the same places."""
    boxes = np.float32([[1000.1, 1000.1, 1010.2, 1010.2]] * 2)
    score, valid = np.float32([0.9, 0.8]), np.ones(2, bool)
    assert found(boxes, score, np.int32([0, 2**30]), valid) == [0, 1]
    assert found(boxes, score, np.int32([2**30, 2**30]), valid) == [0]


def test_padding_rows_change_nothing():
    rng = np.random.default_rng(5)
    boxes, scores, labels = scene(rng, 100)
    expected = found(boxes, scores, labels, np.ones(100, bool))
    rows = np.full((60, 4), np.nan, np.float32)
    padded = np.concatenate([boxes, rows]), np.append(scores, np.full(60, np.inf, np.float32))
    assert found(*padded, np.append(labels, np.zeros(60, np.int32)), np.arange(160) < 100) == expected
    assert found(boxes, scores, labels, np.zeros(100, bool)) == []
    assert found(boxes, np.full(100, -np.inf, np.float32), labels, np.arange(100) > 98) == [99]


def test_each_image_by_itself_on_eight_devices():
    rng = np.random.default_rng(6)
    images = [(*scene(rng, 300), rng.random(300) < i / 7) for i in range(8)]
    batch = [jnp.asarray(np.stack(x)) for x in zip(*images, strict=True)]
    expected = [greedy(*image, 0.6)[:50] for image in images]
    mesh = make_mesh(MeshOptions(replica=2, fsdp=4, tensor=1))
    with jax.set_mesh(mesh):
        index, there = suppress(*jax.device_put(batch, batch_sharding(mesh)), most=50, tile=64)
    assert [np.asarray(i)[np.asarray(t)].tolist() for i, t in zip(index, there, strict=True)] == expected
