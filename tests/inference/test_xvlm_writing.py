"""What X-VLMs that write offer in Python: captions behind the model's words, answers to questions, free and listed."""

import numpy as np
import pytest
from handmade import ByWord
from PIL import Image

from capvl.errors import UserError
from capvl.inference.face import LoadedModel
from capvl.models.parameters import Blueprint
from capvl.models.xvlm_answers import XVlmAnswersOptions
from capvl.models.xvlm_captioner import XVlmCaptionerOptions
from capvl.weights import Weights

TINY = dict(
    encoder="w8d1h1m8/8", res=8, text="w8d2h1m8", cross_layers=1, vocab=8, start=2, text_positions=9, dtype="float32"
)
NAMES = ["red", "green thing", "blue"]


def loaded(options):
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in Blueprint(options).shapes.items()}
    model = LoadedModel(Weights(params, options), "random")
    model.tokenizer = ByWord()
    return model


@pytest.fixture(scope="module")
def answers():
    return loaded(XVlmAnswersOptions(**TINY, length=4, question_length=6, answer_layers=1, end=1))


def pictures(count):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)) for _ in range(count)]


def test_captions():
    model = loaded(XVlmCaptionerOptions(**TINY, length=6, words="the thing"))
    images = pictures(3)
    assert set(model.caption(images, names=NAMES)) <= set(NAMES)
    found = model.n_best(images, beams=3, rule="hugging_face_whole")
    assert [len(texts) for texts in found] == [3, 3, 3]
    assert model.score(images, NAMES).shape == (3,)
    with pytest.raises(UserError, match="wasn't trained for the task 'answer'"):
        model.answer(images, "red")


@pytest.mark.long
def test_answers(answers):
    """One question or one each; a longer batch of questions changes nothing; beams and samples; the closed list."""
    images, questions = pictures(3), ["red", "the red thing", "blue"]
    each = answers.answer(images, questions)
    assert each == [answers.answer(i, q)[0] for i, q in zip(images, questions, strict=True)]
    for options in ({}, {"beams": 3}, {"temperature": 2.0}):
        assert set(answers.answer(images, questions, names=NAMES, **options)) <= set(NAMES)
    assert [len(row) for row in answers.answer(images, questions, temperature=1.0, samples=2)] == [2, 2, 2]
    assert answers.n_best(images, "red", beams=3)[0][0][0] == answers.answer(images[:1], "red", beams=3)[0]
    with pytest.warns(UserWarning, match="too long for the model and was cut"):
        answers.answer(images[:1], "the red thing the red thing")


def test_what_reads_questions_writes_nothing_else(answers):
    for ask in (lambda: answers.caption(pictures(1)), lambda: answers.read(pictures(1))):
        with pytest.raises(UserError, match="wasn't trained for the task"):
            ask()
    with pytest.raises(UserError, match="does not have a decoder"):
        answers.score(pictures(1), "red")
