"""From logits to boxes: the original's detections, a plain loop's, and chunks of classes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_glip import close, load

from capvl.models import postprocess
from capvl.nn.anchors import STRIDES, anchors, inclusive
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding


class Aligned(NamedTuple):
    logits_BNL: jax.Array
    deltas_BN4: jax.Array
    centerness_BN: jax.Array
    grids: tuple


def shares(classes, length):
    """float32 (L, C): each class's tokens share 1."""
    out = np.zeros((length, len(classes)), np.float32)
    for i, tokens in enumerate(classes):
        out[list(tokens), i] = 1 / max(len(tokens), 1)
    return out


def spans(golden, classes):
    """Tokens of each class, label id 1 first; none for ids that have none."""
    out = [()] * classes
    for label, first, last in zip(
        *(golden[f"in/{n}"] for n in ("label_ids", "token_starts", "token_ends")), strict=True
    ):
        out[label - 1] = range(first, last + 1)
    return out


@pytest.mark.golden
@pytest.mark.parametrize("kind", postprocess.KINDS)
def test_class_scores_golden(kind):
    golden = load("scoreconv")
    logits = jnp.asarray(np.log(golden["in/probs"]) - np.log1p(-golden["in/probs"]))
    names = [name for name in golden if name.startswith("out/") and name.endswith(kind.upper())]
    assert names
    for name in names:
        expected = golden[name]
        weights = shares(spans(golden, expected.shape[2]), logits.shape[2])
        weights = jnp.broadcast_to(jnp.asarray(weights)[None], (len(logits), *weights.shape))
        close(postprocess.class_scores(logits, weights, kind), expected, 1e-5, name)


@pytest.mark.golden
def test_tokens_as_classes_golden():
    golden = load("scoreconv")
    logits = jnp.asarray(np.log(golden["in/probs"]) - np.log1p(-golden["in/probs"]))
    expected = golden["out/v1_ONEHOT"]
    weights = jnp.broadcast_to(jnp.eye(logits.shape[2], expected.shape[2])[None], (len(logits), 12, expected.shape[2]))
    close(postprocess.class_scores(logits, weights), expected, 1e-5)


def of_golden(golden):
    levels = range(len(golden["in/level_hw"]))
    logits = np.concatenate([golden[f"in/dot_logits{i}"] for i in levels], axis=1)
    maps = ([golden[f"in/{name}{i}"] for i in levels] for name in ("bbox", "centerness"))
    deltas, near = (np.concatenate([m.reshape(*m.shape[:2], -1) for m in each], axis=2) for each in maps)
    grids = tuple(tuple(map(int, hw)) for hw in golden["in/level_hw"])
    np.testing.assert_array_equal(anchors(grids), np.concatenate([golden[f"in/anchors{i}"] for i in levels]))
    return Aligned(jnp.asarray(logits), jnp.asarray(deltas.swapaxes(1, 2)), jnp.asarray(near[:, 0]), grids)


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["coco", "lvis"])
@pytest.mark.parametrize("chunk", [2, 128])
def test_detections_golden(kind, chunk):
    golden = load(f"postprocess_{kind}")
    aligned, sizes = of_golden(golden), jnp.asarray(golden["in/image_sizes"])
    weights = shares(spans(load("scoreconv"), int(golden["in/num_classes"]) - 1), aligned.logits_BNL.shape[2])
    most = len(golden["out/scores0"])
    padded = tuple(side * STRIDES[0] for side in aligned.grids[0])

    @jax.jit
    def detect(*maps):
        aligned_now = Aligned(*maps, aligned.grids)
        return postprocess.detections(aligned_now, jnp.asarray(weights), sizes, padded, most=most, chunk=chunk)

    found = detect(*aligned[:3])
    for i in range(len(sizes)):
        count = len(golden[f"out/scores{i}"])
        assert found.valid_BM[i].sum() == count
        np.testing.assert_array_equal(found.label_BM[i][:count] + 1, golden[f"out/labels{i}"])
        close(found.score_BM[i][:count], golden[f"out/scores{i}"], 1e-5)
        close(inclusive(found.box_BM4[i][:count], padded), golden[f"out/boxes{i}"], 1e-5)


GRIDS = ((6, 5), (3, 3), (2, 2), (1, 1), (1, 1))
PADDED = (48, 40)
PLACES = sum(h * w for h, w in GRIDS)


def random_case(images, classes, seed=0, length=16):
    """(logits, deltas, centerness), weights (L, C), sizes."""
    rng = np.random.default_rng(seed)
    shapes = (images, PLACES, length), (images, PLACES, 4), (images, PLACES)
    maps = tuple(jnp.asarray(rng.normal(size=shape) * 2, jnp.float32) for shape in shapes)
    words = [rng.choice(length, rng.integers(1, 4), replace=False) for _ in range(classes)]
    sizes = rng.integers(20, 40, (images, 2)).astype(np.int32)
    return maps, jnp.asarray(shares(words, length)), jnp.asarray(sizes)


