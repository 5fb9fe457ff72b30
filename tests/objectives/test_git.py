"""GIT's objective and decoder: what shares an image, what is hidden, what is cut, what is drawn; layouts and caches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from handmade import Letters

from capvl import recipes
from capvl.data.examples.tasks import TaskText
from capvl.data.images.buckets import Bucketed
from capvl.data.reading.loader import TrainLoader
from capvl.decoding.generate import Decoding, generate
from capvl.errors import UserError
from capvl.models.git import GitOptions
from capvl.models.parameters import Blueprint
from capvl.objectives.git import Git
from capvl.objectives.scst import Scst

TINY = dict(
    encoder="w16d2h2m32/8",
    res=16,
    text="w24d2h2m32",
    vocab=40,
    start=2,
    length=8,
    text_positions=10,
    dtype="float32",
    dropout=0.0,
)
VARIANTS = {"prefix": {}, "cross": {"fusion": "cross"}, "pre": {"norm": "pre"}, "plain": {"projection_norm": False}}
VARIANTS["untied"] = {"tied": False}


def make(seed=0, **changes):
    """(blueprint, random parameters)."""
    blueprint = Blueprint(GitOptions(**TINY | changes))
    rng = np.random.default_rng(seed)
    params = {k: 0.3 * rng.normal(size=v.shape) + k.endswith("scale") for k, v in blueprint.shapes.items()}
    return blueprint, jax.device_put({k: v.astype(np.float32) for k, v in params.items()})


def batch_of(rng, rows=4, texts=0, length=8):
    several = (rows, texts) if texts else (rows,)
    lengths = rng.integers(3, length + 1, several)
    text = np.where(np.arange(length) < lengths[..., None], rng.integers(5, 40, (*several, length)), 0)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (rows, 16, 16, 3)), jnp.uint8),
        "text": jnp.asarray(text, jnp.int32),
        "prompt": jnp.asarray(rng.integers(0, 3, several), jnp.int32),
        "flip": jnp.zeros(rows, bool),
        "has_image": jnp.ones(rows, bool),
        "cut": jnp.zeros(several, bool),
    }


def loss_of(blueprint, objective, key=None):
    def loss(params, batch):
        return objective.loss(blueprint.bind(params), objective.prepare(batch, train=True), key)[0]

    return loss


def test_texts_of_an_image_share_its_encoding():
    """Several texts of an image give loss and gradients of as many copies of the image."""
    blueprint, params = make()
    batch = batch_of(np.random.default_rng(0), texts=3)
    apart = {k: jnp.repeat(v, 3, axis=0) for k, v in batch.items() if k in ("image", "flip", "has_image")}
    apart |= {k: batch[k].reshape(-1, *batch[k].shape[2:]) for k in ("text", "prompt", "cut")}
    together = jax.jit(jax.value_and_grad(loss_of(blueprint, Git(texts=3))))(params, batch)
    copies = jax.jit(jax.value_and_grad(loss_of(blueprint, Git())))(params, apart)
    assert_close(together[0], copies[0], 1e-6)
    for name, value in copies[1].items():
        assert_close(together[1][name], value, 1e-4, name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cache_gives_what_a_whole_pass_gives(variant):
    blueprint, params = make(**VARIANTS[variant])
    batch = batch_of(np.random.default_rng(1))
    labels = batch["text"].at[:, :].set(jnp.maximum(batch["text"], 3))

    @jax.jit
    def run(params):
        model = blueprint.bind(params)
        kv = model.decoder.image_kv(model.encode(batch["image"].astype(jnp.float32) / 255))
        whole = model.decoder.project(model.decoder.causal(labels, kv))
        cache = model.decoder.init_cache(len(labels), labels.shape[1])

        def step(carried, given):
            cache, token = carried
            place, label = given
            logits, cache = model.decoder.step(token, kv, cache, place)
            return (cache, label), logits

        first = jnp.full((len(labels),), model.decoder.start, jnp.int32)
        places = jnp.arange(labels.shape[1])
        _, rows = jax.lax.scan(step, (cache, first), (places, labels.T))
        return whole, rows.swapaxes(0, 1)

    whole, stepped = run(params)
    assert_close(stepped, whole, 1e-5)


@pytest.mark.parametrize("variant", ["prefix", "cross"])
def test_text_sees_only_what_is_before_it(variant):
    blueprint, params = make(**VARIANTS[variant])
    labels = batch_of(np.random.default_rng(2), rows=1)["text"]
    image = jnp.zeros((1, 16, 16, 3))

    def logits(embedding):
        model = blueprint.bind(params)
        model.decoder.tokens[...] = embedding
        hidden = model.decoder.causal(labels, model.decoder.image_kv(model.encode(image)))
        return hidden[0].sum(axis=-1)

    distinct = jnp.arange(labels.shape[1], dtype=jnp.int32)[None] + 5
    labels = distinct
    moved = np.abs(jax.jit(jax.jacrev(logits))(params["decoder/tokens"])).sum(axis=2)
    for i in range(labels.shape[1]):
        for j in range(labels.shape[1]):
            assert (moved[i, int(labels[0, j])] > 0) == (j < i)


@pytest.mark.parametrize("changes", [{"unroll": True, "fusion": "cross"}, {"remat": "named", "norm": "pre"}])
def test_layouts_agree(changes):
    """Unrolled and recomputed forms have the loss and gradients of the plain one."""
    base = {k: v for k, v in changes.items() if k in ("norm", "fusion")}
    batch = batch_of(np.random.default_rng(3))
    results = []
    for own in (base, changes):
        blueprint, params = make(**own)
        results.append(jax.jit(jax.value_and_grad(loss_of(blueprint, Git())))(params, batch))
    assert_close(results[1][0], results[0][0], 1e-6)
    for name, value in results[0][1].items():
        assert_close(results[1][1][name], value, 1e-4, name)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_is_one_device(tied):
    """Loss and gradients over data, weights and heads are those of one device."""
    from capvl.parallel.mesh import MeshOptions, make_mesh
    from capvl.parallel.rules import batch_sharding

    blueprint, params = make(tied=tied)
    batch = batch_of(np.random.default_rng(4), rows=4, texts=2)
    step = jax.jit(jax.value_and_grad(loss_of(blueprint, Git(texts=2))))
    expected = jax.device_get(step(params, batch))
    mesh = make_mesh(MeshOptions(replica=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        shardings = blueprint.shardings(mesh)
        if not tied:
            assert tuple(shardings["decoder/logits/kernel"].spec) == ("fsdp", "tensor")
        found = step(
            {k: jax.device_put(v, shardings[k]) for k, v in params.items()},
            jax.device_put(batch, batch_sharding(mesh)),
        )
    assert_close(found[0], expected[0], 1e-5)
    for name, value in expected[1].items():
        assert_close(found[1][name], value, 1e-4, name)


def git_recipe(data_dir, **changes):
    values = {
        "steps": 4,
        "batch_size": 8,
        "objective": {"name": "git"},
        "model": dict(TINY),
        "data": {"name": "scenes/tiny", "data_dir": data_dir, "tokenizer": "{data_dir}/scenes/wordpiece.txt"},
        "optimizer": {"name": "adamw", "lr": 1e-3},
        "schedule": {"warmup": 1},
    }
    return recipes.resolve(values | changes)


@pytest.mark.parametrize("variant", ["prefix", "cross"])
def test_without_an_image_only_the_text_counts(variant):
    blueprint, params = make(**VARIANTS[variant])
    batch = batch_of(np.random.default_rng(5))
    loss = jax.jit(loss_of(blueprint, Git()))
    other = batch | {"image": 255 - batch["image"]}
    assert float(loss(params, batch)) != float(loss(params, other))
    unseen = {"has_image": jnp.zeros(4, bool)}
    assert float(loss(params, batch | unseen)) == float(loss(params, other | unseen))


def test_blind_is_grey():
    blueprint, params = make()
    batch = batch_of(np.random.default_rng(5))
    loss = jax.jit(loss_of(blueprint, Git(blind=True)))
    assert float(loss(params, batch)) == float(loss(params, batch | {"image": 255 - batch["image"]}))


def test_masked_language_modelling():
    """Hidden tokens are not read, all others are, and only hidden ones count."""
    blueprint, params = make()
    objective = Git(kind="masked", mask_ratio=0.4, mask_id=4, smoothing=0.0)
    batch = batch_of(np.random.default_rng(6)) | {"prompt": jnp.zeros(4, jnp.int32)}
    ready = objective.prepare(batch, train=True)
    keys = jax.random.split(jax.random.key(3), 4)

    @jax.jit
    def run(text):
        model = blueprint.bind(params)
        kv = model.decoder.image_kv(model.encode(ready["image"]))
        return objective._masked(model, ready | {"text": text}, kv, keys)

    states, hidden = run(batch["text"])
    real = np.asarray(batch["text"]) != 0
    hidden = np.asarray(hidden) > 0
    assert not (hidden & ~real).any()
    np.testing.assert_array_equal(hidden.sum(1), np.maximum(np.round(0.4 * real.sum(1)), 1))
    changed = jnp.where(hidden, 7, batch["text"])
    again, _ = run(changed)
    np.testing.assert_array_equal(states, again)
    row = int(np.argmax((real & ~hidden).sum(1)))
    last = np.flatnonzero(real[row] & ~hidden[row])[-1]
    moved, _ = run(changed.at[row, last].set(9))
    assert np.abs(np.asarray(moved - states))[row, :last].max() > 1e-4  # What is behind is seen.


def test_dropout_is_the_keys():
    blueprint, params = make(dropout=0.3)
    batch = batch_of(np.random.default_rng(7))
    plain = jax.jit(loss_of(blueprint, Git()))(params, batch)
    objective = Git()
    keyed = jax.jit(lambda p, k: objective.loss(blueprint.bind(p), objective.prepare(batch, train=True), k)[0])
    losses = [float(keyed(params, jax.random.key(k))) for k in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert abs(losses[0] - float(plain)) > 1e-4


def test_context_joins_the_image():
    """Further tokens are seen as image tokens are, and padding among them isn't."""
    blueprint, params = make()
    batch = batch_of(np.random.default_rng(8))
    image = batch["image"].astype(jnp.float32) / 255

    @jax.jit
    def run(context):
        model = blueprint.bind(params)
        kv = model.decoder.image_kv(model.encode(image), context_BC=context)
        return model.decoder.project(model.decoder.causal(batch["text"], kv))

    none = run(None)
    blank = run(jnp.zeros((4, 3), jnp.int32))
    some = run(jnp.full((4, 3), 9, jnp.int32).at[0].set(0))
    assert_close(blank, none, 1e-5)
    assert_close(some[0], none[0], 1e-5)
    assert np.abs(np.asarray(some[1] - none[1])).max() > 1e-3


