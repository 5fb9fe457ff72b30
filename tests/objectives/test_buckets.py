"""Batches in buckets: images that keep their aspect in a wide, a tall and a square one, batch by batch."""

import dataclasses
import json
import re
import time
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import drawn
from flax import nnx
from handmade import Letters, picture

from capvl import objectives, recipes, train
from capvl.checkpoint import Checkpointer
from capvl.data.examples.tasks import TaskText
from capvl.data.images.buckets import Bucket, Bucketed, buckets_in
from capvl.data.images.crops import Crop
from capvl.data.randomness import Uniforms
from capvl.data.reading.batches import stack
from capvl.data.reading.loader import Host, TrainLoader
from capvl.models.git import GitOptions
from capvl.models.parameters import Blueprint
from capvl.models.prompts import TextPrompts
from capvl.nn import weights
from capvl.nn.weights import weight
from capvl.objectives.cappa import CapPa
from capvl.objectives.git import Git
from capvl.objectives.images import unit_range
from capvl.planning import ahead, estimate, tables, topology

WIDE, TALL, SQUARE = Bucket(16, 32), Bucket(32, 16), Bucket(24, 24)


class Sum(nnx.Module):
    """Sums of an image's channels, each by a weight."""

    def __init__(self, rngs):
        self.kernel = weight(rngs, (3, 8), (None, None), weights.normal(1.0))


