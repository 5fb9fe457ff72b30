"""Real photos become the pixels that transformers, open_clip and timm make of them, read from their own files."""

import json

import numpy as np
import pytest
from conftest import assert_close
from pytorch import has_torchvision, import_anyway, opened, photos

from capvl.convert import pixels
from capvl.data.images.crops import Crop
from capvl.data.options import DataOptions
from capvl.data.randomness import Uniforms
from capvl.models.pixels import PIXELS

pytest.importorskip("torch", reason="PyTorch is not installed")
pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
IMAGENET = dict(zip(("image_mean", "image_std"), PIXELS["imagenet"], strict=True))
HALF = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)


def ours(how, res, photo):
    """Normalised pixels (R, R, 3) of a photo; as training data would be cropped for evaluation, too."""
    data = DataOptions(crop=how.crop, crop_fraction=how.crop_fraction, interpolation=how.interpolation)
    image = Crop.from_options(data, res=res, train=False)({"image": photo}, Uniforms(0, 0))
    mean, std = (np.array(x) for x in PIXELS[how.pixels])
    return (image / 255 - mean[None, None]) / std[None, None]


PROCESSORS = [
    ("CLIP", "CLIPImageProcessor", 64, {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}),
    ("CLIP", "CLIPImageProcessor", 41, {"size": {"shortest_edge": 50}, "crop_size": {"height": 41, "width": 41}}),
    ("CLIP", "CLIPImageProcessor", 224, {}),
    ("CLIP", "CLIPImageProcessor", 48, {"size": {"shortest_edge": 48}, "crop_size": dict(height=48, width=48)} | HALF),
    ("Siglip", "SiglipImageProcessor", 224, {}),
    ("Siglip", "SiglipImageProcessor", 65, {"size": {"height": 65, "width": 65}, "resample": 2}),
    ("ViT", "ViTImageProcessor", 224, {}),
    ("ViT", "ViTImageProcessor", 96, {"size": {"height": 96, "width": 96}, "resample": 3} | IMAGENET),
]  # fmt: skip


@pytest.mark.realdata
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
@pytest.mark.parametrize("name, cls, res, arguments", PROCESSORS)
def test_transformers(name, cls, res, arguments, file, tmp_path):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, cls)(**arguments)
    processor.save_pretrained(tmp_path)
    if file == "processor_config.json":  # As transformers 5 writes all of a processor.
        values = json.loads((tmp_path / "preprocessor_config.json").read_text())
        (tmp_path / file).write_text(json.dumps({"image_processor": values, "processor_class": "CLIPProcessor"}))
        (tmp_path / "preprocessor_config.json").unlink()
    how = pixels.of_hugging_face(tmp_path, name, res)
    for photo in photos(40):
        expected = processor(images=opened(photo), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert_close(ours(how, res, photo), expected, 1e-6)


@pytest.mark.realdata
@pytest.mark.parametrize("name, cls, res", [("CLIP", "CLIPImageProcessor", 40), ("ViT", "ViTImageProcessor", 40)])
def test_old_files_have_numbers_for_sizes(name, cls, res, tmp_path):
    transformers = pytest.importorskip("transformers")
    values = {"size": res, "crop_size": res, "resample": 3, "do_resize": True, "do_normalize": True} | HALF
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    processor = getattr(transformers, cls).from_pretrained(tmp_path)
    how = pixels.of_hugging_face(tmp_path, name, res)
    for photo in photos(10):
        expected = processor(images=opened(photo), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert_close(ours(how, res, photo), expected, 1e-6)


@pytest.mark.realdata
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"resize_mode": "squash", "mean": [0.5] * 3, "std": [0.5] * 3},
        {"interpolation": "bilinear", "resize_mode": None},
    ],
)
def test_open_clip(values, monkeypatch):
    if not has_torchvision(monkeypatch):
        pytest.skip("torchvision can't be imported")
    open_clip = import_anyway(monkeypatch, "open_clip")
    how = pixels.of_open_clip({"model_cfg": {}, "preprocess_cfg": values})
    for res in (97, 224):
        transform = open_clip.image_transform(res, False, **values)
        for photo in photos(20):
            expected = transform(opened(photo)).numpy().transpose(1, 2, 0)
            assert_close(ours(how, res, photo), expected, 1e-6)


TIMM = [
    {},
    {"crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3},
    {"crop_pct": 0.95, "crop_mode": "squash"},
    {"crop_pct": 1.0, "interpolation": "bilinear"},
]


@pytest.mark.realdata
@pytest.mark.parametrize("values", TIMM)
def test_timm(values, monkeypatch):
    if not has_torchvision(monkeypatch):
        pytest.skip("torchvision can't be imported")
    data = import_anyway(monkeypatch, "timm").data
    for res in (98, 224):
        pretrained = values | {"input_size": (3, res, res)}
        transform = data.create_transform(**data.resolve_data_config(pretrained_cfg=pretrained))
        for photo in photos(20):
            expected = transform(opened(photo)).numpy().transpose(1, 2, 0)
            assert_close(ours(pixels.of_timm(pretrained, res), res, photo), expected, 1e-6)
