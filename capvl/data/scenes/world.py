"""Scenes as facts: objects with shape, colour, size, texture and place, some of them words.

A scene is a pure function of (seed, split, index). Lengths and places are fractions of the
image's side; the origin is the top left corner.
"""

import dataclasses
import math

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "hexagon")
COLORS = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (42, 92, 214),
    "yellow": (244, 208, 63),
    "purple": (136, 61, 182),
    "orange": (242, 133, 34),
    "cyan": (56, 196, 206),
    "pink": (240, 130, 180),
}
SIZES = {"small": 0.10, "medium": 0.145, "large": 0.20}
TEXTURES = ("plain", "striped", "dotted", "checkered")
WORDS = ("sun", "cat", "dog", "tea", "box", "red", "map", "car", "key", "sea", "owl", "hat", "pen", "ice", "fox", "jam")
MOTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
COLUMNS, ROWS = ("left", "middle", "right"), ("top", "middle", "bottom")
PLAIN_WORD_ZOOM = 2.0
SPLITS = {"train": 0, "val": 1, "test": 2}
PAIRS = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
APART = tuple(f"{color} {SHAPES[(3 * i + 1) % len(SHAPES)]}" for i, color in enumerate(COLORS))
"""Colours and shapes that may be kept from standing together: each colour and each shape is in one of these pairs."""
HELD_OUT = ("", "never", "always")


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. `word` is the text of a rendered word (then `shape` is "word"), else empty; `zoom` scales it."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    word: str = ""
    zoom: float = 1.0

    @property
    def radius(self) -> float:
        """Half the side of the bounding box's larger dimension."""
        return SIZES[self.size] * self.zoom

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(x0, y0, x1, y1) as fractions of the side, inside [0, 1]."""
        half_height = self.radius * (0.5 if self.word else 1.0)
        corners = self.x - self.radius, self.y - half_height, self.x + self.radius, self.y + half_height
        return tuple(min(max(c, 0.0), 1.0) for c in corners)

    @property
    def phrase(self) -> str:
        """What names the object: "large striped red circle", or the word in quotes."""
        if self.word:
            return f"{self.color} word {self.word}"
        texture = "" if self.texture == "plain" else self.texture + " "
        return f"{self.size} {texture}{self.color} {self.shape}"

    @property
    def short(self) -> str:
        """Colour and shape only."""
        return f"word {self.word}" if self.word else f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        """One of nine places, such as "top left" or "middle"."""
        row, column = ROWS[min(int(self.y * 3), 2)], COLUMNS[min(int(self.x * 3), 2)]
        if row == column:
            return row
        return column if row == "middle" else row if column == "middle" else f"{row} {column}"


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects from largest to smallest, on a grey background of a brightness in [0, 255]; `plain`: without patterns."""

    things: tuple[Thing, ...]
    background: int
    noise_seed: int
    plain: bool = False


def generator(seed: int, split: str, index: int, stream: int = 0) -> np.random.Generator:
    """The random numbers of one example; there may be several streams of them."""
    return np.random.Generator(np.random.Philox(key=[seed, SPLITS[split]], counter=[0, 0, stream, index]))


def draw_scene(
    rng: np.random.Generator,
    most: int = 6,
    zoom: float = 1.0,
    plain: bool = False,
    words: float = 1 / 3,
    apart: str = "",
) -> Scene:
    """2 to `most` objects that don't overlap and differ in colour or shape; one may be a word.

    Args:
      rng: of the scene.
      most: objects at most.
      zoom: of their sizes.
      plain: without patterns, no colour twice, words of PLAIN_WORD_ZOOM.
      words: share of the scenes that have a word.
      apart: of HELD_OUT: whether pairs of APART are never or always in a scene; "" leaves it to chance.
    """
    things = []
    while len(things) < 2:  # One that fills the middle leaves no room for another.
        things = _draw_things(rng, int(rng.integers(2, most + 1)), zoom, plain, rng.random() < words, apart)
    things.sort(key=lambda t: -t.radius)
    return Scene(tuple(things), int(rng.integers(90, 200)), int(rng.integers(2**31)), plain)


