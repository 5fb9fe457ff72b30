"""Attention: odd lengths on GPUs (XLA stands for cuDNN's kernel, which isn't here), and keys that rows share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.nn import attention


@pytest.mark.parametrize(("queries", "keys", "causal"), [(7, 7, False), (7, 7, True), (6, 9, False), (5, 8, False)])
def test_a_hidden_place_changes_nothing(monkeypatch, queries, keys, causal):
    lengths = []

    def kernel(q, k, v, *, implementation, **how):
        assert implementation == "cudnn"
        lengths.extend([q.shape[1], k.shape[1]])
        return xla(q, k, v, implementation="xla", **how)

    xla = jax.nn.dot_product_attention
    monkeypatch.setattr(attention.jax.nn, "dot_product_attention", kernel)
    shapes = [(2, n, 2, 8) for n in (queries, keys, keys, queries)]
    *qkv, weights = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
    mask = jnp.tril(jnp.ones((queries, keys), bool))[None, None] if causal else None

    def total(attend, q, k, v):
        return (attend(q, k, v) * weights).sum()

    padded = functools.partial(attention._cudnn_attention, causal=causal)
    plain = functools.partial(attention._softmax_attention, mask=mask)
    assert_close(padded(*qkv), plain(*qkv), 1e-5)
    found, expected = (jax.grad(functools.partial(total, f), argnums=(0, 1, 2))(*qkv) for f in (padded, plain))
    for name, a, b in zip("qkv", found, expected, strict=True):
        assert_close(a, b, 1e-5, name)
    assert not any(n % 2 for n in lengths)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, (1, 1, 1, 5), (1, 1, 3, 5), (6, 1, 1, 5), (6, 2, 3, 5)])
def test_rows_that_share_keys_are_as_rows_with_copies(mask, causal):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(n, length, 2, 8)), jnp.float32) for n, length in ((6, 3), (2, 5), (2, 5)))
    # The first key is always seen.
    mask = None if mask is None else jnp.asarray(rng.random(mask) < 0.5).at[..., 0].set(True)

    def total(attend, q, k, v):
        return (attend(q, k, v) ** 2).sum()

    def shared(q, k, v):
        return attention.attend(q, k, v, mask=mask, causal=causal)

    def copied(q, k, v):
        return shared(q, jnp.repeat(k, 3, axis=0), jnp.repeat(v, 3, axis=0))

    assert_close(shared(q, k, v), copied(q, k, v), 1e-6)
    found, expected = (jax.grad(functools.partial(total, f), argnums=(0, 1, 2))(q, k, v) for f in (shared, copied))
    for name, a, b in zip("qkv", found, expected, strict=True):
        assert_close(a, b, 1e-5, name)
