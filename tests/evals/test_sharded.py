"""Sets of rows that eight devices divide: the same ranks and candidates as all rows on one host, and a second pass."""

import json
import math
import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from colors import by_word, colors, context_of, mesh
from conftest import ROOT, assert_close
from handmade import two_towers

from capvl.evals import NotFiniteError, rerank, retrieval, sharded
from capvl.evals.sharded import ShardedRows
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

AT = retrieval.AT


def vectors(seed, count, width=6, kinds=7):
    """Unit vectors of which many are equal."""
    rng = np.random.default_rng(seed)
    some = rng.normal(size=(kinds, width)).astype(np.float32)
    rows = np.where(rng.uniform(size=(count, 1)) < 0.5, some[rng.integers(kinds, size=count)], 0)
    rows = np.where(rows.any(axis=1, keepdims=True), rows, rng.normal(size=(count, width)))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def ranks_on_one_host(queries, candidates, query_groups, candidate_groups):
    similar = queries @ candidates.T
    own = query_groups[:, None] == candidate_groups[None]
    best = np.where(own, similar, -np.inf).max(axis=1, keepdims=True)
    return ((similar >= best) & ~own).sum(axis=1)


@pytest.fixture(scope="module", params=[dict(), dict(replica=2), dict(replica=2, fsdp=2, tensor=2)])
def meshes(request):
    return make_mesh(MeshOptions(**request.param))


@pytest.mark.parametrize("images, texts, batch", [(7, 15, 8), (40, 40, 16), (33, 70, 8)])
def test_ranks_equal_those_on_one_host(meshes, images, texts, batch):
    """Equal embeddings tie, padding counts nowhere, and some images have no text."""
    left, right = vectors(0, images), vectors(1, texts)
    owners = np.random.default_rng(2).integers(images - 1, size=texts)
    right[::3] = left[owners[::3]]
    numbers = np.arange(images)
    a, b = (ShardedRows.of_host(meshes, x, batch) for x in (left, right))
    for arguments in ((a, b, numbers, owners), (b, a, owners, numbers)):
        plain = [left, right] if arguments[0] is a else [right, left]
        expected = ranks_on_one_host(*plain, *arguments[2:])
        np.testing.assert_array_equal(sharded.ranks(*arguments), expected)
    assert 0 < (expected == 0).mean() < 1


@pytest.mark.parametrize("k", [1, 5, 100])
def test_best_candidates_equal_those_on_one_host(meshes, k):
    queries, candidates = vectors(0, 21), vectors(1, 35)
    numbers, dots = sharded.top(*(ShardedRows.of_host(meshes, x, 8) for x in (queries, candidates)), k)
    similar = queries @ candidates.T
    assert numbers.shape == dots.shape == (21, min(k, 35))
    assert_close(dots, np.take_along_axis(similar, numbers, axis=1), 1e-6)
    assert_close(dots, -np.sort(-similar, axis=1)[:, :k], 1e-6)
    assert all(len(set(row)) == len(row) for row in numbers)
    # Of equal ones the lower number comes first.
    one = np.ones((20, 2), np.float32)
    numbers, _ = sharded.top(*(ShardedRows.of_host(meshes, x, 8) for x in (one[:3], one)), 4)
    np.testing.assert_array_equal(numbers, np.tile(np.arange(4), (3, 1)))


def test_rows_by_their_numbers(meshes):
    """Each device gets its share of a batch of rows, whichever device has them; of several arrays, each."""
    rows = {"a": np.arange(21 * 6, dtype=np.uint8).reshape(21, 3, 2), "b": np.linspace(-1, 1, 21, dtype=np.float32)}
    rows["c"] = np.arange(21) % 3 == 0
    held = ShardedRows.of_host(meshes, rows, 8)
    index = np.array([20, 0, 7, 8, 8, 15, 3, 20])
    found = held.take(index)
    for name, values in rows.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), values[index])
    share = 8 // (meshes.shape["replica"] * meshes.shape["fsdp"])
    assert {s.data.shape[0] for s in found["a"].addressable_shards} == {share}
    assert {s.data.shape[1] for s in held.rows["b"].addressable_shards} == {share}


def test_no_device_has_all_rows_or_similarities(meshes):
    """The programs themselves hold a batch of queries and a block of similarities, not a set of either."""
    queries, candidates = (ShardedRows.of_host(meshes, vectors(i, 160), 16) for i in range(2))
    groups = np.zeros(160, np.int32)
    arguments = (queries.rows, candidates.rows, np.int32(0), np.int32(160))
    share = 16 // (meshes.shape["replica"] * meshes.shape["fsdp"])
    ranks = sharded._ranks.lower(meshes, *arguments, groups, groups)
    for lowered in (ranks, sharded._top.lower(meshes, 4, *arguments)):
        shapes = re.findall(r"f32\[([\d,]+)\]", lowered.compile().as_text())
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        assert 10 * share * 6 <= largest < 160 * 6


