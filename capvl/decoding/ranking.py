"""The likeliest of a closed list of texts, by the likelihood of the whole text (ALBEF, arXiv 2107.07651, section 5).

Only the k texts whose first tokens are likeliest are read: the others' likelihoods can't be high.

Letters: B images (or questions), P tokens of a prompt, C texts of the list, W tokens of the longest, k that are read.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from capvl.decoding.generate import with_prompt
from capvl.losses.vocabulary import vocabulary_loss
from capvl.nn.padding import lengths, real


class Ranked(NamedTuple):
    """The k likeliest texts of each image, best first.

    Attributes:
      index_Bk: int32 numbers in the list.
      logp_Bk: log p(text | image) in nats, float32; what `first_twice` adds included.
    """

    index_Bk: jax.Array
    logp_Bk: jax.Array

    def probabilities(self) -> jax.Array:
        """Softmax over the k texts."""
        return jax.nn.softmax(self.logp_Bk)


def rank(model, image_kv, prompt_BP, texts_CW, k: int, *, first_twice: bool = False) -> Ranked:
    """Ranks texts.

    Args:
      model: one with a `decoder` and `dtype`.
      image_kv: what the decoder writes behind, of B images.
      prompt_BP: int32 tokens in front of the texts, 0 behind them; none where P is 0.
      texts_CW: int32 tokens of the list, their ends included, 0 behind them.
      k: as above; at most C.
      first_twice: the first token's log-probability counts twice, as in the code of ALBEF and X-VLM.
    """
    decoder, (batch, width) = model.decoder, (len(prompt_BP), texts_CW.shape[1])
    texts_CW, k = jnp.asarray(texts_CW), min(k, len(texts_CW))
    given_B = lengths(prompt_BP)
    hidden_BPD = decoder.causal(jnp.pad(prompt_BP, ((0, 0), (0, 1))), image_kv, dtype=model.dtype)
    last_B1D = jnp.take_along_axis(hidden_BPD, given_B[:, None, None], axis=1)
    first_BV = jax.nn.log_softmax(decoder.project(last_B1D)[:, 0])
    first_Bk, index_Bk = jax.lax.top_k(first_BV[:, texts_CW[:, 0]], k)

    text_RW = texts_CW[index_Bk].reshape(batch * k, width)
    prompt_RP = jnp.repeat(prompt_BP, k, axis=0)
    whole_RT = with_prompt(prompt_RP, text_RW)
    behind_RT = jnp.arange(whole_RT.shape[1])[None] >= lengths(prompt_RP)[:, None]
    hidden_RTD = decoder.causal(whole_RT, image_kv, dtype=model.dtype)
    counted_RT = (real(whole_RT) & behind_RT).astype(jnp.float32)
    _, nll_RT = vocabulary_loss(hidden_RTD, whole_RT, counted_RT, *decoder.output_layer())
    logp_Bk = -nll_RT.sum(axis=1).reshape(batch, k) + (first_Bk if first_twice else 0.0)
    logp_Bk, order_Bk = jax.lax.top_k(logp_Bk, k)
    return Ranked(jnp.take_along_axis(index_Bk, order_Bk, axis=1), logp_Bk)