def _draw_things(
    rng: np.random.Generator, wanted: int, zoom: float, plain: bool, with_word: bool, held_out: str = ""
) -> list[Thing]:
    things, apart = [], _boxes_apart if plain else _apart
    for attempt in range(200):
        if len(things) == wanted:
            break
        thing = _draw_thing(rng, with_word and not things, zoom)
        if held_out == "never" and thing.short in APART:
            continue
        if held_out == "always" and not things:  # The first one; the others are of any pair.
            color, shape = APART[rng.integers(len(APART))].split()
            thing = dataclasses.replace(thing, color=color, shape=shape, word="")
        if plain:
            thing = dataclasses.replace(thing, texture="plain")
            if thing.word:
                thing = _place(rng, dataclasses.replace(thing, zoom=PLAIN_WORD_ZOOM))
            if any(thing.color == other.color for other in things):
                continue
        # Late attempts shrink, so that two objects always fit.
        if attempt > 60:
            thing = dataclasses.replace(thing, size="small", zoom=min(zoom, 1.0))
        if all(apart(thing, other) and thing.short != other.short for other in things):
            things.append(thing)
    return things


def _draw_thing(rng: np.random.Generator, word: bool, zoom: float) -> Thing:
    size = "large" if word else list(SIZES)[rng.integers(len(SIZES))]
    radius = SIZES[size] * zoom
    x, y = radius + 0.02 + rng.random(2) * (1 - 2 * radius - 0.04)
    return Thing(
        shape="word" if word else SHAPES[rng.integers(len(SHAPES))],
        color=list(COLORS)[rng.integers(len(COLORS))],
        size=size,
        texture="plain" if word else TEXTURES[rng.integers(len(TEXTURES))],
        x=float(x),
        y=float(y),
        word=WORDS[rng.integers(len(WORDS))] if word else "",
        zoom=zoom,
    )


def _apart(a: Thing, b: Thing) -> bool:
    return math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius + 0.02


def _boxes_apart(a: Thing, b: Thing) -> bool:
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = a.box, b.box
    return max(ax0 - bx1, bx0 - ax1, ay0 - by1, by0 - ay1) > 0.02


def _place(rng: np.random.Generator, word: Thing) -> Thing:
    """The word anywhere that its box fits."""
    half = np.array([word.radius, word.radius / 2])
    x, y = half + 0.02 + rng.random(2) * (1 - 2 * half - 0.04)
    return dataclasses.replace(word, x=float(x), y=float(y))


@dataclasses.dataclass(frozen=True)
class Clip:
    """A scene in which one object moves by `step` a frame in a direction of MOTIONS."""

    scene: Scene
    moving: int
    direction: str
    step: float

    def frame(self, number: int) -> Scene:
        """The scene at frame `number`, 0 being the first."""
        dx, dy = MOTIONS[self.direction]
        thing = self.scene.things[self.moving]
        moved = dataclasses.replace(thing, x=thing.x + dx * self.step * number, y=thing.y + dy * self.step * number)
        things = (*self.scene.things[: self.moving], *self.scene.things[self.moving + 1 :], moved)
        return dataclasses.replace(self.scene, things=things)


def draw_clip(rng: np.random.Generator, frames: int, **options) -> Clip:
    """A scene (`options` are of `draw_scene`) and which of its objects moves, in the direction with the most room."""
    scene = draw_scene(rng, **options)
    moving = int(rng.integers(len(scene.things)))
    thing = scene.things[moving]
    room = {"right": 1 - thing.x, "left": thing.x, "down": 1 - thing.y, "up": thing.y}
    usable = {d: r - thing.radius for d, r in room.items()}
    directions = sorted(usable, key=usable.get)[-2:]
    direction = directions[rng.integers(2)]
    return Clip(scene, moving, direction, max(usable[direction], 0.0) / max(frames - 1, 1))
