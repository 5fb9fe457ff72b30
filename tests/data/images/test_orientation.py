"""Photos that a camera stored lying: every orientation, format and crop sees the upright image."""

import io

import numpy as np
import pytest
from conftest import case
from PIL import Image, ImageCms

from capvl.data.images.crops import Crop
from capvl.data.images.decode import crop_and_resize, decode, image_size
from capvl.data.randomness import Uniforms

ORIENTATION = 0x0112
# How an upright picture is stored so that a viewer has to carry out the orientation.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def corners(height=64, width=96) -> np.ndarray:
    """Red at the upper left, green at the upper right, blue at the lower left, black at the lower right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = pixels[: height // 2, width // 2 :, 1] = 255
    pixels[height // 2 :, : width // 2, 2] = 255
    return pixels


def photo(orientation, kind="JPEG", exif=True, **options) -> bytes:
    upright, buffer, tags = Image.fromarray(corners()), io.BytesIO(), Image.Exif()
    stored = upright if STORED[orientation] is None else upright.transpose(STORED[orientation])
    tags[ORIENTATION] = orientation
    stored.save(buffer, kind, **({"exif": tags} if exif else {}), **options)
    return buffer.getvalue()


def seen(pixels) -> list[int]:
    """The strongest channel of each corner, 3 for black."""
    height, width = pixels.shape[:2]
    places = [(y * height // 4, x * width // 4) for y in (1, 3) for x in (1, 3)]
    return [int(pixels[p].argmax()) if pixels[p].max() > 100 else 3 for p in places]


UPRIGHT = [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_upright(kind, orientation):
    data = photo(orientation, kind)
    assert image_size(data) == corners().shape[:2]
    assert decode(data).shape == corners().shape
    assert seen(decode(data)) == UPRIGHT
    reduced = decode(data, 16, 24)
    assert reduced.shape[0] * 96 == reduced.shape[1] * 64
    assert seen(reduced) == UPRIGHT


@pytest.mark.parametrize("interpolation", ["fast", "bicubic"])
@pytest.mark.parametrize("kind", ["center", "squash", "random", "aspect"])
@pytest.mark.parametrize("orientation", [3, 6, 7])
def test_every_crop_is_the_upright_images(orientation, kind, interpolation):
    crop = Crop(32, kind, (0.5, 1.0), (0.75, 1.33), interpolation, max_side=64 if kind == "aspect" else 0, train=True)
    turned, upright = (crop({"image": photo(o, "PNG")}, Uniforms(3, 1)) for o in (orientation, 1))
    np.testing.assert_array_equal(turned, upright)


def test_exif_behind_a_long_colour_profile_is_found():
    data = photo(6)
    block = data[2 : 4 + int.from_bytes(data[4:6])]
    if block[1] == 0xE0:  # JFIF's header stands in front of EXIF's.
        block = data[2 + len(block) :][: 2 + int.from_bytes(data[4 + len(block) : 6 + len(block)])]
    assert block[1] == 0xE1
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    filling = b"".join(b"\xff\xe2" + (2 + len(profile)).to_bytes(2) + profile for _ in range(8000 // len(profile) + 1))
    late = data[:2] + filling + data[2:].replace(block, b"", 1)
    late = late[: 2 + len(filling)] + block + late[2 + len(filling) :]
    assert late.index(b"Exif") > 4096
    assert image_size(late) == corners().shape[:2]
    assert seen(decode(late)) == UPRIGHT


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_is_none_changes_nothing(value):
    tags, buffer = Image.Exif(), io.BytesIO()
    tags[ORIENTATION] = value
    Image.fromarray(corners()).save(buffer, "JPEG", exif=tags)
    assert seen(decode(buffer.getvalue())) == UPRIGHT


def test_broken_exif_changes_nothing():
    data = bytearray(photo(6))
    first = data.index(b"Exif")
    data[first + 6 : first + 20] = b"\xff" * 14
    assert image_size(bytes(data)) == corners().shape[1::-1]
    assert decode(bytes(data)).shape == corners().swapaxes(0, 1).shape


@pytest.mark.cases
def test_a_circle_stays_a_circle():
    with open(case("exif6_portrait.jpg"), "rb") as file:
        data = file.read()
    with Image.open(io.BytesIO(data)) as stored:
        assert image_size(data) == stored.size  # Height and width change places.
    dark = crop_and_resize(data, None, 64)[..., 0] < 128
    assert abs(int(dark.any(axis=0).sum()) - int(dark.any(axis=1).sum())) <= 1
    assert abs(int(dark.any(axis=0).sum()) - 50) <= 2
