"""What a GIT offers in Python: answers, words, clips, closed lists; and what is said where something doesn't fit."""

import dataclasses
import pathlib

import numpy as np
import pytest
from handmade import ByWord
from PIL import Image

from capvl.errors import UserError
from capvl.inference.face import LoadedModel
from capvl.models.git import GitOptions
from capvl.models.parameters import Blueprint
from capvl.objectives.git import Git
from capvl.weights import Weights

NAMES = ["red", "green thing", "blue"]


def model_of(objective=None, **changes):
    options = GitOptions(
        encoder="w8d1h1m8/8", res=8, text="w8d1h1m8", vocab=8, start=2, length=6, text_positions=6, dtype="float32"
    )
    options = dataclasses.replace(options, **changes)
    rng = np.random.default_rng(0)
    params = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in Blueprint(options).shapes.items()}
    model = LoadedModel(Weights(params, options, objective=objective), "random")
    model.tokenizer = ByWord()
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def clips():
    return model_of(frames=2)


def pictures(count):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)) for _ in range(count)]


def test_one_question_or_one_each(model):
    images, questions = pictures(3), ["red", "the thing", "blue"]
    each = model.answer(images, questions)
    assert each == [model.answer(i, q)[0] for i, q in zip(images, questions, strict=True)]
    assert model.answer(images, "red")[0] == each[0]
    with pytest.raises(UserError, match="2 questions for 3 images"):
        model.answer(images, questions[:2])


def test_closed_lists(model):
    images = pictures(5)
    for options in ({}, {"beams": 3}, {"temperature": 2.0}):
        assert set(model.caption(images, names=NAMES, **options)) <= set(NAMES)
    scores = model.score(images[:2], NAMES)
    best = model.caption(images[:2], names=NAMES, beams=3, length_penalty=0.0)
    assert best == [NAMES[i] for i in scores.argmax(axis=1)]
    assert model.classify(images[:2], NAMES) == best
    with pytest.raises(UserError, match="'red' and 'Red' are the same"):
        model.caption(images, names=["red", "Red"])


def test_the_n_best(model):
    """The first is what is written; scores fall; a closed list gives each name once, in the order of `score`."""
    images = pictures(2)
    found = model.n_best(images, "red", beams=3)
    assert [len(texts) for texts in found] == [3, 3]
    assert [texts[0][0] for texts in found] == model.answer(images, "red", beams=3)
    assert all(a[1] >= b[1] for texts in found for a, b in zip(texts, texts[1:], strict=False))
    named = model.n_best(images, names=NAMES, length_penalty=0.0)
    scores = model.score(images, NAMES)
    for texts, row in zip(named, scores, strict=True):
        assert [text for text, _ in texts] == [NAMES[i] for i in np.argsort(-row)]
    with pytest.raises(UserError, match="n_best needs two beams or more, not 1"):
        model.n_best(images, beams=1)


def test_an_output_layer_of_its_own():
    """Names are scored by the tree as one by one and written by the cache; a copied table is the tied model."""
    own, tied = model_of(tied=False), model_of()
    images = pictures(2)
    scores = own.score(images, NAMES)
    one_by_one = np.stack([own.score(images, [name] * 2) for name in NAMES], axis=1)
    np.testing.assert_allclose(scores, one_by_one, rtol=1e-4)
    assert own.caption(images, names=NAMES, beams=3, length_penalty=0.0) == [NAMES[i] for i in scores.argmax(axis=1)]
    tied.params["decoder/bias"] = tied.params["decoder/bias"] * 0 + 0.5
    same = {k: v for k, v in tied.params.items() if k != "decoder/bias"}
    copied = {"kernel": same["decoder/tokens"].T, "bias": tied.params["decoder/bias"]}
    own.params = same | {f"decoder/logits/{leaf}": value for leaf, value in copied.items()}
    assert own.n_best(images) == tied.n_best(images)
    own.params["decoder/logits/kernel"] = -own.params["decoder/logits/kernel"]
    assert own.n_best(images) != tied.n_best(images)


def test_several_samples_of_an_image(model):
    """Lists of texts, which hang on the seed and the image's place, not on what else is written; one is a text."""
    images = pictures(3)
    drawn = model.caption(images, samples=5, temperature=2.0, seed=3)
    assert [len(texts) for texts in drawn] == [5] * 3 and all(len(set(texts)) > 1 for texts in drawn)
    assert model.caption(images[:2], samples=5, temperature=2.0, seed=3) == drawn[:2]
    assert model.caption(images, samples=5, temperature=2.0, seed=4) != drawn
    asked = model.answer(images, ["red", "the thing", "blue"], samples=2, temperature=2.0, names=NAMES)
    assert len(asked) == 3 and all(len(texts) == 2 and set(texts) <= set(NAMES) for texts in asked)
    one = model.caption(images, temperature=2.0, seed=3)
    assert all(isinstance(text, str) for text in one)
    assert model.caption(images, samples=1, temperature=2.0, seed=3) == one


