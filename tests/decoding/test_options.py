"""max_tokens, min_tokens and no_repeat_ngram in every way of writing, with prompts and closed lists: against texts that
are worked out by hand, and against searches that are written out in numpy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close

from capvl.decoding.generate import Decoding, generate, n_best, planned_length
from capvl.decoding.names import Names
from capvl.errors import UserError

START, EOS, A, B, C = 2, 1, 3, 4, 5
RULES = ["hugging_face", "official", "allennlp"]


class Tables:
    """A model whose next token hangs on the last one, (images, V, V), and the position, (images, positions, V)."""

    start, dtype = START, jnp.float32

    def __init__(self, transition, position):
        self.transition, self.position = np.asarray(transition, np.float32), np.asarray(position, np.float32)
        self.vocab = self.transition.shape[-1]

    @property
    def decoder(self):
        return self

    def init_cache(self, rows, length, dtype):
        return jnp.zeros((1, rows, 1), dtype)

    def step(self, token_R, image_kv, cache, index, *, dtype):
        image_R = jnp.repeat(jnp.arange(image_kv.shape[1]), len(token_R) // image_kv.shape[1])
        logits = jnp.asarray(self.transition)[image_R, token_R] + jnp.asarray(self.position)[image_R, index]
        return logits, cache

    def logp(self, image, text):
        """log-probabilities of what follows a text, padding left out, as `generate` has them."""
        before = [START, *text]
        logits = self.transition[image, before[-1]].astype(np.float64) + self.position[image, len(text)]
        logits[0] = -1e9
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def random_tables(images, vocab=9, seed=0, end=1.5):
    rng = np.random.default_rng(seed)
    position = rng.normal(size=(images, 24, vocab))
    position[:, :, EOS] += end
    return Tables(rng.normal(size=(images, vocab, vocab)) * 2, position)


def wanted(tables, **follows):
    """Tables of one image in which each token is followed by those named, the likeliest first, then by the others."""
    logits = np.tile(-np.arange(tables, dtype=np.float32)[None] - 5, (tables, 1))
    for last, order in follows.items():
        for place, token in enumerate(order):
            logits[{"start": START, "a": A, "b": B, "c": C}[last], token] = 5 - place
    return Tables(logits[None], np.zeros((1, 24, tables)))


def write(model, length, decoding, prompts=None, names=None, **rest):
    """Texts up to their ends, and what `generate` returns."""
    images = len(model.transition)
    prompts = jnp.zeros((images, 0), jnp.int32) if prompts is None else jnp.asarray(prompts, jnp.int32)
    kv = jnp.zeros((1, images, 1))
    call = jax.jit(lambda p: generate(model, kv, length, EOS, decoding, prompt_BP=p, names=names, **rest))
    tokens, logp = jax.device_get(call(prompts))
    assert tokens.shape[1] == length
    return [[int(t) for t in row if t] for row in tokens], logp


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [A, B, A, B, A, B, A, B]),
        (dict(max_tokens=3), [A, B, A]),
        (dict(no_repeat_ngram=1), [A, B, EOS]),
        (dict(no_repeat_ngram=2), [A, B, A, EOS]),
        (dict(no_repeat_ngram=3), [A, B, A, B, EOS]),
        (dict(no_repeat_ngram=2, min_tokens=4), [A, B, A, C, A, EOS]),
        (dict(no_repeat_ngram=2, min_tokens=6), [A, B, A, C, A, A, EOS]),
        (dict(no_repeat_ngram=2, min_tokens=5, max_tokens=5), [A, B, A, C, A]),
        (dict(no_repeat_ngram=30), [A, B, A, B, A, B, A, B]),
    ],
)
def test_by_hand(options, expected):
    """a and b follow each other; where b may not follow a, the end does, else c, else a."""
    model = wanted(8, start=[A], a=[B, EOS, C, A], b=[A], c=[A])
    assert write(model, 8, Decoding(**options))[0] == [expected]
    sampled = Decoding(temperature=1.0, top_k=1, **options)
    assert write(model, 8, sampled, key=jax.random.key(0), samples=2)[0] == [expected] * 2


@pytest.mark.parametrize(
    "prompt, options, expected",
    [
        ([A, B, A], dict(no_repeat_ngram=2), [EOS]),  # "a b" stands in the prompt.
        ([A, B, A], dict(no_repeat_ngram=3), [B, EOS]),
        ([A, B, A], dict(max_tokens=2), [B, A]),
        ([A, B, A], dict(no_repeat_ngram=2, min_tokens=1), [C, A, EOS]),
        ([C], dict(no_repeat_ngram=1), [A, B, EOS]),
        ([START], dict(no_repeat_ngram=2, max_tokens=1), [A]),
    ],
)
def test_a_prompt_counts_for_ngrams_and_not_for_tokens(prompt, options, expected):
    model = wanted(8, start=[A], a=[B, EOS, C, A], b=[A], c=[A])
    for width in (len(prompt), len(prompt) + 2):  # Behind shorter prompts of a batch stands 0.
        padded = [prompt + [0] * (width - len(prompt))]
        assert write(model, 12, Decoding(**options), padded)[0] == [expected]


def test_the_start_counts_for_ngrams():
    """transformers' ids begin with the start, so that with n = 1 it is not written again."""
    model = wanted(8, start=[START, A], a=[EOS])
    assert write(model, 3, Decoding())[0] == [[START] * 3]
    assert write(model, 3, Decoding(no_repeat_ngram=1))[0] == [[A, EOS]]


