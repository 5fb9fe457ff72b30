"""The chunked vocabulary loss against the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.losses.vocabulary import vocabulary_loss
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

B, L, D, V = 8, 7, 16, 61


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, L + 1, B)
    lengths[0] = L
    mask = np.arange(L) < lengths[:, None]
    return {
        "hidden": rng.normal(size=(B, L, D)).astype(np.float32),
        "labels": np.where(mask, rng.integers(1, V, (B, L)), 0).astype(np.int32),
        "weights": (mask * rng.uniform(0.2, 1, (B, L))).astype(np.float32),
        "kernel": rng.normal(size=(D, V)).astype(np.float32),
        "bias": rng.normal(size=V).astype(np.float32),
    }


def dense(hidden, kernel, bias, labels, weights, smoothing):
    log_probs = jax.nn.log_softmax(hidden @ kernel + bias[None, None])
    target = jnp.where(jnp.arange(V)[None, None] == labels[..., None], 1 - smoothing, smoothing / (V - 1))
    nll = -jnp.sum(target * log_probs, axis=-1)
    return jnp.sum(nll * weights), nll


dense_gradient = jax.jit(jax.value_and_grad(dense, (0, 1, 2), has_aux=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 5, 16, 1000])
def test_loss_and_gradients_are_exact(arrays, chunk, smoothing):
    a = jax.device_put(arrays)

    def chunked(hidden, kernel, bias):
        return vocabulary_loss(hidden, a["labels"], a["weights"], kernel, bias, smoothing, chunk)

    point = a["hidden"], a["kernel"], a["bias"]
    (loss, nll), grads = jax.jit(jax.value_and_grad(chunked, (0, 1, 2), has_aux=True))(*point)
    (loss_0, nll_0), grads_0 = dense_gradient(*point, a["labels"], a["weights"], smoothing)
    assert_close(loss, loss_0, 1e-5, "loss")
    assert_close(nll, nll_0 * (a["weights"] != 0).astype(jnp.float32), 1e-5, "nll")
    for name, g, g0 in zip(("hidden", "kernel", "bias"), grads, grads_0, strict=True):
        assert_close(g, g0, 1e-5, name)
    assert_close(jax.jit(chunked)(*point)[0], loss_0, 1e-5, "loss without gradient")


@jax.jit
def gradient(hidden, labels, weights, kernel, bias):
    def loss(hidden, kernel, bias):
        return vocabulary_loss(hidden, labels, weights, kernel, bias, 0.0, 4)[0]

    return jax.value_and_grad(loss, (0, 1, 2))(hidden, kernel, bias)


@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 4, 2), (2, 2, 2)])
def test_sharded_equals_one_device(arrays, shape):
    names = ("hidden", "labels", "weights", "kernel", "bias")
    expected = gradient(*(jnp.asarray(arrays[n]) for n in names))
    mesh = make_mesh(MeshOptions(*shape))
    with jax.set_mesh(mesh):
        rows = jax.device_put([arrays[n] for n in names[:3]], batch_sharding(mesh))
        found = gradient(*rows, jnp.asarray(arrays["kernel"]), jnp.asarray(arrays["bias"]))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, 1e-5)


def test_never_all_logits_at_once(arrays):
    a = jax.device_put(arrays)

    def loss(hidden, kernel):
        return vocabulary_loss(hidden, a["labels"], a["weights"], kernel, a["bias"], 0.0, 4)[0]

    jaxpr = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(a["hidden"], a["kernel"]))
    assert f"f32[1,4,{V}]" in jaxpr
    for shape in (f"{B},{L},{V}", f"1,{B * L},{V}", f"{B * L},{V}"):
        assert f"[{shape}]" not in jaxpr


def test_all_padding_is_zero(arrays):
    a = jax.device_put(arrays)
    zero = jnp.zeros_like(a["weights"])

    def loss_of(hidden):
        return vocabulary_loss(hidden, a["labels"], zero, a["kernel"], a["bias"])[0]

    loss, grads = jax.jit(jax.value_and_grad(loss_of))(a["hidden"])
    assert loss == 0
    assert not np.asarray(grads).any()
