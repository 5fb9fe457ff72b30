"""X-VLM's tasks against the golden numbers: the heat map, and retrieval in two passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden
from golden_xvlm import FEATURES, close, load

from capvl.evals import Context, rerank, retrieval
from capvl.evals.sharded import ShardedRows, ranks, top
from capvl.inference.compiled import compiled
from capvl.inference.grounding import heat_maps
from capvl.parallel.mesh import MeshOptions, make_mesh

pytestmark = pytest.mark.golden


def test_heat_map():
    case = load("task_gradcam")
    grid = case.out("gradcam").shape[1:]
    layer = int(case.golden["in.block_num"]) - int(case.config["fusion_layer"])
    rows = case.image(), case.ids("in.text_ids")[:, None]
    found = case.compute(lambda model: heat_maps(model, *rows, layer=layer, grid=grid))[:, 0]
    assert case.options.grid == grid
    assert_close(found, case.out("gradcam"), 1e-4)


@pytest.fixture(scope="module", params=[1, 8])
def gallery(request):
    """Of the golden gallery: (case, context, rows of images and of texts, the image of each text, k)."""
    case = load("task_retrieval")
    mesh = make_mesh(MeshOptions(), jax.devices()[: request.param])
    context = Context(case.options, None, None, 0, 8, mesh, case.blueprint, None)
    rows = []
    for function, given in (
        (retrieval._image_rows, case.image("gallery.image")),
        (retrieval._text_rows, case.ids("gallery.text_ids")),
    ):
        count = len(given)
        padded = jnp.concatenate([given, jnp.repeat(given[-1:], -count % 8, axis=0)])
        call = compiled(case.blueprint, function)
        batches = [call(case.params, padded[i : i + 8]) for i in range(0, len(padded), 8)]
        rows.append(ShardedRows.of_batches(mesh, batches, count))
    owners = np.arange(rows[1].count) // int(case.golden["gallery.captions_per_image"])
    return case, context, *rows, owners, int(case.golden["gallery.k_test"])


def test_scores_of_the_second_pass(gallery):
    """Those of the k most similar, and -100 elsewhere."""
    case, context, images, texts, _, k = gallery
    match = rerank.pair_scorer(context, retrieval._match)
    for name, queries, candidates in (("score_i2t", images, texts), ("score_t2i", texts, images)):
        numbers, _ = top(retrieval._part(queries, "vector"), retrieval._part(candidates, "vector"), k)
        rows = (retrieval._part(x, "rows") for x in (queries, candidates))
        with jax.set_mesh(context.mesh):
            scores = rerank.rerank(context, match, case.params, *rows, numbers)
        dense = np.full((queries.count, candidates.count), -100.0, np.float32)
        np.put_along_axis(dense, numbers, scores, axis=1)
        close(dense, case.out(name), FEATURES, name)


def test_recalls_of_the_gallery(gallery):
    case, context, images, texts, owners, k = gallery
    match = rerank.pair_scorer(context, retrieval._match)
    with jax.set_mesh(context.mesh):
        found = dict(retrieval.reranked(context, case.params, match, images, texts, owners, k))
    names, golden = case.golden["recall.names"].tolist(), case.golden["recall.out_gallery"]
    check(found, dict(zip(names, golden, strict=True)), "rerank/")


def test_recalls_of_score_matrices():
    """Their rows are made products of embeddings, so that the same code ranks them."""
    golden = load_golden("xvlm", "xvlm_task_retrieval.npz")
    expected = dict(zip(golden["recall.names"].tolist(), golden["recall.out"], strict=True))
    mesh, found = make_mesh(MeshOptions()), {}
    images, texts = golden["recall.in_scores_i2t"].shape
    owners, numbers = np.arange(texts) // (texts // images), np.arange(images)
    for side, groups in (("text", (numbers, owners)), ("image", (owners, numbers))):
        scores = golden[f"recall.in_scores_{'i2t' if side == 'text' else 't2i'}"]
        rows = ShardedRows.of_host(mesh, scores, 8), ShardedRows.of_host(mesh, np.eye(scores.shape[1], dtype="f4"), 8)
        for k in retrieval.AT:
            found[f"{side}/R@{k}"] = rerank.recall(ranks(*rows, *groups), k)
    found["mean"] = np.mean(list(found.values()))
    check(found, expected, "")


def check(found, expected, prefix):
    """txt_r1 is `text/R@1`, r_mean `mean`; theirs are percentages."""
    for k in retrieval.AT:
        for theirs, ours in (("txt", "text"), ("img", "image")):
            assert_close(100 * found[f"{ours}/{prefix}R@{k}"], expected[f"{theirs}_r{k}"], 1e-6)
    assert_close(100 * found[f"{prefix}mean"], expected["r_mean"], 1e-6)
