"""Texts with two images against the official numbers: NLVR2, text assignment, the doubled layers (golden/xvlm)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_xvlm import FEATURES, LOSS, FusionOptions, close, load

from capvl.models.fusion import FusionBert, FusionBlock, TwoImageBlock
from capvl.models.parameters import Blueprint
from capvl.objectives import judge

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module")
def nlvr():
    return load("task_nlvr")


def test_two_images(nlvr):
    """The class head's logits, and the loss of the objective."""
    ids, label = nlvr.ids("in.text_ids"), jnp.asarray(nlvr.golden["in.targets"], jnp.int32)
    # Theirs are all first images, then all second ones.
    pairs = jnp.stack(jnp.split(nlvr.image(), 2), axis=1)
    batch = dict(image=pairs, flip=jnp.zeros(pairs.shape[:2], bool), text=ids[:, None], label=label[:, None])
    batch["slots"] = jnp.ones((len(ids), 1), bool)

    def run(model):
        loss, metrics = judge.Judge().loss(model, judge.Judge().prepare(batch, train=True), None)
        return model.judge(pairs, ids[:, None])[:, 0], loss, metrics["accuracy"].value()

    logits, loss, accuracy = nlvr.compute(run)
    close(logits, nlvr.out("logits"), FEATURES)
    close(loss, nlvr.out("loss"), LOSS)
    assert accuracy == pytest.approx(np.mean(nlvr.out("logits").argmax(axis=-1) == nlvr.golden["in.targets"]))


def test_shared_weights_are_there_once(nlvr):
    """Every tied array of theirs is one of ours: the numbers of parameters differ by the tied ones."""
    tied = [name.split(" = ")[0] for name in nlvr.golden["shared.names"].tolist()]
    theirs = sum(value.size for value in nlvr.theirs.values()) - sum(nlvr.theirs[name].size for name in tied)
    assert tied and sum(value.size for value in nlvr.params.values()) == theirs
    assert not [name for name in nlvr.params if name.startswith("text/cross/second/cross_kv")]


def test_text_assignment():
    case = load("task_nlvr_pretrain")
    ids, label = case.ids("in.text_ids"), jnp.asarray(case.golden["in.labels"], jnp.int32)
    pairs = jnp.asarray(case.golden["in.pairs"], jnp.int32)[None]

    def run(model):
        tokens = model.encode(case.image())
        similar = judge.similarities(model.embed_tokens(tokens)[None])[0]
        loss, _ = judge.assignment_loss(model, tokens, ids, pairs, label)
        chosen = [tokens[pairs[0, :, i]] for i in range(2)]
        return similar, model.logits(chosen, ids[:, None])[:, 0], loss

    similar, logits, loss = case.compute(run)
    own = np.eye(len(ids), dtype=bool)
    # Theirs is a softmax with the images themselves, which are left out of it then.
    weights = np.where(own, 0, np.asarray(jax.nn.softmax(np.where(own, 1 / judge.TEMPERATURE, similar))))
    close(weights, case.out("weights"), FEATURES)
    close(logits, case.out("logits"), FEATURES)
    close(loss, case.out("loss"), LOSS)


class Untied(TwoImageBlock):
    """Two layers, each with its own projection of keys and values, as golden text_cross has them."""

    def __init__(self, size, image_width, rngs, **kind):
        super().__init__(size, image_width, rngs, **kind)
        self.second.cross_kv = FusionBlock(size, image_width, rngs, **kind).cross_kv


@dataclasses.dataclass(frozen=True)
class UntiedOptions(FusionOptions):
    def make(self, rngs):
        return FusionBert(self.bert, self.cross_layers, self.image_width, Untied, rngs=rngs)


def test_layers_alternate_between_two_images():
    case = load("text_cross")
    if case.options.cross_layers % 2:
        pytest.skip("an odd number of layers is no number of pairs")
    options = UntiedOptions(case.options.bert, case.options.cross_layers // 2, case.options.image_width)
    params = {name: value for name, value in case.params.items() if not name.startswith("cross/")}
    for name, value in case.params.items():
        if name.startswith("cross/"):
            parts = {"first": value[0::2], "second": value[1::2]}
            params |= {name.replace("cross/", f"cross/{part}/", 1): half for part, half in parts.items()}
    blueprint, ids = Blueprint(options), case.ids("in.text_ids")
    images = tuple(jnp.asarray(case.golden[f"in.image_embeds{number}"]) for number in ("", "2"))
    masks = tuple(case.bools(f"in.image_atts{number}") for number in ("", "2"))

    @jax.jit
    def run(params):
        model = blueprint.bind(params)
        return model.fuse(model.states(ids), ids, images, masks)

    close(run(params), case.out("two_image_list"), FEATURES)
