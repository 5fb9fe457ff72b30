"""Linear probes and fine-tuning: classifiers on a pooled encoder, several settings trained side by side.

Every head sees the same features and has its own learning rate and weight decay through the rules of
`config.optimizer` (`lr_mult`, `decay`); the loss is the sum of theirs, so none disturbs another.
With `locked=False` the encoder is fine-tuned too; use one head then.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.data.examples.labels import ImageLabelTrain
from capvl.errors import UserError
from capvl.models import flops
from capvl.models.abilities import Ability
from capvl.models.vision import ImageOptions
from capvl.models.vit import MapHead
from capvl.nn import weights
from capvl.nn.layers import Dense
from capvl.objectives.images import unit_range


@dataclasses.dataclass(frozen=True)
class ProbeOptions(ImageOptions):
    """What is trained on an encoder; `config.model` of a recipe.

    Attributes:
      classes: number of classes.
      heads: number of heads, each with its own settings.
      probe_pool: "mean" of the tokens, "map": a MAP head of each classifier's own, or "encoder": the encoder's.
    """

    classes: int = 1000
    heads: int = 1
    probe_pool: str = "mean"

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(probe_pool=("mean", "map", "encoder"))
        if self.classes < 2 or self.heads < 1:
            raise UserError("model.classes must be at least 2, and model.heads at least 1.")

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        return frozenset({Ability.IMAGES, Ability.CLASSIFIERS})

    def head_flops(self) -> float:
        """Forward matmul FLOPs of one head."""
        pool = self.map_head_flops() if self.probe_pool == "map" else 0.0
        return pool + flops.dense(1, self.encoder_width, self.classes)

    def make(self, rngs: nnx.Rngs) -> "ProbeModel":
        """Builds the model."""
        return ProbeModel(self, rngs=rngs)


class Head(nnx.Module):
    """A pooling and a linear classifier that begins at zero."""

    def __init__(self, options: ProbeOptions, *, rngs: nnx.Rngs):
        size = options.encoder_size
        kind = dict(activation=options.activation, eps=options.eps)
        self.map = MapHead(size, rngs, **kind) if options.probe_pool == "map" else None
        shape = (size.width, options.classes)
        self.linear = Dense(shape, ("embed", "vocab"), weights.zeros, bias=(options.classes,), rngs=rngs)


class ProbeModel(nnx.Module):
    """Images -> logits of every head."""

    def __init__(self, options: ProbeOptions, *, rngs: nnx.Rngs):
        self.dtype, self.probe_pool = jnp.dtype(options.dtype), options.probe_pool
        self.encoder = options.make_encoder(rngs)
        self.heads = nnx.List([Head(options, rngs=rngs) for _ in range(options.heads)])

    def encode(self, image_BHWC, *, key: jax.Array | None = None) -> jax.Array:
        """Image tokens (B, N, D) of images (B, H, W, 3) in [-1, 1]; a `key` means training."""
        return self.encoder(self.encoder.normalize(image_BHWC), dtype=self.dtype, key=key)

    def features(self, image_BHWC) -> jax.Array:
        """Pooled features (B, D) float32."""
        return self.pool(self.encode(image_BHWC), None).astype(jnp.float32)

    def pool(self, encoded_BND, head: Head | None) -> jax.Array:
        """The feature (B, D) that a head classifies."""
        if head is not None and head.map is not None:
            return head.map(encoded_BND)
        return self.encoder.pool(encoded_BND) if self.probe_pool == "encoder" else encoded_BND.mean(axis=1)

    def logits(self, encoded_BND) -> jax.Array:
        """Logits (H, B, K) float32 of all heads."""
        return jnp.stack([head.linear(self.pool(encoded_BND, head)).astype(jnp.float32) for head in self.heads])


@dataclasses.dataclass(frozen=True)
class Probe:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      locked: the encoder is not trained.
      smoothing: label smoothing.
    """

    locked: bool = True
    smoothing: float = 0.0

    Model: ClassVar[type] = ProbeOptions

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise UserError(f"objective.smoothing must be in [0, 1), not {self.smoothing}.")

    def check(self, model_options: ProbeOptions, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where several heads would tune one encoder."""
        if not self.locked and model_options.heads > 1:
            raise UserError(f"model.heads={model_options.heads} would tune one encoder together; set model.heads=1.")

    def frozen(self, model_options: ProbeOptions) -> tuple[str, ...]:
        """The encoder where it is locked."""
        return ("encoder/.*",) if self.locked else ()

    def features(self) -> tuple[str, ...]:
        """An image and its class."""
        return ("image", "label")

    def transform(self, model_options: ProbeOptions, data, *, train: bool):
        """Crop; see `capvl.data.examples.labels.ImageLabelTrain`."""
        return ImageLabelTrain.from_options(data, res=model_options.res, classes=model_options.classes, train=train)

    def batch_spec(self, model_options: ProbeOptions, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, R, R, 3), label int32 (B,), flip bool (B,)."""
        res = model_options.res
        return {
            "image": jax.ShapeDtypeStruct((batch, res, res, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
            "flip": jax.ShapeDtypeStruct((batch,), jnp.bool_),
        }

    def prompt(self, model_options: ProbeOptions, tokenizer, task: str, text: str = ""):
        """A classifier writes nothing."""
        raise UserError(f"A probe has no decoder for the task {task!r}.")

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1] and flipped where asked."""
        return {"image": unit_range(batch["image"], batch.get("flip") if train else None), "label": batch["label"]}

    def loss(self, model: ProbeModel, batch, key):
        """Sum of the heads' mean cross-entropies; metrics `best`: the least of them, `accuracy` of that head."""
        encoded = model.encode(batch["image"], key=None if self.locked else key)
        logits_HBK, label = model.logits(encoded), batch["label"]
        classes = logits_HBK.shape[-1]
        rest = self.smoothing / (classes - 1)
        target_BK = (1 - self.smoothing - rest) * jax.nn.one_hot(label, classes) + rest
        each_H = -(target_BK[None] * jax.nn.log_softmax(logits_HBK)).sum(axis=-1).mean(axis=-1)
        right_H = (logits_HBK.argmax(axis=-1) == label[None]).astype(jnp.float32).mean(axis=-1)
        loss, best = each_H.sum(), jnp.argmin(each_H)
        return loss, {"loss": loss, "best": each_H[best], "accuracy": right_H[best]}

    def flops(self, model_options: ProbeOptions) -> float:
        """Matmul FLOPs of training on one example: a locked encoder has no backward pass."""
        heads = 3 * model_options.heads * model_options.head_flops()
        return (1 if self.locked else 3) * model_options.encoder_flops() + heads