def test_clips():
    """Frames in another order give other tokens (where their vectors differ) but the same mean."""
    image = jnp.asarray(np.random.default_rng(9).uniform(-1, 1, (2, 3, 16, 16, 3)), jnp.float32)
    for pool in ("concat", "mean"):
        blueprint, params = make(frames=3, frame_pool=pool)
        model = blueprint.bind(params)
        encode = jax.jit(lambda image, params=params, b=blueprint: b.bind(params).encode(image))
        features = jax.jit(lambda image, params=params, b=blueprint: b.bind(params).features(image))
        tokens, turned = encode(image), encode(image[:, ::-1])
        assert tokens.shape == (2, (3 if pool == "concat" else 1) * 5, 16)
        assert (np.abs(np.asarray(tokens - turned)).max() < 1e-5) == (pool == "mean")
        assert_close(features(image), features(image[:, ::-1]), 1e-5)
    with pytest.raises(ValueError, match="a clip of 4 frames for a model of 3"):
        model.encode(jnp.concatenate([image, image[:, :1]], axis=1))


def test_sides_go_round_batch_by_batch(data_dir):
    recipe = git_recipe(data_dir, objective={"name": "git", "sides": [8, 16, 24]}, model=TINY | {"vocab": 300})
    recipe.objective.check(recipe.model, 8, 1)
    transform = recipe.objective.transform(recipe.model, recipe.data, train=True)
    assert isinstance(transform, Bucketed)
    assert recipe.buckets() == ((8, 8), (16, 16), (24, 24))
    assert recipe.batch_spec(bucket=recipe.buckets()[2])["image"].shape == (8, 24, 24, 3)
    options = dict(batch=4, seed=0)

    def sides(position):
        data = TrainLoader(recipe.data, transform, recipe.objective.features(), position=position, **options)
        return [next(data)["image"].shape[1] for _ in range(4)]

    assert sides(0) == [8, 16, 24, 8]
    assert sides(8) == [24, 8, 16, 24]  # As the uninterrupted run would.
    evaluation = recipe.objective.transform(recipe.model, recipe.data, train=False)
    assert isinstance(evaluation, TaskText)


