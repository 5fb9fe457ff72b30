"""Captions among others."""

import numpy as np
import pytest

from capvl.data.randomness import Uniforms
from capvl.data.text.packing import draw_others, pack
from capvl.data.text.spans import positive_map
from capvl.data.text.training import train_word_piece

OWN = "a red dog and a blue cat"
SPANS = [[(2, 9)], [(14, 24), (0, 1)]]
OTHERS = ["a man runs .", "two fish swim", "a man runs", "", "A red dog and a blue cat.", "who sees it?"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_word_piece([OWN, *OTHERS] * 3, 200, tmp_path_factory.mktemp("words") / "vocab.txt")


def test_spans_move_with_the_caption(tokenizer):
    begins = set()
    for seed in range(40):
        packed = pack(OWN, SPANS, OTHERS, tokenizer, 64, Uniforms(seed, 0))
        assert [[packed.text[a:b] for a, b in row] for row in packed.spans] == [["red dog"], ["a blue cat", "a"]]
        assert packed.text[slice(*packed.own)] == OWN
        assert sorted(packed.others) == [0, 1, 5]  # Neither empty ones nor the same again.
        assert packed.text.count(".") == 3
        begins.add(packed.own[0])
    assert len(begins) > 4


def test_tokens_are_those_of_the_phrases(tokenizer):
    packed = pack(OWN, SPANS, OTHERS, tokenizer, 64, Uniforms(3, 0))
    alone, covered = tokenizer.spans(OWN, 64), tokenizer.spans(packed.text, 64)
    for ours, theirs in zip(positive_map(packed.spans, covered), positive_map(SPANS, alone), strict=True):
        np.testing.assert_array_equal(covered.tokens[ours], alone.tokens[theirs])


@pytest.mark.parametrize("length", range(4, 30))
def test_the_budget_holds_and_the_caption_stays_whole(tokenizer, length):
    whole = np.count_nonzero(tokenizer(OWN, 64))
    for seed in range(5):
        packed = pack(OWN, SPANS, OTHERS, tokenizer, length, Uniforms(seed, 0))
        size = np.count_nonzero(tokenizer(packed.text, 64))
        assert size <= max(length, whole)
        if length <= whole:
            assert (packed.text, packed.others) == (OWN, ())
        covered = tokenizer.spans(packed.text, length)
        assert positive_map([row[:1] for row in packed.spans], covered).any(1).all() == (length >= whole)


def test_without_others_the_caption_is_as_it_was(tokenizer):
    packed = pack(OWN, SPANS, [], tokenizer, 64, Uniforms(0, 0))
    assert (packed.text, packed.spans, packed.own) == (OWN, SPANS, (0, len(OWN)))


def test_how_many_others():
    """40 % none, 30 % all, the rest between."""
    counts = np.bincount([draw_others(Uniforms(1, i)) for i in range(4000)], minlength=21) / 4000
    assert abs(counts[0] - 0.4) < 0.03
    assert abs(counts[20] - (0.3 + 0.3 / 20)) < 0.03
    assert (np.abs(counts[1:20] - 0.015) < 0.01).all()
    assert draw_others(Uniforms(0, 0), most=0) == 0
