"""Evaluators and the face of a loaded model run the same functions: what one writes or scores, the other does."""

import jax
import numpy as np
import pytest
from colors import by_word, colors, context_of, mesh
from conftest import assert_close
from handmade import WORDS, ByWord, captioner, two_towers

from capvl.data.reading import sources
from capvl.decoding.generate import GREEDY
from capvl.evals import captions, encode
from capvl.inference import matching, scoring
from capvl.inference.compiled import compiled
from capvl.inference.face import LoadedModel
from capvl.weights import Weights

NAMES = list(WORDS)


def both(model, colors, mesh):
    """(context, parameters, source, its images, the face of the same model)."""
    context, params = context_of(model, colors, mesh)
    loaded = LoadedModel(Weights(params, context.model), "hand-made")
    loaded.tokenizer = ByWord()
    source = sources.open_source("colors", "test", str(colors), features=("image", "label"))
    return context, params, source, [source[i]["image"] for i in range(len(source))], loaded


@pytest.mark.parametrize("model", [captioner, two_towers])
def test_embeddings(by_word, colors, mesh, model):
    context, params, source, images, loaded = both(model, colors, mesh)
    embed = compiled(context.blueprint, matching.embedding(context.model))
    with jax.set_mesh(mesh):
        found, _ = encode.over_images(context, source, embed, params, "images")
    assert_close(loaded.embed(images), found, 1e-6)
    assert np.ptp(found, axis=0).max() > 0.1


def test_texts_and_their_likelihoods(by_word, colors, mesh):
    context, params, source, images, loaded = both(captioner, colors, mesh)
    writer, decode = captions.compile_writer(context, GREEDY, "caption")
    tokens = encode.tokenize(context, NAMES, whole=True)
    score = compiled(context.blueprint, scoring.TextScorer(tokens))
    with jax.set_mesh(mesh):
        written, _ = encode.over_images(context, source, writer, params, "captions")
        scores, _ = encode.over_images(context, source, score, params, "scores")
    assert loaded.caption(images) == [decode(row) for row in written]
    assert_close(loaded.score(images, NAMES), scores, 1e-6)
