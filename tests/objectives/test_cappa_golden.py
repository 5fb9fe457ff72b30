"""CapPa against the numbers of the original implementation (golden/cappa)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden, under

from capvl.convert.big_vision import from_big_vision, to_big_vision
from capvl.decoding.likelihood import log_likelihood
from capvl.models.captioner import CaptionerOptions
from capvl.models.parameters import Blueprint
from capvl.objectives.cappa import CapPa
from capvl.optim.optimizer import OptimizerOptions
from capvl.optim.schedules import ScheduleOptions
from capvl.step import TrainStep

pytestmark = pytest.mark.golden
FORWARD, GRADIENT = 1e-4, 2e-4


def options_of(golden, **changes) -> CaptionerOptions:
    cfg = {k: v.item() for k, v in under(golden, "cfg").items()}
    encoder = f"w{cfg['width']}d{cfg['depth']}h{cfg['heads']}m{cfg['mlp']}/{cfg['patch']}"
    options = dict(
        encoder=encoder,
        res=cfg["res"],
        decoder_layers=cfg["dec_layers"],
        vocab=cfg["vocab"],
        length=cfg["seq"],
        dtype="float32",
    )
    return CaptionerOptions(**(options | changes))


@pytest.fixture(scope="module")
def golden():
    return load_golden("cappa", "cappa.npz")


@pytest.fixture(scope="module")
def grads():
    return load_golden("cappa", "cappa_grads.npz")


@pytest.fixture(scope="module")
def params(golden):
    return jax.device_put(from_big_vision(under(golden, "params")))


@pytest.fixture(scope="module")
def batch(golden):
    return {"image": jnp.asarray(golden["in/image"]), "text": jnp.asarray(golden["in/labels"])}


VARIANTS = {"scanned": {}, "unrolled": {"unroll": True}, "remat": {"remat": "full"}, "named": {"remat": "named"}}
OBJECTIVES = {
    "ar": CapPa(pa=0.0),
    "pp": CapPa(pa=1.0),
    "smooth01": CapPa(pa=0.0, smoothing=0.1),
    "ar, small chunks": CapPa(pa=0.0, chunk=5),
    "pp, small chunks": CapPa(pa=1.0, chunk=5),
}


def loss_of(objective, model, batch, **changes):
    return objective.loss(model, objective.prepare(batch, train=True) | changes, jax.random.key(0))[0]


def mixed_loss(model, golden, batch):
    objective = CapPa(pa=0.5)
    ready = objective.prepare(batch, train=True)
    use_pa = jnp.asarray(golden["in/use_pp"])
    kv = model.decoder.image_kv(model.encode(ready["image"]))
    hidden = objective.hidden_mixed(model, ready["text"], kv, use_pa, jax.random.key(0))
    return objective.loss_of_hidden(model, hidden, ready, use_pa)[0]


@pytest.fixture(scope="module", params=["scanned", "unrolled", "remat"])
def outputs(request, golden, params, batch):
    """Everything that a forward pass is compared in, from one compilation a variant."""
    blueprint = Blueprint(options_of(golden, **VARIANTS[request.param]))
    class_tokens = jnp.asarray(golden["in/class_tokens"])

    @jax.jit
    def compute(params):
        model = blueprint.bind(params)
        encoder, image, text = model.encoder, batch["image"], batch["text"]
        stem = encoder.embed(image, jnp.float32)
        first = jax.tree.map(lambda p: p[0], encoder.blocks)
        x = encoder.add_positions(stem)
        encoded = model.encode(image)
        token_weights = CapPa(pa=0.0).token_weights(text, token_mask_BL=jnp.asarray(golden["in/label_masks"]))
        out = {
            "enc_stem": stem.reshape(golden["out/enc_stem"].shape),
            "enc_with_posemb": x,
            "enc_block00_sa": first.attn(first.norm1(x)),
            "enc_block00_plus_mlp": first(x),
            "encoded": encoded,
            "enc_gap_pre_logits": encoder.pool(encoded),
            "ar_logits": model.logits(image, text),
            "pp_logits": model.logits(image, text, parallel=True),
            "loss_mixed": mixed_loss(model, golden, batch),
            "loss_ar_label_masks": loss_of(CapPa(pa=0.0), model, batch, weights=token_weights),
            "nll_sum_per_example": -log_likelihood(model, image, text),
            "perplexity_eval": -log_likelihood(model, image, text),
        }
        out |= {f"loss_{name}": loss_of(o, model, batch) for name, o in OBJECTIVES.items()}
        out["scores"] = jax.lax.map(
            lambda tokens: log_likelihood(model, image, jnp.broadcast_to(tokens[None], (len(image), len(tokens)))),
            class_tokens,
        ).T
        return out

    return jax.device_get(compute(params))


def test_forward_pass(outputs, golden):
    named = {"loss_smooth01": "loss_ar_smooth01"}
    for name, value in outputs.items():
        expected = golden["out/" + named.get(name, name.split(",")[0])]
        assert_close(value, expected, FORWARD, name)


def test_loss_weights_and_per_example_losses(golden, params, batch):
    objective = CapPa(pa=0.0)
    b = len(golden["in/image"])
    weights = np.asarray(objective.token_weights(batch["text"]))
    np.testing.assert_array_equal(weights > 0, golden["out/loss_weights"] > 0)
    assert_close(weights.sum(1), np.ones(b), 1e-6)
    blueprint = Blueprint(options_of(golden))
    for parallel, name in ((False, "loss_ar_per_example"), (True, "loss_pp_per_example")):

        @jax.jit
        def nll(params, parallel=parallel):
            return -log_likelihood(blueprint.bind(params), batch["image"], batch["text"], parallel=parallel)

        assert_close(
            np.asarray(nll(params)) / np.asarray(batch["text"] != 0).sum(1), golden["out/" + name], FORWARD, name
        )


@pytest.mark.parametrize("kind, pool, tensor", [("vitmap", "map", "pre_logits"), ("vittok", "cls", "pre_logits")])
def test_other_poolings(golden, kind, pool, tensor):
    extra = {f"encoder/{k}": v for k, v in under(golden, f"out/{kind}_extra_params").items()}
    head = {k.rsplit("/", 1)[1]: extra.pop(k) for k in list(extra) if k.startswith("encoder/head/")}
    blueprint = Blueprint(options_of(golden, pool=pool))
    params = jax.device_put(from_big_vision(under(golden, "params") | extra))
    pooled = jax.jit(lambda p: blueprint.bind(p).features(jnp.asarray(golden["in/image"])))(params)
    assert_close(pooled, golden[f"out/{kind}_{tensor}"], FORWARD, pool)
    if head:
        logits = np.asarray(pooled) @ head["kernel"] + head["bias"]
        assert_close(logits, golden[f"out/{kind}_logits"], FORWARD, "head")


@pytest.mark.parametrize("variant", ["scanned", "unrolled", pytest.param("named", marks=pytest.mark.long)])
def test_every_gradient(golden, grads, params, batch, variant):
    blueprint = Blueprint(options_of(golden, **VARIANTS[variant]))
    names = ("ar", "pp", "smooth01") if variant == "scanned" else ("ar", "pp")
    losses = {name: lambda m, o=OBJECTIVES[name]: loss_of(o, m, batch) for name in names}
    if variant == "scanned":
        losses["mixed"] = lambda m: mixed_loss(m, golden, batch)

    @jax.jit
    def gradients(params):
        return {n: jax.grad(lambda p, f=f: f(blueprint.bind(p)))(params) for n, f in losses.items()}

    for name, ours in gradients(params).items():
        ours = to_big_vision(ours)
        expected = under(grads, f"grad_{name}")
        assert expected, f"no gradients under grad_{name}"
        largest = max(np.abs(g).max() for g in expected.values())
        for path, gradient in expected.items():
            if path.endswith("key/bias"):  # Exactly zero on paper: only noise to compare.
                assert np.abs(ours[path]).max() < 1e-5 * largest
                continue
            assert_close(ours[path], gradient, GRADIENT, f"{name} {path}")


def test_scanned_layout_round_trip(golden, params):
    theirs = load_golden("cappa", "cappa_scan.npz")
    scanned = under(theirs, "params_scan")
    ours = from_big_vision(scanned)
    assert ours.keys() == params.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, params[path], err_msg=path)
    for layout, scan in ((scanned, True), (under(golden, "params"), False)):
        back = to_big_vision(ours, scan=scan)
        assert back.keys() == layout.keys()
        for path, value in layout.items():
            np.testing.assert_array_equal(back[path], value, err_msg=path)
    np.testing.assert_array_equal(theirs["out/ar_logits"].shape, golden["out/ar_logits"].shape)
    assert_close(theirs["out/ar_logits"], golden["out/ar_logits"], FORWARD)


def trajectory(golden, params, batch, steps, objective, **step_options):
    """Losses and gradient norms of full updates with the golden file's optimizer and schedule."""
    step = TrainStep(
        objective,
        options_of(golden),
        OptimizerOptions(name="adafactor", lr=1e-3, weight_decay=1e-4, clip_norm=1.0),
        ScheduleOptions(kind="cosine", warmup=2),
        steps=10,
        **step_options,
    )
    state = step.init(params)
    losses, norms, update = [], [], jax.jit(step)
    for _ in range(steps):
        state, metrics = update(state, batch)
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
    return state, np.asarray(losses), np.asarray(norms), step


