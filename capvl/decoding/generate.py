"""Greedy, sampled and beam-searched text on the device, with a key-value cache."""

import jax
import jax.numpy as jnp

from capvl.decoding.beam import beam_search


def generate(
    model,
    image_kv,
    length: int,
    eos: int,
    *,
    prompt_BP=None,
    key=None,
    temperature: float = 1.0,
    top_k: int = 0,
    beams: int = 1,
    length_penalty: float = 1.0,
):
    """Writes texts token by token.

    Args:
      model: one with a captioner's `decoder` and `dtype`.
      image_kv: `model.decoder.image_kv(encoded)` of B images.
      length: most tokens to write, a prompt included; at most the decoder's positions.
      eos: id of the end-of-sentence token; what follows it is 0.
      prompt_BP: int32 tokens that each text begins with; 0 behind a prompt that is shorter than others.
      key: of the samples; None for greedy decoding or beam search.
      temperature: of the samples.
      top_k: sample from the k likeliest tokens only; 0 for all.
      beams: texts that are kept at a time; 1 for none but the best.
      length_penalty: exponent of a text's length that its log-probability is divided by (beam search only).

    Returns:
      tokens (B, length) int32 without the prompt, and the summed log-probability (B,) float32 of what was written.
    """
    batch = image_kv[0].shape[1]
    if prompt_BP is None:
        prompt_BP = jnp.zeros((batch, 0), jnp.int32)
    forced_BL = jnp.pad(prompt_BP, ((0, 0), (0, length - prompt_BP.shape[1])))
    if beams > 1:
        tokens_BL, logp_B = _beams(model, image_kv, forced_BL, eos, beams, length_penalty)
    else:
        tokens_BL, logp_B = _one_by_one(model, image_kv, forced_BL, eos, key, temperature, top_k)
    # What was written moves to the front of its row.
    start_B1 = (prompt_BP != 0).sum(axis=1)[:, None]
    index_BL = jnp.arange(length)[None] + start_B1
    written_BL = jnp.take_along_axis(tokens_BL, jnp.minimum(index_BL, length - 1), axis=1)
    return jnp.where(index_BL < length, written_BL, 0), logp_B


def _one_by_one(model, image_kv, forced_BL, eos, key, temperature, top_k):
    decoder = model.decoder
    batch, length = forced_BL.shape

    def body(carry):
        index, tokens_BL, last_B, done_B, logp_B, cache = carry
        logits_BV, cache = decoder.step(last_B, image_kv, cache, index, dtype=model.dtype)
        logits_BV = _without_padding(logits_BV)
        if key is None:
            next_B = jnp.argmax(logits_BV, axis=-1)
        else:
            scaled = logits_BV / temperature
            if top_k:
                floor = jax.lax.top_k(scaled, top_k)[0][:, -1:]
                scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
            next_B = jax.random.categorical(jax.random.fold_in(key, index), scaled)
        given_B = forced_BL[:, index]
        next_B = jnp.where(given_B != 0, given_B, jnp.where(done_B, 0, next_B.astype(jnp.int32)))
        log_probs = jax.nn.log_softmax(logits_BV)
        chosen = jnp.take_along_axis(log_probs, jnp.maximum(next_B, 1)[:, None], axis=1)[:, 0]
        logp_B = logp_B + jnp.where(done_B | (given_B != 0), 0.0, chosen)
        tokens_BL = jax.lax.dynamic_update_slice_in_dim(tokens_BL, next_B[:, None], index, axis=1)
        done_B = done_B | ((next_B == eos) & (given_B == 0))
        return index + 1, tokens_BL, next_B, done_B, logp_B, cache

    def unfinished(carry):
        return (carry[0] < length) & ~jnp.all(carry[3])

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch, length), jnp.int32),
        jnp.zeros((batch,), jnp.int32),
        jnp.zeros((batch,), bool),
        jnp.zeros((batch,), jnp.float32),
        decoder.init_cache(batch, length, model.dtype),
    )
    _, tokens_BL, _, _, logp_B, _ = jax.lax.while_loop(unfinished, body, start)
    return tokens_BL, logp_B


def _beams(model, image_kv, forced_BL, eos, beams, length_penalty):
    decoder = model.decoder
    batch, length = forced_BL.shape
    kv = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=1), image_kv)

    def step(token_R, cache, index):
        logits_RV, cache = decoder.step(token_R, kv, cache, index, dtype=model.dtype)
        return _without_padding(logits_RV), cache

    cache = decoder.init_cache(batch * beams, length, model.dtype)
    return beam_search(step, cache, forced_BL, eos, beams=beams, length_penalty=length_penalty, batch_axis=1)


def _without_padding(logits_BV):
    """Padding is never written."""
    return jnp.where(jnp.arange(logits_BV.shape[1])[None] == 0, -jnp.inf, logits_BV)
