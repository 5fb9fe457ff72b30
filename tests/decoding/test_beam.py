"""Beam search against the numbers of both searches (golden/git/beam_search.npz), and against all texts."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden

from capvl.decoding.beam import RULES, HuggingFace, beam_search
from capvl.decoding.generate import Decoding
from capvl.errors import UserError


def search_golden(golden, rule, alpha, no_repeat=False):
    config = json.loads(str(golden["config"]))
    cases, beams = len(golden["in/prefix_ids"]), config["beams"]
    transition, position = (jnp.asarray(golden[f"in/{n}_logits"]) for n in ("transition", "position"))
    case_R = jnp.repeat(jnp.arange(cases), beams)

    def step(token_R, cache, index, tokens_RL):
        logits_RV = transition[case_R, token_R] + position[case_R, index - 1]
        if no_repeat:
            banned = (jnp.arange(logits_RV.shape[1])[None] == token_R[:, None]) & (index > 1)
            logits_RV = jnp.where(banned, -1e9, logits_RV)
        return jax.nn.log_softmax(logits_RV), cache

    length = config["max_len"]
    forced = jnp.zeros((cases, length), jnp.int32).at[:, :1].set(jnp.asarray(golden["in/prefix_ids"], jnp.int32))
    options = dict(beams=beams, rule=RULES[rule](alpha), start=None)
    return config, jax.jit(lambda: beam_search(step, jnp.zeros((cases * beams, 1)), forced, config["eos"], **options))()


@pytest.mark.golden
@pytest.mark.parametrize("alpha", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("rule, name", [("hugging_face", "hf"), ("official", "official")])
def test_golden(rule, name, alpha):
    golden = load_golden("git", "beam_search.npz")
    config, found = search_golden(golden, rule, alpha)
    tokens = np.asarray(found.tokens)[:, 0]
    expected = golden[f"out/{name}_ids_alpha{alpha}"]
    ends = tokens == config["eos"]
    length = np.where(ends.any(1), ends.argmax(1) + 1, config["max_len"])
    inside = np.arange(tokens.shape[1]) < length[:, None]
    np.testing.assert_array_equal(tokens[inside], expected[inside])
    their_ends = expected == config["eos"]
    np.testing.assert_array_equal(their_ends.any(1), ends.any(1))
    np.testing.assert_array_equal(their_ends.argmax(1), ends.argmax(1))
    assert_close(found.scores[:, 0], golden[f"out/{name}_score_alpha{alpha}"], 1e-5)
    if rule == "hugging_face":
        assert_close(found.logp[:, 0] / (length - 1) ** alpha, found.scores[:, 0], 1e-5)


@pytest.mark.golden
def test_golden_allennlp():
    golden = load_golden("git", "beam_search.npz")
    config, found = search_golden(golden, "allennlp", 1.0, no_repeat=True)
    tokens, expected = np.asarray(found.tokens)[:, 0], golden["out/allennlp_beam_ids"]
    written = tokens[:, 1:] != 0
    np.testing.assert_array_equal(np.where(tokens == 0, config["eos"], tokens), expected)
    assert_close(np.asarray(found.logp)[:, 0] / written.sum(axis=1), golden["out/allennlp_beam_score"], 1e-5)


def test_allennlp_has_no_length_penalty():
    with pytest.raises(UserError, match="'allennlp' has no length penalty"):
        Decoding(beams=2, rule="allennlp", length_penalty=0.6)


def test_finds_the_best_of_all_texts():
    """With as many beams as texts nothing is lost: the results are the best by exhaustion, in order."""
    rng = np.random.default_rng(0)
    vocab, length, eos, penalty = 4, 3, 1, 0.7
    table = rng.normal(size=(length, vocab, vocab)) * 2
    table[:, :, 0] = -1e9
    logp = table - np.log(np.exp(table).sum(-1, keepdims=True))
    every = set()
    for text in itertools.product(range(1, vocab), repeat=length):
        end = text.index(eos) + 1 if eos in text else length
        total = sum(logp[i, text[i - 1] if i else 0, text[i]] for i in range(end))
        every.add((total / end**penalty, (*text[:end], *(0,) * (length - end))))
    best = sorted(every, reverse=True)
    device = jnp.asarray(logp, jnp.float32)

    def step(token_R, cache, index, tokens_RL):
        return device[index][token_R], cache

    forced = jnp.zeros((1, length), jnp.int32)
    found = beam_search(step, jnp.zeros((27, 1)), forced, eos, beams=27, rule=HuggingFace(penalty))
    for i in range(len(best)):
        assert tuple(np.asarray(found.tokens)[0, i].tolist()) == best[i][1]
        assert_close(found.scores[0, i], best[i][0], 1e-5)
