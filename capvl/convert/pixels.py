"""How another framework's model gets its pixels, read from that model's own files."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert.files import read_json
from capvl.data.images.crops import resized_side
from capvl.data.images.decode import PILLOW
from capvl.errors import UserError
from capvl.models.pixels import PIXELS
from capvl.weights import Weights

_PILLOW_NUMBERS = {2: "bilinear", 3: "bicubic"}
_FILE = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class Pixels:
    """What is done to an image before a model sees it.

    Attributes:
      pixels: key of `capvl.models.pixels.PIXELS`.
      crop, crop_fraction, interpolation: as in `capvl.data.options.DataOptions`.
    """

    pixels: str
    crop: str = "center"
    crop_fraction: float = 1.0
    interpolation: str = "bicubic"


def normalisation(mean, std, where: str) -> str:
    """The key of PIXELS with this mean and standard deviation (one number or three).

    Raises:
      UserError: there is none.
    """
    for name, known in PIXELS.items():
        if all(np.shape(x) in ((), (3,)) and np.allclose(x, y) for x, y in zip((mean, std), known, strict=True)):
            return name
    raise UserError(f"{where} normalises pixels by mean {mean} and std {std}; known are {', '.join(PIXELS)}.")


def _interpolation(name: str, where: str) -> str:
    if name not in PILLOW:
        raise UserError(f"{where} has the interpolation {name!r}; known are {', '.join(PILLOW)}.")
    return name


# What transformers' processors do where their file doesn't say it: CLIP's, SigLIP's, ViT's.
_CLIP, _HALF = (dict(zip(("image_mean", "image_std"), PIXELS[name], strict=True)) for name in ("clip", "half"))
_PROCESSORS = {
    "CLIP": _CLIP | dict(resample=3, size={"shortest_edge": 224}, do_center_crop=True, crop_size=224),
    "Siglip": _HALF | dict(resample=3, size=224, do_center_crop=False),
    "ViT": _HALF | dict(resample=2, size=224, do_center_crop=False),
}


def of_hugging_face(folder: pathlib.Path, processor: str, res: int) -> Pixels:
    """Of processor_config.json or preprocessor_config.json; without them what transformers' processor does by itself.

    Args:
      folder: where the model is.
      processor: that models of its type have where their files name none: a key of _PROCESSORS.
      res: of the model.

    Raises:
      UserError: it does what we don't.
    """
    values, where = {}, f"transformers' {processor} processor"
    for name in ("processor_config.json", _FILE):
        if not values and (folder / name).exists():
            values, where = read_json(folder / name), name
            values = values.get("image_processor", {} if name != _FILE else values)
    # The size of a model without a file is its own.
    values = values or {"size": {"shortest_edge": res} if processor == "CLIP" else res, "crop_size": res}
    declared = values.get("image_processor_type", values.get("feature_extractor_type", processor))
    processor = next((p for p in _PROCESSORS if str(declared).startswith(p)), None)
    if processor is None:
        raise UserError(f"{where} is of a {declared}; known are those of {', '.join(_PROCESSORS)}.")
    values = _PROCESSORS[processor] | values
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if not values.get(name, True):
            raise UserError(f"{where} has {name}=false; only models whose images are resized and normalised are read.")
    if not np.isclose(values.get("rescale_factor", 1 / 255), 1 / 255) or values.get("do_pad"):
        raise UserError(f"{where} pads images or has a rescale_factor other than 1/255, which isn't known here.")
    crop, fraction = _crop(values, processor, res, where)
    if values["resample"] not in _PILLOW_NUMBERS:
        raise UserError(f"{where} has resample={values['resample']!r}; known are 2 (bilinear) and 3 (bicubic).")
    pixels = normalisation(values["image_mean"], values["image_std"], where)
    return Pixels(pixels, crop, fraction, _PILLOW_NUMBERS[values["resample"]])


def _crop(values: Mapping[str, Any], processor: str, res: int, where: str) -> tuple[str, float]:
    """(crop, crop_fraction) of a processor's size and crop_size."""
    size, cut = values["size"], values["crop_size"] if values["do_center_crop"] else None
    if not isinstance(size, dict):  # As old files have it: of CLIP the short side.
        size = {"shortest_edge": size} if processor == "CLIP" else {"height": size, "width": size}
    sides = (size["shortest_edge"],) * 2 if set(size) == {"shortest_edge"} else (size.get("height"), size.get("width"))
    cuts = (cut.get("height"), cut.get("width")) if isinstance(cut, dict) else (cut, cut)
    final = sides if cut is None else cuts
    if final != (res, res):
        raise UserError(f"{where} makes images of {final[0]} x {final[1]} pixels, and the model reads {res} x {res}.")
    if sides[0] != sides[1] or sides[0] < res or (cut is None and "shortest_edge" in size):
        raise UserError(f"{where} resizes to {size} and cuts out {cut}, which makes no whole square of {res} pixels.")
    fraction = res / sides[0]
    return ("center_floor" if "shortest_edge" in size else "squash"), fraction


