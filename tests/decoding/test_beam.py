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
    """(length of the prompts, most tokens, end, what is found). Every size is the file's."""
    config = json.loads(str(golden["config"]))
    prompts, beams, length = golden["in/prefix_ids"].astype(np.int32), config["beams"], config["max_len"]
    cases, given = prompts.shape
    transition, position = (jnp.asarray(golden[f"in/{n}_logits"]) for n in ("transition", "position"))
    case_R = jnp.repeat(jnp.arange(cases), beams)

    def step(token_R, cache, index, tokens_RL):
        logits_RV = transition[case_R, token_R] + position[case_R, index - 1]
        if no_repeat:
            banned = (jnp.arange(logits_RV.shape[1])[None] == token_R[:, None]) & (index > given)
            logits_RV = jnp.where(banned, -1e9, logits_RV)
        return jax.nn.log_softmax(logits_RV), cache

    forced = jnp.pad(jnp.asarray(prompts), ((0, 0), (0, length - given)))
    options = dict(beams=beams, rule=RULES[rule](alpha), start=None)
    search = jax.jit(lambda: beam_search(step, jnp.zeros((cases * beams, 1)), forced, config["eos"], **options))
    return given, length, config["eos"], search()


def text_lengths(tokens, given, eos, most):
    """Tokens of each text, its end included; `most` where it has none. A prompt may hold the end's id."""
    ends = tokens[:, given:] == eos
    return np.where(ends.any(1), given + ends.argmax(1) + 1, most)


@pytest.mark.golden
@pytest.mark.parametrize("rule, name", [("hugging_face", "hf"), ("official", "official")])
def test_golden(rule, name):
    golden = load_golden("git", "beam_search.npz")
    alphas = [key.split("alpha")[1] for key in golden if key.startswith(f"out/{name}_ids_alpha")]
    assert alphas
    for alpha in alphas:
        given, most, eos, found = search_golden(golden, rule, float(alpha))
        tokens = np.asarray(found.tokens)[:, 0]
        expected = golden[f"out/{name}_ids_alpha{alpha}"]
        length = text_lengths(tokens, given, eos, most)
        np.testing.assert_array_equal(length, text_lengths(expected, given, eos, most))
        inside = np.arange(expected.shape[1]) < length[:, None]
        np.testing.assert_array_equal(tokens[:, : expected.shape[1]][inside], expected[inside])
        assert_close(found.scores[:, 0], golden[f"out/{name}_score_alpha{alpha}"], 1e-5, alpha)
        if rule == "hugging_face":
            assert_close(found.logp[:, 0] / (length - given) ** float(alpha), found.scores[:, 0], 1e-5, alpha)


@pytest.mark.golden
def test_golden_allennlp():
    golden = load_golden("git", "beam_search.npz")
    given, most, eos, found = search_golden(golden, "allennlp", 1.0, no_repeat=True)
    tokens, expected = np.asarray(found.tokens)[:, 0], golden["out/allennlp_beam_ids"]
    written = np.arange(most) < text_lengths(tokens, given, eos, most)[:, None]
    np.testing.assert_array_equal(np.where(written, tokens, eos)[:, : expected.shape[1]], expected)
    new = written[:, given:].sum(axis=1)
    assert_close(np.asarray(found.logp)[:, 0] / new, golden["out/allennlp_beam_score"], 1e-5)


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
