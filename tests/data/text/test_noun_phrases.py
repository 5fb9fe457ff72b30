"""Noun phrases of captions: single rules, odd texts, and agreement with people's annotations."""

import glob
import json
import re
import tarfile

import numpy as np
import pytest
from conftest import real_data

from capvl.data.scenes import language, world
from capvl.data.text.noun_phrases import noun_phrases

CASES = [
    ("A dog runs on the beach .", ["A dog", "the beach"]),
    ("a car in a cart", ["a car", "a cart"]),
    ("two cats and two cats", ["two cats", "two cats"]),
    ("A group of people watch a man's red hat.", ["A group of people", "a man's red hat"]),
    ("a dog left of a cat", ["a dog", "a cat"]),
    ("a photo of a bird in front of the old barn", ["a bird", "the old barn"]),
    ("black and white dogs, a big, furry cat", ["black and white dogs", "a big, furry cat"]),
    ("A man wearing a brightly colored shirt is standing", ["A man", "a brightly colored shirt"]),
    ("the building with a swimming pool", ["the building", "a swimming pool"]),
    ("a girl in pink slides down a slide", ["a girl", "pink", "a slide"]),
    ("A dog trots, two dogs trot", ["A dog", "two dogs"]),
    ("a bike race in the snow", ["a bike race", "the snow"]),
    ("She holds her dog and looks at it", ["her dog"]),
    ("a cat that sleeps on its back", ["a cat", "its back"]),
    ("an Épée, a t-shirt and a can", ["an Épée", "a t-shirt", "a can"]),
    ("three objects: a red circle", ["three objects", "a red circle"]),
]


@pytest.mark.parametrize(("caption", "expected"), CASES)
def test_rules(caption, expected):
    assert [caption[a:b] for a, b in noun_phrases(caption)] == expected


@pytest.mark.parametrize("caption", ["", "   ", "...", "running quickly", "it is", "in front of", "and", "'s", "very"])
def test_nothing_where_there_is_no_noun(caption):
    assert noun_phrases(caption) == []


@pytest.mark.parametrize("caption", ["犬が走る", "🌍🎉 a\x00b", "a " * 500, "'s 's and and of of the", "of the man of"])
def test_odd_texts(caption):
    check(caption, noun_phrases(caption))


def check(caption, spans):
    """Spans are in order, don't overlap, and begin and end with words."""
    end = 0
    for first, last in spans:
        assert end <= first < last <= len(caption)
        end = last
        assert not (first and caption[first - 1].isalnum() and caption[first].isalnum())
        assert not (last < len(caption) and caption[last - 1].isalnum() and caption[last].isalnum())


def agreement(pairs) -> tuple[float, float]:
    """(precision, recall) of spans, found and true."""
    pairs = [(set(found), set(true)) for found, true in pairs]
    both = sum(len(found & true) for found, true in pairs)
    return both / sum(len(found) for found, _ in pairs), both / sum(len(true) for _, true in pairs)


def test_things_of_scenes_are_found():
    """All things of scenes' captions; what else is found is their number, "three objects"."""
    rng, pairs = np.random.default_rng(7), []
    for _ in range(100):
        scene = world.draw_scene(rng)
        names = {language.a(name) for thing in scene.things for name in (thing.phrase, thing.short)}
        for caption in language.captions(scene, rng):
            true = [m.span() for name in names for m in re.finditer(rf"\b{re.escape(name)}\b", caption)]
            found = [(a, b) for a, b in noun_phrases(caption) if not caption[a:b].endswith(" objects")]
            pairs.append((found, true))
    precision, recall = agreement(pairs)
    assert precision > 0.99
    assert recall > 0.99


@pytest.mark.realdata
def test_people_annotate_the_same_phrases():
    """Flickr30k Entities' phrases on images that no rule was made for."""
    pairs = []
    for path in sorted(glob.glob(real_data("flickr8k", "val") + "/*.tar")):
        with tarfile.open(path) as archive:
            rows = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]
        for row in rows:
            for sentence, caption in enumerate(row["captions"]):
                words = [m.span() for m in re.finditer(r"\S+", caption)]
                own = [(first, count) for s, first, count, *_ in row["phrases"] if s == sentence]
                true = [(words[first][0], words[first + count - 1][1]) for first, count in own]
                found = noun_phrases(caption)
                check(caption, found)
                if true:
                    pairs.append((found, true))
    precision, recall = agreement(pairs)
    assert precision > 0.93
    assert recall > 0.89
