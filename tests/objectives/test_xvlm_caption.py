"""Captioning with X-VLM: the smoothed loss, the prompt that isn't learned, self-critical training behind it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from handmade import Letters, picture

from capvl.data.options import DataOptions
from capvl.data.randomness import Uniforms
from capvl.data.text import tokenizers
from capvl.decoding.generate import Decoding, generate
from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.models.xvlm_captioner import XVlmCaptionerOptions
from capvl.objectives.xvlm_caption import XVlmCaption, XVlmScst

TINY = dict(
    encoder="w16d1h2m32/8",
    res=16,
    text="w16d2h2m24",
    cross_layers=1,
    vocab=40,
    start=2,
    length=8,
    text_positions=12,
    words="ab",
    dtype="float32",
    dropout=0.0,
)
END = 1


@pytest.fixture(scope="module")
def made():
    """(blueprint, random parameters)."""
    blueprint = Blueprint(XVlmCaptionerOptions(**TINY))
    rng = np.random.default_rng(0)
    params = {k: 0.3 * rng.normal(size=v.shape) + k.endswith("scale") for k, v in blueprint.shapes.items()}
    return blueprint, jax.device_put({k: v.astype(np.float32) for k, v in params.items()})


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.setattr(tokenizers, "load", lambda *_: LettersFromStart())
    monkeypatch.setattr(DataOptions, "tokenizer_path", lambda self: "letters")


@dataclasses.dataclass(frozen=True)
class LettersFromStart(Letters):
    start_id: int | None = None


def batch_of():
    rng = np.random.default_rng(1)
    text = rng.integers(5, 40, (3, 8))
    text[0, 6:] = 0
    return {
        "image": jnp.asarray(rng.integers(0, 256, (3, 16, 16, 3)), jnp.uint8),
        "text": jnp.asarray(text, jnp.int32),
        "prompt": jnp.full(3, 2, jnp.int32),
        "flip": jnp.zeros(3, bool),
        "has_image": jnp.ones(3, bool),
        "cut": jnp.zeros(3, bool),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_the_official_code(made, smoothing):
    """1 - s on the token and s / V on each other, whatever their sum; no prompt, no padding; mean over tokens."""
    blueprint, params = made
    objective, batch = XVlmCaption(smoothing=smoothing), batch_of()

    @jax.jit
    def both(params):
        model = blueprint.bind(params)
        ready = objective.prepare(batch, train=True)
        return objective.loss(model, ready, None), model.logits(ready["image"], batch["text"])

    (loss, metrics), logits = both(params)
    logp = np.asarray(jax.nn.log_softmax(logits))
    target = np.full(logp.shape, smoothing / TINY["vocab"])
    np.put_along_axis(target, np.asarray(batch["text"])[..., None], 1 - smoothing, axis=2)
    counted = np.asarray(batch["text"]) != 0
    counted[:, :2] = False
    expected = -(target * logp).sum(axis=2)[counted].mean()
    assert_close(loss, expected, 1e-5)
    assert_close(metrics["nll"], expected, 1e-5)


def test_captions_stand_behind_the_models_words(made, letters):
    options = made[0].options
    example = {"image": picture(), "text": ["cde"]}
    objective = XVlmCaption()
    out = objective.transform(options, DataOptions(name="x"), train=True)(example, Uniforms(0, 0))
    ids = Letters()
    assert out["text"].tolist() == [*ids("abcde", 6)[:5].tolist(), END, 0, 0] and out["prompt"] == 2
    np.testing.assert_array_equal(objective.prompt(options, ids, "caption"), out["text"][:2])
    np.testing.assert_array_equal(options.prompt(ids, "caption"), out["text"][:2])
    other = XVlmCaption(prompts=(("caption", "z"),))
    np.testing.assert_array_equal(other.prompt(options, ids, "caption"), ids("z", 2)[:1])
    with pytest.raises(UserError, match="wasn't trained for the task 'answer'"):
        objective.prompt(options, ids, "answer", "a")


@pytest.mark.long
def test_scst_learns_what_stands_behind_the_prompt(made, letters, tmp_path):
    """Its gradient is that of minus advantage times log-probability of the written tokens alone."""
    from capvl.losses.cider import BUCKETS, ORDERS, cider_d

    path = tmp_path / "f.npz"
    table = np.ones((ORDERS, BUCKETS), np.float32)
    np.savez(path, counts=table, documents=np.int64(50))
    blueprint, params = made
    objective = XVlmScst(frequencies=str(path), samples=2, references=2, end=END)
    transform = objective.transform(blueprint.options, DataOptions(name="x"), train=True)
    row = transform({"image": picture(), "text": ["cde", "cdf"]}, Uniforms(0, 0))
    spec = objective.batch_spec(blueprint.options, 2)
    assert {k: (v.shape[1:], v.dtype) for k, v in spec.items()} == {k: (v.shape, v.dtype) for k, v in row.items()}
    batch = {k: jnp.stack([jnp.asarray(v)] * 2) for k, v in row.items()}
    batch["image"] = batch["image"].at[1, :8].set(250)
    ready, key = objective.prepare(batch, train=True), jax.random.key(0)
    words = [int(i) for i in row["prompt"] if i]
    assert words == Letters()("ab", 3)[:2].tolist()

    @jax.jit
    def write(params):
        model = blueprint.bind(params)
        kv = model.decoder.image_kv(model.encode(ready["image"]))
        how = dict(prompt_BP=ready["prompt"], key=key)
        sampled, _ = generate(model, kv, 8, END, Decoding(temperature=1.0), **how, samples=2)
        return sampled, generate(model, kv, 8, END, prompt_BP=ready["prompt"])[0]

    sampled, greedy = write(params)
    ready["references"] = ready["references"].at[:, 0].set(jnp.where(sampled[::2] == END, 0, sampled[::2]))

    def score(tokens, references):
        return cider_d(jnp.where(tokens == END, 0, tokens), references, table, 50)

    advantage = score(sampled, jnp.repeat(ready["references"], 2, axis=0))
    advantage = advantage - jnp.repeat(score(greedy, ready["references"]), 2)
    assert float(jnp.abs(advantage).max()) > 0.1

    def by_hand(params):
        model = blueprint.bind(params)
        kv = model.decoder.image_kv(model.encode(ready["image"]))
        whole = jnp.concatenate([jnp.broadcast_to(jnp.array(words, jnp.int32)[None], (4, 2)), sampled[:, :6]], axis=1)
        logp = jax.nn.log_softmax(model.decoder.project(model.decoder.causal(whole, kv)))[:, 2:]
        chosen = jnp.take_along_axis(logp, sampled[:, :6, None], axis=2)[..., 0]
        return -(advantage * jnp.where(sampled[:, :6] != 0, chosen, 0.0).sum(axis=1)).mean()

    found, _ = jax.jit(jax.grad(lambda p: objective.loss(blueprint.bind(p), ready, key), has_aux=True))(params)
    expected = jax.jit(jax.grad(by_hand))(params)
    for name, value in expected.items():
        assert_close(found[name], value, 1e-3, name)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: XVlmCaption(tasks=("answer",)), "learns .'caption',. alone"),
        (lambda: XVlmCaptionerOptions(**TINY | {"start": 40}), "model.start must be an id below"),
        (lambda: XVlmCaptionerOptions(**TINY, reads_end=False), "reads_end True"),
        (lambda: XVlmCaptionerOptions(**TINY | {"cross_layers": 2}), "less than the 2 layers"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(UserError, match=message):
        make()
