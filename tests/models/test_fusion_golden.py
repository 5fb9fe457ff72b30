"""BERT and RoBERTa whose upper layers look at images, against the official code's numbers (golden/xvlm)."""

import jax.numpy as jnp
import pytest
from golden_xvlm import FEATURES, LOSS, close, load

from capvl.losses.vocabulary import vocabulary_loss

pytestmark = pytest.mark.golden
KINDS = ("text_cross", "text_roberta")


@pytest.fixture(scope="module", params=KINDS)
def case(request):
    return load(request.param)


def inputs(case, text="text_ids", number=""):
    image = jnp.asarray(case.golden[f"in.image_embeds{number}"])
    return case.ids(f"in.{text}"), image, case.bools(f"in.image_atts{number}")


def states(case, *, causal=False, text="text_ids"):
    """All layers of a text with its image."""
    ids, image, seen = inputs(case, text)

    def run(model):
        below = model.states(ids, causal=causal)
        return below, model.fuse(below, ids, image, seen, causal=causal)

    return case.compute(run)


def test_states_of_all_positions(case):
    """Padded positions are computed too, and are what the original has there."""
    text, fused = states(case)
    close(text, case.out("text"), FEATURES)
    close(fused, case.out("fusion"), FEATURES)
    if "out.embeddings" in case.golden:
        close(case.compute(lambda model: model.embed(inputs(case)[0])), case.out("embeddings"), FEATURES)
        close(fused, case.out("multi_modal"), FEATURES)


def test_causal_states(case):
    if "out.causal_multi_modal" not in case.golden:
        pytest.skip("no such numbers of this model")
    _, fused = states(case, causal=True)
    close(fused, case.out("causal_multi_modal"), FEATURES)


def test_hidden_words(case):
    """The text with hidden words through all layers, its logits at those places, and their loss."""
    ids, image, seen = inputs(case, "text_ids_masked")
    place_BN = jnp.asarray(case.golden["in.masked_pos"], jnp.int32)
    labels_BN = jnp.asarray(case.golden["in.masked_ids"], jnp.int32)
    kept_BN = (labels_BN >= 0).astype(jnp.float32)

    def run(model):
        fused = model.fuse(model.states(ids), ids, image, seen)
        chosen = jnp.take_along_axis(fused, place_BN[..., None], axis=1)
        labels, weights = jnp.maximum(labels_BN, 0), kept_BN / kept_BN.sum()
        loss, _ = vocabulary_loss(model.word_states(chosen), labels, weights, *model.output_layer())
        return model.word_logits(chosen), loss

    logits, loss = case.compute(run)
    close(logits, case.out("mlm_logits"), FEATURES)
    close(loss, case.out("mlm_loss"), LOSS)
