"""What happens to an image, by drawing: a coloured rectangle is found where its box says."""

import io

import numpy as np
import pytest
from conftest import load_golden
from PIL import Image

from capvl.data.images.buckets import Bucket
from capvl.data.images.crops import Crop, crop_around
from capvl.data.images.decode import decode, turn
from capvl.data.images.geometry import Geometry, names_sides, swap_sides, swap_sides_with_spans
from capvl.data.options import DataOptions
from capvl.data.randomness import Uniforms
from capvl.errors import UserError

ORIENTATION = 0x0112
STORED_AS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}  # What turns an upright image into a stored one.


def drawn(size, box, kind="PNG", orientation=1) -> bytes:
    """An image with a red rectangle at a box in fractions, stored so that a viewer has to turn it."""
    (height, width), (x0, y0, x1, y1) = size, box
    pixels = np.full((height, width, 3), (0, 0, 255), np.uint8)
    pixels[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = (255, 0, 0)
    tags, buffer = Image.Exif(), io.BytesIO()
    tags[ORIENTATION] = orientation
    Image.fromarray(turn(pixels, STORED_AS[orientation])).save(buffer, kind, exif=tags, quality=95, subsampling=0)
    return buffer.getvalue()


def found(pixels) -> np.ndarray | None:
    """(x0, y0, x1, y1) of what is red, in pixels; None where nothing is."""
    rows, columns = np.nonzero(pixels[..., 0].astype(int) - pixels[..., 2] > 0)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) if len(rows) else None


@pytest.mark.parametrize("how, evaluated", [("squash", "squash"), ("center", "center")])
def test_what_is_cropped_at_random_is_evaluated_as_is_said(how, evaluated):
    options = DataOptions(name="x", crop="random", eval_crop=how)
    assert Crop.from_options(options, res=32, train=False).kind == evaluated
    assert Crop.from_options(options, res=32, train=True).kind == "random"
    with pytest.raises(UserError, match="data.eval_crop='random' is unknown"):
        DataOptions(name="x", eval_crop="random")


BOX = (0.25, 0.4, 0.55, 0.75)
CROPS = {
    "random": Crop(48, "random", (0.3, 1.0), (0.6, 1.6), train=True),
    "random, bicubic": Crop(48, "random", (0.3, 1.0), (0.6, 1.6), "bicubic", train=True),
    "middle": Crop(48),
    "middle, bilinear": Crop(48, "center_floor", interpolation="bilinear", fraction=0.875),
    "squash": Crop(48, "squash"),
    "squash, bicubic": Crop(48, "squash", interpolation="bicubic", fraction=0.9),
    "aspect": Crop(48, "aspect", interpolation="bicubic", max_side=64),
    "aspect, wide": Crop(48, "aspect", max_side=64).in_bucket(Bucket(32, 72)),
    "aspect, tall": Crop(48, "aspect", max_side=64).in_bucket(Bucket(72, 32)),
}


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", CROPS)
def test_a_rectangle_is_where_its_box_says(name, flip):
    crop, whole = CROPS[name], 0
    for n, size in enumerate([(80, 120), (120, 80), (400, 300), (30, 40), (64, 64)] * 6):
        example = {"image": drawn(size, BOX)}
        geometry = crop.draw(example, Uniforms(1, n), flip=flip)
        pixels = crop.pixels(example, Uniforms(1, n), geometry)
        assert pixels.shape[:2] == geometry.padded
        (box,), (there,) = geometry.boxes([BOX], share=0.5)
        if not there:
            continue
        off = found(pixels) - box * np.array([pixels.shape[1], pixels.shape[0]] * 2)
        enlarged = max(1, *np.array(geometry.resized) / size / np.subtract(geometry.box[2:], geometry.box[:2])[::-1])
        assert np.abs(off).max() <= enlarged / 2 + 0.5, (size, off)  # Half a pixel of each may be of both colours.
        whole += 1
    assert whole > 10


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("name", ["random", "middle, bilinear", "aspect"])
def test_photos_that_are_stored_lying(name, orientation):
    crop, upright, lying = CROPS[name], drawn((160, 240), BOX), drawn((160, 240), BOX, "JPEG", orientation)
    assert np.abs(decode(lying).astype(int) - decode(upright)).mean() < 3
    for flip in (False, True):
        a, b = (crop.draw({"image": data}, Uniforms(2, 5), flip=flip) for data in (upright, lying))
        assert a == b
        (box,), (there,) = b.boxes([BOX])
        assert there
        seen = found(crop.pixels({"image": lying}, Uniforms(2, 5), b))
        assert np.abs(seen - box * np.array([*b.padded[::-1]] * 2)).max() <= 1


