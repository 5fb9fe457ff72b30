"""A matcher and grounder whose every right answer is known, by code, and pictures of coloured rectangles for it.

An image's tokens are the mean colours of its places; a text is its first colour word. A place belongs to a text by how
near the colours are; the matching score is the mean over the places that are seen.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from handmade import COLORS, VOCAB, WORDS

from capvl.models.abilities import Ability
from capvl.models.features import Level, regions_of, with_summary
from capvl.models.two_towers import normalize
from capvl.nn import weights
from capvl.nn.weights import weight

RES, PATCH = 32, 4
GRID = (RES // PATCH, RES // PATCH)


@dataclasses.dataclass(frozen=True)
class SeeingOptions:
    """Options of `Seeing`."""

    res: int = RES
    length: int = 4
    vocab: int = VOCAB
    dtype: str = "float32"
    cross_layers: int = 1
    able: tuple[str, ...] = ("TEXTS", "MATCHES", "REGIONS", "BOXES")

    grid: ClassVar[tuple[int, int]] = GRID
    reads_start: ClassVar[bool] = False

    @property
    def abilities(self):
        return frozenset({Ability.IMAGES, *(Ability[name] for name in self.able)})

    def image_shape(self):
        return (self.res, self.res, 3)

    def make(self, rngs):
        return Seeing(self, rngs=rngs)


class Seeing(nnx.Module):
    """See above."""

    def __init__(self, options, *, rngs):
        self.dtype = jnp.dtype(options.dtype)
        self.one = weight(rngs, (1,), (None,), weights.constant(1.0))

    def level(self, image):
        places = image.reshape(len(image), GRID[0], PATCH, GRID[1], PATCH, 3).mean(axis=(2, 4))
        return with_summary(Level(places.reshape(len(image), -1, 3) * self.one[...][0], GRID, PATCH))

    def encode(self, image):
        return self.level(image).tokens_BND

    def features(self, image):
        return self.encode(image)[:, 0]

    def regions(self, image, box, owner):
        return regions_of(self.level(image), box, owner)

    def states(self, text_BL):
        color = jnp.stack([(text_BL == token).any(axis=1) for token in WORDS.values()], axis=1)
        return jnp.where(color, 1.0, -1.0)[:, None].repeat(text_BL.shape[1], axis=1)

    def embed_tokens(self, tokens_BNC):
        return normalize(tokens_BNC[:, 0])

    def embed_states(self, states_BLD):
        return normalize(states_BLD[:, 0])

    def embed_image(self, image):
        return self.embed_tokens(self.encode(image))

    def embed_text(self, text_BL):
        return self.embed_states(self.states(text_BL))

    def near(self, image_BNC, states_BLD):
        """(B, N): 1 where a place has the text's colour, less where it has another."""
        image_BNC = jnp.repeat(image_BNC, len(states_BLD) // len(image_BNC), axis=0)
        return jnp.exp(-((image_BNC - states_BLD[:, :1]) ** 2).sum(axis=2))

    def match(self, image_BNC, text_BL, image_mask_BN=None, *, states_BLD=None):
        states_BLD = self.states(text_BL) if states_BLD is None else states_BLD
        near = self.near(image_BNC, states_BLD)[:, 1:]
        if image_mask_BN is None:
            return near.mean(axis=1)
        return near.mean(axis=1, where=image_mask_BN[:, 1:])

    def opened_match(self, image_BNC, text_BL, layer):
        near = self.near(image_BNC, self.states(text_BL))
        weights_BHLN = jnp.full((len(near), 2, text_BL.shape[1], near.shape[1]), 1 / near.shape[1], jnp.float32)
        return weights_BHLN, lambda w: (w * near[:, None, None]).sum(axis=(1, 2, 3))

    def locate(self, image_BNC, text_BL):
        inside = (self.near(image_BNC, self.states(text_BL))[:, 1:] > 0.5).reshape(-1, *GRID)

        def ends(taken, count):
            first, last = taken.argmax(axis=1), count - taken[:, ::-1].argmax(axis=1)
            return first / count, last / count

        (x0, x1), (y0, y1) = ends(inside.any(axis=1), GRID[1]), ends(inside.any(axis=2), GRID[0])
        return jnp.stack([x0, y0, x1, y1], axis=1).astype(jnp.float32)


def scene(boxes: dict, size=(RES, RES)) -> np.ndarray:
    """uint8 (H, W, 3): black with rectangles, color -> (x0, y0, x1, y1) in fractions."""
    pixels = np.zeros((*size, 3), np.uint8)
    for color, (x0, y0, x1, y1) in boxes.items():
        pixels[round(y0 * size[0]) : round(y1 * size[0]), round(x0 * size[1]) : round(x1 * size[1])] = COLORS[color]
    return pixels


def random_boxes(rng: np.random.Generator) -> dict:
    """A rectangle of the grid for each color, which don't overlap: each in a third of the columns."""
    found, order = {}, rng.permutation(list(WORDS))
    for third, color in enumerate(order):
        width, height = rng.integers(1, 3), rng.integers(2, 7)
        x, y = third * 3 + rng.integers(0, 3 - width + (third < 2)), rng.integers(0, GRID[0] - height + 1)
        x = min(x, GRID[1] - width)
        found[str(color)] = (x / GRID[1], y / GRID[0], (x + width) / GRID[1], (y + height) / GRID[0])
    return found
