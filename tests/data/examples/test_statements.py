"""Statements with their images as arrays: labels by name, flips that the words follow, slots."""

import numpy as np
import pytest
from handmade import ByWord, picture

from capvl.data.examples.statements import Statements
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.randomness import Uniforms
from capvl.errors import UserError

CLASSES = ("contradiction", "neutral", "entailment")


class Words(ByWord):
    """Beside, "left" is 20 and "right" 21."""

    def __call__(self, text, length):
        ids = super().__call__(text, length)
        for i, word in enumerate(text.split()[: length - 1]):
            ids[i] = {"left": 20, "right": 21}.get(word, ids[i])
        return ids


def transform(images=1, texts=2, flip=True, train=True, classes=CLASSES):
    return Statements(Crop(8), images, classes, texts, 4, Words(), flip, train)


def example(*rows, images=1):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    said = {"question": [r[0] for r in rows], "answer": [r[1] for r in rows]}
    pictures = [picture((200, 0, 0), (8, 8)), picture((0, 200, 0), (8, 8))]
    return {"questions": said} | ({"images": pictures} if images == 2 else {"image": pictures[0]})


def test_labels_slots_and_names_in_any_case():
    made = transform(texts=3, train=False)(example(("red", "Entailment"), ("green", "neutral")), Uniforms(0, 0))
    assert made["image"].shape == (1, 8, 8, 3) and made["label"].tolist() == [2, 1, 0]
    assert made["slots"].tolist() == [True, True, False] and made["text"].tolist() == [
        [3, 1, 0, 0],
        [4, 1, 0, 0],
        [0] * 4,
    ]
    pair = transform(images=2, train=False)(example(("red", "neutral"), images=2), Uniforms(0, 0))
    assert pair["image"][:, 0, 0].argmax(axis=-1).tolist() == [0, 1]


def test_in_training_each_statement_is_drawn():
    rows = [("red", "entailment"), ("green", "neutral"), ("blue", "contradiction")]
    drawn = [transform(texts=1)(example(*rows), Uniforms(0, n)) for n in range(60)]
    seen = {(int(d["text"][0, 0]), int(d["label"][0])) for d in drawn}
    assert seen == {(3, 2), (4, 1), (5, 0)}


def test_words_follow_the_flip_of_one_image_and_keep_a_pair_from_it():
    for n in range(8):
        made = transform(texts=1)(example(("left", "neutral")), Uniforms(0, n))
        assert made["text"][0, 0] == (21 if made["flip"][0] else 20)
    flips = [transform(images=2, texts=1)(example(("left", "neutral"), images=2), Uniforms(0, n)) for n in range(8)]
    assert not np.any([f["flip"] for f in flips])
    flips = [transform(images=2, texts=1)(example(("red", "neutral"), images=2), Uniforms(0, n)) for n in range(20)]
    assert {tuple(f["flip"].tolist()) for f in flips} == {(a, b) for a in (False, True) for b in (False, True)}


def test_bad_examples():
    with pytest.raises(UserError, match="answer 'maybe', which is none of model.classes="):
        transform()(example(("red", "maybe")), Uniforms(0, 0))
    with pytest.raises(UserError, match="has 1 images, and model.images=2"):
        transform(images=2)(example(("red", "neutral")), Uniforms(0, 0))
    unlabelled = {"question": ["red"], "answers": ["[]"]}
    with pytest.raises(BadImageError, match="no statement has a label"):
        transform()(example(("red", "neutral")) | {"questions": unlabelled}, Uniforms(0, 0))
