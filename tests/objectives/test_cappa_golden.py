"""CapPa against the numbers of the original implementation (golden/cappa)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden, under

from capvl.convert.big_vision import from_big_vision, to_big_vision
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
    return jax.tree.map(jnp.asarray, from_big_vision(under(golden, "params")))


@pytest.fixture(scope="module")
def batch(golden):
    return {"image": jnp.asarray(golden["in/image"]), "text": jnp.asarray(golden["in/labels"])}


@pytest.fixture(scope="module", params=["scanned", "unrolled", "remat"])
def model(request, golden, params):
    changes = {"scanned": {}, "unrolled": {"unroll": True}, "remat": {"remat": "full"}}[request.param]
    return Blueprint(options_of(golden, **changes)).bind(params)


def test_encoder_stages(model, golden):
    image = jnp.asarray(golden["in/image"])
    encoder = model.encoder
    stem = encoder.embed(image, jnp.float32)
    assert_close(stem.reshape(golden["out/enc_stem"].shape), golden["out/enc_stem"], FORWARD, "stem")
    x = encoder.add_positions(stem)
    assert_close(x, golden["out/enc_with_posemb"], FORWARD, "positions")
    first = jax.tree.map(lambda p: p[0], encoder.blocks)
    assert_close(first.attn(first.norm1(x)), golden["out/enc_block00_sa"], FORWARD, "first self-attention")
    assert_close(first(x), golden["out/enc_block00_plus_mlp"], FORWARD, "first block")


def test_encoded_and_mean_pool(model, golden):
    encoded = model.encode(jnp.asarray(golden["in/image"]))
    assert_close(encoded, golden["out/encoded"], FORWARD, "encoded")
    assert_close(model.encoder.pool(encoded), golden["out/enc_gap_pre_logits"], FORWARD, "mean pool")


def test_map_pool(golden):
    extra = {f"encoder/{k}": v for k, v in under(golden, "out/vitmap_extra_params").items()}
    head = {k: extra.pop(k) for k in list(extra) if k.startswith("encoder/head/")}
    params = from_big_vision(under(golden, "params") | extra)
    model = Blueprint(options_of(golden, pool="map")).bind(jax.tree.map(jnp.asarray, params))
    pooled = model.features(jnp.asarray(golden["in/image"]))
    assert_close(pooled, golden["out/vitmap_pre_logits"], FORWARD, "MAP pool")
    logits = np.asarray(pooled) @ head["encoder/head/kernel"] + head["encoder/head/bias"]
    assert_close(logits, golden["out/vitmap_logits"], FORWARD, "MAP logits")


def test_class_token(golden):
    extra = {f"encoder/{k}": v for k, v in under(golden, "out/vittok_extra_params").items()}
    params = from_big_vision(under(golden, "params") | extra)
    model = Blueprint(options_of(golden, pool="cls")).bind(jax.tree.map(jnp.asarray, params))
    pooled = model.features(jnp.asarray(golden["in/image"]))
    assert_close(pooled, golden["out/vittok_pre_logits"], FORWARD, "class token")


def test_logits(model, golden, batch):
    assert_close(model.logits(batch["image"], batch["text"]), golden["out/ar_logits"], FORWARD, "AR logits")
    parallel = model.logits(batch["image"], batch["text"], parallel=True)
    assert_close(parallel, golden["out/pp_logits"], FORWARD, "PP logits")


def prepared(objective, batch):
    return objective.prepare(batch, train=True)


@pytest.mark.parametrize(
    "name, objective",
    [
        ("out/loss_ar", CapPa(pa=0.0)),
        ("out/loss_pp", CapPa(pa=1.0)),
        ("out/loss_ar_smooth01", CapPa(pa=0.0, smoothing=0.1)),
    ],
)
@pytest.mark.parametrize("chunk", [5, 1024])
def test_losses(model, golden, batch, name, objective, chunk):
    import dataclasses

    objective = dataclasses.replace(objective, chunk=chunk)
    loss, _ = objective.loss(model, prepared(objective, batch), jax.random.key(0))
    assert_close(loss, golden[name], FORWARD, name)


def test_loss_with_token_masks(model, golden, batch):
    objective = CapPa(pa=0.0)
    weights = objective.token_weights(batch["text"], token_mask_BL=jnp.asarray(golden["in/label_masks"]))
    loss, _ = objective.loss(model, prepared(objective, batch) | {"weights": weights}, jax.random.key(0))
    assert_close(loss, golden["out/loss_ar_label_masks"], FORWARD)


def mixed_loss(model, golden, batch):
    objective = CapPa(pa=0.5)
    ready = prepared(objective, batch)
    use_pa = jnp.asarray(golden["in/use_pp"])
    kv = model.decoder.image_kv(model.encode(ready["image"]))
    hidden = objective.hidden_mixed(model, ready["text"], kv, use_pa, jax.random.key(0))
    return objective.loss_of_hidden(model, hidden, ready, use_pa)[0]


def test_mixed_loss(model, golden, batch):
    assert_close(mixed_loss(model, golden, batch), golden["out/loss_mixed"], FORWARD)


@pytest.mark.parametrize("name", ["ar", "pp", "smooth01", "mixed"])
@pytest.mark.parametrize("variant", ["scanned", "unrolled", "named"])
def test_every_gradient(golden, grads, params, batch, name, variant):
    changes = {"scanned": {}, "unrolled": {"unroll": True}, "named": {"remat": "named"}}[variant]
    blueprint = Blueprint(options_of(golden, **changes))
    objective = CapPa(pa=float(name == "pp"), smoothing=0.1 if name == "smooth01" else 0.0)

    def loss(params):
        model = blueprint.bind(params)
        if name == "mixed":
            return mixed_loss(model, golden, batch)
        return objective.loss(model, prepared(objective, batch), jax.random.key(0))[0]

    ours = to_big_vision(jax.jit(jax.grad(loss))(params))
    expected = under(grads, f"grad_{name}")
    assert expected, f"no gradients under grad_{name}"
    largest = max(np.abs(g).max() for g in expected.values())
    for path, gradient in expected.items():
        if path.endswith("key/bias"):  # Exactly zero on paper: only noise to compare.
            assert np.abs(ours[path]).max() < 1e-5 * largest
            continue
        assert_close(ours[path], gradient, GRADIENT, path)


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
    logits = Blueprint(options_of(golden)).bind(jax.tree.map(jnp.asarray, ours))
    logits = logits.logits(jnp.asarray(golden["in/image"]), jnp.asarray(golden["in/labels"]))
    assert_close(logits, theirs["out/ar_logits"], FORWARD)


def test_class_scores_and_perplexity(model, golden, batch):
    from capvl.evals.likelihood import log_likelihood

    nll = -log_likelihood(model, batch["image"], batch["text"])
    assert_close(nll, golden["out/nll_sum_per_example"], FORWARD, "summed NLL")
    assert_close(nll, golden["out/perplexity_eval"], FORWARD, "perplexity evaluator")
    b = len(golden["in/image"])
    scores = [
        log_likelihood(model, batch["image"], jnp.broadcast_to(jnp.asarray(tokens)[None], (b, len(tokens))))
        for tokens in golden["in/class_tokens"]
    ]
    assert_close(np.stack(scores, axis=1), golden["out/scores"], FORWARD, "class scores")


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
