"""A detector whose every right answer is known, by code, and pictures of coloured rectangles for it.

An image has at most one rectangle of each colour. Each place of the pyramid that lies on one gives its whole box, and
fits the tokens of its colour's word; the nearer to the middle, the better.
"""

import dataclasses
import io
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from handmade import COLORS
from PIL import Image

from capvl.data.text.tokenizers import SubwordTokenizer
from capvl.models.abilities import Ability
from capvl.nn import weights
from capvl.nn.anchors import STRIDES, anchors, encode
from capvl.nn.weights import weight

SHORT, LONG = 64, 96
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COLORS, "the", "thing", "a", "big", ".", ",", "and"]
NAMES = [f"{color} thing" for color in COLORS]


class Aligned(NamedTuple):
    """As of `capvl.models.glip.Aligned`."""

    logits_BNL: jax.Array
    deltas_BN4: jax.Array
    centerness_BN: jax.Array
    grids: tuple


@dataclasses.dataclass(frozen=True)
class PointingOptions:
    """Options of `Pointing`.

    Attributes:
      able_to_read: else it has a closed list of classes, one a colour.
    """

    res: int = SHORT
    max_side: int = LONG
    length: int = 12
    vocab: int = len(PIECES)
    dtype: str = "float32"
    able_to_read: bool = True

    reads_start: ClassVar[bool] = True

    @property
    def classes(self):
        return () if self.able_to_read else tuple(NAMES)

    @property
    def abilities(self):
        return frozenset({Ability.IMAGES, Ability.DETECTS})

    def image_shape(self):
        return (self.max_side, self.max_side, 4)

    def make(self, rngs):
        return Pointing(self, rngs=rngs)


class Pointing(nnx.Module):
    """See above."""

    def __init__(self, options, *, rngs):
        self.options = options
        self.one = weight(rngs, (1,), (None,), weights.constant(1.0))
        self.seen = weight(rngs, (len(COLORS),), (None,), weights.constant(1.0))  # 0 of a colour that it doesn't see.

    def encode(self, image_BHWC):
        return (image_BHWC * self.one[...][0],)

    def states(self, text_BL):
        """(B, L, colours): 1 where a token is a colour's word."""
        number = jnp.array([PIECES.index(c) if self.options.able_to_read else k for k, c in enumerate(COLORS, 1)])
        return (text_BL[..., None] == number[None, None]).astype(jnp.float32)

    def align(self, maps, states_BLD, text_BL):
        (image,) = maps
        height, width = image.shape[1:3]
        grids = tuple((-(-height // stride), -(-width // stride)) for stride in STRIDES)
        anchors_N4 = jnp.asarray(anchors(grids))
        middle_N2 = (anchors_N4[:, :2] + anchors_N4[:, 2:]) / 2
        y_N, x_N = (
            jnp.clip(jnp.round(middle_N2[:, i]), 0, side - 1).astype(int) for i, side in ((1, height), (0, width))
        )
        nothing = 0 * image.sum()  # NaN where the parameters are.
        logits, deltas, near = (
            jnp.full((*image.shape[:1], len(x_N), text_BL.shape[1]), -8.0),
            0.0,
            jnp.zeros(x_N.shape)[None],
        )
        for k, color in enumerate(COLORS.values()):
            wanted = jnp.array(color, jnp.float32)[None, None, None] / 127.5 - 1
            is_BYX = (jnp.abs(image[..., :3] - wanted).sum(axis=-1) < 0.1) & (image[..., 3] > 0)
            is_BYX &= self.seen[...][k] > 0
            (x0, x1), (y0, y1) = (self._ends(is_BYX.any(axis=axis)) for axis in (1, 2))
            box_B4 = jnp.stack([x0, y0, x1 - 1, y1 - 1], axis=1).astype(jnp.float32)
            on_BN = is_BYX[:, y_N, x_N]
            logits = jnp.where(on_BN[..., None] & (states_BLD[:, None, :, k] > 0), 6.0 - k, logits)
            deltas = jnp.where(on_BN[..., None], encode(box_B4[:, None], anchors_N4[None]), deltas)
            away = jnp.abs((box_B4[:, None, :2] + box_B4[:, None, 2:]) / 2 - middle_N2[None]).sum(axis=-1)
            near = jnp.where(on_BN, 4.0 - 0.1 * away, near)
        return Aligned(logits + nothing, deltas, near, grids)

    def _ends(self, taken):
        first, last = taken.argmax(axis=1), taken.shape[1] - taken[:, ::-1].argmax(axis=1)
        return first, last


def tokenizer(folder) -> SubwordTokenizer:
    """Of PIECES; its file is written to a folder."""
    path = folder / "vocab.txt"
    path.write_text("".join(f"{piece}\n" for piece in PIECES))
    return SubwordTokenizer(path)


def scene(rng: np.random.Generator, wide: bool) -> tuple[bytes, dict[str, tuple[int, int, int, int]]]:
    """A PNG, and colour -> x, y, width, height in pixels of its rectangle; one colour is lacking."""
    size = (SHORT, LONG) if wide else (LONG, SHORT)
    pixels, boxes = np.zeros((*size, 3), np.uint8), {}
    for third, color in enumerate(rng.permutation(list(COLORS))[:2]):
        side = size[1] // 3 // 8 * 8
        width, height = 8 * int(rng.integers(1, side // 8 + 1)), 8 * int(rng.integers(2, size[0] // 8))
        x, y = third * side, 8 * int(rng.integers(0, (size[0] - height) // 8 + 1))
        pixels[y : y + height, x : x + width] = COLORS[str(color)]
        boxes[str(color)] = (x, y, width, height)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue(), boxes
