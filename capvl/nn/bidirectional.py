"""Attention in both directions from one matrix of logits, between places of an image and tokens of a text.

X-MHA of GLIP (arXiv 2112.03857, §3.2): softmax over the tokens gives each place a mix of the tokens' values, softmax
over the places gives each token a mix of the places'. An image has some 20,000 places, so logits are made for a chunk
of places at a time, and made again in the backward pass; the softmax over places keeps running maxima and sums (arXiv
1805.02867). Neither pass ever holds the whole matrix.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from capvl.nn.layers import drop

CHUNK = 4096
"""Places whose logits are there at a time."""


class Mixed(NamedTuple):
    """What both sides gather: of the tokens' values (B, N, H, K), and of the places' (B, L, H, K)."""

    places: jax.Array
    tokens: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def attend_both_ways(
    q_BNHK, k_BLHK, image_BNHK, text_BLHK, mask_BL, key, dropout: float, limit: float, chunk: int = CHUNK
) -> Mixed:
    """Attention from places to tokens and from tokens to places, by the logits q kᵀ / sqrt(K) of both.

    Args:
      q_BNHK, k_BLHK: what the logits are made of: N places, L tokens.
      image_BNHK, text_BLHK: values of the places and of the tokens.
      mask_BL: which tokens the places see, bool; padding gathers from the places too.
      key: means training; None for none.
      dropout: share of the weights of either softmax that is dropped where there is a `key`.
      limit: logits are clipped to ±limit; 0 for not.
      chunk: of how many places logits are in memory at a time.

    Returns:
      `Mixed`, in the queries' dtype.
    """
    return _forward(q_BNHK, k_BLHK, image_BNHK, text_BLHK, mask_BL, key, dropout, limit, chunk)[0]


def _forward(q_BNHK, k_BLHK, image_BNHK, text_BLHK, mask_BL, key, dropout, limit, chunk):
    batch, length, heads, width = k_BLHK.shape
    dtype, lowest = q_BNHK.dtype, jnp.finfo(jnp.float32).min
    start = (
        jnp.full((batch, heads, length), lowest),
        jnp.zeros((batch, heads, length), jnp.float32),
        jnp.zeros((batch, heads, length, width), jnp.float32),
    )

    def step(state, number, q_BnHK, image_BnHK):
        """The chunk's places are done; the tokens' maxima, sums and sums of values now have its share."""
        peak_BHL, total_BHL, sum_BHLK = state
        keys = _keys(key, number)
        logits_BHnL = _logits(q_BnHK, k_BLHK, limit)[0]
        weights_BHnL = drop(jax.nn.softmax(_seen(logits_BHnL, mask_BL)), dropout, keys[0]).astype(dtype)
        places_BnHK = _dot("bhnl,blhk->bnhk", weights_BHnL, text_BLHK).astype(dtype)
        higher_BHL = jnp.maximum(peak_BHL, logits_BHnL.max(2))
        exp_BHnL, shrink_BHL = jnp.exp(logits_BHnL - higher_BHL[:, :, None]), jnp.exp(peak_BHL - higher_BHL)
        added_BHLK = _dot("bhnl,bnhk->bhlk", drop(exp_BHnL, dropout, keys[1]).astype(dtype), image_BnHK)
        total_BHL = total_BHL * shrink_BHL + exp_BHnL.sum(2)
        return (higher_BHL, total_BHL, sum_BHLK * shrink_BHL[..., None] + added_BHLK), (places_BnHK,)

    (peak_BHL, total_BHL, sum_BHLK), (places_BNHK,) = _by_chunks(step, start, (q_BNHK, image_BNHK), chunk)
    tokens_BLHK = (sum_BHLK / total_BHL[..., None]).swapaxes(1, 2).astype(dtype)
    out = Mixed(places_BNHK, tokens_BLHK)
    return out, (q_BNHK, k_BLHK, image_BNHK, text_BLHK, mask_BL, key, out, peak_BHL, 1 / total_BHL)


def _backward(dropout, limit, chunk, saved, gradient: Mixed):
    """Of either softmax d logits = weights * (d weights - Σ weights * d weights); that sum is gradient . output."""
    q_BNHK, k_BLHK, image_BNHK, text_BLHK, mask_BL, key, out, peak_BHL, inverse_BHL = saved
    dtype, scale = q_BNHK.dtype, q_BNHK.shape[-1] ** -0.5
    dtokens_BLHK = gradient.tokens
    along_BHL = _along(dtokens_BLHK, out.tokens)

    def step(sums, number, q_BnHK, image_BnHK, places_BnHK, dplaces_BnHK):
        keys = _keys(key, number)
        logits_BHnL, inside_BHnL = _logits(q_BnHK, k_BLHK, limit)
        weights_BHnL = jax.nn.softmax(_seen(logits_BHnL, mask_BL))
        dropped_BHnL = drop(weights_BHnL, dropout, keys[0]).astype(dtype)
        dtext_BLHK = _dot("bhnl,bnhk->blhk", dropped_BHnL, dplaces_BnHK)
        dweights_BHnL = drop(_dot("bnhk,blhk->bhnl", dplaces_BnHK, text_BLHK), dropout, keys[0])
        dlogits_BHnL = weights_BHnL * (dweights_BHnL - _along(dplaces_BnHK, places_BnHK)[..., None])

        weights_BHnL = jnp.exp(logits_BHnL - peak_BHL[:, :, None]) * inverse_BHL[:, :, None]
        dropped_BHnL = drop(weights_BHnL, dropout, keys[1]).astype(dtype)
        dimage_BnHK = _dot("bhnl,blhk->bnhk", dropped_BHnL, dtokens_BLHK).astype(dtype)
        dweights_BHnL = drop(_dot("bnhk,blhk->bhnl", image_BnHK, dtokens_BLHK), dropout, keys[1])
        dlogits_BHnL = dlogits_BHnL + weights_BHnL * (dweights_BHnL - along_BHL[:, :, None])

        if limit:
            dlogits_BHnL = jnp.where(inside_BHnL, dlogits_BHnL, 0.0)
        dlogits_BHnL = (dlogits_BHnL * scale).astype(dtype)
        dq_BnHK = _dot("bhnl,blhk->bnhk", dlogits_BHnL, k_BLHK).astype(dtype)
        dk_BLHK = _dot("bhnl,bnhk->blhk", dlogits_BHnL, q_BnHK)
        return (sums[0] + dk_BLHK, sums[1] + dtext_BLHK), (dq_BnHK, dimage_BnHK)

    nothing = jnp.zeros(k_BLHK.shape, jnp.float32)
    by_place = (q_BNHK, image_BNHK, out.places, gradient.places)
    (dk_BLHK, dtext_BLHK), (dq_BNHK, dimage_BNHK) = _by_chunks(step, (nothing, nothing), by_place, chunk)
    return dq_BNHK, dk_BLHK.astype(dtype), dimage_BNHK, dtext_BLHK.astype(dtype), None, None


attend_both_ways.defvjp(_forward, _backward)


def _by_chunks(step, state, arrays, chunk: int):
    """state, rows <- step(state, number, *rows of the arrays) through chunks of arrays (B, N, …) along N.

    Returns:
      The last state, and the rows that the steps gave, each side by side again as (B, N, …).
    """
    size = arrays[0].shape[1]
    whole = size // chunk if size > chunk else 0
    parts = []
    if whole:
        chunks = tuple(
            x[:, : whole * chunk].reshape(x.shape[0], whole, chunk, *x.shape[2:]).swapaxes(0, 1) for x in arrays
        )
        numbers = jnp.arange(whole, dtype=jnp.int32)
        state, given = jax.lax.scan(lambda state, x: step(state, x[0], *x[1]), state, (numbers, chunks))
        parts.append([y.swapaxes(0, 1).reshape(y.shape[1], -1, *y.shape[3:]) for y in given])
    if whole * chunk < size:
        state, given = step(state, jnp.int32(whole), *(x[:, whole * chunk :] for x in arrays))
        parts.append(given)
    return state, tuple(y[0] if len(y) == 1 else jnp.concatenate(y, axis=1) for y in zip(*parts, strict=True))


def _keys(key, number):
    """Keys of a chunk's two softmaxes, the same in both passes."""
    return (None, None) if key is None else jax.random.split(jax.random.fold_in(key, number), 2)


def _dot(equation: str, a, b):
    """einsum with float32 sums."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _logits(q_BNHK, k_BLHK, limit: float):
    """Logits (B, H, N, L) float32, clipped where there is a limit, and which of them were within it."""
    logits_BHNL = _dot("bnhk,blhk->bhnl", q_BNHK * q_BNHK.shape[-1] ** -0.5, k_BLHK)
    if not limit:
        return logits_BHNL, None
    return jnp.clip(logits_BHNL, -limit, limit), jnp.abs(logits_BHNL) <= limit


def _seen(logits_BHNL, mask_BL):
    """Logits with hidden tokens far below all others."""
    return jnp.where(mask_BL[:, None, None], logits_BHNL, jnp.finfo(jnp.float32).min)


def _along(gradient_BTHK, out_BTHK):
    """Sums (B, H, T) of gradient * output over the head's width."""
    return (gradient_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
