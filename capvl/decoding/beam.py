"""Beam search on the device, with batched prefixes of unequal length.

Of each step's continuations the best 2 K are looked at: those that end are kept among the K best
finished texts, by log-probability divided by length ** penalty; the best K that don't end go on. It
stops when no text that goes on can still beat the worst finished one (or the length is reached):
the rule of Hugging Face's generation with early_stopping=False.

Letters: B batch, K beams, R = B K rows, L positions, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LOW = -1e9


class _State(NamedTuple):
    """Running texts (R, L) with their log-probabilities, and the K best finished ones of each example."""

    index: jax.Array
    tokens_BKL: jax.Array
    logp_BK: jax.Array
    done_BKL: jax.Array
    score_BK: jax.Array
    done_logp_BK: jax.Array
    stopped_B: jax.Array
    cache: Any


def beam_search(
    step: Callable[[jax.Array, Any, jax.Array], tuple[jax.Array, Any]],
    cache: Any,
    forced_BL: jax.Array,
    eos: int,
    *,
    beams: int,
    length_penalty: float = 1.0,
    batch_axis: int = 0,
    start: int = 0,
):
    """The best text of each example.

    Args:
      step: (last tokens (R,), cache, index) -> (logits (R, V) of position `index`, cache).
      cache: pytree whose leaves have rows R on `batch_axis`.
      forced_BL: tokens that each text begins with, 0 behind them; L is the most tokens.
      eos: id that ends a text; what follows it is 0.
      beams: K.
      length_penalty: exponent of the number of written tokens, the end included.
      batch_axis: of the cache's leaves.
      start: token that is read before the first position.

    Returns:
      tokens (B, L) int32 with what was forced, and the summed log-probability (B,) of what was written.
    """
    batch, length = forced_BL.shape
    prefix_B = (forced_BL != 0).sum(axis=1)

    def body(state: _State) -> _State:
        index = state.index
        last_BK = jnp.where(index > 0, state.tokens_BKL[:, :, jnp.maximum(index - 1, 0)], start)
        logits_RV, cache = step(last_BK.reshape(-1), state.cache, index)
        vocab = logits_RV.shape[1]
        logp_BKV = jax.nn.log_softmax(logits_RV.astype(jnp.float32)).reshape(batch, beams, vocab)
        given_B = forced_BL[:, index]
        is_given_B11 = (given_B != 0)[:, None, None]
        only_given = jnp.where(jnp.arange(vocab)[None, None] == given_B[:, None, None], 0.0, _LOW)
        total = state.logp_BK[:, :, None] + jnp.where(is_given_B11, only_given, jnp.maximum(logp_BKV, _LOW))
        best_logp, best = jax.lax.top_k(total.reshape(batch, -1), min(2 * beams, beams * vocab))
        beam, token = best // vocab, (best % vocab).astype(jnp.int32)
        rows = jnp.take_along_axis(state.tokens_BKL, beam[:, :, None], axis=1)
        rows = jax.lax.dynamic_update_slice_in_dim(rows, token[:, :, None], index, axis=2)
        ends = (token == eos) & ~is_given_B11[:, 0]

        # Of the best K candidates, those that end join the finished texts.
        written_B1 = (index + 1 - prefix_B)[:, None]
        may_end = ends & (jnp.arange(best.shape[1])[None] < beams) & ~state.stopped_B[:, None]
        score = jnp.where(may_end, _penalised(best_logp, written_B1, length_penalty), _LOW)
        done_BKL, done_score, done_logp = _keep_best(state, rows, score, best_logp)

        # The best K that don't end go on.
        running_logp, running = jax.lax.top_k(jnp.where(ends, _LOW, best_logp), beams)
        parent_BK = jnp.take_along_axis(beam, running, axis=1)
        flat = (jnp.arange(batch)[:, None] * beams + parent_BK).reshape(-1)
        cache = jax.tree.map(lambda x: jnp.take(x, flat, axis=batch_axis), cache)

        full_B = (done_score > _LOW / 2).all(axis=1)
        reachable_B = _penalised(running_logp[:, 0], index + 1 - prefix_B, length_penalty)
        return _State(
            index + 1,
            jnp.take_along_axis(rows, running[:, :, None], axis=1),
            running_logp,
            done_BKL,
            done_score,
            done_logp,
            state.stopped_B | (full_B & (reachable_B <= done_score[:, -1])),
            cache,
        )

    def unfinished(state: _State):
        return (state.index < length) & ~jnp.all(state.stopped_B)

    state = jax.lax.while_loop(unfinished, body, _begin(batch, beams, length, cache))
    return _best(state, prefix_B, length_penalty)


def _keep_best(state: _State, rows_BCL, score_BC, logp_BC) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, scores and log-probabilities of the K best of the finished texts and C candidates, in order."""
    score_BK, kept_BK = jax.lax.top_k(jnp.concatenate([state.score_BK, score_BC], axis=1), state.score_BK.shape[1])
    rows = jnp.concatenate([state.done_BKL, rows_BCL], axis=1)
    logp = jnp.concatenate([state.done_logp_BK, logp_BC], axis=1)
    rows_BKL = jnp.take_along_axis(rows, kept_BK[:, :, None], axis=1)
    return rows_BKL, score_BK, jnp.take_along_axis(logp, kept_BK, axis=1)


def _penalised(logp, written, length_penalty: float) -> jax.Array:
    """Log-probability divided by the number of written tokens to the power of the penalty."""
    return logp / jnp.maximum(written, 1).astype(jnp.float32) ** length_penalty


def _begin(batch: int, beams: int, length: int, cache) -> _State:
    """Only the first of the K equal texts counts at first, or all would go on alike."""
    first_only = jnp.where(jnp.arange(beams)[None] == 0, 0.0, _LOW)
    blank = jnp.zeros((batch, beams, length), jnp.int32)
    return _State(
        jnp.zeros((), jnp.int32),
        blank,
        jnp.broadcast_to(first_only, (batch, beams)),
        blank,
        jnp.full((batch, beams), _LOW, jnp.float32),
        jnp.zeros((batch, beams), jnp.float32),
        jnp.zeros((batch,), bool),
        cache,
    )


def _best(state: _State, prefix_B, length_penalty: float) -> tuple[jax.Array, jax.Array]:
    """Tokens (B, L) and log-probability (B,) of the best text, finished or, where the search was not over, running."""
    written_B1 = jnp.maximum(state.tokens_BKL.shape[2] - prefix_B, 1)[:, None]
    running = _penalised(state.logp_BK, written_B1, length_penalty)
    running = jnp.where(state.stopped_B[:, None], _LOW, running)
    scores = jnp.concatenate([state.score_BK, running], axis=1)
    best_B1 = jnp.argmax(scores, axis=1)[:, None]
    rows = jnp.concatenate([state.done_BKL, state.tokens_BKL], axis=1)
    logp = jnp.concatenate([state.done_logp_BK, state.logp_BK], axis=1)
    tokens_BL = jnp.take_along_axis(rows, best_B1[:, :, None], axis=1)[:, 0]
    return tokens_BL, jnp.take_along_axis(logp, best_B1, axis=1)[:, 0]
