"""Question answering with X-VLM: the weighted loss, questions that share an image, what an Example becomes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from handmade import Letters, picture

from capvl.data.examples.answers import QuestionAnswers
from capvl.data.images.crops import Crop
from capvl.data.options import DataOptions
from capvl.data.randomness import Uniforms
from capvl.data.text import tokenizers
from capvl.decoding.ranking import rank
from capvl.errors import UserError
from capvl.models.fusion_decoder import FusionDecoder
from capvl.models.parameters import Blueprint
from capvl.models.xvlm_answers import XVlmAnswers, XVlmAnswersOptions
from capvl.objectives.xvlm_answers import XVlmAnswering

TINY = dict(
    encoder="w16d1h2m32/8",
    res=16,
    text="w16d2h2m24",
    cross_layers=1,
    vocab=40,
    start=2,
    end=1,
    length=4,
    question_length=8,
    text_positions=12,
    answer_layers=2,
    dtype="float32",
    dropout=0.0,
)


@dataclasses.dataclass(frozen=True)
class Words(Letters):
    """Letters, whose texts have no start."""

    start_id: int | None = None


def make(**changes):
    """(blueprint, random parameters)."""
    blueprint = Blueprint(XVlmAnswersOptions(**TINY | changes))
    rng = np.random.default_rng(0)
    params = {k: 0.3 * rng.normal(size=v.shape) + k.endswith("scale") for k, v in blueprint.shapes.items()}
    return blueprint, jax.device_put({k: v.astype(np.float32) for k, v in params.items()})


def texts(rng, shape, length, least=0):
    """Random ids with padding behind them."""
    ids = rng.integers(5, 40, (*shape, length))
    return np.where(np.arange(length) < rng.integers(least, length + 1, shape)[..., None], ids, 0).astype(np.int32)


def batch_of(rng, rows=3, questions=2, answers=3):
    weight = rng.random((rows, questions, answers)).astype(np.float32)
    weight[0, 1] = 0.0  # An empty slot.
    weight[1, 0, 2] = 0.0
    return {
        "image": jnp.asarray(rng.integers(0, 256, (rows, 16, 16, 3)), jnp.uint8),
        "flip": jnp.zeros(rows, bool),
        "question": jnp.asarray(texts(rng, (rows, questions), 6, least=1)),
        "answer": jnp.asarray(texts(rng, (rows, questions, answers), 4, least=1)),
        "weight": jnp.asarray(weight),
    }


def test_loss_is_the_weighted_sum_of_answers_likelihoods():
    """Of each question by itself, as [CLS] question [SEP]; slots without an answer don't count."""
    blueprint, params = make()
    batch, objective = batch_of(np.random.default_rng(1)), XVlmAnswering(questions=2, answers=3)
    host = {k: np.asarray(v) for k, v in batch.items()}
    text = np.zeros((6, 8), np.int32)
    for row, question in zip(text, host["question"].reshape(6, -1), strict=True):
        ids = [2, *question[question != 0], 1]
        row[: len(ids)] = ids
    weights = host["weight"].reshape(6, 3)

    def by_hand(model, image):
        encoded = jnp.repeat(model.encode(image), 2, axis=0)
        kv = model.decoder.image_kv(model.states(encoded, jnp.asarray(text)), jnp.asarray(text != 0))

        def of_answers(total, answer_and_weight):
            answer, weight = answer_and_weight
            logp = jax.nn.log_softmax(model.decoder.project(model.decoder.causal(answer, kv)))
            logp = jnp.take_along_axis(logp, answer[..., None], axis=2)[..., 0]
            return total - (jnp.where(answer != 0, logp, 0.0).sum(axis=1) * weight).sum(), None

        # The first answer of every question, then the second: a loop, which compiles once.
        answers = jnp.asarray(host["answer"].reshape(6, 3, -1).swapaxes(0, 1))
        total, _ = jax.lax.scan(of_answers, jnp.float32(0), (answers, jnp.asarray(weights.T)))
        return total / int((weights > 0).any(axis=1).sum())

    def ours(params):
        return objective.loss(blueprint.bind(params), objective.prepare(batch, train=True), None)[0]

    def expected(params):
        return by_hand(blueprint.bind(params), objective.prepare(batch, train=True)["image"])

    found, wanted = jax.jit(lambda p: (jax.value_and_grad(ours)(p), jax.value_and_grad(expected)(p)))(params)
    assert_close(found[0], wanted[0], 1e-5)
    for name, value in wanted[1].items():
        assert_close(found[1][name], value, 1e-3, name)
    assert all(np.abs(found[1][name]).max() > 0 for name in found[1] if name.endswith("kernel"))