def test_trajectory(golden, grads, params, batch):
    steps = len(golden["out/traj_ar_losses"])
    state, losses, norms, step = trajectory(golden, params, batch, steps, CapPa(pa=0.0))
    assert_close([step.learning_rate(i) for i in range(steps)], golden["out/traj_schedule"], FORWARD, "schedule")
    assert_close(losses, golden["out/traj_ar_losses"], FORWARD, "losses")
    assert_close(norms, golden["out/traj_ar_gradnorms"], GRADIENT, "gradient norms")
    ours = to_big_vision(state.params)
    for path, expected in under(grads, "traj_ar_params4").items():
        if path.endswith("key/bias"):  # Its gradient is noise, which the optimizer scales up.
            continue
        assert_close(ours[path], expected, GRADIENT, path)


def test_mixed_trajectory(golden, params, batch, monkeypatch):
    steps = len(golden["out/traj_mixed_losses"])
    draw = jnp.where(jnp.asarray(golden["in/use_pp"]), 0.0, 1.0)
    uniform = jax.random.uniform

    def drawn(key, shape=(), *args):
        return draw if shape == draw.shape and not args else uniform(key, shape, *args)

    monkeypatch.setattr(jax.random, "uniform", drawn)
    losses = trajectory(golden, params, batch, steps, CapPa(pa=0.5))[1]
    assert_close(losses, golden["out/traj_mixed_losses"], FORWARD)