def test_not_finite_rows_are_counted_and_padding_is_not(mesh):
    rows = vectors(0, 11)
    ShardedRows.of_host(mesh, rows, 8).check_finite("images")
    rows[3, 1], rows[9, 0] = np.nan, np.inf
    with pytest.raises(NotFiniteError, match="2 of 11 rows of the images"):
        ShardedRows.of_host(mesh, {"a": rows, "b": rows[:, :1]}, 8).check_finite("images")
    whole, last = jnp.ones((8, 2)), jnp.ones((8, 2)).at[3:].set(jnp.nan)
    ShardedRows.of_batches(mesh, [jax.device_put(x, batch_sharding(mesh)) for x in (whole, last)], 11).check_finite("x")


HOST = """
import json, sys
import jax, numpy as np
index, port, path = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
from capvl.data.reading.loader import Host, to_device
from capvl.evals import sharded, to_host
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding
from capvl.parallel.rules import batch_sharding
mesh, data = make_mesh(MeshOptions(replica=2)), np.load(path)
mine, sets = Host.this().rows(8), []
for name in ("images", "texts"):
    rows = data[name]
    padded = np.concatenate([rows, np.zeros((-len(rows) % 8, rows.shape[1]), np.float32)]).reshape(-1, 8, rows.shape[1])
    batches = [to_device({"x": batch[mine.start : mine.stop]}, batch_sharding(mesh))["x"] for batch in padded]
    sets.append(sharded.ShardedRows.of_batches(mesh, batches, len(rows)))
    sets[-1].check_finite(name)
numbers, _ = sharded.top(*sets, 3)
taken = to_host(sets[1].take(numbers.reshape(-1)[:8]))
found = dict(ranks=sharded.ranks(*sets, np.arange(len(data["images"])), data["owners"]), top=numbers, taken=taken)
if index == 1:
    print(json.dumps({name: value.tolist() for name, value in found.items()}))
"""


@pytest.mark.long
def test_two_hosts_that_each_have_half(tmp_path):
    images, texts = vectors(0, 33), vectors(1, 70)
    owners = np.random.default_rng(2).integers(33, size=70)
    np.savez(tmp_path / "data.npz", images=images, texts=texts, owners=owners)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", HOST]
    running = [
        subprocess.Popen([*command, str(i), port, tmp_path / "data.npz"], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    found = json.loads(outs[1].splitlines()[-1])
    np.testing.assert_array_equal(found["ranks"], ranks_on_one_host(images, texts, np.arange(33), owners))
    top, similar = np.array(found["top"]), images @ texts.T
    assert_close(np.take_along_axis(similar, top, axis=1), -np.sort(-similar, axis=1)[:, :3], 1e-6)
    assert_close(found["taken"], texts[top.reshape(-1)[:8]], 1e-7)


def test_a_second_pass(by_word, colors, mesh):
    """A scorer that knows more than the first pass puts right what that leaves open; what isn't among the candidates
    stays lost."""
    context, params = context_of(two_towers, colors, mesh)
    rng = np.random.default_rng(0)
    queries, noise = vectors(3, 21), rng.normal(size=(21, 6)).astype(np.float32)
    candidates = queries + 0.6 * noise
    names = np.arange(21, dtype=np.float32)
    firsts = [ShardedRows.of_host(mesh, x, context.batch) for x in (queries, candidates)]
    numbers, dots = sharded.top(*firsts, 4)

    def score(model, query, candidate):
        assert model.encoder is not None
        return -np.float32(1.0) * abs(query["name"] - candidate["name"])

    seconds = [ShardedRows.of_host(mesh, {"name": names}, context.batch)] * 2
    with jax.set_mesh(mesh):
        scores = rerank.rerank(context, rerank.pair_scorer(context, score), params, *seconds, numbers)
    np.testing.assert_array_equal(scores, -abs(names[:, None] - names[numbers]))
    groups = np.arange(21)
    before = rerank.ranks_of_scores(dots, numbers, groups, groups)
    after = rerank.ranks_of_scores(scores, numbers, groups, groups)
    among = (numbers == groups[:, None]).any(axis=1)
    assert 0.2 < among.mean() < 1 and rerank.recall(before, 1) < rerank.recall(after, 1) == among.mean()
    first = sharded.ranks(*firsts, groups, groups)
    np.testing.assert_array_equal(before[among], first[among])
    assert (first[~among] >= 4).all() and (after[~among] == 20).all()  # All others come before.


def test_ranks_of_scores_are_exact():
    """Several own candidates: the best counts; a tie with another one counts against the model."""
    numbers = np.array([[0, 1, 2], [3, 4, 0], [1, 2, 3]])
    scores = np.array([[0.5, 0.9, 0.7], [0.5, 0.5, 0.1], [3.0, 2.0, 1.0]], np.float32)
    found = rerank.ranks_of_scores(scores, numbers, np.array([0, 1, 9]), np.array([0, 5, 0, 1, 5]))
    np.testing.assert_array_equal(found, [1, 1, 5])


def test_no_number_comes_of_scores_that_are_not_finite(by_word, colors, mesh):
    context, params = context_of(two_towers, colors, mesh)
    rows = ShardedRows.of_host(mesh, np.arange(9, dtype=np.float32), context.batch)
    score = rerank.pair_scorer(context, lambda model, a, b: 1 / (a - 8) + 0 * b)
    with jax.set_mesh(mesh), pytest.raises(NotFiniteError, match="1 of 9 rows of the pairs"):
        rerank.rerank(context, score, params, rows, rows, np.zeros((9, 2), int))
