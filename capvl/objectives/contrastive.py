"""Contrastive pre-training of two towers: CLIP's softmax (arXiv 2103.00020) and SigLIP's sigmoid loss (2303.15343).

`locked` is LiT (arXiv 2111.07991): the image tower is not trained. `caption_weight` adds CapPa's
loss through a decoder on the same image tower, as CoCa does with captioning (arXiv 2205.01917).
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from capvl.data.examples.image_text import EmbeddingText, ImageText
from capvl.errors import UserError, nearest
from capvl.losses.contrastive import CHUNK, sigmoid_loss, softmax_loss
from capvl.models.two_towers import TwoTowers, TwoTowersOptions
from capvl.objectives.cappa import CapPa
from capvl.objectives.images import unit_range

LOCKED = "encoder/(?!map/).*"


@dataclasses.dataclass(frozen=True)
class Contrastive:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      loss_kind: "sigmoid" or "softmax".
      locked: the image tower is not trained, but for its MAP head where it has one.
      cached: train on embeddings that `python -m capvl.embeddings` wrote, not on images
        (needs `locked`).
      caption_weight: weight of CapPa's loss beside; needs model.decoder_layers.
      pa, draw: of CapPa's loss; see `capvl.objectives.cappa.CapPa`.
      chunk: texts whose similarities to its images a device holds at a time.
    """

    loss_kind: str = "sigmoid"
    locked: bool = False
    cached: bool = False
    caption_weight: float = 0.0
    pa: float = 0.75
    draw: str = "example"
    chunk: int = CHUNK

    Model: ClassVar[type] = TwoTowersOptions

    def __post_init__(self):
        kinds = ("sigmoid", "softmax")
        if self.loss_kind not in kinds:
            raise UserError(f"objective.loss_kind={self.loss_kind!r} is unknown." + nearest(self.loss_kind, kinds))
        if self.cached and not self.locked:
            raise UserError("objective.cached=True needs objective.locked=True: cached embeddings can't be trained.")
        if self.caption_weight < 0 or self.chunk < 1:
            raise UserError("objective.caption_weight must not be negative, and objective.chunk must be at least 1.")
        if self.caption_weight and self.cached:
            raise UserError("objective.caption_weight needs images, which objective.cached=True leaves out.")
        object.__setattr__(self, "_captions", CapPa(pa=self.pa, draw=self.draw))

    def check(self, model_options: TwoTowersOptions, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where options contradict each other."""
        if micro_batches > 1:
            raise UserError(
                f"micro_batches={micro_batches} would leave a contrastive loss only the negatives of a part of the "
                f"batch; set micro_batches=1 and save memory with model.remat."
            )
        if bool(self.caption_weight) != bool(model_options.decoder_layers):
            raise UserError("objective.caption_weight and model.decoder_layers go together: set both or neither.")
        if self.caption_weight:
            self._captions.check(model_options, batch_per_device, micro_batches)

    def frozen(self, model_options: TwoTowersOptions) -> tuple[str, ...]:
        """The image tower where it is locked."""
        return (LOCKED,) if self.locked else ()

    def features(self) -> tuple[str, ...]:
        """An image, or its embedding, and its captions."""
        return ("embedding" if self.cached else "image", "text")

    def transform(self, model_options: TwoTowersOptions, data, *, train: bool):
        """Crop and tokenize, or pick an embedding and tokenize; see `capvl.data.images.crops`."""
        if self.cached and train:
            return EmbeddingText.from_options(data, length=model_options.length)
        return ImageText.from_options(data, res=model_options.res, length=model_options.length, train=train)

    def batch_spec(self, model_options: TwoTowersOptions, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, R, R, 3) or embedding float16 (B, [N,] D), text int32 (B, L), flip and mask bool (B,)."""
        spec = self._captions.batch_spec(model_options, batch)
        if self.cached:
            del spec["image"], spec["flip"]
            spec["embedding"] = jax.ShapeDtypeStruct((batch, *embedding_shape(model_options)), jnp.float16)
        return spec

    def prompt(self, model_options: TwoTowersOptions, tokenizer, task: str, text: str = "") -> np.ndarray:
        """The model's own: a caption has none, and nothing else is trained."""
        return model_options.prompt(tokenizer, task, text)

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1] and flipped where asked; the rows that count; token weights for the captions."""
        text = batch["text"]
        mask = batch["mask"] if "mask" in batch else jnp.ones(len(text), bool)
        ready = {"text": text, "mask": mask}
        if "embedding" in batch:
            return ready | {"embedding": batch["embedding"]}
        ready["image"] = unit_range(batch["image"], batch.get("flip") if train else None)
        return ready | {"weights": self._captions.token_weights(text, mask)}

    def loss(self, model: TwoTowers, batch, key):
        """Mean loss; metrics `scale`, `offset`, and `matched`: images most similar to their own text (softmax only)."""
        drop_key, caption_key = jax.random.split(key)
        encoded = None
        if self.cached:
            embedding = batch["embedding"].astype(model.dtype)
            image = model.embed_tokens(embedding) if embedding.ndim == 3 else model.embed_pooled(embedding)
        else:
            encoded = model.encode(batch["image"], key=None if self.locked else drop_key)
            image = model.embed_tokens(encoded)
        text, scale = model.embed_text(batch["text"]), model.scale()
        metrics = {"scale": scale}
        if self.loss_kind == "sigmoid":
            loss = sigmoid_loss(image, text, scale, model.offset(), self.chunk, batch["mask"])
            metrics["offset"] = model.offset()
        else:
            loss, matched = softmax_loss(image, text, scale, batch["mask"], self.chunk)
            metrics["matched"] = matched / len(image)
        if self.caption_weight:
            captioning, of_captions = self._captions.loss_of_encoded(model, encoded, batch, caption_key)
            metrics |= {"contrastive": loss, "nll_cap": of_captions["nll_cap"], "nll_pa": of_captions["nll_pa"]}
            loss = loss + self.caption_weight * captioning
        return loss, {"loss": loss} | metrics

    def flops(self, model_options: TwoTowersOptions) -> float:
        """Matmul FLOPs of training on one example, similarities left out: a locked tower has no backward pass."""
        image = 0.0 if self.cached else (1 if self.locked else 3) * model_options.encoder_flops()
        if model_options.pool == "map":
            image += 3 * model_options.map_head_flops()
        decoder = 3 * model_options.decoder_flops() if self.caption_weight else 0.0
        return image + 3 * model_options.text_tower_flops() + decoder


def embedding_shape(model_options: TwoTowersOptions) -> tuple[int, ...]:
    """Shape of a cached embedding: (N, D) tokens where a MAP head trains, else the pooled (D,)."""
    tokens, width = math.prod(model_options.grid), model_options.encoder_width
    return (tokens, width) if model_options.pool == "map" else (width,)
