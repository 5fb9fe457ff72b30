"""One annotated image to a record: what is left out of it, and what its boxes and phrases become."""

import io

import numpy as np
import pytest
from PIL import Image
from region_files import SIZE, picture

from capvl.data.preparing import regional
from capvl.data.preparing.regional import Annotated, Entity, Phrase, Rules
from capvl.data.reading.regions import regions
from capvl.data.reading.rejected import Rejected, RejectedError

LONG = "x" * 301


def entity(*boxes, phrases=("dog",), category=""):
    return Entity(boxes, tuple(Phrase(p) if isinstance(p, str) else p for p in phrases), category)


def example(item, data=None, **rules):
    left, changed = Rejected(), Rejected()
    record = regional.to_example(item, data or picture(), "test", {"cat": 0}, Rules(**rules), left, changed)
    return record, {k: n for k, (n, _) in left.items()}, {k: n for k, (n, _) in changed.items()}


def boxes_of(record) -> list[tuple[float, ...]]:
    return [(b["bbox"].xmin, b["bbox"].ymin, b["bbox"].xmax, b["bbox"].ymax) for b in record["boxes"]]


WHOLE = (0, 0, 40, 30)
FAULTS = {
    "box of no area": [entity((5, 5, 5, 9)), entity((9, 9, 5, 12))],
    "box outside of the image": [entity((40, 0, 50, 10)), entity((-9, -9, 0, 5))],
    "box is in fractions, where pixels are due": [entity((0.1, 0.2, 0.4, 0.6)), entity((0, 0, 1, 0.5))],
    "box is not of numbers": [entity((0, 0, float("nan"), 3))],
    "box that is there twice": [entity((1, 1, 5, 5), (1, 1, 5, 5), phrases=("x",))],
    "region that is there twice": [entity(WHOLE), entity(WHOLE)],
    "region without a phrase left": [entity((1, 1, 9, 9), phrases=("...",))],
    "phrase says nothing": [entity(WHOLE, phrases=("a", " - !"))],
    "phrase too long": [entity(WHOLE, phrases=("a", LONG))],
    "phrase not in its caption": [
        entity(WHOLE, phrases=("a", Phrase("b", 0, 3, 99), Phrase("c", 4, 0, 1), Phrase("d", 0, 2, 2)))
    ],
}


@pytest.mark.parametrize("reason", FAULTS)
def test_what_is_left_out_of_an_image(reason):
    item = Annotated("a.jpg", "7", size=SIZE, text=("one thing",), entities=(entity(WHOLE), *FAULTS[reason]))
    record, left, changed = example(item)
    wanted = sum(len(e.boxes) for e in FAULTS[reason]) if reason.startswith(("box of", "box is in")) else None
    assert reason in left and (wanted is None or left[reason] == wanted)
    assert boxes_of(record)[0] == (0, 0, 1, 1) and not changed
    said = {(p["phrase"], p["sentence"]) for p in record["phrases"]}
    assert said <= {("dog", -1), ("a", -1), ("x", -1)}


def test_boxes_that_touch_are_cut():
    inside, rounded, touching = (4, 3, 20, 15), (-0.5, 0, 40.5, 30.2), (-9, 15, 20, 90)
    record, left, changed = example(Annotated("a", "7", entities=(entity(inside, rounded, touching),)))
    np.testing.assert_allclose(boxes_of(record), [(0.1, 0.1, 0.5, 0.5), (0, 0, 1, 1), (0, 0.5, 0.5, 1)], rtol=1e-6)
    assert changed == {"box cut at the image's edge": 1} and not left  # Half a pixel is rounding.


def test_fractions_and_classes():
    item = Annotated("a", "7", entities=(Entity(((0.1, 0.2, 0.3, 0.4),), (), "cat", ("red", "red")),), fractions=True)
    record, _, _ = example(item)
    np.testing.assert_allclose(boxes_of(record), [(0.1, 0.2, 0.3, 0.4)], rtol=1e-6)
    assert (record["boxes"][0]["label"], record["boxes"][0]["category"]) == (0, "cat")
    assert record["attributes"] == [{"attribute": "red", "chain": "0"}]
    other, _, _ = example(Annotated("a", "7", entities=(Entity((WHOLE,), (), "unheard of"),)))
    assert other["boxes"][0]["label"] == -1


