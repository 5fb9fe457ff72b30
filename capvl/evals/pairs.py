"""How well texts fit images: a captioner's log-likelihood, or a two-tower model's similarity."""

import jax
import jax.numpy as jnp

from capvl.decoding.likelihood import log_likelihood_of_kv


def pair_scores(model, image_BRRC, text_BKL) -> jax.Array:
    """Scores (B, K) float32 of K texts for each image: log p(text | image), or the cosine of both embeddings.

    A model with both a decoder and a text tower is asked for its likelihood.

    Args:
      model: with a captioner's `decoder`, or with two towers.
      image_BRRC: images in [-1, 1].
      text_BKL: tokens; 0 is padding, a text of padding only has score 0 as a likelihood.
    """
    if getattr(model, "decoder", None) is not None:
        kv = model.decoder.image_kv(model.encode(image_BRRC))
        texts = jnp.swapaxes(text_BKL, 0, 1)
        return jax.lax.map(lambda text_BL: log_likelihood_of_kv(model, kv, text_BL), texts).T
    return cosine_scores(model, image_BRRC, text_BKL)


def cosine_scores(model, image_BRRC, text_BKL) -> jax.Array:
    """Cosines (B, K) float32 of a two-tower model's embeddings."""
    batch, count, length = text_BKL.shape
    text_BKE = model.embed_text(text_BKL.reshape(batch * count, length)).reshape(batch, count, -1)
    return jnp.einsum("be,bke->bk", model.embed_image(image_BRRC), text_BKE)
