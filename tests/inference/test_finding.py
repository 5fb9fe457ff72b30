"""The face's `detect` and `ground` of a detector: hand-made, whose answers are known, and a tiny GLIP."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from handmade import COLORS, two_towers
from PIL import Image
from pointing import LONG, NAMES, PIECES, SHORT, PointingOptions, tokenizer

from capvl.errors import UserError
from capvl.inference import finding
from capvl.inference.face import LoadedModel
from capvl.models.glip import GlipOptions
from capvl.models.parameters import Blueprint
from capvl.objectives.glip import Glip
from capvl.weights import Weights

RED, BLUE = (0.0, 0.25, 0.5, 0.75), (0.5, 0.5, 1.0, 1.0)
BOTH = {"red": RED, "blue": BLUE}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("vocabulary")
    tokenizer(folder)
    return str(folder / "vocab.txt")


def loaded(vocabulary, **changes):
    options = PointingOptions(**changes)
    params = {n: np.ones(s.shape, np.float32) for n, s in Blueprint(options).shapes.items()}
    return LoadedModel(Weights(params, options, tokenizer=vocabulary, interpolation="bilinear"), "pointing")


@pytest.fixture(scope="module")
def points(vocabulary):
    """The hand-made detector."""
    return loaded(vocabulary)


@pytest.fixture(scope="module")
def glip(vocabulary):
    """A tiny GLIP with random parameters, that reads a few classes at a time."""
    how = dict(encoder="w16d1h2m32/8", pad_windows=False, level_norms=False, pixels="half", res=32, max_side=64)
    how |= dict(width=16, blocks=1, groups=2, offsets="none", fusion_width=16, fusion_heads=2, dtype="float32")
    options = GlipOptions(**how, text="w16d1h2m32", vocab=len(PIECES), length=10, text_positions=10)
    rng, params = np.random.default_rng(0), {}
    for name, shape in Blueprint(options).shapes.items():
        value = 0.3 * rng.normal(size=shape.shape) + name.endswith(("/scale/bias", "task/down/bias", "norm/scale"))
        params[name] = value.astype(np.float32)
    return LoadedModel(Weights(params, options, tokenizer=vocabulary), "tiny")


def picture(boxes=BOTH, size=(SHORT, LONG)) -> Image.Image:
    pixels = np.zeros((*size, 3), np.uint8)
    for color, (x0, y0, x1, y1) in boxes.items():
        rows, columns = slice(round(y0 * size[0]), round(y1 * size[0])), slice(round(x0 * size[1]), round(x1 * size[1]))
        pixels[rows, columns] = COLORS[color]
    return Image.fromarray(pixels)


def noise(size, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8))


def named(found) -> dict[str, list[float]]:
    """Boxes by their labels, of which there is one each."""
    assert len(set(found.labels)) == len(found)
    return dict(zip(found.labels, found.boxes.tolist(), strict=True))


def same(found, expected):
    assert found.labels == expected.labels and list(found.spans) == list(expected.spans)
    assert_close(found.scores, expected.scores, 1e-5)
    assert_close(found.boxes, expected.boxes, 1e-5)


def test_detect(points):
    found = points.detect(picture(), ["a big blue", "green", "red thing"])
    boxes = named(found)
    assert boxes.keys() == {"a big blue", "red thing"}
    assert_close(boxes["red thing"], RED, 1e-5)
    assert_close(boxes["a big blue"], BLUE, 1e-5)
    assert found.labels[0] == "red thing" and (np.diff(found.scores) < 0).all() and found.scores[-1] > 0.3
    assert found.boxes.dtype == found.scores.dtype == np.float32 and found.spans == ()
    assert repr(found).startswith(f"Found(red thing {found.scores[0]:.2f}, a big blue")
    drawn = np.asarray(found.picture())
    plain = np.asarray(dataclasses.replace(found, boxes=found.boxes[:0], scores=found.scores[:0], labels=[]).picture())
    assert drawn.shape == plain.shape and (drawn != plain).any()


def test_options_of_what_is_found(points):
    classes = ["red thing", "blue thing"]
    best = points.detect(picture(), classes, most=1)
    assert best.labels == ["red thing"]
    scores = points.detect(picture(), classes).scores
    between = float(scores.mean())
    assert points.detect(picture(), classes, threshold=between).labels == ["red thing"]
    none = points.detect(picture({}), classes)
    assert len(none) == 0 and none.boxes.shape == (0, 4) and repr(none) == "Found(nothing)"
    assert none.picture().size
    twice = ["red", "red thing"]
    assert sorted(points.detect(picture({"red": RED}), twice).labels) == twice
    assert len(points.detect(picture({"red": RED}), twice, across=0.5)) == 1


def test_other_options_compile_nothing_new(points):
    """As people try thresholds one after another."""
    found = points.detect(picture(), ["red thing", "blue thing"], threshold=0.1)
    calls = points._compiled.values()
    compilations = sum(call._cache_size() for call in calls)
    between = float(found.scores.mean())
    assert len(found) == 2
    assert len(points.detect(picture(), ["red thing", "blue thing"], threshold=between)) == 1
    assert len(points.detect(picture(), ["red thing", "blue thing"], threshold=0.2, most=1)) == 1
    assert sum(call._cache_size() for call in calls) == compilations


def test_what_a_prompt_says_of_a_class(points):
    """The label is of its name, not of what stands around."""
    classes = [{"name": "mug", "said": "red", "description": "a big blue thing"}, {"name": "sky", "said": "blue"}]
    assert_close(named(points.detect(picture(), classes))["mug"], RED, 1e-5)
    assert points.detect(picture({"blue": BLUE}), classes, prefix="a thing and").labels == ["sky"]


def test_classes_that_the_model_can_not_know(points):
    """Are told, and the others found."""
    with pytest.warns(UserWarning, match="'red' and 'Red' are the same in a prompt"):
        assert set(points.detect(picture(), ["red", "Red", "blue"]).labels) == {"red", "Red", "blue"}
    with pytest.warns(UserWarning, match="doesn't know all words of 'mauve thing' and 1 more"):
        assert "red" in points.detect(picture(), ["mauve thing", "red", "ochre"]).labels


def test_what_stood_before_classes_in_training_stands_there(points, monkeypatch):
    asked, own = [], finding.vocabulary
    monkeypatch.setattr(finding, "vocabulary", lambda *args, prefix: asked.append(prefix) or own(*args, prefix=prefix))
    monkeypatch.setattr(points, "objective", Glip(prefix="a big"))
    for options in ({}, {"prefix": "the"}, {"prefix": ""}):
        points.detect(picture(), ["red"], **options)
    assert asked == ["a big", "the", ""]


def test_a_closed_list(vocabulary):
    """Classes go by the model's names, in any order; and some of them may be asked for."""
    model = loaded(vocabulary, able_to_read=False, length=len(COLORS))
    for names in (["red thing", "green thing", "blue thing"], ["blue thing", "red thing"]):
        boxes = named(model.detect(picture(), names))
        assert boxes.keys() == {"red thing", "blue thing"}
        assert_close(boxes["blue thing"], BLUE, 1e-5)
    with pytest.raises(UserError, match="closed list of 3 classes, and 'red think' is none.* mean 'red thing'"):
        model.detect(picture(), ["green thing", "red think", "blue thing"])
    with pytest.raises(UserError, match="'pointing' has a closed list of classes and reads no captions"):
        model.ground(picture(), "a red thing")


