"""A model's options from the shapes of its parameters, for weights that come without a description."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.models.captioner import CaptionerOptions
from capvl.models.encoder import EncoderOptions
from capvl.models.two_towers import TwoTowersOptions


def options_of(params: Mapping[str, np.ndarray]) -> Any:
    """Options of big_vision's captioner, two towers or encoder with these parameters of ours."""
    patch, _, _, width = params["encoder/stem/kernel"].shape
    grid = round(len(params["encoder/positions"]) ** 0.5)
    image = {
        "encoder": f"{_size(params, 'encoder')}/{patch}",
        "res": grid * patch,
        "pool": "map" if "encoder/map/probe" in params else "cls" if "encoder/cls" in params else "mean",
        "dtype": "float32",
    }
    if "decoder/tokens" in params:
        rows, _ = params["decoder/tokens"].shape
        depth, length = len(params["decoder/cross_kv"]), len(params["decoder/positions"])
        return CaptionerOptions(**image, decoder_layers=depth, vocab=rows - 1, length=length)
    if "text/tokens" in params:
        projected = "image_head/kernel" in params
        return TwoTowersOptions(
            **image,
            text=_size(params, "text"),
            vocab=len(params["text/tokens"]),
            length=len(params["text/positions"]),
            text_pool="map" if "text/map/probe" in params else "last",
            text_pad=1,
            projection=params["image_head/kernel"].shape[1] if projected else 0,
            projection_bias=projected and "image_head/bias" in params,
        )
    return EncoderOptions(**image)


def _size(params: Mapping[str, np.ndarray], tower: str) -> str:
    depth, width, hidden = params[f"{tower}/blocks/mlp/up/kernel"].shape
    heads = params[f"{tower}/blocks/attn/qkv/kernel"].shape[3]
    return f"w{width}d{depth}h{heads}m{hidden}"