def test_captions_that_say_nothing_move_the_others():
    phrases = (Phrase("dog", 1, 2, 5), Phrase(".", 0, 0, 1))
    record, left, _ = example(Annotated("a", "7", text=("...", "a dog"), entities=(entity(WHOLE, phrases=phrases),)))
    assert record["text"] == ["a dog"] and left == {"caption says nothing": 1, "phrase says nothing": 1}
    assert record["phrases"] == [{"phrase": "dog", "chain": "0", "sentence": 0, "start": 2, "end": 5, "kinds": ""}]


IMAGES = {
    "undecodable image": (b"rubbish", SIZE),
    "truncated image": (picture((90, 90))[:-2000], (90, 90)),
    "image has another size than its annotation says": (picture((60, 80)), SIZE),
    "EXIF turns the image, and nothing says which way its boxes are": (picture(SIZE, 3), SIZE),
}


@pytest.mark.parametrize("reason", IMAGES)
def test_images_that_are_left_out(reason):
    data, size = IMAGES[reason]
    with pytest.raises(RejectedError, match=reason):
        example(Annotated("a", "7", size=size, entities=(entity(WHOLE),)), data)


def test_images_without_regions():
    for entities, reason in (((), "no region$"), ((entity((50, 0, 60, 9)),), "no region left")):
        with pytest.raises(RejectedError, match=reason):
            example(Annotated("a", "7", text=("one",), entities=entities))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_images_that_exif_turns(orientation):
    """A red rectangle in the stored image: where it is in the upright one, is its box."""
    from capvl.data.images.decode import decode

    pixels, buffer, tags = np.zeros((30, 40, 3), np.uint8), io.BytesIO(), Image.Exif()
    pixels[6:12, 4:24] = 255
    tags[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, "PNG", exif=tags)
    stored = Annotated("a", "7", size=None, entities=(entity((4, 6, 24, 12)),))
    record, _, _ = example(stored, buffer.getvalue(), turned="stored")
    rows, columns = np.nonzero(decode(buffer.getvalue())[..., 0])
    height, width = record["height"], record["width"]
    found = (columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)
    np.testing.assert_allclose(boxes_of(record)[0], found, rtol=1e-6)
    if orientation >= 5:  # The size says which one is meant.
        said, _, _ = example(stored._replace(size=(30, 40)), buffer.getvalue())
        assert boxes_of(said) == boxes_of(record)
        upright = Annotated("a", "7", size=(40, 30), entities=(entity((3, 4, 15, 20)),))
        said, _, _ = example(upright, buffer.getvalue())
        np.testing.assert_allclose(boxes_of(said), [(0.1, 0.1, 0.5, 0.5)], rtol=1e-6)
    elif orientation > 1:
        with pytest.raises(RejectedError, match="EXIF"):
            example(stored, buffer.getvalue())


def test_what_two_people_say_of_a_region_counts_twice():
    """A phrase of a caption, once."""
    spoken = Phrase("dog", 0, 2, 5)
    named = entity(WHOLE, phrases=("dog", "cat", "dog", spoken, spoken))
    record, _, _ = example(Annotated("a", "7", text=("a dog",), entities=(named,)))
    assert [(p["phrase"], p["sentence"]) for p in record["phrases"]] == [
        ("dog", -1),
        ("cat", -1),
        ("dog", -1),
        ("dog", 0),
    ]
    rows = {k: [p[k] for p in record["phrases"]] for k in record["phrases"][0]}
    boxes = {"bbox": [(0, 0, 1, 1)], "chain": ["0"]}
    assert regions({"boxes": boxes, "phrases": rows, "text": ["a dog"]})[0].phrases == ("dog", "cat", "dog")
