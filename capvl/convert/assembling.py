"""A model of ours from what a file's reader found: options, parameters, pixels and tokenizer, checked together."""

import dataclasses
from typing import Any

import numpy as np

from capvl.checkpoint import check_leaves
from capvl.convert.files import Source
from capvl.convert.pixels import Pixels
from capvl.models.encoder import EncoderOptions
from capvl.models.parameters import Blueprint
from capvl.models.vision import ImageOptions
from capvl.weights import Weights


def assemble(
    source: Source,
    options: Any,
    params: dict[str, np.ndarray],
    *,
    resize: str,
    pixels: Pixels | None = None,
    tokenizer: str = "",
    clean: str = "",
) -> Weights:
    """The model; an image tower that is alone becomes an encoder by itself.

    Args:
      source: where it was read.
      options, params: of the model, by our names.
      resize, tokenizer, clean: as in `Weights`.
      pixels: what is done to its images; None for a model that reads none.

    Raises:
      UserError: the parameters are not those of a model with these options: what a configuration says of sizes is
        compared with the arrays.
    """
    if type(options) is ImageOptions:
        options = EncoderOptions(**dataclasses.asdict(options))
    crop = {}
    if pixels is not None:
        crop = dataclasses.asdict(pixels)
        options = dataclasses.replace(options, pixels=crop.pop("pixels"))
    stored = {name: [list(value.shape), str(value.dtype)] for name, value in params.items()}
    check_leaves(stored, Blueprint(options).shapes, source.path)
    return Weights(params, options, resize, tokenizer, clean, **crop)
