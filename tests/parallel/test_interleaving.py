"""Batches put together and taken apart: nothing is lost, and nothing travels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rows import interleave, part
from capvl.parallel.rules import batch_sharding


@pytest.mark.parametrize("counts", [(8,), (8, 8), (16, 24, 8), (3, 4)])
def test_what_is_put_together_comes_apart_again(counts):
    batches = [jnp.asarray(np.random.default_rng(i).normal(size=(n, 2, 3))) for i, n in enumerate(counts)]
    joined = interleave(batches)
    assert joined.shape == (sum(counts), 2, 3)
    for found, batch in zip(part(joined, counts), batches, strict=True):
        np.testing.assert_array_equal(found, batch)


def test_rows_alternate_as_finely_as_their_counts_allow():
    joined = interleave([jnp.arange(4), 10 + jnp.arange(6)])
    np.testing.assert_array_equal(joined, [0, 1, 10, 11, 12, 2, 3, 13, 14, 15])


def test_nothing_travels_between_devices():
    mesh = make_mesh(MeshOptions(fsdp=8))
    given = [jax.device_put(np.ones((n, 4), np.float32), batch_sharding(mesh)) for n in (16, 24)]

    def changed(joining):
        return jax.jit(lambda a, b: [2 * x for x in part(joining([a, b]), (16, 24))]).lower(*given).compile().as_text()

    with jax.set_mesh(mesh):
        text, plain = changed(interleave), changed(jnp.concatenate)
    for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert name not in text, name
    assert any(name in plain for name in ("all-gather", "all-to-all", "collective-permute", "all-reduce"))
