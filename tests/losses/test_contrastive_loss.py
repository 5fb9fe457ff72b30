"""Blockwise contrastive losses against dense ones, on one device and on eight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.losses.contrastive import sigmoid_loss, softmax_loss
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding


def dense_sigmoid(image, text, scale, bias):
    logits = scale * image @ text.T + bias
    sign = 2.0 * jnp.eye(len(image)) - 1.0
    return -jax.nn.log_sigmoid(sign * logits).sum() / len(image)


def dense_softmax(image, text, scale, mask):
    image, text = image[mask], text[mask]
    logits = scale * image @ text.T
    diagonal = jnp.diag(logits)
    both = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
    return (0.5 * both - diagonal).mean()


def embeddings(rows=24, width=6):
    rng = np.random.default_rng(0)
    pair = rng.normal(size=(2, rows, width)).astype(np.float32)
    pair[1] += pair[0]
    return [jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in pair]


WRT = {"sigmoid": (0, 1, 2, 3), "softmax": (0, 1, 2)}


def inputs(kind):
    """(image, text, scale, bias or mask, mask)."""
    image, text = embeddings()
    mask = np.ones(len(image), bool)
    if kind == "softmax":
        mask[[3, 20]] = False
    return image, text, jnp.float32(7.0), jnp.float32(-2.0) if kind == "sigmoid" else jnp.asarray(mask), mask


@functools.cache
def expected_of(kind):
    """Loss and gradients of the dense form, which know nothing of meshes and chunks."""
    image, text, scale, last, mask = inputs(kind)

    def dense(image, text, scale, bias):
        if kind == "sigmoid":
            return 3.0 * dense_sigmoid(image, text, scale, bias)
        return 3.0 * dense_softmax(image, text, scale, mask)

    return jax.jit(jax.value_and_grad(dense, WRT[kind]))(image, text, scale, last)


MESHES = {"one": None, "eight": {"replica": 2, "fsdp": 2, "tensor": 2}, "ring": {"replica": 1, "fsdp": 8, "tensor": 1}}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("chunk", [1024, 2])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_loss_and_gradients_equal_the_dense_ones(kind, chunk, mesh):
    image, text, scale, last, _ = inputs(kind)

    def ours(image, text, scale, bias):
        if kind == "sigmoid":
            return 3.0 * sigmoid_loss(image, text, scale, bias, chunk)
        return 3.0 * softmax_loss(image, text, scale, last, chunk)[0]

    wrt, expected = WRT[kind], expected_of(kind)
    if MESHES[mesh] is None:
        found = jax.jit(jax.value_and_grad(ours, wrt))(image, text, scale, last)
    else:
        mesh = make_mesh(MeshOptions(**MESHES[mesh]))
        with jax.set_mesh(mesh):
            image, text = (jax.device_put(x, batch_sharding(mesh)) for x in (image, text))
            found = jax.jit(jax.value_and_grad(ours, wrt))(image, text, scale, last)
    assert_close(found[0], expected[0], 1e-5, "loss")
    for name, ours_, theirs in zip(("image", "text", "scale", "bias"), found[1], expected[1], strict=False):
        assert_close(ours_, theirs, 1e-5, name)


def test_correct_counts_the_diagonal():
    image, text = embeddings()
    mask = jnp.ones(len(image), bool).at[5].set(False)
    found = softmax_loss(image, text, jnp.float32(3.0), mask)[1]
    dots = np.array(image @ text.T)
    dots[:, 5] = -9
    expected = (dots.argmax(1) == np.arange(len(dots)))[np.asarray(mask)].sum()
    assert float(found) == expected


def test_memory_of_a_device_does_not_grow_with_the_devices():
    """Temporary bytes of loss and gradients at 64 rows a device, on 2 and on 8 devices."""
    sizes = []
    for devices in (2, 8):
        mesh = jax.make_mesh(
            (1, devices, 1),
            ("replica", "fsdp", "tensor"),
            (jax.sharding.AxisType.Auto,) * 3,
            devices=jax.devices()[:devices],
        )
        with jax.set_mesh(mesh):
            rows = jax.ShapeDtypeStruct((64 * devices, 32), jnp.float32, sharding=batch_sharding(mesh))
            one = jax.ShapeDtypeStruct((), jnp.float32)
            step = jax.jit(jax.value_and_grad(sigmoid_loss, (0, 1, 2, 3)))
            sizes.append(step.lower(rows, rows, one, one).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] <= 1.1 * sizes[0]


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_that_are_masked_take_no_part_in_the_sigmoid_loss(mesh):
    image, text = embeddings()
    mask = np.ones(len(image), bool)
    mask[[3, 20, 21]] = False
    scale, bias = jnp.float32(7.0), jnp.float32(-2.0)

    def ours(image, text, scale, bias):
        return sigmoid_loss(image, text, scale, bias, 4, jnp.asarray(mask))

    def dense(image, text, scale, bias):
        return dense_sigmoid(image[mask], text[mask], scale, bias)

    expected = jax.jit(jax.value_and_grad(dense, (0, 1, 2, 3)))(image, text, scale, bias)
    run = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3)))
    if MESHES[mesh] is None:
        found = run(image, text, scale, bias)
    else:
        mesh = make_mesh(MeshOptions(**MESHES[mesh]))
        with jax.set_mesh(mesh):
            found = run(*(jax.device_put(x, batch_sharding(mesh)) for x in (image, text)), scale, bias)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, 1e-5)
