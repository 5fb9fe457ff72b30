"""Attention in both directions: chunks against the whole matrix, our backward pass against JAX's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.nn.bidirectional import Mixed, attend_both_ways

PLACES, TOKENS = 11, 5


def inputs(scale=1.0, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(2, n, 3, 4)), dtype) for n in (PLACES, TOKENS, PLACES, TOKENS)]
    mask = jnp.asarray([[True] * 5, [True] * 3 + [False] * 2])
    return [arrays[0] * scale, *arrays[1:]], mask


def weights_of(q, k, mask, limit):
    logits = jnp.einsum("bnhk,blhk->bhnl", q, k) / 2
    logits = jnp.clip(logits, -limit, limit) if limit else logits
    return jax.nn.softmax(jnp.where(mask[:, None, None], logits, -jnp.inf)), jax.nn.softmax(logits, axis=2)


def plain(q, k, image, text, mask, limit):
    """The whole matrix, differentiated by JAX."""
    to_tokens, to_places = weights_of(q, k, mask, limit)
    return Mixed(jnp.einsum("bhnl,blhk->bnhk", to_tokens, text), jnp.einsum("bhnl,bnhk->blhk", to_places, image))


def total(function, arrays):
    places, tokens = function(*arrays)
    rng = np.random.default_rng(1)
    by = [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in (places, tokens)]
    return sum((x.astype(jnp.float32) * w).sum() for x, w in zip((places, tokens), by, strict=True))


@pytest.mark.parametrize("limit", [0.0, 1.0])
@pytest.mark.parametrize("chunk", [100, 11, 4, 1])
def test_chunks_are_the_whole_matrix(chunk, limit):
    arrays, mask = inputs(2.0)
    logits = jnp.einsum("bnhk,blhk->bhnl", *arrays[:2]) / 2
    assert 0.1 < (jnp.abs(logits) > 1).mean() < 0.9

    def ours(*arrays):
        return attend_both_ways(*arrays, mask, None, 0.1, limit, chunk)

    theirs = functools.partial(plain, mask=mask, limit=limit)
    (out, found), (wanted, expected) = (
        jax.jit(lambda arrays, f=f: (f(*arrays), jax.grad(functools.partial(total, f))(arrays)))(arrays)
        for f in (ours, theirs)
    )
    for a, b in zip(out, wanted, strict=True):
        assert_close(a, b, 2e-6)
    for name, a, b in zip(("q", "k", "image", "text"), found, expected, strict=True):
        assert_close(a, b, 1e-5, name)


def test_far_larger_logits_are_fine():
    """The running maximum moves from chunk to chunk by more than float32's exp can bear."""
    arrays, mask = inputs(1e4)
    for a, b in zip(attend_both_ways(*arrays, mask, None, 0.0, 0.0, 3), plain(*arrays, mask, 0.0), strict=True):
        assert np.isfinite(a).all()
        assert_close(a, b, 1e-5)


def test_hidden_tokens_reach_no_place_but_gather_from_all():
    (q, k, image, text), mask = inputs()
    places, tokens = attend_both_ways(q, k, image, text, mask, None, 0.0, 0.0)
    other, other_tokens = attend_both_ways(
        q, k.at[1, 3:].add(1.0), image, text.at[1, 3:].set(9.0), mask, None, 0.0, 0.0
    )
    np.testing.assert_array_equal(places, other)
    assert (np.abs(tokens - other_tokens)[1, 3:] > 1e-4).any(axis=(1, 2)).all()
    _, shifted = attend_both_ways(q, k, image + 1.0, text, mask, None, 0.0, 0.0)
    assert_close(shifted, tokens + 1.0, 1e-5)


def test_dropout_is_the_same_in_both_passes():
    """Outputs are linear in the values, whose gradients give the output again; those of q and k are differences."""
    arrays, mask = inputs()
    key = jax.random.key(3)

    def ours(*arrays):
        return attend_both_ways(*arrays, mask, key, 0.4, 0.0, 4)

    whole = jax.jit(functools.partial(total, ours))
    assert np.abs(jax.jit(ours)(*arrays).places - plain(*arrays, mask, 0.0).places).max() > 0.1
    value, gradients = jax.jit(jax.value_and_grad(functools.partial(total, ours)))(arrays)
    assert_close((gradients[2] * arrays[2]).sum() + (gradients[3] * arrays[3]).sum(), value, 1e-4)
    for place in (0, 1):
        step = jnp.asarray(np.random.default_rng(place).normal(size=arrays[place].shape), jnp.float32) * 1e-2
        moved = [[*arrays[:place], arrays[place] + sign * step, *arrays[place + 1 :]] for sign in (1, -1)]
        slope = (whole(moved[0]) - whole(moved[1])) / 2
        assert_close((gradients[place] * step).sum(), slope, 2e-4, "qk"[place])


def test_each_chunk_drops_others():
    """All places are alike, so that they differ by what is dropped."""
    (q, k, image, text), mask = inputs()
    alike = (jnp.broadcast_to(x[:, :1], x.shape) for x in (q, image))
    places, _ = attend_both_ways(next(alike), k, next(alike), text, mask, jax.random.key(0), 0.4, 0.0, 4)
    assert (np.abs(places[:, :4] - places[:, 4:8]) > 1e-3).mean() > 0.3


def test_dropout_keeps_the_mean():
    arrays, mask = inputs()
    keys = jax.random.split(jax.random.key(0), 500)
    draws = jax.jit(jax.vmap(lambda key: attend_both_ways(*arrays, mask, key, 0.2, 0.0, 4)))(keys)
    for drawn, whole in zip(draws, plain(*arrays, mask, 0.0), strict=True):
        error = np.abs(drawn.mean(0) - whole) / (drawn.std(0) / np.sqrt(500) + 1e-6)
        assert drawn.std(0).max() > 0.1 and error.mean() < 1.0


def test_half_precision_keeps_its_dtype():
    arrays, mask = inputs(dtype=jnp.bfloat16)

    def ours(*arrays):
        return attend_both_ways(*arrays, mask, None, 0.0, 5e4, 4)

    found = ours(*arrays)
    gradients = jax.grad(functools.partial(total, ours))(arrays)
    assert {x.dtype for x in (*found, *gradients)} == {jnp.dtype(jnp.bfloat16)}
    exact = plain(*(x.astype(jnp.float32) for x in arrays), mask, 0.0)
    for a, b in zip(found, exact, strict=True):
        assert_close(a.astype(jnp.float32), b, 0.03)