def test_many_classes_become_several_prompts(glip):
    """What is found for a prompt's classes is what is found for these alone."""
    classes = ["red", "green thing", "blue", "the big thing", "a thing", "big", "and"]
    image, options = noise((32, 64)), dict(threshold=0.0, most=400)
    listed = finding.vocabulary(glip.options, glip.tokenizer, classes).prompts()
    assert len(listed) > 1
    parts = [glip.detect(image, [classes[k] for k in prompt.classes], **options) for prompt in listed]
    whole = glip.detect(image, classes, **options)
    assert 0 < len(whole) < 400 and set(whole.labels) == set(classes)
    rows = [list(zip(found.scores, found.labels, found.boxes.tolist(), strict=True)) for found in (whole, *parts)]
    first, *others = rows
    expected = sorted((row for part in others for row in part), key=lambda row: -row[0])
    assert len(first) == len(expected)
    assert_close([row[0] for row in first], [row[0] for row in expected], 1e-5)
    by_label = {name: [row for row in first if row[1] == name] for name in classes}
    for name, own in by_label.items():
        assert_close([row[2] for row in own], [row[2] for row in expected if row[1] == name], 1e-5, name)
    best = glip.detect(image, classes, threshold=0.0, most=5)
    assert_close(best.scores, whole.scores[:5], 1e-5)


