"""Scenes in words: paraphrased captions, questions with answers, and sentences about clips."""

import numpy as np

from capvl.data.scenes.world import COLORS, SHAPES, Clip, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
MAX_MENTIONED = 3


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _at(place: str) -> str:
    return "in the middle" if place == "middle" else f"at the {place}"


def a(phrase: str) -> str:
    """The phrase with its article."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def relation(first: Thing, second: Thing) -> str:
    """Where the first is, seen from the second: the larger of the two offsets decides."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """Four captions: a list, places, a relation, and a count with a list."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    named = things[:MAX_MENTIONED]
    starts = ("", "there is ", "a picture of ", "i see ")
    start = starts[rng.integers(len(starts))]
    first, second = things[0], things[1]
    count = NUMBERS[len(things)]
    return [
        start + _join([a(t.phrase) for t in named]),
        _join([f"{a(t.short)} {_at(t.place)}" for t in named]),
        f"{a(first.phrase)} {relation(first, second)} {a(second.phrase)}",
        f"{count} objects: " + _join([a(t.short) for t in named]),
    ]


def questions(scene: Scene, rng: np.random.Generator) -> list[dict[str, str]]:
    """One question of each kind that the scene allows: rows of kind, question, answer."""
    things = scene.things
    plain = [t for t in things if not t.word]
    rows = [("count", "how many objects are there", NUMBERS[len(things)])]
    thing = things[rng.integers(len(things))]
    rows.append(("place", f"where is the {thing.short}", thing.place))
    if plain:
        thing = plain[rng.integers(len(plain))]
        if sum(t.shape == thing.shape for t in plain) == 1:
            rows.append(("color", f"what color is the {thing.shape}", thing.color))
            if not scene.plain:
                rows.append(("texture", f"is the {thing.shape} plain", "yes" if thing.texture == "plain" else "no"))
        if sum(t.color == thing.color for t in things) == 1:
            rows.append(("shape", f"what is {thing.color}", thing.shape))
        asked = thing.short
        if rng.random() < 0.5:
            asked = f"{list(COLORS)[rng.integers(len(COLORS))]} {SHAPES[rng.integers(len(SHAPES))]}"
        there = any(t.short == asked for t in things)
        rows.append(("exists", f"is there {a(asked)}", "yes" if there else "no"))
    word = next((t.word for t in things if t.word), None)
    if word:
        rows.append(("reading", "what does it say", word))
    return [dict(zip(("kind", "question", "answer"), row, strict=True)) for row in rows]


def clip_captions(clip: Clip) -> list[str]:
    """What moves, and where to."""
    thing = clip.scene.things[clip.moving]
    return [f"the {thing.short} moves {clip.direction}", f"{a(thing.phrase)} is moving {clip.direction}"]


def clip_questions(clip: Clip) -> list[dict[str, str]]:
    """What moves, and in which direction."""
    thing = clip.scene.things[clip.moving]
    return [
        {"kind": "moving", "question": "what is moving", "answer": thing.short},
        {"kind": "direction", "question": "in which direction does it move", "answer": clip.direction},
    ]