def detect(maps, weights, sizes, **options):
    return postprocess.detections(Aligned(*maps, GRIDS), weights, sizes, PADDED, **options)


detect_jit = jax.jit(detect, static_argnames=("per_level", "most", "chunk", "kind", "threshold", "overlap"))


def by_sorting_all(maps, weights, per_level):
    """(score, label) of the best of all pairs of each level of one image, those above 0, by falling score."""
    logits, _, near = (np.asarray(x[0], np.float64) for x in maps)
    score = (1 / (1 + np.exp(-logits))) @ np.asarray(weights, np.float64)
    score = np.where(score > 0.05, score / (1 + np.exp(-near))[:, None], 0)
    out, first = [], 0
    for rows, columns in GRIDS:
        pairs = score[first : first + rows * columns].ravel()
        best = np.argsort(-pairs)[:per_level]
        best = best[pairs[best] > 0]
        out.extend(zip(np.sqrt(pairs[best]), best % weights.shape[1], strict=True))
        first += rows * columns
    return sorted(out, reverse=True)


@pytest.mark.parametrize(("per_level", "chunk"), [(3, 3), (3, 128), (1000, 3)])
def test_the_best_pairs_of_each_level(per_level, chunk):
    """Ranking places by their best class loses no pair; an overlap of 1 leaves nothing out."""
    maps, weights, sizes = random_case(6, 11)
    found = detect_jit(maps, weights, sizes, per_level=per_level, most=500, chunk=chunk, overlap=1.0)
    for i in range(6):
        expected = by_sorting_all(jax.tree.map(lambda x: x[i : i + 1], maps), weights, per_level)  # noqa: B023
        count = int(found.valid_BM[i].sum())
        assert count == len(expected) >= 11
        close(found.score_BM[i, :count], [score for score, _ in expected], 1e-5)
        np.testing.assert_array_equal(found.label_BM[i, :count], [label for _, label in expected])


def test_a_matrix_an_image():
    """Images of different texts in a batch give what each gives by itself."""
    first, second = random_case(1, 4, seed=1), random_case(1, 4, seed=2)
    maps = jax.tree.map(lambda *x: jnp.concatenate(x), first[0], second[0])
    together = detect_jit(maps, jnp.stack([first[1], second[1]]), jnp.concatenate([first[2], second[2]]))
    for i, case in enumerate((first, second)):
        alone = detect_jit(*case)
        assert alone.valid_BM.sum() > 5
        np.testing.assert_array_equal(together.label_BM[i], alone.label_BM[0])
        close(together.box_BM4[i], alone.box_BM4[0], 1e-6)


def test_boxes_stay_in_the_image_and_rows_without_one_are_empty():
    maps, weights, sizes = random_case(3, 4)
    found = detect_jit(maps, weights, sizes, most=200)
    ends = np.asarray(found.box_BM4)
    limit = np.asarray(sizes)[:, None, ::-1] / np.float32([PADDED[1], PADDED[0]])
    assert (ends >= 0).all() and (ends[..., 2:] <= limit + 1e-6).all()
    there = np.asarray(found.valid_BM)
    assert 0 < there.sum() < there.size and not np.asarray(found.box_BM4)[~there].any()
    assert (np.asarray(found.label_BM)[~there] == -1).all() and not np.asarray(found.score_BM)[~there].any()
    assert (np.diff(np.asarray(found.score_BM), axis=1) <= 0).all()


def test_nothing_above_the_threshold():
    maps, weights, sizes = random_case(2, 4)
    found = detect_jit(tuple(x - 50 for x in maps), weights, sizes)
    assert not found.valid_BM.any() and np.isfinite(found.box_BM4).all()


def test_no_such_kind():
    maps, weights, sizes = random_case(1, 2)
    with pytest.raises(ValueError, match="'median'; there are mean, max, power"):
        detect(maps, weights, sizes, kind="median")


def test_eight_devices_give_the_boxes_of_one():
    maps, weights, sizes = random_case(8, 5)
    expected = detect_jit(maps, weights, sizes, most=30)
    mesh = make_mesh(MeshOptions(replica=2, fsdp=4, tensor=1))
    with jax.set_mesh(mesh):
        maps, sizes = jax.device_put((maps, sizes), batch_sharding(mesh))
        found = detect_jit(maps, weights, sizes, most=30)
    np.testing.assert_array_equal(found.label_BM, expected.label_BM)
    close(found.box_BM4, expected.box_BM4, 1e-6)