def of_open_clip(config: Mapping[str, Any]) -> Pixels:
    """Of preprocess_cfg of an open_clip_config.json, with open_clip's defaults.

    Raises:
      UserError: it does what we don't.
    """
    where, values = "open_clip_config.json's preprocess_cfg", dict(config.get("preprocess_cfg") or {})
    mode = values.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise UserError(f"{where} has resize_mode={mode!r}; known are 'shortest' and 'squash'.")
    default = PIXELS["clip"]
    pixels = normalisation(values.get("mean") or default[0], values.get("std") or default[1], where)
    crop = "squash" if mode == "squash" else "center"
    return Pixels(pixels, crop, 1.0, _interpolation(values.get("interpolation") or "bicubic", where))


def of_timm(pretrained: Mapping[str, Any], res: int) -> Pixels:
    """Of timm's pretrained_cfg, with timm's defaults.

    Raises:
      UserError: it does what we don't.
    """
    where, default = "timm's pretrained_cfg", PIXELS["imagenet"]
    size = tuple(pretrained.get("input_size") or (3, 224, 224))
    if size != (3, res, res):
        raise UserError(f"{where} has input_size={list(size)}, and the model reads {res} x {res} pixels of 3 channels.")
    mode = pretrained.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise UserError(f"{where} has crop_mode={mode!r}; known are 'center' and 'squash'.")
    pixels = normalisation(pretrained.get("mean") or default[0], pretrained.get("std") or default[1], where)
    fraction = float(pretrained.get("crop_pct") or 0.875)
    if not 0 < fraction <= 1:
        raise UserError(f"{where} has crop_pct={fraction}; it should be above 0 and at most 1.")
    # As timm rounds.
    fraction = res / math.floor(res / fraction)
    return Pixels(pixels, mode, fraction, _interpolation(pretrained.get("interpolation") or "bicubic", where))


def to_timm(weights: Weights) -> dict[str, Any]:
    """What pretrained_cfg says of a model's crop and interpolation; "fast" is bilinear, which is nearest."""
    return {
        "crop_pct": weights.crop_fraction,
        "crop_mode": "squash" if weights.crop == "squash" else "center",
        "interpolation": "bicubic" if weights.interpolation == "bicubic" else "bilinear",
    }


def write_processor(folder: pathlib.Path, weights: Weights) -> None:
    """preprocessor_config.json for transformers.

    Args:
      folder: where to write it.
      weights: a model with an image tower. "fast" is written as bilinear, which is nearest.
    """
    options = weights.options
    res, cls = options.res, options.pool == "cls"
    side = resized_side(res, weights.crop_fraction)
    squash = weights.crop == "squash"
    mean, std = PIXELS[options.pixels]
    values = {
        "image_processor_type": "CLIPImageProcessor" if cls or not squash else "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side} if squash else {"shortest_edge": side},
        "resample": 3 if weights.interpolation == "bicubic" else 2,
        "do_center_crop": not squash or side > res,
        "crop_size": {"height": res, "width": res},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    (folder / _FILE).write_text(json.dumps(values, indent=1), encoding="utf-8")