def test_frames_of_a_clip_are_cropped_and_flipped_alike():
    crop = Crop(32, "random", (0.3, 0.6), (0.6, 1.6), frames=2, train=True)
    example = {"frames": [drawn((60, 90), BOX)] * 4}
    geometry = crop.draw(example, Uniforms(0, 3), flip=True)
    flipped, plain = (crop.pixels(example, Uniforms(0, 3), geometry, flip_on_device=d) for d in (False, True))
    np.testing.assert_array_equal(flipped, plain[:, :, ::-1])
    (box,), _ = geometry.boxes([BOX], share=0.0)
    for frame in flipped:
        assert np.abs(found(frame) - box * 32).max() <= 1


def test_points_go_where_the_corners_of_boxes_go():
    rng = np.random.default_rng(0)
    for n, crop in enumerate(CROPS.values()):
        geometry = crop.draw({"image": drawn((80, 120), BOX)}, Uniforms(0, n), flip=n % 2 == 1)
        points = rng.uniform(0, 1, (50, 2))
        moved, there = geometry.points(points)
        boxes, kept = geometry.boxes(np.concatenate([points - 1e-4, points + 1e-4], axis=1), share=0.99)
        assert there.any() and (moved[~there] == 0).all()
        assert (np.abs(boxes[:, :2] + boxes[:, 2:] - 2 * moved)[kept & there] < 1e-4).all()
        assert (kept == there).mean() > 0.95
        assert (moved >= 0).all() and (moved <= 1).all()


def test_boxes_are_cut_and_dropped_by_their_share():
    """The left half of a 100 x 100 image is kept, mirrored, and padded to twice its width."""
    geometry = Geometry((100, 100), (0.0, 0.0, 0.5, 1.0), (20, 10), (20, 20), flip=True)
    boxes = [(0, 0, 0.5, 1), (0.4, 0.2, 0.6, 0.4), (0.4, 0.2, 0.59, 0.4), (0.6, 0, 1, 1), (0.2, 0.2, 0.2, 0.9)]
    moved, there = geometry.boxes(boxes)
    assert there.tolist() == [True, False, True, False, False]  # Half of the second is not more than half.
    np.testing.assert_allclose(moved[0], [0, 0, 0.5, 1])
    np.testing.assert_allclose(moved[2], [0, 0.2, 0.1, 0.4], atol=1e-7)
    assert (moved[~there] == 0).all()
    assert moved.dtype == np.float32
    assert geometry.boxes(boxes, share=0.0)[1].tolist() == [True, True, True, False, False]
    none, nobody = geometry.boxes(np.zeros((0, 4)))
    assert none.shape == (0, 4) and nobody.shape == (0,)


def test_the_way_back():
    for n, crop in enumerate(CROPS.values()):
        geometry = crop.draw({"image": drawn((80, 120), BOX)}, Uniforms(0, n), flip=n % 2 == 0)
        (box,), (there,) = geometry.boxes([(0.45, 0.45, 0.5, 0.55)], share=0.999)
        assert there
        np.testing.assert_allclose(geometry.upright_boxes([box])[0], (0.45, 0.45, 0.5, 0.55), atol=1e-6)
    np.testing.assert_array_equal(geometry.upright_boxes([[0, 0, 1, 1]])[0, :2], 0)  # Padding is no part of it.


def test_a_crop_around_a_box_keeps_it_whole():
    crop, lefts = Crop(32, "random", train=True), []
    for n in range(200):
        x, y = (0.9 * Uniforms(7, n)() for _ in range(2))
        box = (x, y, x + 0.02, y + 0.04)
        example = {"image": drawn((50, 70), box)}
        geometry = crop.draw(example, Uniforms(0, n), around=box)
        assert geometry.boxes([box], share=0.999)[1].all()
        lefts.append(geometry.box[0] / x)
    assert 0.4 < np.mean(lefts) < 0.6 and min(lefts) < 0.05 and max(lefts) > 0.95
    assert crop_around(Uniforms(0, 0), (9, 9), (0.0, 0.0, 1.0, 1.0)) == (0.0, 0.0, 1.0, 1.0)
    # What an annotation has beyond the image's edges isn't there.
    assert crop_around(Uniforms(0, 0), (9, 9), (-0.2, -0.1, 1.1, 1.3)) == (0.0, 0.0, 1.0, 1.0)


