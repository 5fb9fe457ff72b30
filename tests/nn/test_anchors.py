"""Anchors, the box coder and boxes in pixels with inclusive ends, against the original's numbers."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_glip import close, load

from capvl.data.images.buckets import Bucket
from capvl.data.images.crops import fitted_size
from capvl.data.images.geometry import Geometry
from capvl.nn.anchors import STRIDES, anchors, area, clip, decode, encode, fractions, in_image, inclusive, iou

MULTI = dict(ratios=(0.5, 1.0, 2.0), octaves=tuple(2 ** (i / 3) for i in range(3)))


@pytest.mark.golden
@pytest.mark.parametrize(("kind", "options"), [("glip", {}), ("multi", MULTI)])
def test_anchors_golden(kind, options):
    golden = load("anchors")
    grids = [tuple(map(int, hw)) for hw in golden["in/level_hw"]]
    expected = [golden[f"out/{kind}/lvl{i}"] for i in range(len(grids))]
    found = anchors(grids, STRIDES[: len(grids)], **options)
    close(found, np.concatenate(expected), 1e-6)
    # The file's threshold of "multi" is negative: all are visible there.
    straddle = 0.0 if kind == "glip" else np.inf
    visible = np.concatenate([golden[f"out/{kind}/vis_img0_lvl{i}"] for i in range(len(grids))])
    np.testing.assert_array_equal(in_image(found, tuple(golden["in/image_sizes"][0]), straddle), visible)


@pytest.mark.golden
def test_box_coder_golden():
    golden = load("boxcoder")
    boxes, places, deltas = (jnp.asarray(golden[f"in/{name}"]) for name in ("gt", "anchors", "pred"))
    close(encode(boxes, places), golden["out/encoded"], 1e-5)
    close(decode(deltas, places), golden["out/decoded"], 1e-5)
    close(decode(encode(boxes, places), places), golden["out/roundtrip"], 1e-6)


@pytest.mark.golden
def test_boxes_in_pixels_golden():
    golden = load("misc")
    size = golden["hflip"]["h"], golden["hflip"]["w"]
    boxes = np.float32(golden["clip"]["boxes"])[None]
    close(clip(jnp.asarray(boxes), jnp.asarray([size]))[0], golden["clip"]["clipped_keep_empty"], 1e-7)
    close(area(jnp.asarray(golden["area"]["boxes"], jnp.float32)), golden["area"]["area"], 1e-7)

    boxes = jnp.asarray(golden["hflip"]["boxes"], jnp.float32)
    mirror = Geometry.resized_first(size, size, (0, 0), size, True)
    flipped, _ = mirror.boxes(np.asarray(fractions(boxes, size)))
    # One of the boxes reaches beyond the last row, where ours are cut.
    expected = clip(jnp.asarray(golden["hflip"]["flipped"], jnp.float32)[None], jnp.asarray([size]))[0]
    close(inclusive(jnp.asarray(flipped), size), expected, 1e-6)


@pytest.mark.golden
def test_resized_sizes_golden():
    for width, height, short, longest, *expected in load("misc")["resize_w_h_min_max_outh_outw"]:
        assert list(fitted_size((height, width), short, Bucket(longest, longest))) == expected, (width, height, short)


def test_a_box_of_one_pixel():
    box = inclusive(jnp.asarray([[0.25, 0.5, 0.375, 0.75]]), (4, 8))
    np.testing.assert_array_equal(box, [[2.0, 2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(area(box), [1.0])
    np.testing.assert_array_equal(fractions(box, (4, 8)), [[0.25, 0.5, 0.375, 0.75]])


def test_iou_counts_pixels():
    a, b = jnp.asarray([0.0, 0.0, 9.0, 9.0]), jnp.asarray([5.0, 0.0, 14.0, 9.0])
    assert float(iou(a, b)) == pytest.approx(50 / 150)
    assert float(iou(a, b + 10)) == 0.0
    assert float(iou(b[::-1], b[::-1])) == 0.0  # The wrong way round.


def test_empty_boxes_are_finite():
    empty = inclusive(jnp.zeros((1, 4)), (64, 64))
    assert np.isfinite(encode(empty, jnp.asarray([[0.0, 0.0, 63.0, 63.0]]))).all()


def test_levels_without_strides():
    with pytest.raises(ValueError, match="zip"):
        anchors([(2, 2), (1, 1)], (8,))
