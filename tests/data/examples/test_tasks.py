"""Prompts and targets: what is drawn, cut and learned; and what is said where images stand for clips."""

import pytest
from handmade import Letters

from capvl.data.examples.tasks import TaskText
from capvl.data.images.crops import Crop
from capvl.data.randomness import Uniforms
from capvl.data.reading.texts import questions
from capvl.errors import UserError
from capvl.models.prompts import TextPrompts


def test_prompts_and_targets():
    prompts = TextPrompts(Letters(), 8, {"read": "r"})
    crop = Crop(16)
    made = TaskText(crop, ("answer",), prompts, Letters(), 8)
    text, prompt, cut = made.text("answer", "ab", "c")
    assert text.tolist() == [5, 6, 7, 1, 0, 0, 0, 0] and prompt == 2 and not cut
    text, prompt, cut = made.text("answer", "abcdefghij", "xyz")
    assert prompt == 6 and cut and text.tolist() == [5, 6, 7, 8, 9, 10, 28, 1]  # Cut at the end; room for an answer.
    assert prompts("read", "")[0].tolist() == [22] and not len(prompts("caption", "")[0])


def test_several_texts_are_drawn_without_return():
    made = TaskText(Crop(16), ("caption", "answer"), TextPrompts(Letters(), 8), Letters(), 8, texts=4)
    example = {"text": [b"a", b"b"], "questions": {"question": [b"q", b"r"], "answer": [b"x", b"y"]}}
    for n in range(20):
        out = made(example, Uniforms(0, n))
        assert out["text"].shape == (4, 8) and not out["has_image"] and (out["image"] == 0).all()
        captions = [tuple(t) for t, p in zip(out["text"].tolist(), out["prompt"], strict=True) if p == 0]
        assert len(set(captions)) == min(len(captions), 2)
    assert made({"text": []}, Uniforms(0, 0))["text"].sum() == 0


def test_a_task_named_twice_is_drawn_twice_as_often():
    example = {"text": [b"a"], "questions": {"question": [b"q"], "answer": [b"x"]}}
    made = TaskText(Crop(16), ("caption", "answer", "answer"), TextPrompts(Letters(), 8), Letters(), 8)
    answers = sum(bool(made(example, Uniforms(0, n))["prompt"]) for n in range(300))
    assert 170 <= answers <= 230
    assert not any(made({"text": [b"a"]}, Uniforms(0, n))["prompt"] for n in range(9))


def test_images_are_no_clips():
    made = TaskText(Crop(16, frames=2), ("caption",), TextPrompts(Letters(), 8), Letters(), 8)
    with pytest.raises(UserError, match="The data set has images, and the model reads clips"):
        made({"image": b"", "text": [b"a"]}, Uniforms(0, 0))


def test_too_few_frames():
    crop = Crop(16, frames=3)
    with pytest.raises(UserError, match="A clip has 2 frames, and the model reads 3"):
        crop({"frames": [b"", b""]}, Uniforms(0, 0))


@pytest.mark.parametrize(
    "given, wanted",
    [
        ('["red", "blue"]', ("red", "blue")),
        ("[]", ()),
        ("red", ("red",)),
        ('"red"', ('"red"',)),
        ("3", ("3",)),
        ("{", ("{",)),
        ("[1, 2]", ("[1, 2]",)),
        (["red", b"blue"], ("red", "blue")),
    ],
)
def test_answers_are_a_list_of_texts_or_one_text(given, wanted):
    """A data set that was made elsewhere may have a plain text where ours has JSON."""
    (row,) = questions({"question": [b"what?"], "answers": [given]})
    assert row.answers == wanted
