"""X-VLM's losses and gradients against those of the original (golden/xvlm), and its hard negatives' weights."""

import functools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_golden
from golden_xvlm import FEATURES, LOSS, close, load

from capvl import recipes
from capvl.convert import rules, xvlm, xvlm_names
from capvl.losses.contrastive import softmax_loss
from capvl.losses.matching import LEAST, Negatives
from capvl.nn.boxes import centres, corners, iou_and_giou
from capvl.objectives.xvlm import XVlm
from capvl.optim.optimizer import matches

pytestmark = pytest.mark.golden
FILES = ("pretrain_clip", "pretrain_swin")


@functools.cache
def case_of(name):
    return load(name)


def boxes(case):
    """(x0, y0, x1, y1) in fractions of the golden (x, y, w, h) in pixels."""
    box = case.golden["in.boxes_xywh"] / case.config["image_res"]
    return np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1).astype(np.float32)


def rows_of(case, kind):
    """A prepared batch of one kind: the golden's `in` are regions of one group of images, its `in2` pairs."""
    name = "in" if kind == "regions" else "in2"
    count = len(case.golden[f"{name}.text_ids"])
    rows = {
        "image": case.image(f"{name}.image"),
        "text": case.ids(f"{name}.text_ids"),
        "masked": case.ids(f"{name}.text_ids_masked"),
        "places": jnp.asarray(case.golden[f"{name}.masked_pos"], jnp.int32),
        "words": jnp.asarray(np.maximum(case.golden[f"{name}.masked_ids"], -1), jnp.int32),
        "there": jnp.ones(count, bool),
        "cut": jnp.zeros(count, bool),
        "id": jnp.arange(count, dtype=jnp.int32),
    }
    if kind == "pairs":
        return rows
    owner = jnp.asarray(case.golden["in.idx_to_group_img"], jnp.int32)
    whole = jnp.asarray(case.golden["in.is_image"] > 0)
    box = jnp.asarray(boxes(case))[None]
    return rows | {"box": box, "owner": owner[None], "id": owner, "whole": whole, "left": jnp.float32(0)}


@pytest.fixture
def forced(monkeypatch):
    """Makes the objective take the golden's negatives instead of drawing."""

    def force(case, kind):
        name = "in" if kind == "regions" else "in2"
        image, text = (jnp.asarray(case.golden[f"{name}.neg_{of}_idx"], jnp.int32) for of in ("image", "text"))
        there = jnp.ones(len(image), bool)
        found = Negatives(image, there, text, there)
        monkeypatch.setattr("capvl.objectives.xvlm.hard_negatives", lambda *a, **k: found)

    return force


def loss_of(case, kind, **options):
    """A function of parameters that gives (loss, metrics)."""
    objective = XVlm(kinds=(kind,), masks=case.golden["in.masked_pos"].shape[1], **options)
    return lambda params: objective.loss(case.blueprint.bind(params), {kind: rows_of(case, kind)}, None)


@pytest.mark.parametrize("name", FILES)
def test_losses_and_gradients_of_regions(name, forced):
    case = case_of(name)
    forced(case, "regions")
    loss = loss_of(case, "regions")
    (total, found), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    for ours, theirs in (("itc", "itc"), ("itm", "itm"), ("mlm", "mlm"), ("l1", "bbox"), ("giou", "giou")):
        close(found[ours], case.out(f"loss_{theirs}"), LOSS, ours)
    close(total, case.out("loss_total"), 2 * LOSS, "total")
    options = case.options
    gradients = {name: value for name, value in gradients.items() if name not in xvlm_names.fixed(options)}
    theirs = rules.write(gradients, xvlm.table(options), "X-VLM")
    for full, expected in case.golden.items():
        if full.startswith("grad.") and full != "grad.none_names":
            largest = np.abs(expected).max() + 1e-8
            np.testing.assert_allclose(theirs[full[5:]], expected, atol=1e-3 * largest, rtol=1e-3, err_msg=full)
    norms = dict(zip(case.golden["gradnorm.names"].tolist(), case.golden["gradnorm.values"].tolist(), strict=True))
    for parameter, norm in norms.items():
        if parameter in theirs:
            np.testing.assert_allclose(np.linalg.norm(theirs[parameter]), norm, rtol=1e-3, atol=2e-6, err_msg=parameter)


@pytest.mark.parametrize("name", FILES)
def test_losses_of_pairs_and_options(name, forced):
    case = case_of(name)
    forced(case, "pairs")
    _, found = jax.jit(loss_of(case, "pairs"))(case.params)
    for loss in ("itc", "itm", "mlm"):
        close(found[loss], case.golden[f"out2.loss_{loss}"], LOSS, loss)
    forced(case, "regions")
    _, found = jax.jit(loss_of(case, "regions", boxes_of_images=True, same_image=True))(case.params)
    close(found["l1"], case.out("loss_bbox_all"), LOSS, "l1")
    close(found["giou"], case.out("loss_giou_all"), LOSS, "giou")
    close(found["itc"], case.out("loss_itc_same_image_idx"), LOSS, "itc of the same image")