def test_the_work_of_an_example_is_the_mean_over_the_sides():
    options = GitOptions(**TINY)
    each = [Git().flops(dataclasses.replace(options, res=side)) for side in (8, 24)]
    assert Git(sides=(8, 24)).flops(options) == sum(each) / 2 != Git().flops(options)


def test_other_sides_in_one_step(data_dir):
    blueprint, params = make()
    loss = jax.jit(loss_of(blueprint, Git()))
    batch = batch_of(np.random.default_rng(10))
    for side in (8, 24):
        image = jnp.zeros((4, side, side, 3), jnp.uint8)
        assert np.isfinite(float(loss(params, batch | {"image": image})))


@pytest.mark.long
def test_self_critical_gradient(tmp_path):
    """The gradient is that of -(reward - greedy reward) * log-probability of what was sampled."""
    from capvl.data.text import frequencies
    from capvl.losses.cider import BUCKETS, ORDERS, cider_d

    np.savez(tmp_path / "f.npz", counts=np.ones((ORDERS, BUCKETS), np.float32), documents=np.int64(50))
    blueprint, params = make()
    objective = Scst(frequencies=str(tmp_path / "f.npz"), samples=3, references=2, end=1)
    rng = np.random.default_rng(11)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (2, 16, 16, 3)), jnp.uint8),
        "references": jnp.asarray(rng.integers(3, 40, (2, 2, 8)), jnp.int32),
    }
    ready, key = objective.prepare(batch, train=True), jax.random.key(0)
    table, documents = frequencies.read(str(tmp_path / "f.npz"))

    def score(tokens, references):
        return cider_d(jnp.where(tokens == 1, 0, tokens), references, table, documents)

    @jax.jit
    def write(params):
        model = blueprint.bind(params)
        kv = model.decoder.image_kv(model.encode(ready["image"]))
        sampled, _ = generate(model, kv, 8, 1, Decoding(temperature=1.0), key=key, samples=3)
        return sampled, generate(model, kv, 8, 1)[0]

    sampled, greedy = write(params)
    # A reference that is what the model writes, so that there is something to be learned.
    ready["references"] = ready["references"].at[:, 0].set(jnp.where(sampled[::3] == 1, 0, sampled[::3]))
    score = jax.jit(score)
    reward, base = score(sampled, jnp.repeat(ready["references"], 3, axis=0)), score(greedy, ready["references"])
    advantage = reward - jnp.repeat(base, 3)
    assert float(jnp.abs(advantage).max()) > 0.1

    def by_hand(params):
        model = blueprint.bind(params)
        kv = model.decoder.image_kv(model.encode(ready["image"]))
        logp = jax.nn.log_softmax(model.decoder.project(model.decoder.causal(sampled, kv)))
        chosen = jnp.where(sampled != 0, jnp.take_along_axis(logp, sampled[..., None], axis=2)[..., 0], 0.0)
        return -(advantage * chosen.sum(axis=1)).mean()

    found, metrics = jax.jit(jax.grad(lambda p: objective.loss(blueprint.bind(p), ready, key), has_aux=True))(params)
    expected = jax.jit(jax.grad(by_hand))(params)
    for name, value in expected.items():
        assert_close(found[name], value, 1e-3, name)
    assert_close(metrics["reward"], reward.mean(), 1e-4)


