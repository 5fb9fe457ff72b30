"""Beam search against the numbers of Hugging Face's search (golden/git/beam_search.npz), and against all texts."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden

from capvl.decoding.beam import beam_search


def search_golden(golden, alpha):
    config = json.loads(str(golden["config"]))
    cases, beams = len(golden["in/prefix_ids"]), config["beams"]
    transition, position = (jnp.asarray(golden[f"in/{n}_logits"]) for n in ("transition", "position"))
    case_R = jnp.repeat(jnp.arange(cases), beams)

    def step(token_R, cache, index):
        first = transition[case_R, token_R] + position[case_R, index - 1]
        return first, cache

    length = config["max_len"]
    forced = jnp.zeros((cases, length), jnp.int32).at[:, :1].set(jnp.asarray(golden["in/prefix_ids"], jnp.int32))
    run = jax.jit(
        lambda: beam_search(
            step, jnp.zeros((cases * beams, 1)), forced, config["eos"], beams=beams, length_penalty=alpha
        )
    )
    return config, *map(np.asarray, run())


@pytest.mark.golden
@pytest.mark.parametrize("alpha", [0.2, 0.6, 1.0])
def test_hugging_face_rule(alpha):
    golden = load_golden("git", "beam_search.npz")
    config, tokens, logp = search_golden(golden, alpha)
    expected = golden[f"out/hf_ids_alpha{alpha}"]
    ends = tokens == config["eos"]
    length = np.where(ends.any(1), ends.argmax(1) + 1, config["max_len"])
    inside = np.arange(tokens.shape[1]) < length[:, None]
    np.testing.assert_array_equal(tokens[inside], expected[inside])
    their_ends = expected == config["eos"]
    np.testing.assert_array_equal(their_ends.any(1), ends.any(1))
    np.testing.assert_array_equal(their_ends.argmax(1), ends.argmax(1))
    written = length - 1
    assert_close(logp / written**alpha, golden[f"out/hf_score_alpha{alpha}"], 1e-4)


def test_finds_the_best_of_all_texts():
    """With as many beams as texts nothing is lost: the result is the best by exhaustion."""
    rng = np.random.default_rng(0)
    vocab, length, eos, penalty = 4, 3, 1, 0.7
    table = rng.normal(size=(length, vocab, vocab)) * 2
    table[:, :, 0] = -1e9
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    best = (-np.inf, None)
    for text in itertools.product(range(1, vocab), repeat=length):
        end = text.index(eos) + 1 if eos in text else length
        total = sum(logp[i, text[i - 1] if i else 0, text[i]] for i in range(end))
        best = max(best, (total / end**penalty, (*text[:end], *(0,) * (length - end))))
    device = jnp.asarray(table, jnp.float32)

    def step(token_R, cache, index):
        return device[index][token_R], cache

    forced = jnp.zeros((1, length), jnp.int32)
    tokens, total = beam_search(step, jnp.zeros((27, 1)), forced, eos, beams=27, length_penalty=penalty)
    assert tuple(np.asarray(tokens)[0].tolist()) == best[1]
    written = (np.asarray(tokens)[0] != 0).sum()
    assert_close(total[0] / written**penalty, best[0], 1e-5)