def test_a_row_that_may_write_nothing_ends():
    model = wanted(5, start=[A], a=[B], b=[A])  # 0, the end, the start, a and b.
    for decoding in (Decoding(no_repeat_ngram=1, min_tokens=5), Decoding(no_repeat_ngram=1, min_tokens=5, beams=2)):
        written = write(model, 8, decoding)[0]
        assert written == [[A, B]] if decoding.beams == 1 else written == [[]]


class Search:
    """What a search finds, by lists and loops."""

    def __init__(self, model, image, prompt, length, decoding, names=None):
        self.model, self.image, self.prompt, self.names, self.how = model, image, list(prompt), names, decoding
        room = length - len(prompt)
        self.most = min(decoding.max_tokens, room) if decoding.max_tokens else room
        self.allowed = names and [n for n in names if self.fits(n)]

    def fits(self, name):
        text = []
        for token in name:
            if token in self.banned(text):
                return False
            text.append(token)
        return len(name) <= self.most

    def banned(self, text):
        """Tokens that may not follow what is written."""
        n, whole = self.how.no_repeat_ngram, [START, *self.prompt, *text]
        out = {EOS} if len(text) < self.how.min_tokens else set()
        if self.how.no_repeat and text:
            out.add(text[-1])
        grams = [tuple(whole[i : i + n]) for i in range(len(whole) - n + 1)] if n else []
        return out | {g[-1] for g in grams if g[:-1] == tuple(whole[len(whole) - n + 1 :])}

    def next(self, text):
        logp = self.model.logp(self.image, self.prompt + text)
        if self.how.no_repeat and text:  # Before the softmax, as in GIT's code.
            logp[text[-1]] = -np.inf
            logp -= np.log(np.exp(logp).sum())
        logp[[0, *self.banned(text)]] = -np.inf
        if self.names is not None:
            begun = {n[len(text)] for n in self.allowed if list(n[: len(text)]) == text and len(n) > len(text)}
            logp[[t for t in range(len(logp)) if t not in begun]] = -np.inf
        return logp

    def greedy(self):
        text, total = [], 0.0
        while len(text) < self.most and text[-1:] != [EOS]:
            logp = self.next(text)
            if not np.isfinite(logp).any():
                break
            text.append(int(logp.argmax()))
            total += logp.max()
        return text, total

    def best(self, running, count, per_text=None):
        found = []
        for total, text in running:
            logp = self.next(text)
            order = np.argsort(-logp, kind="stable")[: per_text if text else None]
            found += [(total + logp[t], [*text, int(t)]) for t in order if np.isfinite(logp[t])]
        return sorted(found, key=lambda pair: -pair[0])[:count]

    def hugging_face(self):
        beams, penalty, done, running = self.how.beams, self.how.length_penalty, [], [(0.0, [])]
        for written in range(1, self.most + 1):
            found = self.best(running, 2 * beams)
            ended = [p for p in found[:beams] if p[1][-1] == EOS or written == self.most]
            done = sorted(done + [(s / written**penalty, t, s) for s, t in ended], key=lambda d: -d[0])[:beams]
            running = [p for p in found if p[1][-1] != EOS][:beams]
            if not running or (len(done) == beams and running[0][0] / written**penalty <= done[-1][0]):
                break
        return done

    def official(self):
        beams, before, running, best = self.how.beams, 1 + len(self.prompt), [(0.0, [])], None

        def norm(n):
            return ((5 + n) / 6) ** self.how.length_penalty

        while running:
            found = self.best(running, 2 * beams)
            if not found or (best and best[0] >= found[0][0] / norm(before + self.most - 1)):
                break
            running = []
            for total, text in found:
                if text[-1] == EOS or len(text) == self.most:
                    score = total / norm(before + len(text) - 1)
                    best = max(best or (score, [*text[:-1], EOS], total), (score, [*text[:-1], EOS], total))
                else:
                    running.append((total, text))
                if len(running) == beams:
                    break
        return [best] if best else []

    def allennlp(self):
        beams, kept = self.how.beams, [(0.0, [])]
        for _ in range(self.most):
            over = [p for p in kept if p[1][-1:] == [EOS]]
            found = self.best([p for p in kept if p not in over], None, per_text=2)
            kept = sorted(over + found, key=lambda p: -p[0])[:beams]
        return [(s, t, s) for s, t in kept]