@pytest.mark.parametrize("name", FILES)
def test_what_the_losses_are_made_of(name):
    case = case_of(name)
    rows = rows_of(case, "regions")

    def made(model):
        regions = model.regions(rows["image"], rows["box"], rows["owner"])
        states = model.states(rows["text"])
        image, text = model.embed_tokens(regions.tokens_RND), model.embed_states(states)
        return regions, states, image, text, model.temperature()

    regions, states, image, text, temperature = case.compute(made)
    np.testing.assert_array_equal(regions.inside_RN, case.bools("in.image_atts"))
    close(regions.tokens_RND, case.out("image_embeds"), FEATURES)
    owner = case.golden["in.idx_to_group_img"]
    close(regions.whole.tokens_BND[owner], case.out("image_embeds_fullatts"), FEATURES)
    close(states, case.out("text_embeds"), FEATURES)
    close(image, case.out("image_feat"), FEATURES)
    close(text, case.out("text_feat"), FEATURES)
    logits = image @ text.T / temperature
    for theirs, ours in (("i2t", logits), ("t2i", logits.T)):
        weights = np.asarray(jax.nn.softmax(ours)) + LEAST
        close(weights * (1 - np.eye(len(weights))), case.out(f"weights_{theirs}"), 1e-5, theirs)
    assert np.abs(centres(boxes(case)) - case.golden["in.target_bbox"]).max() < 1e-6


def test_boxes():
    golden = load_golden("xvlm", "xvlm_boxes.npz")
    a, b = (jnp.asarray(golden[f"in.cxcywh{i}"]) for i in (1, 2))
    close(corners(a), golden["out.xyxy1"], 1e-6)
    close(centres(corners(a)), golden["out.back_cxcywh1"], 1e-6)
    iou, giou = iou_and_giou(corners(a)[:, None], corners(b)[None])
    close(iou, golden["out.iou"], 1e-5)
    close(giou, golden["out.giou"], 1e-5)


def test_contrast_of_small_cases_and_of_several_devices():
    golden = load_golden("xvlm", "xvlm_util.npz")
    image, text = (jnp.asarray(golden[f"itc.{of}_feat"]) for of in ("image", "text"))
    there, ids = jnp.ones(len(image), bool), jnp.asarray(golden["itc.idx"].reshape(-1), jnp.int32)
    scale = 1 / jnp.float32(golden["itc.temp"])
    close(softmax_loss(image, text, scale, there)[0], golden["itc.loss_diag"], LOSS)
    close(softmax_loss(image, text, scale, there, ids_B=ids)[0], golden["itc.loss_idx"], LOSS)


@pytest.mark.parametrize("kind", ["diag", "idx"])
def test_gradients_of_contrast_are_those_of_one_process(kind):
    """The original averages the ranks' gradients afterwards, so its encoders' are smaller by their number."""
    golden = load_golden("xvlm", "xvlm_itc_dist.npz")
    x, y = (jnp.asarray(golden[f"in.{side}"].reshape(-1, golden["in.X"].shape[-1])) for side in "XY")
    ids = jnp.asarray(golden["in.idx"].reshape(-1), jnp.int32) if kind == "idx" else None

    def loss(x, y, temperature):
        image, text = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
        return softmax_loss(image, text, 1 / temperature, jnp.ones(len(x), bool), 3, ids)[0]

    value, (dx, dy, dt) = jax.value_and_grad(loss, (0, 1, 2))(x, y, jnp.float32(golden["in.temp"]))
    close(value, golden[f"out.loss_{kind}"][0], LOSS)
    for ours, name in ((dx, "dX"), (dy, "dY")):
        expected = golden[f"out.{name}_{kind}"].reshape(ours.shape)
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(dt, golden[f"out.dtemp_{kind}"][0], rtol=1e-4)


@pytest.mark.parametrize("tower, config", [("swin", "xvlm_4m"), ("clip", "xvlm_4m_vit")])
def test_groups_of_the_recipes_are_the_originals(tower, config):
    """Which parameters decay, and which learn twice as fast."""
    golden, case = load_golden("xvlm", "xvlm_util.npz"), case_of(f"pretrain_{tower}")
    groups = dict(zip(golden[f"groups.{tower}.names"].tolist(), golden[f"groups.{tower}.group"].tolist(), strict=True))
    options = recipes.load(os.path.join(ROOT, f"configs/{config}.py")).optimizer
    told = set()
    for rule in xvlm.table(case.options):
        ours = rule.ours.replace("/{i}", "")
        fast, decays = matches(options.lr_mult, ours, 1.0) == 2, matches(options.decay, ours, 0.0) == 1
        expected = 2 * fast + (not decays)
        for theirs in rule.theirs:
            pattern = re.escape(theirs).replace(re.escape("{i}"), r"\d+")
            found = {name for name in groups if re.fullmatch(pattern, name)}
            assert all(groups[name] == expected for name in found), (theirs, ours)
            told |= found
    ties = xvlm_names.ties(xvlm.TEXT, False)
    assert set(groups) <= told | set(ties) | set(ties.values()), sorted(set(groups) - told)
