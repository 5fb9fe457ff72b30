"""A paper that isn't there: pairs and regions in one step, images of several sizes, an evaluator of its own.

Nothing in capvl/ knows it. Means of a region's tokens are aligned with its phrase; a pair is one region, all of it.
"""

import dataclasses
import json
import shutil
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capvl import evaluation, recipes, train
from capvl.checkpoint import Checkpointer
from capvl.data.examples.slots import choose, fill
from capvl.data.images.buckets import Bucket, Bucketed
from capvl.data.images.crops import Crop
from capvl.data.images.geometry import WHOLE
from capvl.data.reading import loader, sources
from capvl.data.reading.evaluating import eval_batches
from capvl.data.reading.regions import Region, regions
from capvl.data.text import tokenizers
from capvl.inference.compiled import compiled
from capvl.models.abilities import Ability, require
from capvl.models.features import pool_regions
from capvl.models.two_towers import TwoTowersOptions
from capvl.objectives import Kind
from capvl.objectives.images import unit_range
from capvl.parallel.rules import batch_sharding

BUCKETS = (Bucket(32, 32), Bucket(32, 48))
SLOTS = {"pairs": 1, "regions": 3}


@dataclasses.dataclass(frozen=True)
class Phrased:
    """image uint8 (H, W, 4) of a bucket; box (S, 4), phrase (S, L) and slots (S,): what is said of which part of it."""

    crop: Crop
    slots: int
    length: int
    tokenizer: Any
    train: bool

    def __call__(self, example, uniforms):
        geometry = self.crop.draw(example, uniforms, flip=self.train and uniforms() < 0.5)
        found = regions(example) if "objects" in example else [Region(WHOLE, tuple(example["text"]))]
        boxes, there = geometry.boxes([r.box for r in found])
        rows = [
            {"box": box, "phrase": self.tokenizer(geometry.text(r.phrases[0]), self.length)}
            for r, box, is_there in zip(found, boxes, there, strict=True)
            if is_there and r.phrases
        ]
        blank = {"box": np.zeros(4, np.float32), "phrase": np.zeros(self.length, np.int32)}
        chosen = choose(rows, self.slots, uniforms if self.train else None)
        return {"image": self.crop.pixels(example, uniforms, geometry)} | fill(chosen, self.slots, blank)


def scores(model, batch):
    """Cosines (R, R) of all regions of a batch with all phrases, and which of them are there (R,)."""
    (level,) = model.encoder.levels(model.encoder.normalize(batch["image"]), dtype=model.dtype)
    pooled = pool_regions(level.tokens_BND, level.in_boxes(batch["box"]))
    visual = model.embed_pooled(pooled.reshape(-1, pooled.shape[-1]))
    text = model.embed_text(batch["phrase"].reshape(-1, batch["phrase"].shape[-1]))
    return visual @ text.T, batch["slots"].reshape(-1)


@dataclasses.dataclass(frozen=True)
class Phrases:
    """The objective, which weighs regions half."""

    Model: ClassVar[type] = TwoTowersOptions

    def check(self, model_options, batch_per_device, micro_batches):
        require(model_options, "The objective", Ability.TEXTS)

    frozen = staticmethod(lambda model_options: ())
    buckets = staticmethod(lambda model_options: BUCKETS)

    def features(self):
        return {"pairs": Kind(("image", "text")), "regions": Kind(("image", "objects"), share=0.5)}

    def transform(self, model_options, data, *, train):
        tokenizer = tokenizers.load(data.tokenizer_path())
        crop = Crop(model_options.res, "aspect", max_side=48)
        how = model_options.length, tokenizer, train
        return {kind: Bucketed(Phrased(crop, slots, *how), BUCKETS) for kind, slots in SLOTS.items()}

    def batch_spec(self, model_options, batch, bucket=BUCKETS[-1]):
        def spec(count, slots):
            shapes = {"image": ((*bucket, 4), np.uint8), "box": ((slots, 4), np.float32), "slots": ((slots,), np.bool_)}
            shapes["phrase"] = (slots, model_options.length), np.int32
            return {k: jax.ShapeDtypeStruct((count, *shape), dtype) for k, (shape, dtype) in shapes.items()}

        return {kind: spec(k.count(batch, kind), SLOTS[kind]) for kind, k in self.features().items()}

    def prepare(self, batch, *, train):
        return {kind: rows | {"image": unit_range(rows["image"])} for kind, rows in batch.items()}

    def loss(self, model, batch, key):
        def one(rows):
            cosine_RR, there_R = scores(model, rows)
            logits = jnp.where(there_R[None], model.scale() * cosine_RR, -1e9)
            return -jnp.diagonal(jax.nn.log_softmax(logits)).mean(where=there_R)

        loss = one(batch["pairs"]) + 0.5 * (regional := one(batch["regions"]))
        return loss, {"loss": loss, "regions": regional}

    def flops(self, model_options):
        return 3 * 1.5 * model_options.encoder_flops()


@dataclasses.dataclass(frozen=True)
class Grounding:
    """How often a phrase is nearest to its own region among those of a batch."""

    def setup(self, context):
        crop = Crop(context.model.res, "aspect", max_side=48).in_bucket(BUCKETS[0])
        transform = Phrased(crop, SLOTS["regions"], context.model.length, context.tokenizer(), False)
        source = sources.open_source("scenes/tiny", "val", context.data.directory(), features=("image", "objects"))
        call = compiled(context.blueprint, scores)

        def evaluate(params):
            right = []
            for batch in eval_batches(source, transform, context.batch):
                cosine, there = map(np.asarray, call(params, loader.to_device(batch, batch_sharding(context.mesh))))
                right += list(cosine[there][:, there].argmax(axis=0) == np.arange(there.sum()))
            yield "accuracy", float(np.mean(right))

        return evaluate


@pytest.mark.long
def test_it_trains_resumes_and_is_evaluated(tiny, tmp_path, one_device, capsys):
    towers = {"encoder": "w16d1h2m32/16", "res": 32, "text": "w16d1h2m32", "vocab": 128, "length": 12}
    values = tiny(steps=4, objective={"name": "test_toy_objective:Phrases"}, model=towers | {"dtype": "float32"})
    values |= {"evals": {"grounding": {"type": "test_toy_objective:Grounding"}}, "checkpoint": {"every": 2}}
    values["data"] |= {"name": "pairs=scenes/tiny + regions=scenes/tiny"}
    recipe = recipes.resolve(values)
    train.run(recipe, str(tmp_path / "whole"))
    said = capsys.readouterr().out
    assert all(f"compiling for images of {bucket} took" in said for bucket in BUCKETS)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/4")
    train.run(recipe, str(tmp_path / "part"))
    (a, _), (b, _) = (Checkpointer(str(tmp_path / name)).read_all() for name in ("whole", "part"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    last = json.loads((tmp_path / "whole/metrics.jsonl").read_text().splitlines()[-1])
    assert evaluation.evaluate(str(tmp_path / "whole"), trust=True).items() <= last.items()
