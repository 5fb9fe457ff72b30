"""Hard negatives: their distribution, and that they are the same however many devices there are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capvl.losses.matching import hard_negatives
from capvl.losses.ring import take_rows
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

MESHES = {"one": None, "eight": {"replica": 2, "fsdp": 2, "tensor": 2}, "ring": {"replica": 1, "fsdp": 8, "tensor": 1}}
ROWS = 16


def embeddings(rows=ROWS, width=6):
    rng = np.random.default_rng(0)
    found = rng.normal(size=(2, rows, width)).astype(np.float32)
    return [jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in found]


def on(mesh, function, *arguments):
    """What a function gives, its rows divided over a mesh; None: on one device."""
    if MESHES[mesh] is None:
        return jax.jit(function)(*arguments)
    mesh = make_mesh(MeshOptions(**MESHES[mesh]))
    with jax.set_mesh(mesh):
        return jax.jit(function)(*jax.device_put(arguments, batch_sharding(mesh)))


def weights(image, text, scale, mask, ids, among):
    """The dense distributions of the original's formula: of each text over images, of each image over texts."""
    logits = float(scale) * np.asarray(image) @ np.asarray(text).T
    rows = np.arange(len(logits))
    seen = mask[:, None] & mask[None]
    if among:
        seen &= rows[:, None] // among == rows[None] // among
    same = ids[:, None] == ids[None]
    found = []
    for z, s in ((logits.T, seen.T), (logits, seen)):
        p = np.exp(np.where(s, z, -np.inf))
        p = p / np.maximum(p.sum(axis=1, keepdims=True), 1e-30) + 1e-5
        p = np.where(s & ~same, p, 0)
        found.append(p / np.maximum(p.sum(axis=1, keepdims=True), 1e-30))
    return found


@pytest.mark.parametrize("among", [0, 4])
def test_draws_follow_the_softmax_of_the_similarities(among):
    image, text = embeddings()
    mask, ids = np.ones(ROWS, bool), np.arange(ROWS)
    mask[[2, 9]] = False
    ids[1] = ids[0]
    draws = 3000

    def draw(key):
        return hard_negatives(image, text, jnp.float32(3.0), jnp.asarray(mask), jnp.asarray(ids), key, among=among)

    found = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), draws))
    expected = weights(image, text, 3.0, mask, ids, among)
    for rows, there, probability in zip(found[::2], found[1::2], expected, strict=True):
        assert (np.asarray(there) == (probability.sum(axis=1) > 0)).all()
        counted = np.stack([np.bincount(column, minlength=ROWS) for column in np.asarray(rows).T]) / draws
        live = probability.sum(axis=1) > 0
        error = np.abs(counted - probability)[live]
        assert (error <= 4.5 * np.sqrt(probability[live] * (1 - probability[live]) / draws) + 1e-9).all()


@pytest.mark.parametrize("mesh", MESHES)
def test_draws_are_the_same_on_any_number_of_devices(mesh):
    image, text = embeddings()
    mask = jnp.ones(ROWS, bool).at[3].set(False)
    ids = jnp.arange(ROWS, dtype=jnp.int32) // 2

    def draw(image, text, mask, ids, chunk=1024):
        return hard_negatives(image, text, jnp.float32(9.0), mask, ids, jax.random.key(5), chunk=chunk)

    expected = draw(image, text, mask, ids, chunk=2)
    for a, b in zip(on(mesh, draw, image, text, mask, ids), expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_alone_has_no_negative():
    image, text = embeddings(2)
    found = hard_negatives(image, text, jnp.float32(9.0), jnp.array([True, False]), None, jax.random.key(0))
    assert not np.asarray(found.image_there).any() and not np.asarray(found.text_there).any()


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_are_taken_and_their_gradients_given_back(mesh):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(ROWS, 3, 2)).astype(np.float32))
    numbers = jnp.arange(ROWS, dtype=jnp.int32)
    index = jnp.asarray(rng.integers(0, ROWS, ROWS).astype(np.int32))
    weight = jnp.asarray(rng.normal(size=x.shape).astype(np.float32))

    def ours(x, numbers, index, weight):
        def loss(x):
            taken, whose = take_rows((x, numbers), index)
            return (weight * taken**2).sum(), whose

        return jax.value_and_grad(loss, has_aux=True)(x)

    (value, whose), gradient = on(mesh, ours, x, numbers, index, weight)
    np.testing.assert_array_equal(whose, index)
    expected, of_x = jax.value_and_grad(lambda x: (weight * x[index] ** 2).sum())(x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, of_x, rtol=1e-5, atol=1e-6)


def test_fetched_rows_need_the_same_memory_on_any_number_of_devices():
    """Tokens of drawn negatives with their gradients: a device holds its own rows and a block that passes."""
    own, sizes = 4, []
    for count in (2, 4, 8):
        mesh = make_mesh(MeshOptions(replica=1, fsdp=count, tensor=1), jax.devices()[:count])
        x, index = jnp.ones((own * count, 32, 16)), jnp.zeros(own * count, jnp.int32)

        def total(x, index):
            return (take_rows(x, index) ** 2).sum()

        with jax.set_mesh(mesh):
            x, index = jax.device_put((x, index), batch_sharding(mesh))
            compiled = jax.jit(jax.grad(total)).lower(x, index).compile()
        sizes.append(compiled.memory_analysis().temp_size_in_bytes)
    # One more block would be 8 KiB.
    assert max(sizes) - min(sizes) < x[:own].nbytes, sizes
