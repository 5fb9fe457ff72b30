"""Grad-CAM and rectangles against slow and plain forms; the face's `ground` on the hand-made grounder."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from handmade import ByWord
from PIL import Image
from seeing import RES, SeeingOptions, random_boxes, scene

from capvl.errors import UserError
from capvl.inference import grounding
from capvl.inference.face import LoadedModel
from capvl.models.parameters import Blueprint, flatten
from capvl.models.xvlm import XVlmOptions
from capvl.nn.padding import real
from capvl.nn.positions import bicubic
from capvl.weights import Weights

TINY = dict(encoder="w16d2h2m32/8", res=32, text="w16d4h2m32", cross_layers=2, vocab=40, length=8, dropout=0.0)


@pytest.fixture(scope="module")
def xvlm():
    """(options, model) with random parameters, biases and scales too."""
    options = XVlmOptions(**TINY, projection=8, dtype="float32")
    blueprint, rng = Blueprint(options), np.random.default_rng(0)
    params = jax.device_put(
        {n: (0.7 * rng.normal(size=s.shape)).astype(np.float32) for n, s in blueprint.shapes.items()}
    )
    return options, blueprint.bind(params)


def inputs(batch=3, texts=2, length=8):
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.uniform(-1, 1, (batch, 32, 32, 3)), jnp.float32)
    text = rng.integers(2, 40, (batch, texts, length))
    text[:, 1:, 5:] = 0
    return image, jnp.asarray(text, jnp.int32)


def test_a_layer_laid_open_gives_what_the_model_gives(xvlm):
    _, model = xvlm
    image, text = inputs()
    text = text.reshape(-1, 8)
    for layer in range(2):

        @jax.jit
        def call(image, text, layer=layer):
            encoded = model.encode(image)
            weights, score = model.opened_match(encoded, text, layer)
            return weights, score(weights), score(weights[::-1]), model.match(encoded, text)

        weights, same, other, expected = call(image, text)
        assert weights.shape == (6, 2, 8, 17)
        assert_close(weights.sum(axis=-1), np.ones((6, 2, 8)), 1e-6)
        assert_close(same, expected, 1e-5)
        assert np.abs(np.asarray(other - same)).max() > 1e-3


def test_texts_that_end_without_their_end_are_so_in_the_heat_map(xvlm):
    options, model = xvlm
    model = Blueprint(dataclasses.replace(options, reads_end=False)).bind(flatten(model))
    image, text = inputs()
    weights, score = model.opened_match(model.encode(image), text.reshape(-1, 8), 1)
    assert_close(score(weights), model.match(model.encode(image), text.reshape(-1, 8)), 1e-5)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.long
def test_heat_maps_equal_differences(xvlm, layer):
    """The gradient by the attention is that of small changes; the map is its positive part times the attention."""
    options, model = xvlm
    image, text = inputs(batch=1)
    found = grounding.heat_maps(model, image, text, layer=layer, grid=options.grid)
    assert found.shape == (1, 2, 4, 4)
    flat = text.reshape(-1, 8)
    weights, score = model.opened_match(model.encode(image), flat, layer)
    rng, step = np.random.default_rng(2), 3e-2
    call = jax.jit(score)
    gradient = np.zeros(weights.shape)
    places = [tuple(rng.integers(n) for n in weights.shape) for _ in range(25)]
    exact = np.asarray(jax.grad(lambda w: score(w).sum())(weights))
    for place in places:
        up, down = (weights.at[place].add(sign * step) for sign in (1, -1))
        gradient[place] = float((call(up) - call(down)).sum()) / (2 * step)
    assert_close([exact[p] for p in places], [gradient[p] for p in places], 1e-2)
    expected = np.asarray(weights) * np.maximum(exact, 0) * np.asarray(real(flat))[:, None, :, None]
    assert_close(found[0].reshape(2, -1), expected.mean(axis=(1, 2))[:, 1:], 1e-5)
    # Padding gives nothing, whatever stands there.
    assert (exact[1, :, 5:] == 0).all()


def test_the_best_rectangle_is_the_best_of_all():
    rng = np.random.default_rng(0)
    maps = rng.uniform(size=(5, 6, 4)).astype(np.float32) ** 8
    maps[0] = 0.25  # All the same: the whole has the most over its root.
    found, values = map(np.asarray, jax.jit(grounding.best_rectangles)(maps))
    for field, box, value in zip(maps, found, values, strict=True):
        scores = {}
        for x0, y0, x1, y1 in grounding.rectangles(6, 4):
            part = field[round(y0 * 6) : round(y1 * 6), round(x0 * 4) : round(x1 * 4)]
            scores[float(x0), float(y0), float(x1), float(y1)] = part.sum() / np.sqrt(part.size)
        assert len(scores) == 21 * 10
        assert_close(value, max(scores.values()), 1e-5)
        assert_close(scores[tuple(map(float, box))], value, 1e-5)
    np.testing.assert_array_equal(found[0], [0, 0, 1, 1])


def test_candidates_weigh_as_the_enlarged_map_does():
    rng, (height, width) = np.random.default_rng(0), (37, 53)
    field, boxes = (
        rng.uniform(size=(4, 5)),
        np.array([[0.1, 0.2, 0.7, 0.9], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.6, 0.6]]),
    )
    rows = grounding.candidates(boxes, (height, width), (4, 5), slots=4)
    large = bicubic(4, height) @ field @ bicubic(5, width).T
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        part = large[int(y0 * height) : int(y1 * height), int(x0 * width) : int(x1 * width)]
        expected = part.sum() / np.sqrt((x1 - x0) * width * (y1 - y0) * height)
        assert_close(rows["rows"][i] @ field @ rows["columns"][i] * rows["inverse_root"][i], expected, 1e-5)
    assert rows["there"].tolist() == [True, True, True, False] and not rows["boxes"][3].any()


@pytest.mark.parametrize("by", ["itc", "itm"])
def test_region_scores_are_those_of_each_region(xvlm, by):
    _, model = xvlm
    image, text = inputs(batch=2)
    boxes = jnp.asarray([[[0, 0, 0.5, 0.5], [0.2, 0.4, 0.9, 1], [0, 0, 1, 1]]] * 2, jnp.float32)
    boxes = boxes.at[1, 0].set(jnp.array([0.5, 0, 1, 0.25]))
    found = jax.jit(lambda *rows: grounding.region_scores(model, *rows, by))(image, boxes, text)
    assert found.shape == (2, 2, 3)

    @jax.jit
    def alone(image, box, text):
        one = model.regions(image[None], box[None, None], jnp.zeros((1, 1), jnp.int32))
        if by == "itm":
            return model.match(one.tokens_RND, text[None], one.inside_RN)[0]
        return (model.embed_tokens(one.tokens_RND) * model.embed_text(text[None])).sum()

    for i, s, d in np.ndindex(2, 2, 3):
        assert_close(found[i, s, d], alone(image[i], boxes[i, d], text[i, s]), 2e-5)
    assert np.ptp(np.asarray(found), axis=2).min() > 1e-4


def loaded(**changes):
    options = SeeingOptions(**changes)
    params = {n: np.ones(s.shape, np.float32) for n, s in Blueprint(options).shapes.items()}
    model = LoadedModel(Weights(params, options), "seeing")
    model.tokenizer = ByWord()
    return model


@pytest.fixture(scope="module")
def sees():
    return loaded()


@pytest.fixture(scope="module")
def truth():
    return random_boxes(np.random.default_rng(5))


def test_ground(sees, truth):
    picture = Image.fromarray(scene(truth, (64, 96)))
    one = sees.ground(picture, "the red")
    assert_close(one.box, truth["red"], 1e-6)
    assert one.heat.shape == sees.options.grid and one.phrase == "the red" and isinstance(one.score, float)
    drawn = one.picture()
    large = np.asarray(picture).repeat(4, axis=0).repeat(4, axis=1)
    assert drawn.size == (384, 256) and np.any(np.asarray(drawn) != large)
    plain = np.asarray(one.picture(heat=False))
    x0, y0 = round(truth["red"][0] * 384), round(truth["red"][1] * 256)
    assert tuple(plain[y0, x0]) == grounding.FOUND
    three = sees.ground(picture, list(truth))
    assert [g.phrase for g in three] == list(truth)
    assert_close([g.box for g in three], list(truth.values()), 1e-6)
    other = random_boxes(np.random.default_rng(6))
    two = sees.ground([picture, scene(other, (40, 24))], ["red", "blue"])
    assert_close([g.box for g in two], [truth["red"], other["blue"]], 0.05)
    assert len(sees.ground([picture], "red")) == 1


def test_boxes_are_those_of_the_upright_image(sees, truth):
    """A photo that is stored on its side is shown, and grounded, upright."""
    upright = Image.fromarray(scene(truth, (64, 96)))
    tags, buffer = Image.Exif(), io.BytesIO()
    tags[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=tags)
    found = sees.ground(buffer.getvalue(), "green")
    assert_close(found.box, truth["green"], 1e-6)
    assert found.picture().size == (384, 256)


def test_other_methods_and_boxes_to_choose_from(sees, truth):
    picture = Image.fromarray(scene(truth, (64, 96)))
    given = [*truth.values(), (0, 0, 1, 1)]
    for method in ("gradcam", "itc", "itm"):
        found = sees.ground(picture, list(truth), method=method, boxes=given)
        assert_close([g.box for g in found], list(truth.values()), 1e-6)
        assert (found[0].heat is not None) and found[0].score is not None
    heat = sees.ground(picture, "red", method="gradcam").heat
    assert_close(heat, sees.ground(picture, "red").heat, 1e-6)
    only = loaded(able=("BOXES",)).ground(picture, "red")
    assert only.heat is None and only.score is None
    assert only.picture().size == (384, 256)


BAD = [
    (lambda m, p: m.ground(p, "red", method="boxes"), "Grounding has no method 'boxes'"),
    (lambda m, p: m.ground(p, "red", method="gradcam", layer=3), "layers are 0 to 0"),
    (lambda m, p: m.ground(p, "red", boxes=[[0, 0, 1, 1]]), "A box head finds boxes of its own"),
    (lambda m, p: m.ground(p, "red", method="itm", boxes=[0, 0, 1, 1]), r"should be \(D, 4\)"),
    (lambda m, p: m.ground(p, "red", method="itm", boxes=[[0, 0, 1], [1]]), "should be numbers"),
    (lambda m, p: m.ground(p, "red", method="itm", boxes=[[0, 0, 96, 64]]), "in fractions of the upright image"),
    (lambda m, p: m.ground([p, p], ["red"], method="itm"), "1 phrases for 2 images"),
    (lambda m, p: m.ground(p, ""), "none of them empty"),
    (lambda m, p: m.ground(p, "the red thing the red"), "has more than the 4 tokens that the model reads"),
    (lambda m, p: m.ground("none.jpg", "red"), "'none.jpg' does not exist"),
    (lambda m, p: m.ground(b"nothing", "red"), "Image 0 can't be used"),
    (lambda m, p: loaded(able=("TEXTS",)).ground(p, "red"), "needs a model with boxes or a matching head"),
    (lambda m, p: loaded(able=("MATCHES",)).ground(p, "red", method="box"), "needs a model with boxes"),
]


@pytest.mark.parametrize("call, sentence", BAD)
def test_bad_input(sees, call, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        call(sees, Image.new("RGB", (RES, RES)))
    assert "\n" not in str(error.value)
