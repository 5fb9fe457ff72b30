"""Log-likelihood of texts given images, by the model's autoregressive (or parallel) prediction."""

import jax
import jax.numpy as jnp

from capvl.losses.vocabulary import vocabulary_loss
from capvl.nn.padding import real


def log_likelihood(model, image_BRRC, text_BL, *, parallel: bool = False) -> jax.Array:
    """log p(text | image) in nats, summed over non-padding tokens: (B,) float32.

    Args:
      model: a `capvl.models.captioner.Captioner`.
      image_BRRC: images in [-1, 1].
      text_BL: int32 tokens, 0 is padding.
      parallel: predict all tokens at once (Pa) instead of one after another (Cap).
    """
    kv = model.decoder.image_kv(model.encode(image_BRRC))
    return log_likelihood_of_kv(model, kv, text_BL, parallel=parallel)


def log_likelihood_of_kv(model, image_kv, text_BL, *, parallel: bool = False) -> jax.Array:
    """As `log_likelihood`, from the decoder's keys and values of encoded images."""
    length = text_BL.shape[1]
    decoder, dtype = model.decoder, model.dtype
    if parallel:
        hidden = decoder.parallel(length, image_kv, dtype=dtype)
    else:
        hidden = decoder.causal(text_BL, image_kv, dtype=dtype)
    weights = real(text_BL).astype(jnp.float32)
    _, nll_BL = vocabulary_loss(hidden, text_BL, weights, *model.decoder.output_layer())
    return -nll_BL.sum(axis=1)