def test_dropout_of_questions_and_answers_has_keys_of_its_own(monkeypatch):
    blueprint, params = make()
    batch, objective, seen = batch_of(np.random.default_rng(1)), XVlmAnswering(questions=2, answers=3), []
    for owner, name in ((XVlmAnswers, "encode"), (XVlmAnswers, "states"), (FusionDecoder, "causal")):
        own = getattr(owner, name)

        def spy(*args, own=own, key=None, **named):
            seen.append(key)
            return own(*args, key=key, **named)

        monkeypatch.setattr(owner, name, spy)

    @jax.jit
    def keys(key):
        objective.loss(blueprint.bind(params), objective.prepare(batch, train=True), key)
        return [jax.random.key_data(key) for key in seen]

    found = keys(jax.random.key(0))
    assert len(found) == 3 and len({tuple(key.tolist()) for key in found}) == 3


def test_padding_of_a_question_is_not_seen():
    blueprint, params = make()
    rng = np.random.default_rng(2)
    image, question = jnp.asarray(rng.normal(size=(1, 16, 16, 3)), jnp.float32), jnp.array([[7, 8, 9]], jnp.int32)
    answer = jnp.array([[11, 12, 1]], jnp.int32)

    @jax.jit
    def hidden(params, question):
        model = blueprint.bind(params)
        return model.decoder.causal(answer, model.ask(image, question))

    padded = jnp.pad(question, ((0, 0), (0, 3)))
    assert_close(hidden(params, padded), hidden(params, question), 1e-5)
    assert np.abs(hidden(params, question.at[0, 2].set(10)) - hidden(params, question)).max() > 1e-3


def test_the_end_of_a_question_is_read_or_not():
    question = jnp.array([[7, 8, 0], [9, 9, 9], [0, 0, 0]], jnp.int32)
    for reads_end, expected in (
        (True, [[2, 7, 8, 1, 0], [2, 9, 9, 9, 1], [2, 1, 0, 0, 0]]),
        (False, [[2, 7, 8, 0, 0], [2, 9, 9, 9, 0], [2, 0, 0, 0, 0]]),
    ):
        blueprint, params = make(reads_end=reads_end)
        assert blueprint.bind(params).read(question).tolist() == expected


def test_an_example():
    """Different answers by how many gave them; sides change places where the image is mirrored; slots stay empty."""
    tokenizer = Words()
    options = XVlmAnswersOptions(**TINY)

    def prompt(text):
        return options.prompt(tokenizer, "answer", text)

    example = {"image": picture(), "questions": {"question": ["a left b"], "answers": ['["no", "a", "no", "right"]']}}
    made = QuestionAnswers(Crop(16), prompt, 6, tokenizer, 4, questions=2, answers=2, flip=True)
    for seed in range(20):
        out = made(example, Uniforms(seed, 0))
        side = "right" if out["flip"] else "left"
        np.testing.assert_array_equal(out["question"][0], tokenizer(f"a {side} b", 7)[:6])
        np.testing.assert_array_equal(out["answer"][0], [tokenizer("no", 4), tokenizer("a", 4)])
        np.testing.assert_allclose(out["weight"], [[2 / 3, 1 / 3], [0, 0]], rtol=1e-6)
        assert not out["question"][1].any() and not out["answer"][1].any()
    whole = dataclasses.replace(made, answers=4)(example, Uniforms(0, 0))
    np.testing.assert_allclose(whole["weight"][0], [0.5, 0.25, 0.25, 0], rtol=1e-6)
    assert {made(example, Uniforms(s, 0))["flip"].item() for s in range(20)} == {True, False}
    half = dataclasses.replace(made, lone=0.5)
    only = {
        "image": picture(),
        "questions": {"question": ["a", "b"], "answer": ["c", ""], "answers": ["", '["d", "d"]']},
    }
    for kept, weights in ((half, {0.5, 1.0}), (made, {1.0})):
        assert {float(x) for x in kept(only, Uniforms(0, 0))["weight"][:, 0]} == weights


