"""Every kind of image that a web crawl brings."""

import io

import numpy as np
import pytest
from conftest import assert_close
from PIL import Image

from capvl.data.images import decode as decoding
from capvl.data.images.crops import random_crop
from capvl.data.images.decode import BadImageError, crop_and_resize, decode, image_size
from capvl.data.randomness import Uniforms


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(height=96, width=128, mode="RGB"):
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 90)], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


REFERENCE = np.asarray(gradient(), np.float32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_formats(kind):
    data = encode(gradient(), kind, quality=95)
    assert image_size(data) == (96, 128)
    assert np.abs(decode(data).astype(np.float32) - REFERENCE).mean() < 3


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_jpeg_modes(mode):
    out = decode(encode(gradient(mode=mode), "JPEG", quality=95))
    expected = np.asarray(gradient().convert(mode).convert("RGB"), np.float32)
    assert np.abs(out.astype(np.float32) - expected).mean() < 6


def test_sixteen_bits():
    deep = Image.fromarray(np.asarray(gradient(mode="L")).astype(np.uint16) << 8)
    out = decode(encode(deep, "PNG"))
    assert np.abs(out[..., 0].astype(np.float32) - np.asarray(gradient(mode="L"), np.float32)).max() <= 1


def test_the_range_is_the_files_whatever_its_values():
    dark = np.arange(0, 256, dtype=np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF", "PPM"):
        out = decode(encode(Image.fromarray(dark), kind))
        assert out.max() == 1, kind  # 255 of 65,535 is nearly black.
    bright = decode(encode(Image.fromarray(np.full((16, 16), 65535, np.uint16)), "PNG"))
    assert (bright == 255).all()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_range_are_refused(mode):
    with pytest.raises(BadImageError, match="32 bits"):
        decode(encode(gradient(mode="L").convert(mode), "TIFF"))


def test_transparency_becomes_white():
    image = gradient().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 64, 96))
    for data in (encode(image, "PNG"), encode(image.quantize(64), "PNG"), encode(image.convert("LA"), "PNG")):
        out = decode(data)
        assert (out[:, :60] > 250).all()
        assert (out[:, 70:] < 250).any()


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (20, 20), c) for c in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data)[10, 10] == (255, 0, 0)).all()


def test_exif_rotation_is_undone():
    exif = Image.Exif()
    exif[0x0112] = 6  # Stored on its side: turn it by 90 degrees to the right.
    turned = gradient().rotate(90, expand=True)
    out = decode(encode(turned, "JPEG", exif=exif, quality=95))
    assert out.shape == (96, 128, 3)
    assert np.abs(out.astype(np.float32) - REFERENCE).mean() < 3


def broken():
    whole = encode(gradient(), "JPEG")
    png = encode(gradient(), "PNG")
    return {
        "empty": b"",
        "text": b"not an image at all",
        "header only": whole[:20],
        "truncated JPEG": whole[: len(whole) // 2],
        "truncated PNG": png[: len(png) // 2],
        "JPEG with EXIF cut": encode(gradient(), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00")[:300],
    }


@pytest.mark.parametrize("name", broken())
def test_broken_images_are_errors(name):
    with pytest.raises(BadImageError):
        decode(broken()[name])


def test_decompression_bomb_is_refused_before_decoding(monkeypatch):
    data = encode(Image.new("L", (20_000, 20_000)), "PNG")
    monkeypatch.setattr(decoding, "_to_rgb", lambda image: pytest.fail("it was decoded"))
    with pytest.raises(BadImageError, match="bomb"):
        decode(data)


@pytest.mark.parametrize("side, shrink", [(32, 4), (24, 8), (12, 8), (90, 2), (100, 1)])
def test_reduced_scale(side, shrink):
    data = encode(gradient(192, 192), "JPEG", quality=95)
    out = decode(data, side, side)
    assert out.shape == (192 // shrink, 192 // shrink, 3)
    assert min(out.shape[:2]) >= side
    assert_close(out.mean(axis=(0, 1)), np.asarray(gradient(192, 192), np.float32).mean(axis=(0, 1)), 0.03)


@pytest.mark.parametrize("box", [None, (0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.75, 1.0)])
@pytest.mark.parametrize("side", [8, 24, 150])
def test_crop_and_resize(box, side):
    out = crop_and_resize(encode(gradient(), "PNG"), box, side).astype(np.float32)
    assert out.shape == (side, side, 3)
    x0, y0, x1, y1 = box or (0.125, 0.0, 0.875, 1.0)
    assert out[:, :, 0].mean() == pytest.approx(255 * (x0 + x1) / 2, abs=4)
    assert out[:, :, 1].mean() == pytest.approx(255 * (y0 + y1) / 2, abs=4)


def test_random_crops_stay_inside_and_have_their_area():
    areas = []
    for n in range(300):
        x0, y0, x1, y1 = random_crop(Uniforms(0, n), (96, 128), (0.3, 0.6), (0.75, 1.33))
        assert 0 <= x0 < x1 <= 1 + 1e-9
        assert 0 <= y0 < y1 <= 1 + 1e-9
        areas.append((x1 - x0) * (y1 - y0))
        assert 0.7 < (x1 - x0) * 128 / ((y1 - y0) * 96) < 1.4
    assert 0.29 < min(areas) < 0.35
    assert 0.55 < max(areas) < 0.61
    # An aspect that fits nowhere falls back to a central crop.
    x0, y0, x1, y1 = random_crop(Uniforms(0, 0), (10, 1000), (0.9, 1.0), (0.75, 1.33))
    assert (x0 + x1) / 2 == pytest.approx(0.5)


def test_uniforms_are_uniform_and_depend_on_both_arguments():
    draws = np.array([[Uniforms(s, n)() for n in range(500)] for s in range(4)])
    assert abs(draws.mean() - 0.5) < 0.03
    assert abs(np.corrcoef(draws)[0, 1]) < 0.15
    assert Uniforms(1, 2)() == Uniforms(1, 2)() != Uniforms(2, 1)()
