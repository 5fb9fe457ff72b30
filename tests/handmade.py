"""A captioner and two towers whose every right answer is known, by weights made by hand.

An image is one colour. The encoder's tokens are its red, green and blue; the two towers compare them with
the words "red", "green", "blue"; the captioner's first word is likelier the more of its colour there is.
"""

import dataclasses
import io

import numpy as np
from PIL import Image

from capvl.models.captioner import CaptionerOptions
from capvl.models.parameters import Blueprint
from capvl.models.two_towers import TwoTowersOptions

WORDS = {"red": 3, "green": 4, "blue": 5}
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
VOCAB = 8
IMAGE = dict(encoder="w8d1h1m8/8", res=8, dtype="float32", pool="mean")


def picture(color=(200, 30, 30), size=(24, 20)) -> bytes:
    """A PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True)
class ByWord:
    """A tokenizer of single words: "the" and "thing" are known too. Its path names it."""

    path: str = "by word"
    eos: int = 1
    vocab: int = VOCAB

    def __call__(self, text, length):
        known = WORDS | {"the": 6, "thing": 7}
        text = text.decode() if isinstance(text, bytes) else text
        ids = [known.get(word.strip(".,"), 2) for word in text.lower().split()][: length - 1]
        return np.array([*ids, self.eos, *[0] * (length - 1 - len(ids))], np.int32)

    def decode(self, ids):
        names = {v: k for k, v in (WORDS | {"the": 6, "thing": 7}).items()}
        ids = np.asarray(ids).tolist()
        end = ids.index(self.eos) if self.eos in ids else len(ids)
        return " ".join(names.get(i, "?") for i in ids[:end] if i)


def two_towers():
    """(options, parameters) whose embedding of an image or a word points along its colour."""
    options = TwoTowersOptions(**IMAGE, text="w8d1h1m8", vocab=VOCAB, length=4, text_pool="first")
    params = _silent(options)
    _see_colors(params)
    for color, token in enumerate(WORDS.values()):
        params["text/tokens"][token, color] = 5.0
    params["text/norm/scale"][:] = 1.0
    params["text/head/kernel"][:] = np.eye(8)
    return options, params


def captioner():
    """(options, parameters) that writes an image's colour and stops."""
    options = CaptionerOptions(**IMAGE, decoder_layers=1, vocab=VOCAB, length=4)
    params = _silent(options)
    _see_colors(params)
    for name in ("decoder/blocks/norm1/scale", "decoder/blocks/norm2/scale", "decoder/norm/scale"):
        params[name][:] = 1.0
    params["decoder/cross_kv"][0, :, 1, 0] = np.eye(8)
    params["decoder/blocks/cross_attn/out/kernel"][0, 0] = 4.0 * np.eye(8)
    for color, token in enumerate(WORDS.values()):
        params["decoder/logits/kernel"][color, token] = 3.0
    # Position 1 wants the end, whatever the image.
    params["decoder/positions"][1:, 7] = 60.0
    params["decoder/logits/kernel"][7, 1] = 8.0
    params["decoder/logits/bias"][[0, 2, 6, 7]] = -4.0
    return options, params


def _silent(options):
    return {n: np.zeros(s.shape, np.float32) for n, s in Blueprint(options).shapes.items()}


def _see_colors(params):
    params["encoder/stem/kernel"][:, :, range(3), range(3)] = 1 / 64
    params["encoder/norm/scale"][:] = 1.0


@dataclasses.dataclass(frozen=True)
class Letters:
    """A tokenizer of letters; 1 is the end."""

    path: str = "letters"
    eos: int = 1
    vocab: int = 40

    def __call__(self, text, length):
        text = text.decode() if isinstance(text, bytes) else text
        ids = [ord(c) - ord("a") + 5 for c in text if c != " "][: length - 1]
        return np.array([*ids, 1, *[0] * (length - 1 - len(ids))], np.int32)
