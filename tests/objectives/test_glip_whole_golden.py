"""The whole GLIP by its official names: losses, gradients of every parameter and detections, as the official code's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import under
from golden_glip import close, load

from capvl.convert import glip
from capvl.models.parameters import Blueprint
from capvl.models.postprocess import detections
from capvl.nn.anchors import fractions, inclusive
from capvl.objectives.glip import Glip

pytestmark = pytest.mark.golden


class Whole:
    """The golden model as ours: `options`, `params`, `batch`."""

    def __init__(self):
        self.golden = load("e2e")
        self.theirs = under(self.golden, "param")
        images = np.moveaxis(self.golden["in/images"], 1, -1)
        self.size = images.shape[1:3]
        self.text = np.where(self.golden["in/attention_mask"] > 0, self.golden["in/input_ids"], 0)
        # As ours are: RGB, and with a channel that is 1 where the image is. They are normalised already.
        image = np.concatenate([images[..., ::-1], np.ones_like(images[..., :1])], axis=-1)
        counts = [len(self.golden[f"in/gt_labels{i}"]) for i in range(len(images))]
        slots = max(counts)
        box, positive = np.zeros((len(images), slots, 4), np.float32), np.zeros((len(images), slots, 256), bool)
        rows = np.split(self.golden["in/positive_map"] > 0, np.cumsum(counts)[:-1])
        for i, own in enumerate(rows):
            box[i, : counts[i]] = fractions(self.golden[f"in/gt_boxes{i}"], self.size)
            positive[i, : counts[i]] = own
        there = np.arange(slots)[None] < np.array(counts)[:, None]
        batch = dict(image=image, text=self.text, counted=self.text > 0, box=box, slots=there, positive=positive)
        self.batch = jax.device_put(batch | {"left": np.zeros(len(images), np.int32)})

    def of_groups(self, groups: int):
        """(options, parameters); no array tells the groups of the norms."""
        options, params = glip.read_official(self.theirs, glip.Told(4, 4, groups, 96, 128))
        return dataclasses.replace(options, pixels="half", dropout=0.0), jax.device_put(params)

    @property
    def losses(self) -> np.ndarray:
        names = ("loss_dot_product_token", "loss_reg", "loss_centerness")
        return np.array([self.golden[f"out/train/{name}"] for name in names])


@pytest.fixture(scope="module")
def whole():
    """With the first groups whose losses are the golden ones, or else those whose losses are nearest."""
    found = Whole()
    objective = Glip()

    def losses(options, params):
        total, metrics = objective.loss(
            Blueprint(options).bind(params), objective.prepare(found.batch, train=True), None
        )
        return total, jnp.stack([metrics["token"], 2 * metrics["box"], metrics["centerness"]])

    each = []
    for groups in (4, 2):  # The README says 4 of this file.
        options, params = found.of_groups(groups)
        gradients, values = jax.jit(jax.grad(lambda p, o=options: losses(o, p), has_aux=True))(params)
        off = np.abs(np.asarray(values) - found.losses)
        each.append((off.sum(), options, params, gradients, values))
        if (off <= 1e-4 * found.losses.max()).all():
            break  # A compilation of these gradients takes long.
    _, found.options, found.params, found.gradients, found.values = min(each, key=lambda x: x[0])
    return found


def test_losses(whole):
    close(whole.values, whole.losses)


def test_every_gradient(whole):
    """Their norms, by the official names; those of heads that nothing reads are 0."""
    ours = glip.write_official(dataclasses.replace(whole.options, pixels="imagenet"), jax.device_get(whole.gradients))
    theirs = {k: v for k, v in under(whole.golden, "gradnorm").items() if "cls_logits" not in k}
    assert set(ours) == set(theirs)
    largest = max(float(v) for v in theirs.values())
    for name, expected in theirs.items():
        found = np.linalg.norm(ours[name])
        assert abs(found - expected) <= 1e-3 * max(expected, 1e-4 * largest), f"{name}: {found} for {expected}"


def test_detections(whole):
    """Of the caption of the first image, in all images."""
    label_tokens = under(whole.golden, "in/label_to_tokens")
    weights = np.zeros((whole.text.shape[1], len(label_tokens)), np.float32)
    for label, tokens in label_tokens.items():
        weights[tokens, int(label) - 1] = 1 / len(tokens)
    text = jnp.asarray(np.repeat(whole.text[:1], len(whole.text), axis=0))

    @jax.jit
    def run(params, image):
        model = Blueprint(whole.options).bind(params)
        aligned = model.align(model.encode(image), model.states(text), text)
        sizes = jnp.asarray([whole.size] * len(text), jnp.int32)
        most = len(whole.golden["out/det_scores0"])
        return detections(aligned, jnp.asarray(weights), sizes, whole.size, most=most)

    found = jax.device_get(run(whole.params, whole.batch["image"]))
    for i in range(len(text)):
        expected = {k: whole.golden[f"out/det_{k}{i}"] for k in ("boxes", "scores", "labels")}
        count = len(expected["scores"])
        order = np.lexsort((-expected["scores"], expected["labels"]))
        own = np.lexsort((-found.score_BM[i, :count], found.label_BM[i, :count]))
        np.testing.assert_array_equal(found.label_BM[i, own] + 1, expected["labels"][order])
        close(found.score_BM[i, own], expected["scores"][order])
        close(inclusive(found.box_BM4[i, own], whole.size), expected["boxes"][order])
