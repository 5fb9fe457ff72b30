"""The face of a matching head: pairs, every image with every text, search in one pass and in two, classes."""

import dataclasses

import numpy as np
import pytest
from conftest import assert_close
from handmade import COLORS, WORDS, ByWord
from seeing import RES, SeeingOptions, scene

import capvl
from capvl.errors import UserError
from capvl.inference import matching
from capvl.inference.face import LoadedModel
from capvl.models.parameters import Blueprint
from capvl.models.xvlm import XVlmOptions
from capvl.weights import Weights

NAMES = list(WORDS)


def loaded(options, value=1.0):
    rng = np.random.default_rng(0)
    shapes = Blueprint(options).shapes
    draw = (lambda s: np.ones(s, np.float32)) if value else (lambda s: rng.normal(size=s).astype(np.float32))
    model = LoadedModel(Weights({n: draw(s.shape) for n, s in shapes.items()}, options), "seeing")
    model.tokenizer = ByWord()
    return model


@pytest.fixture(scope="module")
def sees():
    return loaded(SeeingOptions())


@pytest.fixture(scope="module")
def images():
    """Mostly of one colour, with a stripe of another at the top."""
    found = []
    for i, name in enumerate(NAMES):
        found.append(scene({name: (0, 0, 1, 1)}))
        found[-1][:8] = COLORS[NAMES[i - 1]]
    return found


def test_match(sees, images):
    own = sees.match(images, NAMES)
    every = sees.match([*images, images[0]], NAMES)
    assert own.shape == (3,) and every.shape == (4, 3)
    assert_close(np.diag(every[:3]), own, 1e-6)
    assert every.argmax(axis=1).tolist() == [0, 1, 2, 0]
    assert sees.match(images[0], NAMES).shape == (1, 3) and sees.match(images[0], "red").shape == (1,)


def test_pairs_equal_the_model_however_they_are_cut(images, monkeypatch):
    """Each is encoded once, in float32 and in bfloat16."""
    tiny = dict(encoder="w16d1h2m32/8", res=32, text="w16d3h2m32", cross_layers=1, vocab=8, length=4, dropout=0.0)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 3e-2)):
        model = loaded(XVlmOptions(**tiny, projection=8, dtype=dtype), value=0)
        found = model.match([*images, images[1]], NAMES)
        pixels = model.pixels(images)
        direct = model.run("direct", lambda m, rows: m.match(m.encode(rows[0]), rows[1]), (pixels, model.ids(NAMES)))
        assert_close(np.diag(found[:3]), direct, tolerance)
        assert np.ptp(found, axis=1).max() > 1e-3
        with monkeypatch.context() as patch:
            patch.setattr(matching, "PAIRS", 5)
            assert_close(model.match([*images, images[1]], NAMES), found, 1e-6)


def test_retrieve(sees, images):
    for rerank in (0, 2):
        assert sees.retrieve("green", images=images, top=2, rerank=rerank)[0][0] == 1
        found = sees.retrieve(images[2], texts=NAMES, top=5, rerank=rerank)
        assert [i for i, _ in found][0] == 2 and len(found) == 3
        assert [s for _, s in found] == sorted((s for _, s in found), reverse=True)
    cosines = sees.similarity(images, ["red"])[:, 0]
    assert sees.retrieve("red", images=images) == [(int(i), pytest.approx(cosines[i])) for i in np.argsort(-cosines)]
    scores = sees.match(images, ["red"])[:, 0]
    found = sees.retrieve("red", images=images, top=1, rerank=2)
    assert found == [(0, pytest.approx(scores[0], rel=1e-5))]


def test_the_second_pass_puts_right_what_the_first_gets_wrong(sees):
    """A brown that is nearer to red than the mean colour of an image that is red for the most part; yet nothing in it
    is red."""
    pale, right = np.full((RES, RES, 3), (140, 0, 0), np.uint8), scene({"red": (0, 0, 1, 1)})
    right[:12] = COLORS["blue"]
    both = [pale, right]
    assert sees.retrieve("red", images=both)[0][0] == 0
    assert sees.retrieve("red", images=both, rerank=2)[0][0] == 1


def test_classify(sees, images):
    assert sees.classify(images, NAMES, by="match") == NAMES
    only = loaded(dataclasses.replace(SeeingOptions(), able=("MATCHES",)))
    assert only.classify(images, NAMES) == NAMES
    assert only.classify(images, NAMES, templates=["{}", "the {}"], top=2)[1][0][0] == "green"


BAD = [
    (lambda m: m.retrieve("red"), "give one of the two"),
    (lambda m: m.retrieve("red", images=[scene({})], texts=["red"]), "give one of the two"),
    (lambda m: m.retrieve(scene({}), images=[scene({})]), "searched for one text, not for ndarray"),
    (lambda m: m.retrieve([scene({}), scene({})], texts=["red"]), "searched for one image, not for 2"),
    (lambda m: m.retrieve("red", images=[scene({})], top=0), "top should be a whole number of at least 1, not 0"),
    (lambda m: m.retrieve("red", images=[]), "There are no images"),
    (lambda m: m.retrieve("red", images=[scene({})], top="1"), "top should be a whole number of at least 1, not '1'"),
    (lambda m: m.retrieve("red", images=[scene({})], rerank=1.5), "rerank should be a whole number of at least 0"),
    (lambda m: m.retrieve(scene({}), texts=5), "Texts should be a text or a list of texts"),
    (lambda m: m.match(scene({}), None), "Texts should be a text or a list of texts"),
    (lambda m: m.match(scene({}), {"red": 1}), "Texts should be a text or a list of texts"),
    (lambda m: m.embed_text([5]), "Texts should be a text or a list of texts"),
    (lambda m: m.classify(scene({}), 5), "Texts should be a text or a list of texts"),
    (lambda m: m.classify(scene({}), NAMES, top=-1), "top should be a whole number of at least 1, not -1"),
    (lambda m: m.classify(scene({}), NAMES, templates=["a photo"]), "'a photo' should have {} once"),
    (lambda m: m.classify(scene({}), NAMES, templates=["{} {}"]), "'{} {}' should have {} once"),
    (lambda m: m.classify(scene({}), NAMES, templates=[5]), "Texts should be a text or a list of texts"),
    (lambda m: m.ground(scene({}), "red", layer=True), "layer should be a whole number of at least -1, not True"),
    (lambda m: m.ground(scene({}), "red", method=["box"]), "method should be a text"),
    (lambda m: capvl.load(None), "path should be a path, not None"),
    (lambda m: capvl.load("x", tokenizer=5), "tokenizer should be a path, not 5"),
    (lambda m: m.classify(scene({}), NAMES, by="itm"), "classify has no by='itm'"),
    (lambda m: m.classify(scene({}), NAMES, by="likelihood"), "does not have a decoder"),
    (lambda m: loaded(SeeingOptions(able=("TEXTS",))).match(scene({}), "red"), "does not have a matching head"),
    (lambda m: loaded(SeeingOptions(able=("TEXTS",))).retrieve("r", images=[scene({})], rerank=1), "a matching head"),
    (lambda m: loaded(SeeingOptions(able=("MATCHES",))).retrieve("r", images=[scene({})]), "a text tower"),
]


@pytest.mark.parametrize("call, sentence", BAD)
def test_bad_input(sees, call, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        call(sees)
    assert "\n" not in str(error.value)