def test_how_long_texts_are(model):
    """max_tokens counts what is written behind the question; more of them than the model's texts have may be asked."""
    long, images = model_of(text_positions=20), pictures(2)
    words = [len(text.split()) for text in long.answer(images, "red thing", max_tokens=9, min_tokens=8)]
    assert set(words) <= {8, 9}
    for options in ({}, {"beams": 2}, {"temperature": 3.0}):
        assert max(len(text.split()) for text in long.answer(images, "red", max_tokens=2, **options)) <= 2
    for texts in long.n_best(images, "red", max_tokens=3, min_tokens=2, no_repeat_ngram=1):
        for text, _ in texts:
            assert 2 <= len(text.split()) <= 3 and len(set(text.split())) == len(text.split())
            assert "red" not in text.split()
    named = long.caption(images, names=["red", "green thing", "the blue thing"], min_tokens=2, max_tokens=3)
    assert set(named) == {"green thing"}


def test_reading_asks_the_words_of_the_recipe():
    asking = model_of(Git(prompts=(("read", "the red"),)))
    images = pictures(2)
    assert asking.read(images) == model_of().answer(images, "the red")
    with pytest.raises(UserError, match="wasn't trained for the task 'answer'; it knows caption, read"):
        asking.answer(images, "red")


def test_long_questions_are_cut_and_that_is_said(model):
    image = pictures(1)
    with pytest.warns(UserWarning, match="too long for the model and was cut at its end"):
        long = model.answer(image, "red green blue the thing red blue")
    assert long == model.answer(image, "red green blue the")


def film(path, frames):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for i in range(frames):
            pixels = np.full((24, 32, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


def test_clips(clips, model, tmp_path):
    path = film(tmp_path / "a.mp4", 4)
    written = clips.caption_video(path, names=NAMES)
    assert len(written) == 1 and written[0] in NAMES
    assert clips.caption_video([path, pathlib.Path(path).read_bytes()], names=NAMES) == written * 2
    assert len(clips.answer_video(path, "red")) == 1
    assert clips.n_best(path)[0][0][0] == clips.caption_video(path, beams=4)[0]
    assert clips.clips(path).shape == (1, 2, 8, 8, 3)
    with pytest.raises(UserError, match="reads images, not clips"):
        model.caption_video(path)
    with pytest.raises(UserError, match="has 1 frames, and 2 are needed"):
        clips.caption_video(film(tmp_path / "b.mp4", 1))
    with pytest.raises(UserError, match="does not exist"):
        clips.caption_video("none.mp4")


def test_images_that_keep_their_aspect():
    wide = model_of(max_side=24)
    (pixels,) = wide.pixels(Image.new("RGB", (30, 12), (255, 0, 0)))
    assert pixels.shape == (24, 24, 4)
    assert (pixels[:8, :20, 3] == 255).all() and pixels[..., 3].sum() == 255 * 8 * 20
    assert len(wide.caption([*pictures(1), Image.new("RGB", (5, 40))])) == 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, i: m.caption(i, beems=3), "Did you mean 'beams'"),
        (lambda m, i: m.caption(i, beams=9), "9 beams are more than the 7 words"),
        (lambda m, i: m.answer(i, ""), "none of them empty"),
        (lambda m, i: m.caption(i, names=["red", "  "]), "none of them empty"),
        (lambda m, i: m.caption(i, names=[]), "vocabulary of names is empty"),
        (lambda m, i: m.caption(i, samples=4), "samples=4: .* several of an image need a temperature"),
        (lambda m, i: m.caption(i, samples=2, beams=2), "samples=2: .* need a temperature"),
        (lambda m, i: m.caption(i, samples=0, temperature=1.0), "samples=0: 1 or more are possible"),
        (lambda m, i: m.caption(i, samples="many", temperature=1.0), "samples should be a whole number, not 'many'"),
        (lambda m, i: m.caption(i, sample=2), "no option 'sample'. Did you mean 'samples'"),
        (lambda m, i: m.caption(i, beams="two"), "beams should be a whole number, not 'two'"),
        (lambda m, i: m.caption(i, max_tokens=2, min_tokens=3), "min_tokens=3 is above max_tokens=2"),
        (lambda m, i: m.caption(i, max_tokens=7), "max_tokens=7 behind a prompt of 0 .* than the 6 positions"),
        (lambda m, i: m.answer(i, "the red", min_tokens=5), "min_tokens=5 is more than the 4 tokens .* prompt of 2"),
        (lambda m, i: m.n_best(i, no_repeat_ngram=-1), "must not be negative"),
        (lambda m, i: m.caption(i, names=["red"], min_tokens=2), "None of the 1 names may be written"),
    ],
)
def test_bad_input(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model, pictures(1))
