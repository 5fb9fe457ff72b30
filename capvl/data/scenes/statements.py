"""Statements about one scene, or about two side by side, that hold or don't, as SNLI-VE's and NLVR2's do.

Words give nothing away: each statement about two scenes comes with two pairs of which it holds and two of which it
doesn't, as NLVR2's do, and what is said falsely of one scene is said as often truly of others.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from capvl.data.scenes import render, world
from capvl.data.scenes.language import NUMBERS, a, relation
from capvl.data.scenes.world import COLORS, SHAPES, Scene, Thing

PAIRS_EACH = 4
"""Pairs of scenes that a statement comes with."""
OF_ONE, OF_TWO = {True: "entailment", False: "contradiction"}, {True: "True", False: "False"}
"""What the data set calls true and false, as SNLI-VE and NLVR2 do."""
_CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_DRAWS, _SCENES = 1, 2  # Streams of random numbers; the first is that of captioned scenes.

Holds = Callable[[Scene, Scene], bool]
Named = tuple[str, str]  # Colour and shape.


def make(seed: int, split: str, side: int, scenes: int, index: int, **options) -> dict:
    """Example `index` of a split: `image`, or `images` of two scenes, and `questions`, whose answers are what holds.

    Args:
      seed, split, side, options: as of `capvl.data.scenes.examples.make`.
      scenes: 1 or 2.
      index: of the example.
    """
    if scenes == 1:
        scene = world.draw_scene(world.generator(seed, split, index, _SCENES), **options)
        rows = of_scene(scene, world.generator(seed, split, index, _DRAWS))
        image = render.encode_jpeg(render.render(scene, side))
        asked = [_row(f"{split}-{index}-{i}", kind, text, OF_ONE[holds]) for i, (kind, text, holds) in enumerate(rows)]
        return {"image": image, "questions": asked, "index": index}
    group, number = divmod(index, PAIRS_EACH)
    kind, text, named, holds = of_pair(world.generator(seed, split, group, _DRAWS))
    rng, wanted = world.generator(seed, split, index, _SCENES), number % 2 == 0
    while True:
        pair = [_scene_near(rng, named, options) for _ in range(2)]
        if holds(*pair) == wanted:
            break
    images = [render.encode_jpeg(render.render(scene, side)) for scene in pair]
    row = _row(f"{split}-{group}-{number}-0", kind, text, OF_TWO[wanted])
    return {"images": images, "questions": [row], "index": index}


def _row(id: str, kind: str, text: str, answer: str) -> dict[str, str]:
    return {"id": id, "kind": kind, "question": text, "answer": answer}


def of_scene(scene: Scene, rng: np.random.Generator) -> list[tuple[str, str, bool]]:
    """(kind, statement, whether it holds), one of each kind, true or false by chance."""
    things = scene.things
    chosen = things[rng.integers(len(things))]
    exists = rng.random() < 0.5
    named = (chosen.color, chosen.shape) if exists else _absent(scene, chosen, rng)
    right = rng.random() < 0.5
    count = len(things) if right else int(rng.choice([n for n in range(1, len(NUMBERS)) if n != len(things)]))
    first, second = (things[i] for i in rng.permutation(len(things))[:2])
    where, ordered = relation(first, second), rng.random() < 0.5
    place = where if ordered else _CONVERSE[where]
    return [
        ("exists", f"there is {a(' '.join(named))}", exists),
        ("count", f"there are {NUMBERS[count]} objects" if count > 1 else "there is one object", right),
        ("relation", f"the {first.short} is {place} the {second.short}", ordered),
    ]


def _absent(scene: Scene, near: Thing, rng: np.random.Generator) -> Named:
    """What is not there: another colour or another shape of a thing that is."""
    while True:
        named = _changed((near.color, near.shape), rng)
        if not _shows(scene, named):
            return named


def _changed(named: Named, rng: np.random.Generator) -> Named:
    color, shape = named
    if rng.random() < 0.5:
        return str(rng.choice([c for c in COLORS if c != color])), shape
    return color, str(rng.choice([s for s in SHAPES if s != shape]))


def _shows(scene: Scene, named: Named) -> bool:
    return any((thing.color, thing.shape) == named for thing in scene.things)


def of_pair(rng: np.random.Generator) -> tuple[str, str, tuple[Named, ...], Holds]:
    """(kind, statement, what it names, whether it holds of a left and a right scene)."""
    one, other = (_name(rng) for _ in range(2))
    while other == one:
        other = _name(rng)
    first, second = (a(" ".join(named)) for named in (one, other))

    def shown(left: Scene, right: Scene) -> int:
        return _shows(left, one) + _shows(right, one)

    choices: list[tuple[str, str, tuple[Named, ...], Holds]] = [
        ("both", f"both images show {first}", (one,), lambda left, right: shown(left, right) == 2),
        ("either", f"at least one image shows {first}", (one,), lambda left, right: shown(left, right) > 0),
        ("one", f"exactly one image shows {first}", (one,), lambda left, right: shown(left, right) == 1),
        (
            "sides",
            f"the left image shows {first} and the right image {second}",
            (one, other),
            lambda left, right: _shows(left, one) and _shows(right, other),
        ),
        (
            "more",
            "the left image shows more objects than the right image",
            (),
            lambda left, right: len(left.things) > len(right.things),
        ),
        (
            "same",
            "both images show the same number of objects",
            (),
            lambda left, right: len(left.things) == len(right.things),
        ),
    ]
    return choices[rng.integers(len(choices))]


def _name(rng: np.random.Generator) -> Named:
    return str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))


def _scene_near(rng: np.random.Generator, named: tuple[Named, ...], options: dict) -> Scene:
    """A scene, in which one thing often is what a statement names, or nearly."""
    while True:
        scene = world.draw_scene(rng, **options)
        if not named or rng.random() < 0.2:
            return scene
        color, shape = named[rng.integers(len(named))]
        if rng.random() < 0.5:
            color, shape = _changed((color, shape), rng)
        place = rng.integers(len(scene.things))
        thing = dataclasses.replace(scene.things[place], color=color, shape=shape, word="")
        things = (*scene.things[:place], thing, *scene.things[place + 1 :])
        # Things differ in colour or shape, in plain scenes in colour.
        what = [t.color if scene.plain else t.short for t in things]
        if len(set(what)) == len(what):
            return dataclasses.replace(scene, things=things)


def texts(count: int) -> list[str]:
    """Statements about one scene and about two, for a tokenizer."""
    found = []
    for i in range(count):
        rng = world.generator(0, "train", i)
        found += [text for _, text, _ in of_scene(world.draw_scene(rng, words=0.0), rng)] + [of_pair(rng)[1]]
    return found
