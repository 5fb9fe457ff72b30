"""Tokens that must not be written next, whatever the model makes of them.

Letters: R rows, L positions, V vocabulary.
"""

import jax
import jax.numpy as jnp


def early_ends(index, given_R, eos: int, least: int, vocab: int) -> jax.Array:
    """The end, where fewer than `least` tokens are written: (R, V) bool.

    Args:
      index: position of the next token.
      given_R: tokens of each row's prompt.
      eos: id of the end.
      least: tokens before the end.
      vocab: V.
    """
    return (jnp.arange(vocab)[None] == eos) & (index - given_R < least)[:, None]


def repeated_ngrams(tokens_RL, index, start: int, n: int, vocab: int) -> jax.Array:
    """Tokens that would end a sequence of n tokens that a row has already, prompt and start included: (R, V) bool.

    Args:
      tokens_RL: what each row holds before `index`, the start left out.
      index: position of the next token.
      start: token that is read before the first.
      n: as above, at least 1.
      vocab: V.
    """
    text_RT = jnp.pad(tokens_RL, ((0, 0), (1, 0)), constant_values=start)
    rows, known, count = jnp.arange(len(text_RT))[:, None], index + 1, text_RT.shape[1] - n + 1
    banned_RV = jnp.zeros((len(text_RT), vocab), bool)
    if count < 1:
        return banned_RV
    last_RN = jax.lax.dynamic_slice_in_dim(text_RT, known - (n - 1), n - 1, axis=1)
    same = jnp.broadcast_to((jnp.arange(count) + n <= known)[None], (len(text_RT), count))
    for i in range(n - 1):
        same = same & (text_RT[:, i : i + count] == last_RN[:, i : i + 1])
    # A column past the last, which is dropped, takes the others.
    return banned_RV.at[rows, jnp.where(same, text_RT[:, n - 1 :], vocab)].set(True, mode="drop")
