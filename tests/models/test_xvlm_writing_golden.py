"""X-VLM that writes, against golden task_caption and task_vqa."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_xvlm import FEATURES, LOSS, close, load

from capvl.decoding.generate import Decoding, generate
from capvl.decoding.likelihood import log_likelihood_of_kv
from capvl.decoding.ranking import rank
from capvl.models.parameters import Blueprint
from capvl.objectives.xvlm_answers import XVlmAnswering
from capvl.objectives.xvlm_caption import XVlmCaption

pytestmark = pytest.mark.golden
PROBABILITY = 1e-4
"""Of probabilities relative to the largest difference that logits have."""


def case_of(name, **ids):
    """A golden model whose texts begin and end with the ids that they have in the file."""
    case = load(name)
    case.options = dataclasses.replace(case.options, **{k: int(v) for k, v in ids_of(case.golden, **ids).items()})
    case.blueprint = Blueprint(case.options)
    return case


def ids_of(golden, **names):
    """start and end of the texts of arrays of the file."""
    found = {}
    for kind, (ids, there) in names.items():
        last = golden[there].sum(axis=1) - 1 if kind == "end" else 0
        (found[kind],) = set(golden[ids][np.arange(len(golden[ids])), last].tolist())
    return found


@pytest.fixture(scope="module")
def caption():
    return case_of("task_caption", start=("in.text_ids", "in.text_atts"))


@pytest.fixture(scope="module")
def vqa():
    return case_of("task_vqa", **dict.fromkeys(("start", "end"), ("in.q_ids", "in.q_atts")))


def without_start(case, name):
    """Texts as ours are: the start is read by the decoder."""
    ids = np.asarray(case.ids(name))
    assert (ids[:, 0] == case.options.start).all()
    return jnp.asarray(np.pad(ids[:, 1:], ((0, 0), (0, 1))))


def test_caption_logits_and_loss(caption):
    golden = caption.golden
    labels, length = without_start(caption, "in.text_ids"), int(golden["in.prompt_length"])
    objective = XVlmCaption(smoothing=float(golden["in.label_smoothing"]))

    def run(model):
        image = caption.image()
        batch = {"image": image, "text": labels, "prompt": jnp.full(len(labels), length - 1, jnp.int32)}
        batch = objective.prepare(batch | {"image": image}, train=False) | {"image": image}
        return model.logits(image, labels), objective.loss(model, batch, None)[0]

    logits, loss = caption.compute(run)
    # Theirs at the last place predicts what would follow.
    there = golden["in.text_atts"] > 0
    close(logits[there], golden["out.logits"][there], FEATURES)
    close(loss, golden["out.loss"], LOSS)


def written(rows, eos):
    """Texts up to their end, whatever they are filled with behind."""
    return [row[: row.index(eos) + 1] if eos in row else row for row in np.asarray(rows).tolist()]


def behind_prompt(case, how):
    """What is written behind the prompt, and the tokens that theirs have in front of it."""
    golden, eos = case.golden, end_of(case)
    prompt, length = golden["in.prompt_ids"][:, 1:].astype(np.int32), int(golden["in.gen_max_length"]) - 1

    def run(model):
        kv = model.decoder.image_kv(model.encode(case.image()))
        return generate(model, kv, length, eos, how, prompt_BP=jnp.asarray(prompt))[0][:, : length - prompt.shape[1]]

    return case.compute(run), 1 + prompt.shape[1]


def end_of(case):
    """The id that ends the golden texts."""
    return ids_of(case.golden, end=("in.text_ids", "in.text_atts"))["end"]


def test_greedy_captions(caption):
    """Theirs is given its end where it reached full length."""
    ours, given = behind_prompt(caption, Decoding())
    eos, theirs = end_of(caption), caption.golden["out.greedy_ids"][:, given:]
    for row, expected in zip(ours.tolist(), theirs.tolist(), strict=True):
        (row,), (expected,) = written([row], eos), written([expected], eos)
        whole = len(expected) == theirs.shape[1]
        assert row[: len(row) - whole] == expected[: len(expected) - whole]


def test_mean_log_probability_of_greedy_captions(caption):
    """Scored at once; the last token is that which was chosen, before it became the end."""
    golden, eos = caption.golden, end_of(caption)
    given = golden["in.prompt_ids"].shape[1]
    ids = golden["out.greedy_ids"].astype(np.int32)

    def run(model):
        kv = model.decoder.image_kv(model.encode(caption.image()))
        return jax.nn.log_softmax(model.decoder.project(model.decoder.causal(jnp.asarray(ids[:, 1:]), kv)))

    logp = caption.compute(run)
    for i, row in enumerate(ids):
        stop = row.tolist().index(eos) + 1 if eos in row else len(row)
        chosen = [logp[i, t - 1].max() for t in range(given, stop)]
        close(np.mean(chosen), golden["out.greedy_mean_logprob"][i], FEATURES)


def test_beam_captions(caption):
    golden = caption.golden
    least = int(golden["in.beam_min_length"]) - golden["in.prompt_ids"].shape[1]
    how = Decoding(beams=int(golden["in.num_beams"]), min_tokens=least, rule="hugging_face_whole")
    ours, given = behind_prompt(caption, how)
    eos = end_of(caption)
    assert written(ours, eos) == written(golden["out.beam_ids"][:, given:], eos)


def questions(case):
    """Questions without start and end."""
    ids = np.asarray(case.ids("in.q_ids"))
    inside = (ids != case.options.start) & (ids != case.options.end)
    rows = [row[keep & (row != 0)] for row, keep in zip(ids, inside, strict=True)]
    return jnp.asarray([np.pad(row, (0, ids.shape[1] - 2 - len(row))) for row in rows], jnp.int32)


def test_question_states_and_loss(vqa):
    golden = vqa.golden
    question, answers = questions(vqa), np.asarray(without_start(vqa, "in.a_ids"))
    count = golden["in.k"]
    slots, first = (len(count), count.max()), np.cumsum(count) - count
    answer, weight = np.zeros((*slots, answers.shape[1]), np.int32), np.zeros(slots, np.float32)
    for i, (begin, n) in enumerate(zip(first, count, strict=True)):
        answer[i, :n], weight[i, :n] = answers[begin : begin + n], golden["in.weights"][begin : begin + n]
    objective = XVlmAnswering(answers=int(count.max()))
    batch = {
        "question": question[:, None],
        "answer": jnp.asarray(answer)[:, None],
        "weight": jnp.asarray(weight)[:, None],
    }

    def run(model):
        image, text = vqa.image(), model.read(question)
        batch_of = batch | {"image": image}
        return text, model.states(model.encode(image), text), objective.loss(model, batch_of, None)[0]

    text, states, loss = vqa.compute(run)
    np.testing.assert_array_equal(text, vqa.ids("in.q_ids"))
    there = golden["in.q_atts"] > 0
    close(states[there], golden["out.question_states"][there], FEATURES)
    close(loss, golden["out.loss"], LOSS)


def test_ranking(vqa):
    """With the first token counted twice, as theirs; and the likelihood alone, as ours is by itself."""
    golden, names = vqa.golden, np.asarray(without_start(vqa, "in.answer_list_ids"))
    k, rows, question = int(golden["in.rank_k"]), len(golden["in.q_ids"]), questions(vqa)

    def run(model):
        kv, none = model.ask(vqa.image(), question), jnp.zeros((rows, 0), jnp.int32)
        ranked = rank(model, kv, none, names, k, first_twice=True)
        each = [log_likelihood_of_kv(model, kv, jnp.broadcast_to(jnp.asarray(n)[None], (rows, len(n)))) for n in names]
        return ranked.index_Bk, ranked.probabilities(), rank(model, kv, none, names, len(names)), jnp.stack(each, 1)

    index, probabilities, alone, each = vqa.compute(run)
    np.testing.assert_array_equal(index, golden["out.topk_ids"])
    close(probabilities, golden["out.topk_probs"], PROBABILITY)
    np.testing.assert_array_equal(alone.index_Bk, np.argsort(-each, axis=1, kind="stable"))
    close(alone.logp_Bk, -np.sort(-each, axis=1), FEATURES)
