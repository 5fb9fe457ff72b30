"""What GIT writes, against golden ids and scores (golden/git/git.npz); closed vocabularies; images in a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from golden_git import Case

from capvl.decoding.generate import Decoding, generate, search
from capvl.decoding.names import Names
from capvl.errors import UserError

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def case():
    return Case()


def inputs(case, task):
    """(images, prompts without [CLS], most tokens)."""
    image = case.image("video_pixel_values" if task == "video" else "pixel_values")
    prompt = np.zeros((len(image), 0), np.int32)
    if task == "vqa":
        prompt = case.golden["in/prefix_ids"][:, 1:].astype(np.int32)
    return image, jnp.asarray(prompt), prompt.shape[1] + case.config["max_new_tokens"]


def cut(ids, eos):
    """Rows up to their end."""
    return [tuple(row[: list(row).index(eos) + 1 if eos in row else len(row)]) for row in np.asarray(ids).tolist()]


def unpadded(ids, eos):
    return [tuple(t for t in row if t) if eos not in row else row for row in cut(ids, eos)]


@pytest.mark.parametrize("task", ["caption", "vqa", "video"])
def test_greedy(case, task):
    image, prompt, length = inputs(case, task)
    eos = case.config["eos"]
    for name, decoding in (("greedy", Decoding()), ("greedy_official_norepeat", Decoding(no_repeat=True))):

        def run(model, decoding=decoding):
            kv = model.decoder.image_kv(model.encode(image))
            return generate(model, kv, length, eos, decoding, prompt_BP=prompt)

        tokens, logp = case.compute(run)
        expected = unpadded(case.golden[f"out/{task}_{name}_ids"], eos)
        assert unpadded(tokens, eos) == expected, name
        if name != "greedy":  # The mean, of logits after the ban.
            means = logp / np.array([len(row) for row in expected])
            assert_close(means, case.golden[f"out/{task}_{name}_score"], 1e-4)


@pytest.mark.parametrize("task", ["caption", "vqa", "video"])
@pytest.mark.parametrize("rule, name", [("hugging_face", "hf"), ("official", "official")])
def test_beams(case, task, rule, name):
    image, prompt, length = inputs(case, task)
    config = case.config
    forced = jnp.pad(prompt, ((0, 0), (0, length - prompt.shape[1])))
    decoding = Decoding(beams=config["num_beams"], length_penalty=config["length_penalty"], rule=rule)

    def run(model):
        kv = model.decoder.image_kv(model.encode(image))
        one = generate(model, kv, length, config["eos"], decoding, prompt_BP=prompt)
        return one, search(model, kv, forced, config["eos"], decoding)

    (tokens, logp), found = case.compute(run)
    assert unpadded(tokens, config["eos"]) == unpadded(case.golden[f"out/{task}_beam_{name}_ids"], config["eos"])
    assert_close(found.scores[:, 0], case.golden[f"out/{task}_beam_{name}_score"], 1e-4)
    assert_close(logp, found.logp[:, 0], 1e-6)


def test_prompts_of_unequal_length(case):
    """A batch of prompts of different lengths is as each by itself."""
    image, prompt, length = inputs(case, "vqa")
    lengths = [i % (prompt.shape[1] + 1) for i in range(len(image))]
    mixed = jnp.where(jnp.arange(prompt.shape[1])[None] < jnp.asarray(lengths)[:, None], prompt, 0)
    eos = case.config["eos"]
    for decoding in (Decoding(), Decoding(beams=3, rule="official")):

        @jax.jit
        def run(params, image, prompt, decoding=decoding):
            model = case.blueprint.bind(params)
            return generate(model, model.decoder.image_kv(model.encode(image)), length, eos, decoding, prompt_BP=prompt)

        together, logp = run(case.params, image, mixed)
        for i in range(len(lengths)):
            alone, own = run(case.params, image[i : i + 1], mixed[i : i + 1])
            assert cut(together, eos)[i] == cut(alone, eos)[0]
            assert_close(logp[i], own[0], 1e-4)
    # And a prompt that is padded is as one that isn't.
    size = max(n for n in lengths if n < prompt.shape[1])
    row = slice(lengths.index(size), lengths.index(size) + 1)
    whole, short = (run(case.params, image[row], prompts[row])[0] for prompts in (mixed, mixed[:, :size]))
    assert cut(short, eos) == cut(whole, eos)


def golden_names(case):
    return [tuple(int(t) for t in row if t >= 0) for row in case.golden["in/trie_names"]]


def test_closed_vocabulary(case):
    eos, names = case.config["eos"], golden_names(case)
    names = [n if n[-1] == eos else (*n, eos) for n in names]
    tree = Names.of_tokens(names)
    image, _, _ = inputs(case, "caption")
    most = len(names)

    def run(model):
        kv = model.decoder.image_kv(model.encode(image))
        greedy = generate(model, kv, tree.longest, eos, names=tree)[0]
        forced = jnp.zeros((len(image), tree.longest), jnp.int32)
        # With as many beams as names and no penalty the search is exact.
        return greedy, search(model, kv, forced, eos, Decoding(beams=most, length_penalty=0.0), names=tree)

    greedy, found = case.compute(run)
    assert cut(greedy, eos) == cut(case.golden["out/trie_greedy_ids"], eos)
    expected = case.golden["out/class_logprob"]
    for row in range(len(image)):
        written = [cut(t[None], eos)[0] for t in found.tokens[row]]
        assert sorted(written) == sorted(names)
        order = [names.index(w) for w in written]
        assert order == np.argsort(-expected[row]).tolist()
        assert_close(found.logp[row], expected[row][order], 1e-4)


def test_bad_names():
    class Letters:
        def __call__(self, text, length):
            return np.array([*(ord(c) for c in text.strip().lower()), 1, 0])

    with pytest.raises(UserError, match="is empty"):
        Names.of([], Letters())
    with pytest.raises(UserError, match="'a' and 'A' are the same"):
        Names.of(["a", "b", "A"], Letters())
    with pytest.raises(UserError, match="' ' has no token"):
        Names.of(["a", " "], Letters())
    assert Names.of(["ab", "a"], Letters()).longest == 3


def test_samples(case):
    """Samples are alike for a key, differ among themselves, and obey top-k, top-p and the penalty."""
    image, _, length = inputs(case, "caption")
    eos = case.config["eos"]

    def run(model, decoding, key):
        kv = model.decoder.image_kv(model.encode(image))
        return generate(model, kv, length, eos, decoding, key=jax.random.key(key), samples=3)[0]

    warm = Decoding(temperature=1.5)
    first, again, other = (case.compute(lambda m, k=k: run(m, warm, k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and len(first) == 3 * len(image)
    assert len({row.tobytes() for row in first}) > len(image)
    greedy = case.compute(lambda m: generate(m, m.decoder.image_kv(m.encode(image)), length, eos)[0])
    for narrow in (dict(top_k=1), dict(top_p=1e-6)):
        sampled = case.compute(lambda m, n=narrow: run(m, Decoding(temperature=1.0, **n), 0))
        np.testing.assert_array_equal(sampled, np.repeat(greedy, 3, axis=0))
    strict = dataclasses.replace(warm, temperature=0.0, repetition_penalty=1e6)
    tokens = case.compute(lambda m: run(m, strict, 0))
    for row in cut(tokens, eos):
        assert len(set(row)) == len(row)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(beams=0), "at least 1"),
        (dict(beams=2, temperature=1.0), "exclude each other"),
        (dict(top_p=0.0, temperature=1.0), "top_p must be above 0"),
        (dict(top_k=3), "need a temperature"),
        (dict(rule="oficial"), "did you mean 'official'"),
    ],
)
def test_bad_decoding(options, message):
    with pytest.raises(UserError, match="(?i)" + message):
        Decoding(**options)


def test_more_beams_than_words():
    with pytest.raises(UserError, match="7 beams are more than the 4 words"):
        Decoding(beams=7).check(5)