CASES = [
    dict(max_tokens=3),
    dict(no_repeat_ngram=1),
    dict(no_repeat_ngram=2, no_repeat=True, min_tokens=4),
    dict(no_repeat_ngram=3, max_tokens=6, min_tokens=2),
]
# Of each options two rules, and of each rule two options, are in the short run.
PAIRS = [
    pytest.param(options, rule, marks=[] if (i - j) % 4 in (0, 3) else pytest.mark.long)
    for i, options in enumerate(CASES)
    for j, rule in enumerate(["greedy", *RULES])
]


def prompts(images, vocab, width=4, seed=5):
    """Prompts of unequal length, none among them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(START + 1, vocab, (images, width))
    return np.where(np.arange(width)[None] < (np.arange(images) % (width + 1))[:, None], tokens, 0)


def same(tokens, logp, expected):
    assert tokens == expected[0], expected
    assert_close(logp, expected[1], 1e-4)


@pytest.mark.parametrize("options, rule", PAIRS)
def test_as_written_out(rule, options):
    """Every row of a batch with unequal prompts is what a search with lists and loops finds for it."""
    images, length = 10, 12
    model = random_tables(images)
    asked = prompts(images, model.vocab)
    more = {} if rule == "greedy" else dict(beams=3, rule=rule, length_penalty=1.0 if rule == "allennlp" else 0.7)
    decoding = Decoding(**options, **more)
    texts, logp = write(model, length, decoding, asked)
    for i in range(images):
        search = Search(model, i, [t for t in asked[i].tolist() if t], length, decoding)
        expected = search.greedy() if rule == "greedy" else getattr(search, rule)()[0][1:]
        same(texts[i], logp[i], expected)


def names_of(vocab, seed=3):
    """Names of one to five tokens, some of which repeat themselves or are the beginning of others."""
    rng = np.random.default_rng(seed)
    words = {tuple(rng.integers(START + 1, vocab, 1 + i % 5).tolist()) for i in range(24)}
    words |= {(A, A), (A, B, A, B), (A, B), (C, A, C)}
    return [(*name, EOS) for name in sorted(words)]


@pytest.mark.parametrize("options, rule", PAIRS)
def test_closed_lists(rule, options):
    """What is written is a name of the list that the options and the prompt allow: never the beginning of one."""
    images, length = 10, 10
    model, names = random_tables(images, seed=1), names_of(9)
    asked = prompts(images, model.vocab)
    more = {} if rule == "greedy" else dict(beams=3, rule=rule, length_penalty=1.0 if rule == "allennlp" else 0.7)
    decoding = Decoding(**options, **more)
    texts, logp = write(model, length, decoding, asked, names=Names.of_tokens(names))
    for i in range(images):
        search = Search(model, i, [t for t in asked[i].tolist() if t], length, decoding, names)
        assert tuple(texts[i]) in search.allowed if search.allowed else texts[i] == []
        if rule == "greedy":
            same(texts[i], logp[i], search.greedy())
        elif search.allowed:
            same(texts[i], logp[i], getattr(search, rule)()[0][1:])


def test_the_best_of_a_list_with_options():
    """With as many beams as names all that are allowed are found, and no others."""
    model, names = random_tables(2, vocab=40, seed=2), names_of(9)
    decoding = Decoding(beams=len(names), min_tokens=2, max_tokens=4, no_repeat_ngram=2, length_penalty=0.0)
    prompt = np.array([[0, 0], [A, B]])
    kv, tree = jnp.zeros((1, 2, 1)), Names.of_tokens(names)
    found = jax.device_get(
        jax.jit(lambda p: n_best(model, kv, 8, EOS, decoding, p, names=tree))(jnp.asarray(prompt, jnp.int32))
    )
    for i in range(2):
        search = Search(model, i, [t for t in prompt[i].tolist() if t], 8, decoding, names)
        written = [tuple(t for t in row if t) for row, s in zip(found.tokens[i].tolist(), found.scores[i], strict=True)
                   if s > -5e8]  # fmt: skip
        assert sorted(written) == sorted(search.allowed) and 0 < len(written) < len(names)


def test_samples():
    """Samples obey the options, differ, and each image's hang on its own key only."""
    model, asked = random_tables(6, end=0.5), prompts(6, 9)
    decoding = Decoding(temperature=2.0, no_repeat_ngram=2, min_tokens=2, max_tokens=5)
    keys = jax.random.split(jax.random.key(0), 6)
    texts = write(model, 12, decoding, asked, key=keys, samples=7)[0]
    assert len({tuple(t) for t in texts[:7]}) > 3
    for row, text in enumerate(texts):
        assert 2 < len(text) <= 5 or EOS not in text
        search = Search(model, row // 7, [t for t in asked[row // 7].tolist() if t], 12, decoding)
        for place, token in enumerate(text):
            assert token not in search.banned(text[:place])
    part = Tables(model.transition[3:], model.position[3:])
    assert write(part, 12, decoding, asked[3:], key=keys[3:], samples=7)[0] == texts[21:]


OPTIONS = types.SimpleNamespace(vocab=9, length=8, text_positions=12)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_tokens=-1), "max_tokens and min_tokens must not be negative"),
        (dict(min_tokens=-2), "must not be negative"),
        (dict(no_repeat_ngram=-1), "no_repeat_ngram, max_tokens .* must not be negative; 0 is for none"),
        (dict(min_tokens=4, max_tokens=3), "min_tokens=4 is above max_tokens=3"),
        (dict(min_tokens=3, max_tokens=3, rule="official", beams=2), "min_tokens=3 must be below max_tokens=3"),
    ],
)
def test_nonsense(options, message):
    with pytest.raises(UserError, match=message):
        Decoding(**options)


