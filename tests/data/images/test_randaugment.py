"""RandAugment: what is drawn, that boxes and points go where the pixels go, and flips on the device."""

import collections

import numpy as np
import pytest
from test_geometry import BOX, CROPS, drawn, found

from capvl.data.images import randaugment
from capvl.data.images.crops import Crop
from capvl.data.images.geometry import Geometry, after, inverse
from capvl.data.options import DataOptions
from capvl.data.randomness import Uniforms
from capvl.errors import UserError

AUGMENTED = {
    "random": Crop(96, "random", (0.5, 1.0), (0.6, 1.6), train=True, randaugment="all"),
    "squash": Crop(96, "squash", interpolation="bicubic", randaugment="all"),
    "aspect": Crop(64, "aspect", max_side=96, randaugment="all"),
}


def of_colors(pixels):
    """(x0, y0, x1, y1) of the rectangle, whatever was done to its colours; None where it isn't seen."""
    return found(pixels[..., :3])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("name", AUGMENTED)
def test_boxes_go_where_the_pixels_go(name, flip):
    """The rectangle's box is that around its warped corners: it touches all four sides."""
    crop, compared = AUGMENTED[name], 0
    for n in range(60):
        example = {"image": drawn((120, 160), BOX)}
        geometry = crop.draw(example, Uniforms(3, n), flip=flip)
        if geometry.warp is None or any(tone != "brightness" for tone, _ in geometry.tones):
            continue
        (box,), (there,) = geometry.boxes([BOX], share=0.9)
        if not there:
            continue
        pixels = crop.pixels(example, Uniforms(3, n), geometry)
        height, width = geometry.padded
        off = of_colors(pixels) - box * np.array([width, height, width, height])
        assert np.abs(off).max() <= 2.5, (n, geometry.warp, off)
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize("name", AUGMENTED)
def test_flipped_on_the_device_or_here(name):
    crop, moved = AUGMENTED[name], 0
    for n in range(40):
        example = {"image": drawn((120, 160), BOX)}
        geometry = crop.draw(example, Uniforms(4, n), flip=True)
        here, there = (crop.pixels(example, Uniforms(4, n), geometry, flip_on_device=d) for d in (False, True))
        width = geometry.resized[1]
        difference = np.abs(here[:, :width].astype(int) - there[:, :width][:, ::-1])
        assert difference.max() <= 2 and not here[:, width:].any()
        moved += geometry.warp is not None
    assert moved > 5


def test_points_go_where_corners_go_and_back():
    size = (40, 60)
    for n in range(30):
        tones, warp = randaugment.draw("all", size, Uniforms(5, n))
        geometry = Geometry(size, (0.1, 0.0, 0.9, 0.8), size, (50, 60), flip=n % 2 == 0, warp=warp, tones=tones)
        points = np.array([[0.3, 0.3], [0.6, 0.5], [0.05, 0.5]])
        moved, there = geometry.points(points)
        tiny = np.concatenate([points - 1e-4, points + 1e-4], axis=1)
        boxes, kept = geometry.boxes(tiny, share=0.9)
        np.testing.assert_array_equal(there, kept)
        np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:])[there] / 2, moved[there], atol=1e-4)
        np.testing.assert_allclose(geometry.upright_boxes(boxes)[there], tiny[there], atol=4e-4)


def test_warps_are_put_together():
    first, second = randaugment.move("rotate", 0.7, (20, 30)), randaugment.move("shear_x", -0.7, (20, 30))
    x, y = 3.0, 5.0

    def at(warp, x, y):
        a, b, c, d, e, f = warp
        return a * x + b * y + c, d * x + e * y + f

    np.testing.assert_allclose(at(after(first, second), x, y), at(second, *at(first, x, y)))
    np.testing.assert_allclose(at(after(first, inverse(first)), x, y), (x, y), atol=1e-12)
    np.testing.assert_allclose(at(first, 15, 10), (15, 10))  # The middle of a 20 x 30 image stays.


def test_what_leaves_the_image_is_cut_or_dropped():
    size = (100, 100)
    geometry = Geometry(size, (0, 0, 1, 1), size, size, warp=randaugment.move("translate_x", 1.0, size))
    moved, there = geometry.boxes([(0.8, 0.2, 1, 0.4), (0.75, 0.2, 1, 0.4), (0.9, 0.1, 1, 0.2), (0, 0, 0.1, 0.1)])
    assert there.tolist() == [False, True, False, True]  # Half of the first is not more than half.
    np.testing.assert_allclose(moved[1], [0.85, 0.2, 1, 0.4], atol=1e-6)
    np.testing.assert_allclose(moved[3], [0.1, 0, 0.2, 0.1], atol=1e-6)
    assert (moved[~there] == 0).all()


def test_how_often_what_is_drawn():
    counts, many = collections.Counter(), 4000
    for n in range(many):
        tones, warp = randaugment.draw("all", (50, 50), Uniforms(6, n))
        counts["warp"] += warp is not None
        counts.update(name for name, _ in tones)
    # Two draws, each with probability 1/2 one of ten; five move, four change colours, one does nothing.
    assert abs(counts["warp"] / many - (1 - 0.75**2)) < 0.03
    assert all(abs(counts[name] / many - 0.1) < 0.02 for name in randaugment.TONES if name != "identity")
    photometric = [randaugment.draw("photometric", (50, 50), Uniforms(7, n)) for n in range(500)]
    assert all(warp is None for _, warp in photometric) and any(tones for tones, _ in photometric)


def test_an_image_is_changed_by_its_own_numbers_only():
    crop, example = AUGMENTED["random"], {"image": drawn((80, 120), BOX)}
    made = [crop(example, Uniforms(0, n)) for n in (1, 1, 2)]
    np.testing.assert_array_equal(made[0], made[1])
    assert (made[0] != made[2]).any()
    plain = CROPS["random"]
    assert plain.draw(example, Uniforms(0, 1)).tones == () and plain.draw(example, Uniforms(0, 1)).warp is None


def test_grey_comes_in_and_tones_are_pillows():
    pixels = np.full((30, 40, 3), 10, np.uint8)
    moved = randaugment.apply(pixels, (), randaugment.move("translate_x", 0.7, (30, 40)))
    assert (moved[:, :7] == 128).all() and (moved[:, 7:] == 10).all()
    bright = randaugment.apply(pixels, (("brightness", 1.36),), None)
    assert (bright == 13).all()
    assert randaugment.apply(pixels, (), None) is pixels


def test_the_option_is_for_training():
    options = DataOptions(randaugment="photometric")
    assert Crop.from_options(options, res=32, train=True).randaugment == "photometric"
    assert Crop.from_options(options, res=32, train=False).randaugment == ""
    with pytest.raises(UserError, match="data.randaugment='photo' is unknown.*photometric"):
        DataOptions(randaugment="photo")
