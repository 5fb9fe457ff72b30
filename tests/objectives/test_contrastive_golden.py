"""Two towers and their losses against the numbers of the original implementation (golden/cappa/lit.npz)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden, under

from capvl.convert.big_vision import from_big_vision, to_big_vision
from capvl.losses.contrastive import sigmoid_loss
from capvl.models.parameters import Blueprint
from capvl.models.two_towers import TwoTowersOptions, normalize
from capvl.objectives.contrastive import Contrastive

pytestmark = pytest.mark.golden
FORWARD, GRADIENT = 1e-4, 2e-4


@pytest.fixture(scope="module")
def golden():
    return load_golden("cappa", "lit.npz")


def size(cfg, prefix=""):
    return "w{}d{}h{}m{}".format(*(cfg[prefix + key] for key in ("width", "depth", "heads", "mlp")))


@pytest.fixture(scope="module")
def blueprint(golden):
    cfg = {k: v.item() for k, v in under(golden, "cfg").items()}
    return Blueprint(
        TwoTowersOptions(
            encoder=f"{size(cfg)}/{cfg['patch']}",
            res=cfg["res"],
            pool="map",
            text=size(cfg, "txt_"),
            vocab=cfg["vocab"],
            length=cfg["seq"],
            dtype="float32",
        )
    )


@pytest.fixture(scope="module")
def params(golden):
    return jax.device_put(from_big_vision(under(golden, "params")))


def test_both_towers(golden, blueprint, params):
    @jax.jit
    def compute(params):
        model = blueprint.bind(params)
        image, text = jnp.asarray(golden["in/image"]), jnp.asarray(golden["in/text"])
        encoded, hidden = model.encode(image), model.text.hidden(text)
        pooled = {"img_pre_logits": model.encoder.pool(encoded), "txt_pre_logits": model.text.pooled(hidden, text)}
        embedded = {"zimg": model.embed_image(image), "ztxt": model.embed_text(text)}
        dots = embedded["zimg"] @ embedded["ztxt"].T
        norms = {
            "img_norm": jnp.linalg.norm(pooled["img_pre_logits"], axis=1, keepdims=True),
            "txt_norm": jnp.linalg.norm(model.text(text), axis=1, keepdims=True),
        }
        for name, kind in (("first", "first"), ("gap", "mean"), ("max", "max")):
            model.text.pool_kind = kind
            embedded[f"ztxt_pool_{name}"] = normalize(model.text.head(model.text.pooled(hidden, text)))
        logits = {
            "logits_softmax": model.scale() * dots,
            "logits_sigmoid": model.scale() * dots + model.offset(),
            "t": model.scale()[None],
            "b": model.offset()[None],
        }
        return {"img_encoded": encoded, "txt_transformed": hidden} | pooled | embedded | norms | logits

    for name, value in jax.device_get(compute(params)).items():
        assert_close(value, golden[f"out/{name}"], FORWARD, name)


def batch_of(golden, mask=None):
    batch = {"image": jnp.asarray(golden["in/image"]), "text": jnp.asarray(golden["in/text"])}
    return batch if mask is None else batch | {"mask": jnp.asarray(mask)}


@pytest.mark.parametrize("kind", ["sigmoid", "softmax", "softmax_masked"])
def test_loss(golden, blueprint, params, kind):
    objective = Contrastive(loss_kind=kind.removesuffix("_masked"))
    batch = objective.prepare(batch_of(golden, golden["in/mask"] > 0 if "masked" in kind else None), train=True)
    loss, metrics = jax.jit(lambda p: objective.loss(blueprint.bind(p), batch, jax.random.key(0)))(params)
    assert_close(loss, golden[f"out/loss_{kind}"], FORWARD)
    if kind != "sigmoid":
        rows = float(batch["mask"].sum())
        assert float(metrics["matched"]) * len(batch["text"]) / rows == pytest.approx(
            golden[f"out/{kind}_ncorrect"].item()
        )


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_gradients(golden, blueprint, params, kind):
    objective = Contrastive(loss_kind=kind)
    batch = objective.prepare(batch_of(golden), train=True)
    gradient = jax.jit(jax.grad(lambda p: objective.loss(blueprint.bind(p), batch, jax.random.key(0))[0]))(params)
    found = to_big_vision(gradient)
    expected = under(golden, f"grad_{kind}")
    assert expected
    for name, value in expected.items():
        if name.endswith("key/bias"):  # Zero but for rounding.
            assert np.abs(found[name]).max() < 1e-6, name
        else:
            assert_close(found[name], value, GRADIENT, name)


def test_round_trip_is_exact(golden):
    theirs = under(golden, "params")
    back = to_big_vision(from_big_vision(theirs))
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    scanned = to_big_vision(from_big_vision(theirs), scan=True)
    again = from_big_vision(scanned)
    for name, value in from_big_vision(theirs).items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_loss_of_given_embeddings(golden):
    image, text = (jnp.asarray(golden[f"out/{n}"]) for n in ("zimg", "ztxt"))
    loss = sigmoid_loss(image, text, jnp.asarray(golden["out/t"])[0], jnp.asarray(golden["out/b"])[0])
    assert_close(loss, golden["out/loss_sigmoid"], FORWARD)
