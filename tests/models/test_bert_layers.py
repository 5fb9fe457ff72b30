"""States of all layers of a BERT: GLIP's golden text encoder, whose features are means of the last layers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from golden_glip import close, load

from capvl.convert import bert
from capvl.models.bert import BertOptions
from capvl.models.features import pool_regions
from capvl.models.parameters import Blueprint

HEADS = 4  # Of the golden text encoder, which no array shows.


def glip_text():
    """(n, options, parameters, arrays) of each case."""
    arrays = load("textenc")
    for case in sorted({name.split("/")[1] for name in arrays if name.startswith("in/")}):
        theirs = {k.split("/")[2]: v for k, v in arrays.items() if k.startswith(f"param/{case}/")}
        vocabulary, width = theirs["embeddings.word_embeddings.weight"].shape
        config = dict(
            vocab_size=vocabulary,
            hidden_size=width,
            max_position_embeddings=len(theirs["embeddings.position_embeddings.weight"]),
            type_vocab_size=len(theirs["embeddings.token_type_embeddings.weight"]),
            num_hidden_layers=sum(name.endswith("intermediate.dense.bias") for name in theirs),
            intermediate_size=len(theirs["encoder.layer.0.intermediate.dense.bias"]),
            num_attention_heads=HEADS,
        )
        yield case, *bert.read_bert(theirs, config), arrays


@pytest.mark.golden
def test_golden_text_encoder():
    for case, options, params, arrays in glip_text():
        ids, mask = (jnp.asarray(arrays[f"in/{case}/{name}"]) for name in ("ids", "mask"))
        blueprint, mask = Blueprint(options), mask > 0
        run = jax.jit(lambda params, ids, mask, b=blueprint: b.bind(params).layers(ids, mask))
        layers = run(params, ids, mask)
        close(layers[-1], arrays[f"out/{case}/hidden"], name=case)
        count = int(case.removeprefix("n"))
        embedded = jnp.where(mask[..., None], layers[-count:].mean(axis=0), 0.0)
        # The original divides the mean by the number of layers once more.
        close(embedded / count, arrays[f"out/{case}/embedded"], name=case)
        mean = pool_regions(embedded / count, mask[:, None])[:, 0]
        close(mean, arrays[f"out/{case}/aggregate"], name=case)


@pytest.mark.parametrize("changes", [{}, dict(unroll=True), dict(remat="full"), dict(dropout=0.3)], ids=str)
def test_layers_end_with_the_states(changes):
    """Also in training, where both draw the same; gradients reach the first layer from each."""
    options = BertOptions("w16d3h2m32", vocab=20, length=8, heads="none", **changes)
    blueprint = Blueprint(options)
    params = jax.jit(blueprint.init)(jax.random.key(0))
    ids = jnp.asarray([[3, 4, 5, 6, 7], [8, 9, 2, 0, 0]], jnp.int32)
    key = jax.random.key(1) if options.dropout else None

    def run(params):
        model = blueprint.bind(params)
        return model.layers(ids, ids > 0, key=key), model(ids, ids > 0, key=key)

    layers, states = jax.jit(run)(params)
    assert layers.shape == (3, 2, 5, 16)
    np.testing.assert_array_equal(layers[-1], states)
    # A stack of as many of its layers ends with those that are before the last.
    shallow = Blueprint(BertOptions("w16d2h2m32", vocab=20, length=8, heads="none"))
    two = {k: v[:2] if k.startswith("blocks/") else v for k, v in params.items()}
    if key is None:
        assert_close(layers[1], shallow.bind(two)(ids, ids > 0), 1e-5)
    gradient = jax.jit(jax.grad(lambda params: (run(params)[0][0] ** 3).sum()))(params)["blocks/mlp/up/kernel"]
    reached = np.abs(gradient).max(axis=(1, 2)) > 0
    assert reached.tolist() == [True, False, False]