@pytest.mark.parametrize(
    "options, prompt, message",
    [
        (dict(max_tokens=11), 2, "max_tokens=11 behind a prompt of 2 tokens is more than the 12 positions"),
        (dict(min_tokens=7), 2, "min_tokens=7 is more than the 6 tokens that there is room for behind a prompt of 2"),
        (dict(min_tokens=6, rule="official", beams=2), 2, "min_tokens=6 is more than the 5 tokens"),
    ],
)
def test_no_room(options, prompt, message):
    with pytest.raises(UserError, match=message):
        planned_length(OPTIONS, Decoding(**options), prompt)


def test_lists_that_do_not_fit():
    names = Names.of_tokens([(A, A, EOS), (A, B, C, EOS)])
    assert planned_length(OPTIONS, Decoding(max_tokens=10), 2, names) == 12
    assert planned_length(OPTIONS, Decoding(), 4, names) == OPTIONS.length
    with pytest.raises(UserError, match=r"1 of 2 names are longer \(up to 4 tokens, the end included\) than the 3"):
        planned_length(OPTIONS, Decoding(), 5, names)
    assert planned_length(OPTIONS, Decoding(max_tokens=3), 5, names) == 8  # The longer one is left out.
    for options in (dict(max_tokens=2), dict(min_tokens=4, max_tokens=5), dict(max_tokens=3, no_repeat_ngram=1)):
        with pytest.raises(UserError, match="None of the 2 names may be written"):
            planned_length(OPTIONS, Decoding(**options), 5, names)
