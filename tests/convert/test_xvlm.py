"""X-VLM's official names: read, they compute what the official code does; written, they are as they were."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from golden_xvlm import FEATURES, close, load

from capvl.convert import xvlm
from capvl.models.features import with_summary

PRETRAINED = ("pretrain_clip", "pretrain_swin")


@pytest.fixture(scope="module", params=PRETRAINED)
def case(request):
    return load(request.param)


@pytest.mark.golden
def test_a_pretrained_model_computes_the_same(case):
    owner, ids = case.golden["in.idx_to_group_img"], case.ids("in.text_ids")
    image, seen = case.image(), case.bools("in.image_atts")

    def run(model):
        tokens = model.levels(image).tokens_BND[owner]
        states = model.states(ids)
        positives = model.itm(model.fuse(states, ids, jnp.asarray(case.out("image_embeds")), seen)[:, 0])
        boxes = model.box_of(model.fuse(states, ids, tokens))
        return tokens, states, model.embed_states(states), boxes, positives

    tokens, states, embedded, boxes, positives = case.compute(run)
    close(tokens, case.out("image_embeds_fullatts"), FEATURES)
    close(states, case.out("text_embeds"), FEATURES)
    close(embedded, case.out("text_feat"), FEATURES)
    close(boxes, case.out("output_coord"), FEATURES)
    close(positives, case.out("itm_logits")[: len(ids)], FEATURES)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["vit_clip", "vit_deit", "swin"])
def test_image_encoders_compute_the_same(name):
    case = load(name)

    def run(model):
        return with_summary(model.encoder.levels(case.image())[-1]).tokens_BND

    close(case.compute(run), case.out("full"), FEATURES)


@pytest.mark.golden
def test_round_trips_are_exact(case):
    """All arrays, those that are tied and the constants too, by their names, shapes and bits."""
    options = dataclasses.replace(case.options, pixels="clip")
    back = xvlm.write_official(options, case.params)
    theirs = case.theirs | case.buffers
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value, err_msg=name)