@dataclasses.dataclass(frozen=True)
class SumOptions:
    """Options of a model of one layer."""

    dtype: str = "float32"
    remat: str = "none"

    def make(self, rngs):
        return Sum(rngs)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Images that keep their aspect, some of them flipped."""

    crop: Crop

    def __call__(self, example, uniforms):
        geometry = self.crop.draw(example, uniforms, flip=uniforms() < 0.5)
        return {"image": self.crop.pixels(example, uniforms, geometry)}


@dataclasses.dataclass(frozen=True)
class InBuckets:
    """Makes the sums of every real pixel small."""

    Model: ClassVar[type] = SumOptions

    def check(self, model_options, batch_per_device, micro_batches):
        pass

    def frozen(self, model_options):
        return ()

    def features(self):
        return ("image",)

    def buckets(self, model_options):
        return WIDE, TALL, SQUARE

    def transform(self, model_options, data, *, train):
        made = Pixels(Crop(16, "aspect", max_side=32))
        return Bucketed(made, self.buckets(model_options)) if train else made

    def batch_spec(self, model_options, batch, bucket=None):
        return {"image": jax.ShapeDtypeStruct((batch, *(bucket or (32, 32)), 4), np.uint8)}

    def prepare(self, batch, *, train):
        return {"image": unit_range(batch["image"])}

    def loss(self, model, batch, key):
        real = batch["image"][..., 3] > 0
        sums = jnp.where(real[..., None], jnp.einsum("bhwc,cd->bhwd", batch["image"][..., :3], model.kernel[...]), 0.0)
        loss = ((sums**2).sum(axis=(1, 2, 3)) / real.sum(axis=(1, 2), dtype=jnp.float32)).mean()
        return loss, {"loss": loss}

    def flops(self, model_options):
        return 6.0 * 3 * 8 * 16 * 32


@pytest.fixture
def recipe(tiny):
    def make(**changes):
        values = tiny(objective={"name": "test_buckets:InBuckets"}, model={}, batch_size=8, steps=4)
        optimizer = {"name": "adamw", "lr": 1e-3, "decay": ()}
        return recipes.resolve(values | {"schedule": {"warmup": 2}, "optimizer": optimizer} | changes)

    return make


def shown(batch) -> np.ndarray:
    """(height, width) of each image in a padded batch."""
    mask = batch["image"][..., 3] > 0
    return np.stack([mask.any(axis=2).sum(axis=1), mask.any(axis=1).sum(axis=1)], axis=1)


def test_all_images_of_a_batch_are_in_its_bucket(recipe):
    r = recipe()
    loader = r.train_loader(r.transforms())
    batches = [next(loader) for _ in range(4)]
    assert [buckets_in(batch) for batch in batches] == [(WIDE,), (TALL,), (SQUARE,), (WIDE,)]
    for batch in batches:  # Scenes are squares, and short sides are 16.
        np.testing.assert_array_equal(shown(batch), 16)
        spec = r.batch_spec(bucket=buckets_in(batch)[0])
        assert {k: (x.shape, x.dtype) for k, x in batch.items()} == {k: (s.shape, s.dtype) for k, s in spec.items()}


@pytest.mark.parametrize("position, hosts", [(0, 2), (8, 1), (24, 4)])
def test_buckets_are_the_same_on_all_hosts_and_when_resumed(recipe, position, hosts):
    r = recipe()
    whole = r.train_loader(r.transforms())
    expected = [next(whole) for _ in range(5)][position // 8 :]
    options = dict(batch=8, seed=r.seed, position=position)
    parts = [
        TrainLoader(r.data, r.transforms()[""], r.objective.features(), host=Host(i, hosts), **options)
        for i in range(hosts)
    ]
    for batch in expected:
        rows = [next(part) for part in parts]
        found = {key: np.concatenate([row[key] for row in rows]) for key in batch}
        jax.tree.map(np.testing.assert_array_equal, found, batch)


def test_padding_says_nothing():
    """GIT's loss of images in a bucket is that of the same images in a larger one."""
    options = GitOptions(encoder="w16d1h2m32/8", res=16, text="w24d1h2m32", vocab=40, start=2, length=8,
                         text_positions=10, dtype="float32", dropout=0.0, max_side=32)  # fmt: skip
    blueprint, objective, losses = Blueprint(options), Git(), []
    params = drawn(blueprint.shapes)
    transform = TaskText(Crop(16, "aspect", max_side=32), ("caption",), TextPrompts(Letters(), 8), Letters(), 8)

    @jax.jit
    def loss(batch):
        return objective.loss(blueprint.bind(params), objective.prepare(batch, train=False), None)[0]

    for bucket in (WIDE, Bucket(24, 64)):
        made = Bucketed(transform, (bucket,)).for_batch(0)
        images = [picture((30 * n, 40, 200), (44 + 2 * n, 30)) for n in range(8)]
        batch = stack([made({"image": image, "text": ["a dog"]}, Uniforms(0, 0)) for image in images])
        assert shown(batch)[:, 1].max() > 16
        losses.append(float(loss(batch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_each_bucket_is_compiled_once_and_said(recipe, tmp_path, capsys, one_device):
    loop, compiled = train.loop, []

    def counting(training, state, stop):
        out = loop(training, state, stop)
        compiled.append(training.update._cache_size())
        return out

    prepare = InBuckets.prepare

    def slow(self, batch, *, train):  # Runs when a step is traced.
        time.sleep(0.5)
        return prepare(self, batch, train=train)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "loop", counting)
        patch.setattr(InBuckets, "prepare", slow)
        train.run(recipe(), str(tmp_path / "run"))
    assert compiled == [3]
    said = re.findall(r"step (\d+): compiling for images of (.*) took ([\d.]+) s \((.*)\)", capsys.readouterr().out)
    assert [(step, size, of) for step, size, _, of in said] == [
        ("1", "16 x 32", "1 of 3 sizes"),
        ("2", "32 x 16", "2 of 3 sizes"),
        ("3", "24 x 24", "3 of 3 sizes"),
    ]
    seconds = json.loads((tmp_path / "run/goodput.jsonl").read_text().splitlines()[-1])["seconds"]
    assert seconds["compile"] > sum(float(took) for *_, took, _ in said) - 0.2
    # Resumed is uninterrupted, though it begins with the last bucket.
    part = recipe()
    train.run(dataclasses.replace(part, steps=2), str(tmp_path / "part"))
    (tmp_path / "part/config.json").write_text((tmp_path / "run/config.json").read_text())
    train.run(part, str(tmp_path / "part"))
    (a, step), (b, other) = (Checkpointer(str(tmp_path / name)).read_all() for name in ("run", "part"))
    assert step == other == 4
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_of_one_size_says_nothing_of_sizes(recipe, tmp_path, capsys, one_device, monkeypatch):
    monkeypatch.setattr(InBuckets, "buckets", lambda self, model_options: (WIDE,))
    train.run(recipe(), str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "compiled in" in said and "compiling for" not in said


def _once(compile_step):
    """Compiles for each bucket once."""
    known = {}

    def compiled(recipe, place, bucket):
        if bucket not in known:
            known[bucket] = compile_step(recipe, place, bucket)
        return known[bucket]

    return compiled


def test_plans_compile_every_bucket(recipe, monkeypatch, capsys):
    """The largest memory and the mean work, of programs compiled for this machine's processors."""
    monkeypatch.setattr(ahead, "devices", lambda topology: tuple(jax.devices()[:1]))
    monkeypatch.setattr(ahead, "compile_step", _once(ahead.compile_step))
    place, r = topology.parse("v5e:2x2"), recipe()
    buckets = (WIDE, Bucket(64, 32))
    monkeypatch.setattr(InBuckets, "buckets", lambda self, model_options: buckets)
    whole = estimate.compiled_plan(r, place)
    parts = []
    for bucket in buckets:
        monkeypatch.setattr(InBuckets, "buckets", lambda self, model_options, b=bucket: (b,))
        parts.append(estimate.compiled_plan(r, place))
    small, large = parts
    assert small.total < large.total and small.cost.flops < large.cost.flops
    assert (whole.total, whole.temporaries) == (large.total, large.temporaries)
    assert whole.cost.flops == pytest.approx((small.cost.flops + large.cost.flops) / 2)
    assert whole.step_seconds[0] == pytest.approx((small.step_seconds[0] + large.step_seconds[0]) / 2)
    assert whole.images_per_second[1] == pytest.approx(whole.batch / whole.step_seconds[0])
    values = whole.values()
    assert values["compilations"] == 2 and values["buckets"] == [[16, 32], [64, 32]]
    assert values["hbm"]["total"] == large.total and values["seconds"]["most"] == whole.step_seconds[1]
    tables.show(whole, "toy")
    assert "2, for images of 16 x 32, 64 x 32" in capsys.readouterr().out
    tables.show(small, "toy")
    assert "for images of" not in capsys.readouterr().out


def test_a_plan_that_does_not_fit_says_what_the_largest_bucket_needs(recipe, monkeypatch):
    def refused(recipe, place, bucket):
        raise ahead.DoesNotFitError(bucket.height * 1e9, 1e9)

    monkeypatch.setattr(ahead, "compile_step", refused)
    with pytest.raises(ahead.DoesNotFitError) as error:
        estimate.compiled_plan(recipe(), topology.parse("v5e:2x2"))
    assert error.value.needed == 32e9


def test_plans_on_paper_take_the_largest_bucket(recipe, monkeypatch):
    place, r, found = topology.parse("v5e:2x2"), recipe(), {}
    for name, buckets in {"both": (WIDE, Bucket(64, 32)), "small": (WIDE,), "large": (Bucket(64, 32),)}.items():
        monkeypatch.setattr(InBuckets, "buckets", lambda self, model_options, b=buckets: b)
        found[name] = estimate.paper_plan(r, place)
    assert found["small"].total < found["large"].total == found["both"].total
    assert found["large"].temporaries == found["both"].temporaries
    assert found["both"].cost.hbm_bytes == pytest.approx(
        (found["small"].cost.hbm_bytes + found["large"].cost.hbm_bytes) / 2
    )


def test_who_names_no_buckets_has_the_models_size(tiny):
    r = recipes.resolve(tiny())
    assert r.buckets() == (None,) == objectives.buckets(CapPa(), r.model)
    assert buckets_in(r.batch_spec()) == (Bucket(32, 32),)
    assert r.batch_spec(batch=4)["image"].shape[0] == 4


def test_sizes_of_several_kinds_of_batch():
    def images(*shape, dtype=np.uint8):
        return np.zeros(shape, dtype)

    batch = {
        "pairs": {"image": images(2, 8, 8, 3), "text": images(2, 8, 8, 3, dtype=np.int32)},
        "clips": {"image": images(2, 5, 16, 24, 4), "labels": images(2, 8)},
    }
    assert buckets_in(batch) == (Bucket(16, 24), Bucket(8, 8))
    assert buckets_in({"embedding": images(2, 8, dtype=np.float16)}) == ()