def test_images_keep_their_aspect_in_a_bucket():
    """And are no longer than the model lets them be, whatever room there is."""
    crop = Crop(48, "aspect", max_side=64)
    sizes = {}
    for size in [(100, 100), (100, 200), (200, 100), (100, 1000)]:
        geometry = crop.in_bucket(Bucket(32, 72)).draw({"image": drawn(size, BOX)}, Uniforms(0, 0))
        sizes[size] = geometry.resized
        assert geometry.padded == (32, 72)
        pixels = crop.in_bucket(Bucket(32, 72)).pixels({"image": drawn(size, BOX)}, Uniforms(0, 0), geometry)
        assert (pixels[..., 3] > 0).sum() == np.prod(geometry.resized)
    assert sizes == {(100, 100): (32, 32), (100, 200): (32, 64), (200, 100): (32, 16), (100, 1000): (6, 60)}
    with pytest.raises(ValueError, match="kind 'squash' fills squares, not 32 x 72"):
        Crop(48, "squash").in_bucket(Bucket(32, 72))


def test_an_image_of_one_line_has_a_row():
    """Its short side, in proportion, would be no pixel at all."""
    pixels = Crop(8, "aspect", max_side=16)({"image": drawn((1, 300), (0, 0, 1, 1))}, Uniforms(0, 0))
    assert pixels.shape == (16, 16, 4) and (pixels[0, :, 3] == 255).all() and not pixels[1:].any()


@pytest.mark.parametrize(
    ("said", "mirrored"),
    [
        ("the man on the left", "the man on the right"),
        ("Left of the RIGHT door", "Right of the LEFT door"),
        ("a bright, upright leftover", "a bright, upright leftover"),
        ("leftmost cup in her right-hand", "rightmost cup in her left-hand"),
        (b"the right one", b"the left one"),
        ("à gauche", "à gauche"),
    ],
)
def test_words_of_sides_change_places(said, mirrored):
    size = (8, 8)
    assert swap_sides(said) == mirrored and swap_sides(mirrored) == said
    assert names_sides(said) == (said != mirrored)
    for flip in (False, True):
        assert Geometry(size, (0, 0, 1, 1), size, size, flip).text(said) == (mirrored if flip else said)


def test_spans_move_with_swapped_words():
    """Those behind a word that became longer or shorter, and those around it."""
    said = "the left dog, LEFT of a cat, right of the leftmost fish"
    phrases = ["the left dog", "dog", "LEFT", "a cat", "right of", "leftmost fish", "fish", "eft", "the lef"]
    places = [(said.index(p), said.index(p) + len(p)) for p in phrases]
    swapped, moved = swap_sides_with_spans(said, places)
    assert swapped == swap_sides(said) == "the right dog, RIGHT of a cat, left of the rightmost fish"
    found = [swapped[first:end] for first, end in moved]
    assert found == [
        "the right dog",
        "dog",
        "RIGHT",
        "a cat",
        "left of",
        "rightmost fish",
        "fish",
        "right",
        "the right",
    ]
    back, there = swap_sides_with_spans(swapped, moved[:7])
    assert (back, there) == (said, places[:7])
    assert swap_sides_with_spans("bright dog", [(7, 10)]) == ("bright dog", [(7, 10)])


@pytest.mark.golden
def test_boxes_are_as_x_vlms():
    """Crop, flip, share and target boxes of the official iterator (golden/xvlm)."""
    golden = load_golden("xvlm", "xvlm_util.npz")
    side = int(golden["geom.res_patch"][0])
    share = float(golden["geom.max_regions_min_perc"][1])
    compared = 0
    for i, (width, height) in enumerate(golden["geom.size_wh"]):
        sides = np.array([width, height, width, height])
        boxes = golden["geom.boxes"][i] @ np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]]) / sides
        # Pixels are counted down from what is cut out, and a fraction may be a hair below its pixel.
        crop = tuple(golden["geom.crop_xyxy"][i] / sides + 1e-9)
        geometry = Geometry.cut_first((height, width), crop, (side, side), bool(golden["geom.flip"][i]))
        found, there = geometry.boxes(boxes, share)
        kept, limit = golden["geom.kept"][i], len(golden["geom.kept"][i])
        order = [n for n in golden["geom.order"][i] if there[n]]
        expected = [int(n) for n in kept if n not in (-1, 99)]
        assert order[: limit - (99 in kept)] == expected
        for row, n in enumerate(kept):
            if n not in (-1, 99):
                cx, cy, w, h = golden["geom.target"][i, row]
                np.testing.assert_allclose(found[n], [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], atol=1e-5)
                compared += 1
    assert compared
