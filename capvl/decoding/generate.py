"""Greedy and sampled text generation on the device, with a key-value cache."""

import jax
import jax.numpy as jnp


def generate(model, image_kv, length: int, eos: int, *, key=None, temperature: float = 1.0, top_k: int = 0):
    """Writes texts token by token.

    Args:
      model: a `capvl.models.captioner.Captioner`.
      image_kv: `model.decoder.image_kv(encoded)` of B images.
      length: most tokens to write; at most the decoder's positions.
      eos: id of the end-of-sentence token; what follows it is 0.
      key: of the samples; None for greedy decoding.
      temperature: of the samples.
      top_k: sample from the k likeliest tokens only; 0 for all.

    Returns:
      tokens (B, length) int32, and their summed log-probability (B,) float32.
    """
    decoder = model.decoder
    batch = image_kv[0].shape[1]
    vocab = decoder.vocab

    def body(carry):
        index, tokens_BL, last_B, done_B, logp_B, cache = carry
        logits_BV, cache = decoder.step(last_B, image_kv, cache, index, dtype=model.dtype)
        # Padding is never written.
        logits_BV = jnp.where(jnp.arange(vocab)[None] == 0, -jnp.inf, logits_BV)
        if key is None:
            next_B = jnp.argmax(logits_BV, axis=-1)
        else:
            scaled = logits_BV / temperature
            if top_k:
                floor = jax.lax.top_k(scaled, top_k)[0][:, -1:]
                scaled = jnp.where(scaled < floor, -jnp.inf, scaled)
            next_B = jax.random.categorical(jax.random.fold_in(key, index), scaled)
        next_B = jnp.where(done_B, 0, next_B.astype(jnp.int32))
        log_probs = jax.nn.log_softmax(logits_BV)
        chosen = jnp.take_along_axis(log_probs, jnp.maximum(next_B, 1)[:, None], axis=1)[:, 0]
        logp_B = logp_B + jnp.where(done_B, 0.0, chosen)
        tokens_BL = jax.lax.dynamic_update_slice_in_dim(tokens_BL, next_B[:, None], index, axis=1)
        return index + 1, tokens_BL, next_B, done_B | (next_B == eos), logp_B, cache

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
