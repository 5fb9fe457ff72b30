"""CIDEr-D on the device against pycocoevalcap's numbers (golden/git/coco_caption), and by hand."""

import gzip
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import GOLDEN, assert_close

from capvl.losses import cider
from capvl.losses.cider import count_documents

cider_d = jax.jit(cider.cider_d)


def golden_captions(name):
    folder = os.path.join(GOLDEN, "git", "coco_caption")
    path = os.path.join(folder, f"{name}_tokenized.json.gz")
    if not os.path.exists(path):
        pytest.skip(f"golden file {path} is absent (set CAPVL_GOLDEN)")
    with gzip.open(path, "rt") as file, open(os.path.join(folder, "expected_scores.json")) as scores:
        return json.load(file), json.load(scores)[name]


@pytest.mark.golden
@pytest.mark.parametrize("name", ["fakecap134", "human500"])
def test_golden(name):
    """Words as tokens: the scores of every image are those of the reference implementation."""
    tokenized, expected = golden_captions(name)
    written, people = dict(tokenized["hyps"]), dict(tokenized["refs"])
    keys = list(written)
    vocabulary: dict[str, int] = {}

    def ids(text, length):
        row = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in text.split()]
        return np.array(row + [0] * (length - len(row)), np.int32)

    longest = max(len(t.split()) for rows in (*written.values(), *people.values()) for t in rows)
    most = max(map(len, people.values()))
    references = np.zeros((len(keys), most, longest), np.int32)
    for i, key in enumerate(keys):
        for j, text in enumerate(people[key]):
            references[i, j] = ids(text, longest)
    candidates = np.stack([ids(written[key][0], longest) for key in keys])
    counts, documents = count_documents(references)
    parts = [slice(i, i + 10) for i in range(0, len(keys), 10)]
    parts = [slice(i, i + 10) for i in range(0, len(keys), 10)]
    found = np.concatenate([np.asarray(cider_d(candidates[p], references[p], counts, documents)) for p in parts])
    per_image = dict(expected["per_image"])
    # What is left is the hash table's: two n-grams in one bucket.
    assert_close(found, [per_image[key]["CIDEr"] for key in keys], 1e-2)
    assert_close(found.mean(), expected["scores"]["CIDEr"], 2e-3)


def test_by_hand():
    references = np.array([[[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], [[7, 8, 9, 10, 11], [0, 0, 0, 0, 0]]], np.int32)
    counts, documents = count_documents(references)
    assert documents == 2
    candidates = np.array([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], np.int32)
    same, other = np.asarray(cider_d(jnp.asarray(candidates), jnp.asarray(references), counts, documents))
    assert other == 0
    assert 5 < same < 10  # Equal to one of two references.
    (whole,) = np.asarray(cider_d(jnp.asarray(candidates[:1]), jnp.asarray(references[:1, :1]), counts, documents))
    assert_close(whole, 10.0, 1e-5)
    twice = jnp.asarray([[1, 2, 1, 2, 1, 2, 1, 2]], jnp.int32)
    padded = jnp.asarray(np.pad(references[:1, :1], ((0, 0), (0, 0), (0, 3))))
    (repeated,) = np.asarray(cider_d(twice, padded, counts, documents))
    assert repeated < 3  # What is said again counts once, and the length is wrong.
    empty = np.asarray(cider_d(jnp.zeros((1, 5), jnp.int32), jnp.asarray(references[:1]), counts, documents))
    assert empty == 0
