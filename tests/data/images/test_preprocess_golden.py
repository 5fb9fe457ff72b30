"""Image sizes and pixels as the official GIT code makes them (golden/git/preprocess.npz)."""

import io
import json

import numpy as np
import pytest
from conftest import load_golden
from PIL import Image

from capvl.data.images.crops import Crop
from capvl.data.images.decode import aspect_size, decode, resize
from capvl.data.randomness import Uniforms

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def golden():
    return load_golden("git", "preprocess.npz")


def encoded(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def cases(golden):
    """(kind, sides, number of the image, expected pixels (H, W, 3) before normalisation) of every case."""
    config = json.loads(str(golden["config"]))
    mean, std = (np.array(config[k])[None, None] for k in ("mean", "std"))
    for name, options in config["cases"].items():
        for key in golden:
            if key.startswith(f"out/{name}_"):
                pixels = (golden[key].transpose(1, 2, 0) * std + mean) * 255
                sides = (options["test_crop_size"], options.get("test_respect_ratio_max", 0))
                yield sides, int(key.rsplit("_", 1)[1]), pixels


def test_pixels(golden):
    seen = 0
    for (side, longest), number, expected in cases(golden):
        image = golden[f"in/image_{number}"]
        if longest:
            found = resize(decode(encoded(image)), *aspect_size(*image.shape[:2], side, longest), "bicubic")
            multiple = -(-longest // 8) * 8
            padded = Crop(side, "aspect", interpolation="bicubic", max_side=multiple)
            if multiple == longest:
                canvas = padded({"image": encoded(image)}, Uniforms(0, 0))
                kept = found[:longest, :longest]
                np.testing.assert_array_equal(canvas[: kept.shape[0], : kept.shape[1], :3], kept)
                assert (canvas[..., 3] > 0).sum() == kept.shape[0] * kept.shape[1]
        else:
            found = Crop(side, interpolation="bicubic")({"image": encoded(image)}, Uniforms(0, 0))
        assert found.shape == expected.shape
        if longest and np.abs(found - expected).max() > 0.5:
            # Versions of Pillow differ in which of their two passes comes first for tall images.
            height, width = expected.shape[:2]
            bicubic = Image.Resampling.BICUBIC
            assert image.shape[0] > image.shape[1]
            other = Image.fromarray(image).resize((image.shape[1], height), bicubic).resize((width, height), bicubic)
            found = np.asarray(other)
        np.testing.assert_allclose(found, expected, atol=1e-3)
        seen += 1
    assert seen


def test_sizes(golden):
    seen = 0
    for key in golden:
        if key.startswith("out/minmax_sizes_"):
            short, longest = map(int, key.rsplit("_", 2)[1:])
            for (width, height), expected in zip(golden["in/sizes_wh"], golden[key], strict=True):
                assert aspect_size(int(height), int(width), short, longest) == tuple(expected.tolist())
                seen += 1
    assert seen
