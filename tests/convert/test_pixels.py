"""Other frameworks' ways to make pixels: what is refused, and how sides are rounded."""

import json

import pytest

from capvl.convert import pixels
from capvl.data.images.crops import resized_side
from capvl.errors import UserError


def test_the_sides_of_timm():
    """What is cut out is cut out of the side that timm computes, where its division rounds down too."""
    for res, fraction in ((14, 0.56), (224, 0.9), (378, 1.0), (336, 0.875), (224, 0.96)):
        how = pixels.of_timm({"crop_pct": fraction, "input_size": (3, res, res)}, res)
        assert resized_side(res, how.crop_fraction) == int(res / fraction)


REFUSED = [
    ("CLIP", {"do_resize": False}, "do_resize=false"),
    ("CLIP", {"do_normalize": False}, "do_normalize=false"),
    ("CLIP", {"rescale_factor": 1.0}, "rescale_factor"),
    ("CLIP", {"resample": 1}, "resample=1"),
    ("CLIP", {"image_mean": [0.1, 0.2, 0.3]}, "by mean \\[0.1"),
    ("CLIP", {"image_std": [1, 1, 1]}, "std \\[1"),
    ("CLIP", {"crop_size": 32}, "32 x 32 pixels, and the model reads 64 x 64"),
    ("CLIP", {"size": 60}, "no whole square"),
    ("CLIP", {"do_center_crop": False}, "no whole square"),
    ("ViT", {"size": {"height": 64, "width": 32}}, "64 x 32 pixels"),
    ("ViT", {"image_processor_type": "BlipImageProcessor"}, "BlipImageProcessor"),
]


@pytest.mark.parametrize("processor, changes, sentence", REFUSED)
def test_processors_that_are_refused(processor, changes, sentence, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 64, "crop_size": 64} | changes))
    with pytest.raises(UserError, match=sentence):
        pixels.of_hugging_face(tmp_path, processor, 64)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"resize_mode": "longest"}, "resize_mode='longest'"),
        ({"interpolation": "random"}, "interpolation 'random'"),
        ({"mean": [0.0, 0.0, 0.0]}, "mean \\[0.0"),
    ],
)
def test_open_clip_that_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        pixels.of_open_clip({"preprocess_cfg": changes})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"input_size": [3, 32, 64]}, "input_size"),
        ({"input_size": [1, 64, 64]}, "input_size"),
        ({"crop_mode": "border"}, "crop_mode='border'"),
        ({"crop_pct": 1.2}, "crop_pct=1.2"),
        ({"interpolation": "lanczos"}, "'lanczos'"),
        ({"std": [0.5, 0.5, 0.5]}, "std \\[0.5"),
    ],
)
def test_timm_that_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        pixels.of_timm({"input_size": [3, 64, 64]} | changes, 64)
