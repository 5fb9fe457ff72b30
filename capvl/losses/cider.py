"""CIDEr-D of token sequences on the device (arXiv 1411.5726, section 5): the reward of self-critical training.

n-grams are compared by a 32-bit hash; in how many training images one occurs comes from a table of BUCKETS buckets.
Words are tokens here, so a word in two pieces counts as two.

Letters: X candidates, R references of each, L positions, n 1 to 4.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from capvl.nn.padding import lengths, real

ORDERS = 4
BUCKETS = 1 << 20
SIGMA = 6.0
_PRIME, _SEED = 0x01000193, 0x811C9DC5


def n_grams(tokens_XL, n: int) -> tuple[jax.Array, jax.Array]:
    """Hash (X, L) uint32 of the n tokens that begin at each position, and whether there are so many; 0 is padding."""
    hashed = jnp.full(tokens_XL.shape, _SEED + n, jnp.uint32)
    there = real(tokens_XL)
    whole = jnp.ones(tokens_XL.shape, bool)
    for i in range(n):
        shifted = jnp.pad(tokens_XL[:, i:], ((0, 0), (0, i)))
        mixed = (hashed ^ shifted.astype(jnp.uint32)) * jnp.uint32(_PRIME)
        hashed, whole = mixed ^ (mixed >> 15), whole & jnp.pad(there[:, i:], ((0, 0), (0, i)))
    return hashed, whole


def count_documents(documents: Iterable[np.ndarray]) -> tuple[np.ndarray, int]:
    """In how many documents the n-grams of each bucket occur, (4, BUCKETS) float32, and how many documents there are.

    Args:
      documents: token sequences (R, L) of each: all captions of an image, without their ends.
    """
    counts, number = np.zeros((ORDERS, BUCKETS), np.float32), 0
    hash_all = jax.jit(lambda tokens: [n_grams(tokens, n + 1) for n in range(ORDERS)])
    for tokens in documents:
        number += 1
        for n, (hashed, whole) in enumerate(hash_all(jnp.asarray(tokens))):
            counts[n, np.unique(np.asarray(hashed)[np.asarray(whole)] % BUCKETS)] += 1
    return counts, number


def cider_d(candidates_XL, references_XRL, counts, documents: float) -> jax.Array:
    """CIDEr-D (X,) of each candidate, 10 at most.

    Args:
      candidates_XL: int32 tokens without their end; 0 is padding.
      references_XRL: the same of the references; one that is all padding doesn't count.
      counts, documents: see `count_documents`.
    """
    x, r, length = references_XRL.shape
    flat = references_XRL.reshape(x * r, length)
    there_XR = lengths(references_XRL) > 0
    total_XR = jnp.zeros((x, r))
    # The reference implementation takes the number of bigrams for the length.
    lengths_X, lengths_XR = n_grams(candidates_XL, 2)[1].sum(1), n_grams(flat, 2)[1].sum(1).reshape(x, r)
    gap_XR = (lengths_X[:, None] - lengths_XR).astype(jnp.float32)
    for n in range(ORDERS):
        (mine, mine_real), (theirs, theirs_real) = n_grams(candidates_XL, n + 1), n_grams(flat, n + 1)
        own_XL, own_norm_X, idf_XL = _weights(mine, mine_real, counts[n], documents)
        _, norm_XR, _ = _weights(theirs, theirs_real, counts[n], documents)
        theirs, theirs_real = (v.reshape(x, r, length) for v in (theirs, theirs_real))
        same_XRLL = (mine[:, None, :, None] == theirs[:, :, None]) & theirs_real[:, :, None]
        their_count_XRL = jnp.where(mine_real[:, None], same_XRLL.sum(axis=3).astype(jnp.float32), 0.0)
        product = jnp.minimum(own_XL[:, None], their_count_XRL) * their_count_XRL * jnp.square(idf_XL)[:, None]
        dot_XR = (product / jnp.maximum(own_XL, 1.0)[:, None]).sum(axis=2)
        norms = own_norm_X[:, None] * norm_XR.reshape(x, r)
        total_XR = total_XR + jnp.where(norms > 0, dot_XR / jnp.maximum(norms, 1e-12), 0.0)
    score_XR = total_XR / ORDERS * jnp.exp(-jnp.square(gap_XR) / (2 * SIGMA**2))
    count_X = jnp.maximum(there_XR.sum(axis=1), 1).astype(jnp.float32)
    return 10 * jnp.where(there_XR, score_XR, 0.0).sum(axis=1) / count_X


def _weights(hashed_XL, real_XL, counts, documents):
    """How often each n-gram occurs in its sequence (X, L), the norm (X,) of its tf-idf vector, and its idf (X, L)."""
    same = (hashed_XL[:, :, None] == hashed_XL[:, None]) & real_XL[:, None]
    often_XL = jnp.where(real_XL, same.sum(axis=2).astype(jnp.float32), 0.0)
    seen = jnp.asarray(counts)[(hashed_XL % BUCKETS).astype(jnp.int32)]
    idf_XL = jnp.log(jnp.asarray(documents, jnp.float32)) - jnp.log(jnp.maximum(seen, 1.0))
    # A sum over positions counts an n-gram as often as it occurs.
    squares = jnp.square(often_XL * idf_XL) / jnp.maximum(often_XL, 1.0)
    return often_XL, jnp.sqrt(jnp.where(real_XL, squares, 0.0).sum(axis=1)), idf_XL