@pytest.mark.long
def test_several_images_are_each_alone(glip, monkeypatch):
    """Wide and tall ones, larger and smaller than the model's, whatever the parts that they are looked at in."""
    images = [noise(size, seed) for seed, size in enumerate([(32, 64), (64, 40), (100, 120), (50, 20), (16, 24)])]
    classes, how = ["red", "green thing"], dict(threshold=0.0, most=6)
    alone = [glip.detect(image, classes, **how) for image in images]
    assert len({tuple(found.scores.tolist()) for found in alone}) == len(images)
    monkeypatch.setattr(finding, "TOGETHER", 2)
    for found, expected in zip(glip.detect(images, classes, **how), alone, strict=True):
        same(found, expected)
        assert 0 < len(found) <= 6 and found.boxes.min() >= 0 and found.boxes.max() <= 1
    # Of two phrases each, so that their programs are the same.
    captions = [
        "a red thing and the blue thing",
        "the big thing and a thing",
        "a thing and the red",
        "the blue and a red",
    ]
    captions += ["a green thing and a big blue"]
    alone = [glip.ground(image, caption, **how) for image, caption in zip(images, captions, strict=True)]
    for found, expected in zip(glip.ground(images, captions, **how), alone, strict=True):
        same(found, expected)


def test_kinds_of_images(points, tmp_path):
    image = picture()
    image.save(tmp_path / "image.png")
    data, array = (tmp_path / "image.png").read_bytes(), np.asarray(image)
    expected = points.detect(image, NAMES)
    for given in (data, array, str(tmp_path / "image.png"), tmp_path / "image.png", jnp.asarray(array)):
        same(points.detect(given, NAMES), expected)
    for found in points.detect(np.stack([array, array]), NAMES):
        same(found, expected)
    (one,) = points.detect([image], NAMES)
    same(one, expected)
    tags, buffer = Image.Exif(), io.BytesIO()
    tags[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=tags)
    same(points.detect(buffer.getvalue(), NAMES), expected)


def test_ground(points):
    caption = "The red thing and a big blue thing"
    found = points.ground(picture(), caption)
    assert sorted(zip(found.spans, found.labels, strict=True)) == [((0, 13), "The red thing"), ((18, 34), caption[18:])]
    assert_close(named(found)["The red thing"], RED, 1e-5)
    assert_close(named(found)["a big blue thing"], BLUE, 1e-5)
    wide, tall = {"blue": BLUE}, {"green": (0.0, 0.0, 0.5, 0.25)}
    two = points.ground([picture(wide), picture(tall, (LONG, SHORT))], [caption, "a green thing and a red"])
    assert [own.labels for own in two] == [["a big blue thing"], ["a green thing"]]
    assert [list(own.spans) for own in two] == [[(18, 34)], [(0, 13)]]
    assert_close(two[1].boxes[0], tall["green"], 1e-5)


def test_ground_by_phrases_that_are_given(points):
    caption = "bored, the red thing and big blue"
    found = points.ground(picture(), caption, phrases=["red", (25, 33)])
    assert dict(zip(found.labels, found.spans, strict=True)) == {"red": (11, 14), "big blue": (25, 33)}
    assert_close(named(found)["red"], RED, 1e-5)
    assert points.ground(picture(), caption, phrases="blue").labels == ["blue"]
    # A word that is none by itself is a part of one; of two that are words, the first.
    assert points.ground(picture(), "red blue red", phrases=["red"]).spans[0] == (0, 3)
    assert finding._span("redhead, bored, red-hot", "red") == (16, 19)
    assert finding._span("a (red) one", "red") == (3, 6)