BAD = [
    (dict(model=TINY | {"fusion": "corss"}), "Did you mean 'cross'"),
    (dict(model=TINY | {"start": 40}), "start an id below vocab"),
    (dict(model=TINY | {"length": 11}), "more than model.text_positions=10"),
    (dict(model=TINY | {"max_side": 12}), "max_side=12 should be a multiple"),
    (dict(model=TINY | {"max_side": 24, "frames": 2}), "goes with images"),
    (dict(model=TINY | {"max_side": 24, "stem": "conv"}), "convolutions would read the padding"),
    (dict(objective={"name": "git", "tasks": ["captoin"]}), "Did you mean 'caption'"),
    (dict(objective={"name": "git", "tasks": []}), "one task or more"),
    (dict(objective={"name": "git", "sides": [12]}), "12 is not a multiple of the patch 8"),
    (dict(objective={"name": "git", "kind": "masked"}), "mask_id=103 is not an id below"),
    (
        dict(objective={"name": "git", "kind": "masked", "mask_id": 4}, model=TINY | {"length": 10}),
        "model.text_positions must be at least 11",
    ),
    (dict(objective={"name": "scst", "frequencies": "none.npz"}), "frequencies 'none.npz' are missing"),
]


@pytest.mark.parametrize("changes, message", BAD)
def test_bad_options(data_dir, changes, message):
    with pytest.raises(UserError, match=message):
        recipe = git_recipe(data_dir, **changes)
        recipe.objective.check(recipe.model, 8, 1)


def test_unknown_tasks(data_dir):
    recipe = git_recipe(data_dir, objective={"name": "git", "prompts": [["read", "ab"]]})
    assert recipe.objective.prompt(recipe.model, Letters(), "read").tolist() == [5, 6]
    with pytest.raises(UserError, match="wasn't trained for the task 'answer'; it knows caption, read"):
        recipe.objective.prompt(recipe.model, Letters(), "answer", "a")
