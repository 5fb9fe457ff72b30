"""Swin by the names of the original code (github.com/microsoft/Swin-Transformer), in."""

from capvl.convert import swin
from capvl.convert.assembling import assemble
from capvl.convert.files import Source
from capvl.convert.pixels import Pixels
from capvl.weights import Weights


def read(source: Source) -> Weights:
    """A Swin with the pixels of the original evaluation: bicubic, ImageNet's mean; the middle 224 of 256 pixels, larger
    images squashed."""
    options, params = swin.read_original(source.arrays)
    small = options.res <= 224
    how = Pixels(options.pixels, "center" if small else "squash", 224 / 256 if small else 1.0, "bicubic")
    return assemble(source, options, params, resize="hugging_face", pixels=how)