BAD = [
    (lambda m, p: m.detect(p, []), "The list of classes is empty; name at least one"),
    (lambda m, p: m.detect(p, ["red", "blue", "red"]), "The list of classes has 'red' twice; name each class once"),
    (lambda m, p: m.detect(p, ["red", "big " * 12]), "has more than the 10 tokens that a prompt of 12 has room for"),
    (
        lambda m, p: m.detect(p, ["red"], prefix="a " * 12),
        "A prompt of 12 tokens has no room for classes behind 'a a a",
    ),
    (lambda m, p: m.detect(p, "red"), r"The classes should be a list such as \[\"cat\", \"dog\"\], not 'red'"),
    (lambda m, p: m.detect(p, [""]), "Nothing is left of the class ''"),
    (lambda m, p: m.detect(p, [3]), 'A class should be a name or a dict with "name", not 3'),
    (lambda m, p: m.detect(p, [{"name": "red", "sufix": "x"}]), "has no 'sufix'. Did you mean 'suffix'"),
    (lambda m, p: m.detect(p, NAMES, threshold=2), "threshold should be a number from 0 to 1, not 2"),
    (lambda m, p: m.detect(p, NAMES, threshold="high"), "threshold should be a number from 0 to 1, not 'high'"),
    (lambda m, p: m.detect(p, NAMES, across=-0.5), "across should be a number from 0 to 1, not -0.5"),
    (lambda m, p: m.detect(p, NAMES, most=0), "most should be"),
    (lambda m, p: m.detect([], NAMES), "There are no images"),
    (lambda m, p: m.detect("none.jpg", NAMES), "'none.jpg' does not exist"),
    (lambda m, p: m.detect(b"nothing", NAMES), "Image 0 can't be used"),
    (lambda m, p: m.detect([p, Image.new("RGB", (20, 7))], NAMES), "Image 1 of 20x7 pixels has a side .* the 8 pixels"),
    (lambda m, p: m.detect(Image.new("RGB", (20, 900)), NAMES), "Image 0 of 20x900 pixels has a side .* the 8 pixels"),
    (lambda m, p: m.ground(p, "running quickly"), "has no noun phrase that could be looked for; give phrases="),
    (lambda m, p: m.ground(p, ""), "none of them empty"),
    (lambda m, p: m.ground([p, p], ["a red thing"]), "There are 1 captions for 2 images; give one for each image"),
    (lambda m, p: m.ground([p, p], ["a", "b"], phrases=["a"]), "phrases belong to one caption; ask for one image"),
    (lambda m, p: m.ground(p, "a red thing and " * 4), "has more than the 12 tokens that the model reads"),
    (lambda m, p: m.ground(p, "a red thing", phrases=[]), "There are no phrases"),
    (lambda m, p: m.ground(p, "a red thing", phrases=["blue"]), "'blue' doesn't stand in the caption 'a red thing'"),
    (lambda m, p: m.ground(p, "a redthing", phrases=["red"]), "The phrase 'red' doesn't stand in the caption"),
    (lambda m, p: m.ground(p, "a red thing", phrases=[(2, 99)]), r"in its 11, not \(2, 99\)"),
    (lambda m, p: m.ground(p, "a red thing", phrases=[(3, 3)]), r"should be a part of the caption, or .* not \(3, 3\)"),
    (lambda m, p: m.ground(p, "a red thing", phrases=[" "]), "A phrase should be a part of the caption"),
    (
        lambda m, p: m.ground(p, "a red thing", phrases=[(1, 2)]),
        "No token of the caption 'a red thing' is of the phrase",
    ),
    (lambda m, p: m.ground(p, "a red thing", metod="itc"), "Grounding by 'pointing' has no option 'metod'"),
    (lambda m, p: m.ground(p, "a red thing", treshold=0.5), "no option 'treshold'. Did you mean 'threshold'"),
]


@pytest.mark.parametrize("call, sentence", BAD)
def test_bad_input(points, call, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        call(points, picture())
    assert "\n" not in str(error.value)


def test_a_model_that_detects_nothing():
    options, params = two_towers()
    model = LoadedModel(Weights(params, options), "towers")
    with pytest.raises(UserError, match="The model 'towers' does not have a detection head, which this needs"):
        model.detect(picture(), ["red"])
    with pytest.raises(UserError, match="boxes or a matching head"):
        model.ground(picture(), "a red thing")


def test_values_that_are_not_finite(vocabulary):
    """They are above no threshold, and would pass for an image without anything."""
    model = loaded(vocabulary)
    model.params = jax.tree.map(lambda x: x * jnp.nan, model.params)
    with pytest.raises(UserError, match="'pointing' gives values that are not finite for image 0"):
        model.detect(picture(), NAMES)
