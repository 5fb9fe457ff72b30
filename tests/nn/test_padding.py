"""Zeros behind a text's end are padding, those before it are tokens: in towers, likelihoods and prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capvl.decoding.beam import RULES, beam_search
from capvl.decoding.generate import without_prompt
from capvl.decoding.trie import build
from capvl.losses.cider import n_grams
from capvl.models.sizes import Size
from capvl.models.text_tower import TextTower
from capvl.nn import padding

ROWS = [[5, 0, 7, 2, 0, 0], [0, 3, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0], [4, 4, 4, 4, 4, 2], [2, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("numeric", [np, jnp])
def test_tokens_end_with_the_last_that_is_not_0(numeric):
    text = numeric.array(ROWS, np.int32)
    counts = [len(" ".join(map(str, row)).rstrip("0 ").split()) for row in ROWS]
    assert padding.lengths(text).tolist() == counts == [4, 3, 0, 6, 1]
    assert padding.real(text).tolist() == [[i < n for i in range(6)] for n in counts]
    assert padding.real(text[0]).tolist() == padding.real(text)[0].tolist()


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_a_tower_reads_a_piece_of_id_0(pool):
    """Padding changes nothing, and the piece does."""
    tower = TextTower(
        Size(16, 2, 32, 2), 12, 6, 8, out_bias=False, pool=pool, causal=False, hide_padding=True, pad=11,
        activation="gelu", eps=1e-6, remat="none", unroll=False, rngs=nnx.Rngs(0),
    )  # fmt: skip
    text = jnp.array([ROWS[0]], jnp.int32)
    whole = tower.hidden(text)[:, :4]
    np.testing.assert_allclose(whole, tower.hidden(text[:, :4]), atol=1e-5)
    if pool == "mean":
        np.testing.assert_allclose(tower.pooled(tower.hidden(text), text), whole.mean(axis=1), atol=1e-5)
    tower.tokens[...] = tower.tokens[...].at[11].add(1.0)  # No token is read as padding,
    np.testing.assert_allclose(tower.hidden(text)[:, :4], whole, atol=1e-5)
    tower.tokens[...] = tower.tokens[...].at[0].add(jnp.linspace(-1, 1, 16))  # and what reads the piece sees it change.
    assert np.abs(tower.hidden(text)[:, 0] - whole[:, 0]).max() > 1e-3


def test_a_prompt_with_a_piece_of_id_0_stays():
    """The model writes behind the prompt and not into it."""
    prompt = jnp.array([[3, 0, 4], [5, 0, 0]], jnp.int32)
    forced = jnp.pad(prompt, ((0, 0), (0, 3)))
    logp = jnp.log(jnp.array([0.0, 0.1, 0.2, 0.3, 0.15, 0.25]) + 1e-9)  # Token 3 is the likeliest, 1 ends.

    def step(token_R, cache, index, tokens_RL):
        return jnp.broadcast_to(logp, (len(token_R), 6)), cache

    found = jax.jit(
        lambda: beam_search(step, jnp.zeros((1, 4)), forced, 1, beams=2, rule=RULES["official"](1.0), batch_axis=1)
    )()
    tokens = np.asarray(found.tokens)
    assert (tokens[0, :, :3] == [3, 0, 4]).all() and (tokens[1, :, 0] == 5).all()
    assert (tokens[1, 0, 1:] != 0).any()
    written = np.asarray(without_prompt(jnp.asarray(tokens[:, 0]), prompt))
    np.testing.assert_array_equal(written[0], [*tokens[0, 0, 3:], 0, 0, 0])


def test_trees_and_n_grams_with_a_piece_of_id_0():
    tree = build(np.array([[5, 0, 7, 2], [5, 2, 0, 0]], np.int32))
    assert sorted(tree.tokens[tree.tokens >= 0].tolist()).count(0) == 1
    assert len(tree.tokens) == 5  # 5; 0, 7, 2 behind it; and 2 behind it.
    _, whole = n_grams(jnp.array([[5, 0, 7, 0, 0]], jnp.int32), 2)
    assert whole.tolist() == [[True, True, False, False, False]]