def test_batches_are_as_the_specification_says(monkeypatch):
    monkeypatch.setattr(tokenizers, "load", lambda *_: Words())
    monkeypatch.setattr(DataOptions, "tokenizer_path", lambda self: "letters")
    options, objective = XVlmAnswersOptions(**TINY), XVlmAnswering(questions=2, answers=3)
    example = {"image": picture(), "questions": {"question": ["a", "b"], "answer": ["c", "d"]}}
    row = objective.transform(options, DataOptions(name="x"), train=True)(example, Uniforms(0, 0))
    spec = objective.batch_spec(options, 5)
    assert {k: (v.shape[1:], v.dtype) for k, v in spec.items()} == {k: (v.shape, v.dtype) for k, v in row.items()}


def test_micro_batches_have_the_mean_of_the_whole():
    blueprint, params = make()
    objective = XVlmAnswering(questions=2, answers=3)
    ready = objective.prepare(batch_of(np.random.default_rng(3), rows=4), train=True)

    @jax.jit
    def loss(ready):
        return objective.loss(blueprint.bind(params), ready, None)[0]

    parts = [loss({k: v[i : i + 2] for k, v in ready.items()}) for i in (0, 2)]
    assert_close(loss(ready), np.mean(parts), 1e-6)


RANKINGS = [(k, first_twice) for k in (2, 7) for first_twice in (False, True)]


@pytest.fixture(scope="module")
def ranked():
    """(answers, what `rank` finds by k and first_twice, log-probabilities of every answer by itself)."""
    blueprint, params = make()
    rng = np.random.default_rng(5)
    image, question = jnp.asarray(rng.normal(size=(3, 16, 16, 3)), jnp.float32), jnp.asarray(texts(rng, (3,), 6, 1))
    answers = texts(rng, (7,), 4, least=2)
    answers[:, 0] = rng.permutation(np.arange(5, 40))[:7]  # Were two the same, the short list's edge were not defined.

    @jax.jit
    def run(params):
        model = blueprint.bind(params)
        kv, none = model.ask(image, question), jnp.zeros((3, 0), jnp.int32)

        def by_itself(answer):
            hidden = model.decoder.causal(jnp.broadcast_to(answer[None], (3, 4)), kv)
            return jax.nn.log_softmax(model.decoder.project(hidden))

        found = [rank(model, kv, none, answers, k, first_twice=twice) for k, twice in RANKINGS]
        return found, jax.lax.map(by_itself, jnp.asarray(answers))

    found, alone = run(params)
    return answers, dict(zip(RANKINGS, found, strict=True)), alone


@pytest.mark.parametrize("k, first_twice", RANKINGS)
def test_ranks_as_by_hand(ranked, k, first_twice):
    """Every answer by itself; a short list leaves out those whose first token is unlikely."""
    answers, found, alone = ranked
    found = found[k, first_twice]
    pairs = zip(alone, answers, strict=True)
    logp = np.stack([np.take_along_axis(np.asarray(p), a[None, :, None], 2)[..., 0] for p, a in pairs], axis=1)
    total = (logp * (answers != 0)[None]).sum(axis=2) + first_twice * logp[:, :, 0]
    short = np.argsort(-logp[:, :, 0], axis=1)[:, :k]
    for row in range(3):
        best = sorted(short[row], key=lambda i: -total[row, i])
        assert found.index_Bk[row].tolist() == best
        assert_close(found.logp_Bk[row], total[row, best], 1e-5)
    np.testing.assert_allclose(found.probabilities().sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "make_bad, message",
    [
        (lambda: XVlmAnswering(answers=0), "at least 1"),
        (lambda: XVlmAnswersOptions(**TINY | {"question_length": 13}), "model.question_length=13"),
        (lambda: XVlmAnswersOptions(**TINY | {"end": 0}), "the end not 0"),
        (lambda: XVlmAnswersOptions(**TINY).check_tokenizer(Words(eos=3)), "model.end=1"),
        (lambda: XVlmAnswersOptions(**TINY).prompt(Words(), "caption"), "wasn't trained for the task 'caption'"),
    ],
)
def test_bad_options(make_bad, message):
    with pytest.raises(UserError, match=message):
        make_bad()
