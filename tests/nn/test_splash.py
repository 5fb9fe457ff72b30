"""The TPU kernel for long sequences against plain attention, interpreted; and when it is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.nn import attention, splash
from capvl.parallel.mesh import MeshOptions, make_mesh


def inputs(queries, keys, heads=2, batch=4):
    rng = np.random.default_rng(0)
    shapes = [(batch, n, heads, 64) for n in (queries, keys, keys, queries)]
    return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def outputs(attend, q, k, v, gradient):
    """The result and the gradients of q, k and v."""
    out, pullback = jax.vjp(attend, q, k, v)
    return out, *pullback(gradient)


@pytest.mark.parametrize(("queries", "keys", "causal"), [(150, 150, False), (150, 150, True), (130, 200, False)])
@pytest.mark.parametrize("mesh", [None, MeshOptions(2, 2, 2)])
def test_equal_to_plain_attention(queries, keys, causal, mesh):
    arguments = inputs(queries, keys)
    expected = outputs(lambda *qkv: attention.attend(*qkv, causal=causal), *arguments)

    def run(*arguments):
        return outputs(lambda *qkv: splash.attend(*qkv, causal=causal, interpret=True), *arguments)

    if mesh is None:
        found = jax.jit(run)(*arguments)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            found = jax.jit(run)(*arguments)
    for name, a, b in zip(("output", "q", "k", "v"), found, expected, strict=True):
        assert_close(a, b, 2e-5, name)


def shaped(tokens):
    return jax.ShapeDtypeStruct((1, tokens, 1, 64), jnp.bfloat16)


def test_chosen_by_shape_and_platform():
    assert not splash.pays(shaped(1024), shaped(1024))  # No TPU.
    cpu = jax.sharding.AbstractMesh((1,), ("x",))
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    tpu = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(cpu):
        assert not splash.pays(shaped(1024), shaped(1024))
    with jax.sharding.use_abstract_mesh(tpu):
        assert splash.pays(shaped(576), shaped(576))
        assert not splash.pays(shaped(196), shaped(196))
        assert not splash.pays(shaped(64), shaped(1024))
