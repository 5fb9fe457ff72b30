"""The Python face: all kinds of images, buckets, and answers of the hand-made models."""

import io

import numpy as np
import pytest
from conftest import assert_close
from handmade import COLORS, WORDS, ByWord, captioner, two_towers
from PIL import Image

import capvl
from capvl.convert.folder import write_folder
from capvl.errors import UserError
from capvl.inference.face import LoadedModel
from capvl.weights import Weights

NAMES = list(WORDS)


def picture(name, size=(16, 16)):
    return Image.new("RGB", size, COLORS[name])


@pytest.fixture(scope="module")
def writer():
    options, params = captioner()
    return hand_made(options, params)


@pytest.fixture(scope="module")
def pair():
    options, params = two_towers()
    return hand_made(options, params)


def hand_made(options, params):
    model = LoadedModel(Weights(params, options), "hand-made")
    model.tokenizer = ByWord()
    return model


def test_pil_images_are_seen_upright_and_in_their_range(pair):
    tags, stored = Image.Exif(), Image.new("RGB", (32, 16))
    stored.paste((255, 255, 255), (0, 0, 16, 16))
    tags[0x0112] = 6  # To be turned clockwise: white comes to the top.
    buffer = io.BytesIO()
    stored.save(buffer, "JPEG", exif=tags)
    seen = pair.pixels([Image.open(buffer), buffer.getvalue()])
    assert (seen[:, 2] > 200).all()
    assert (seen[:, -3] < 50).all()
    deep = Image.fromarray(np.full((16, 16), 32896, np.uint16))
    assert (pair.pixels([deep, deep.convert("I")]) == 128).all()
    for image in (Image.new("F", (16, 16), 0.5), Image.new("I", (16, 16), 70_000)):
        with pytest.raises(UserError, match="no defined range"):
            pair.pixels(image)


def test_every_kind_of_image(pair, tmp_path):
    picture("green").save(tmp_path / "green.png")
    buffer = io.BytesIO()
    picture("green").save(buffer, "PNG")
    array = np.asarray(picture("green"))
    transparent = np.dstack([array, np.full((16, 16), 255, np.uint8)])
    kinds = [picture("green", (40, 17)), array, str(tmp_path / "green.png"), tmp_path / "green.png", buffer.getvalue()]
    kinds += [picture("green").convert("RGBA"), picture("green").convert("P"), transparent]
    together = pair.embed(kinds)
    assert together.shape == (len(kinds), 8)
    for kind, row in zip(kinds, together, strict=True):
        assert_close(pair.embed(kind)[0], row, 1e-6)
    assert_close(pair.embed(np.stack([array, array])), together[:2], 1e-6)
    grey = pair.embed([np.full((9, 9), 128, np.uint8), Image.new("L", (9, 9), 128), Image.new("I;16", (9, 9), 0)])
    assert_close(grey[0], grey[1], 1e-5)


def test_classify_and_similarity(pair, writer):
    images = [picture(n) for n in (*NAMES, "red")]
    assert writer.classify(images, NAMES) == [*NAMES, "red"]
    with pytest.warns(UserWarning, match="texts have more than 4 tokens and are cut"):
        assert pair.classify(images, NAMES) == [*NAMES, "red"]
    best = pair.classify(images, NAMES, templates=["{}", "{} thing"], top=2)
    assert [row[0][0] for row in best] == [*NAMES, "red"] and best[0][0][1] > best[0][1][1]
    similar = pair.similarity(images, NAMES)
    assert similar.shape == (4, 3)
    assert_close(similar, pair.embed(images) @ pair.embed_text(NAMES).T, 1e-6)


def test_caption_and_score(writer):
    images = [picture(n) for n in NAMES]
    for options in ({}, {"beams": 2}, {"temperature": 0.01}):
        assert writer.caption(images, **options) == NAMES
    own = writer.score(images, NAMES)
    every = writer.score([*images, images[0]], NAMES)
    assert_close(np.diag(every[:3]), own, 1e-5)
    assert (every.argmax(axis=1) == [0, 1, 2, 0]).all()
    assert writer.tokens(images).shape == (3, 1, 8)
    with pytest.warns(UserWarning, match="1 of 1 texts have more than 4 tokens and are cut at their end"):
        assert writer.score(images[0], " ".join([NAMES[0]] * 40)).shape == (1,)  # As in training.
    with pytest.raises(UserError, match="1 of 2 texts have more than the"):
        writer.classify(images[0], [NAMES[0], " ".join([NAMES[0]] * 40)])


def test_any_number_of_images_and_few_compilations(pair):
    images = [picture(NAMES[i % 3]) for i in range(150)]
    embedded = pair.embed(images)
    assert len(embedded) == 150
    assert_close(embedded[147], embedded[0], 1e-6)
    sizes = pair._compiled["embed"]._cache_size()
    pair.embed(images[:140])
    assert pair._compiled["embed"]._cache_size() <= sizes + 1


BAD = [
    (lambda m: m.embed("none.jpg"), "'none.jpg' does not exist"),
    (lambda m: m.embed([]), "There are no images"),
    (lambda m: m.embed(b"nothing"), "Image 0 can't be used"),
    (lambda m: m.embed(np.zeros((4, 4, 7), np.uint8)), r"not uint8 of \(4, 4, 7\)"),
    (lambda m: m.embed(np.zeros((4, 4, 3))), "not float64"),
    (lambda m: m.embed(np.zeros((0, 4, 3), np.uint8)), "out of range"),
    (lambda m: m.embed(3), "not int"),
    (lambda m: m.embed_text([""]), "none of them empty"),
    (lambda m: m.caption(picture("red")), "does not have a decoder"),
    (lambda m: m.classify(picture("red"), ["a", "A"]), "each once"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(pair, call, message):
    with pytest.raises(UserError, match=message):
        call(pair)


def test_load(tmp_path, writer):
    options, params = captioner()
    write_folder(str(tmp_path / "model"), Weights(params, options))
    model = capvl.load(tmp_path / "model")
    assert "a decoder" in repr(model)
    assert_close(model.embed(picture("blue")), writer.embed(picture("blue")), 1e-6)
    with pytest.raises(UserError, match="has no tokenizer"):
        model.caption(picture("blue"))
    with pytest.raises(UserError, match="does not have a text tower"):
        model.embed_text("red")
    with pytest.raises(UserError, match="neither a run's workdir"):
        capvl.load(tmp_path)


def test_the_index_of_the_package():
    assert set(capvl._PUBLIC) <= set(dir(capvl))
    for name in capvl._PUBLIC:
        assert name in capvl.__doc__
        assert getattr(capvl, name) is not None
    with pytest.raises(AttributeError):
        capvl.nothing  # noqa: B018
