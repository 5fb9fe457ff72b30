"""Texts of images and of their regions as X-VLM is trained on them."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from capvl.data.examples.phrases import PairText, RegionText, TextReader, texts_of
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.randomness import Uniforms
from capvl.data.reading.regions import Region
from capvl.objectives.images import unit_range


class Letters:
    """A tokenizer: a token each letter."""

    eos = 1

    def __call__(self, text, length):
        ids = [ord(c) for c in (text.decode() if isinstance(text, bytes) else text)][: length - 1]
        return np.array([*ids, 1, *[0] * (length - 1 - len(ids))], np.int32)


READ = TextReader(Letters(), 40, None)


def said(row) -> str:
    return "".join(chr(i) for i in row if i > 1)


def example(box, phrase, **more):
    """A grey image of 60 x 100 pixels, white in the box (x0, y0, x1, y1)."""
    pixels = np.full((60, 100, 3), 30, np.uint8)
    x0, y0, x1, y1 = box
    pixels[round(y0 * 60) : round(y1 * 60), round(x0 * 100) : round(x1 * 100)] = 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    rows = {"bbox": np.array([[y0, x0, y1, x1]], np.float32), "phrase": [phrase]}
    return {"image": out.getvalue(), "objects": rows} | more


BOX = (0.1, 0.2, 0.4, 0.5)


@pytest.mark.parametrize("interpolation", ["fast", "bicubic"])
def test_boxes_are_where_the_device_shows_them(interpolation):
    """Through crop, squash and flip: what is white on the device is what the box holds."""
    crop = Crop(64, "random", interpolation=interpolation, randaugment="photometric")
    transform, flips = RegionText(crop, READ, True, "skip", True, 2), []
    for number in range(20):
        row = transform(example(BOX, "a white box"), Uniforms(0, number))
        assert row["slots"].tolist() == [True, False] and said(row["text"][0]) == "a white box"
        flips.append(bool(row["flip"]))
        shown = unit_range(jnp.asarray(row["image"])[None], jnp.asarray(row["flip"])[None])[0]
        grey = np.asarray(shown, np.float32).mean(axis=2)
        white = grey > (grey.min() + grey.max()) / 2
        ys, xs = np.nonzero(white)
        hull = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / 64
        np.testing.assert_allclose(row["box"][0], hull, atol=2.5 / 64)
    assert len(set(flips)) == 2


@pytest.mark.parametrize("sides, flipped, words", [("skip", {False}, {"the left box"}), ("swap", {False, True}, None)])
def test_sides(sides, flipped, words):
    """A text that names a side isn't flipped, or is told anew; so it is with captions beside."""
    rows = []
    for kind, name in ((PairText, "text"), (RegionText, "objects")):
        how = (Crop(16, "random"), READ, True, sides, True)
        transform = kind(*how) if kind is PairText else kind(*how, 1, False)
        given = example(BOX, "the left box", **({"text": ["the left box"]} if name == "text" else {}))
        rows += [transform(given, Uniforms(0, n)) for n in range(12)]
    assert {bool(row["flip"]) for row in rows} == flipped
    for row in rows:
        text = said(row["text"].reshape(-1, 40)[0])
        assert text in words if words else text == ("the right box" if row["flip"] else "the left box")


def test_captions_are_the_whole_image_and_come_first():
    transform = RegionText(Crop(16, "random"), READ, False, "skip", True, 2)
    row = transform(example(BOX, "a box", text=["a picture"]), Uniforms(0, 0))
    assert row["whole"].tolist() == [True, False] and row["box"][0].tolist() == [0, 0, 1, 1]
    assert [said(text) for text in row["text"]] == ["a picture", "a box"]


@pytest.mark.parametrize("train", [True, False])
def test_an_image_of_which_nothing_is_said_is_no_pair(train):
    """It would be learned as a pair with an empty text."""
    transform = PairText(Crop(16), READ, False, "skip", train, "regions", ("phrases",))
    assert said(transform(example(BOX, "a box"), Uniforms(0, 0))["text"]) == "a box"
    nothing = example(BOX, "a box")
    nothing["objects"] = {"bbox": np.zeros((0, 4), np.float32), "phrase": []}
    with pytest.raises(BadImageError, match="nothing is said of the image"):
        transform(nothing, Uniforms(0, 0))


@pytest.mark.parametrize(
    "region, kinds, texts",
    [
        (Region((0, 0, 1, 1), ("a cat", "the pet"), 0, "cat", ("black",)), ("phrases",), ("a cat", "the pet")),
        (Region((0, 0, 1, 1), ("a pet",), 0, "cat", ("black",)), ("classes",), ("black cat",)),
        (Region((0, 0, 1, 1), ("dark brown cat",), -1, "", ("dark brown", "fat")), ("phrases", "classes"), None),
    ],
)
def test_names_of_a_region(region, kinds, texts):
    assert texts_of(region, kinds) == (texts or ("dark brown cat", "fat dark brown cat"))


def test_the_region_that_a_crop_is_around_has_a_slot(monkeypatch):
    """With one slot, what is asked for is never cut; each region has its turn."""
    boxes = [(0.1 * i, 0.1 * i, 0.1 * i + 0.3, 0.1 * i + 0.2) for i in range(5)]
    given = example(boxes[0], "0")
    given["objects"]["bbox"] = np.array([[y0, x0, y1, x1] for x0, y0, x1, y1 in boxes], np.float32)
    given["objects"]["phrase"] = [str(i) for i in range(5)]
    kept, draw = [], Crop.draw

    def recording(self, *given, **how):
        kept.append(how["around"])
        return draw(self, *given, **how)

    monkeypatch.setattr(Crop, "draw", recording)
    transform = RegionText(Crop(16, "random"), READ, False, "skip", True, 1, False)
    found = [said(transform(given, Uniforms(0, n))["text"][0]) for n in range(40)]
    for text, box in zip(found, kept, strict=True):
        np.testing.assert_allclose(box, boxes[int(text)], atol=1e-6)
    assert set(found) == set("01234")


class Cleaning(Letters):
    """Leaves nothing of signs."""

    def __call__(self, text, length):
        return super().__call__(text.strip("!?"), length)


def test_texts_of_which_cleaning_leaves_nothing():
    """They would be learned as texts that belong to their images."""
    read = TextReader(Cleaning(), 12, None)
    pair = PairText(Crop(16), read, False, "skip", False)
    assert said(pair(example(BOX, "x", text=["a cat!"]), Uniforms(0, 0))["text"]) == "a cat"
    with pytest.raises(BadImageError, match="its text says nothing"):
        pair(example(BOX, "x", text=["!?"]), Uniforms(0, 0))
    region = RegionText(Crop(16), read, False, "skip", False, 3)
    row = region(example(BOX, "a box", text=["!?"]), Uniforms(0, 0))
    assert row["slots"].tolist() == [True, False, False] and said(row["text"][0]) == "a box"
