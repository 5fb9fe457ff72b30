"""Cap, Pa and CapPa: image captioners as vision learners (arXiv 2306.07915).

Cap predicts the caption token by token from the image and the tokens before; Pa (parallel
prediction) replaces every decoder input by [MASK] and drops the causal mask; CapPa draws Pa
for 75 % of the examples. Loss: mean over examples of the mean over non-padding tokens.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from capvl.data.examples.image_text import ImageText
from capvl.errors import UserError, nearest
from capvl.losses.vocabulary import vocabulary_loss
from capvl.models.captioner import Captioner, CaptionerOptions
from capvl.models.text_decoder import shift_right
from capvl.nn.padding import real
from capvl.objectives import Mean
from capvl.objectives.images import unit_range
from capvl.parallel.rules import constrain, data_groups


@dataclasses.dataclass(frozen=True)
class CapPa:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      pa: share of the examples trained by parallel prediction; 0 is Cap, 1 is Pa.
      draw: "example" draws the mode of each example by itself (reference); "stratified" takes
        exactly that share of each device's examples: less noise, no per-example masks, and
        the decoder's first self-attention is computed once for all Pa examples.
      mask_ratio: share of a Pa example's tokens replaced by [MASK] (int(ratio * L) of them, at
        random); the others are read as they are.
      smoothing: label smoothing.
      average: "example" (mean of per-example means, reference) or "token" (mean over tokens).
      chunk: tokens whose logits a device holds at a time.
    """

    pa: float = 0.75
    draw: str = "example"
    mask_ratio: float = 1.0
    smoothing: float = 0.0
    average: str = "example"
    chunk: int = 1024

    Model: ClassVar[type] = CaptionerOptions

    def __post_init__(self):
        for name, known in (("draw", ("example", "stratified")), ("average", ("example", "token"))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"objective.{name}={getattr(self, name)!r} is unknown." + nearest(getattr(self, name), known)
                )
        for name in ("pa", "mask_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"objective.{name} must be between 0 and 1, not {getattr(self, name)}.")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"objective.smoothing must be in [0, 1), not {self.smoothing}.")
        if self.chunk < 1:
            raise UserError(f"objective.chunk must be at least 1, not {self.chunk}.")

    def check(self, model_options: CaptionerOptions, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where the stratified share is not a whole number of examples, or nothing is masked."""
        if self.pa and not int(self.mask_ratio * model_options.length):
            raise UserError(
                f"objective.mask_ratio={self.mask_ratio} masks none of model.length={model_options.length} tokens, so "
                f"parallel prediction would only copy them."
            )
        share = self.pa * batch_per_device
        if self.draw == "stratified" and abs(share - round(share)) > 1e-6:
            raise UserError(
                f"objective.draw='stratified' needs objective.pa={self.pa} of a device's {batch_per_device} examples "
                f"to be a whole number; objective.pa={round(share) / batch_per_device:g} is the nearest that is."
            )

    def frozen(self, model_options: CaptionerOptions) -> tuple[str, ...]:
        """All parameters train."""
        return ()

    def features(self) -> tuple[str, ...]:
        """An image and its captions."""
        return ("image", "text")

    def transform(self, model_options: CaptionerOptions, data, *, train: bool):
        """Crop and tokenize; see `capvl.data.examples.image_text.ImageText`."""
        return ImageText.from_options(data, res=model_options.res, length=model_options.length, train=train)

    def batch_spec(self, model_options: CaptionerOptions, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, R, R, 3), text int32 (B, L), flip and mask bool (B,)."""
        res, length = model_options.res, model_options.length
        return {
            "image": jax.ShapeDtypeStruct((batch, res, res, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((batch, length), jnp.int32),
            "flip": jax.ShapeDtypeStruct((batch,), jnp.bool_),
            "mask": jax.ShapeDtypeStruct((batch,), jnp.bool_),
        }

    def prompt(self, model_options: CaptionerOptions, tokenizer, task: str, text: str = "") -> np.ndarray:
        """The model's own: a caption has none, and nothing else is trained."""
        return model_options.prompt(tokenizer, task, text)

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1] and flipped where asked, and the loss weight of each token."""
        image = unit_range(batch["image"], batch.get("flip") if train else None)
        text = batch["text"]
        return {"image": image, "text": text, "weights": self.token_weights(text, batch.get("mask"))}

    def token_weights(self, text_BL, mask_B=None, token_mask_BL=None) -> jax.Array:
        """Weights (B, L) whose weighted sum of token losses, divided by B, is the loss."""
        weights = real(text_BL).astype(jnp.float32)
        if mask_B is not None:
            weights = weights * mask_B.astype(jnp.float32)[:, None]
        if token_mask_BL is not None:
            weights = weights * token_mask_BL
        if self.average == "token":
            return weights * (text_BL.shape[0] / jnp.maximum(weights.sum(), 1.0))
        return weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)

    def loss(self, model: Captioner, batch, key):
        """Mean loss over the batch; metrics `nll_cap` and `nll_pa` are nats per token of either mode."""
        drop_key, mode_key = jax.random.split(key)
        return self.loss_of_encoded(model, model.encode(batch["image"], key=drop_key), batch, mode_key)

    def loss_of_encoded(self, model, encoded, batch, mode_key):
        """As `loss`, from encoded images; the model is any with a captioner's `decoder` and `dtype`."""
        text = batch["text"]
        if self.draw == "stratified" and 0 < self.pa < 1:
            hidden, use_pa = self._stratified(model, text, encoded, mode_key)
            return self.loss_of_hidden(model, hidden, batch, use_pa)
        kv = model.decoder.image_kv(encoded)
        if self.pa in (0, 1):
            hidden = (
                self._hidden_pa(model, text, kv, mode_key)
                if self.pa
                else model.decoder.causal(text, kv, dtype=model.dtype)
            )
            use_pa = jnp.full(text.shape[:1], bool(self.pa))
        else:
            use_pa = jax.random.uniform(mode_key, text.shape[:1]) < self.pa
            hidden = self.hidden_mixed(model, text, kv, use_pa, mode_key)
        return self.loss_of_hidden(model, hidden, batch, use_pa)

    def loss_of_hidden(self, model: Captioner, hidden_BLD, batch, use_pa_B):
        """Loss and metrics from the decoder's last hidden states."""
        total, nll_BL = vocabulary_loss(
            hidden_BLD,
            batch["text"],
            batch["weights"],
            *model.decoder.output_layer(),
            self.smoothing,
            self.chunk,
        )
        loss = total / hidden_BLD.shape[0]
        metrics = {"loss": loss}
        counted_BL = (batch["weights"] > 0).astype(jnp.float32)
        for name, chosen_B in (("nll_cap", ~use_pa_B), ("nll_pa", use_pa_B)):
            chosen_B1 = chosen_B.astype(jnp.float32)[:, None]
            metrics[name] = Mean(jnp.sum(nll_BL * chosen_B1), jnp.sum(counted_BL * chosen_B1))
        return loss, metrics

    def hidden_mixed(self, model: Captioner, text_BL, kv, use_pa_B, key) -> jax.Array:
        """Decoder states where `use_pa_B` says which examples are predicted in parallel."""
        inputs = jnp.where(use_pa_B[:, None], self._masked(text_BL, model.decoder.vocab, key), shift_right(text_BL))
        length = text_BL.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        mask = causal[None, None] | use_pa_B[:, None, None, None]
        return model.decoder(inputs, kv, mask=mask, dtype=model.dtype)

    def _hidden_pa(self, model, text_BL, kv, key) -> jax.Array:
        if self.mask_ratio == 1:
            return model.decoder.parallel(text_BL.shape[1], kv, dtype=model.dtype)
        return model.decoder(self._masked(text_BL, model.decoder.vocab, key), kv, dtype=model.dtype)

    def _masked(self, text_BL, mask_id: int, key) -> jax.Array:
        """The text with int(mask_ratio * L) positions of each example, drawn at random, as [MASK]."""
        length = text_BL.shape[1]
        count = int(self.mask_ratio * length)
        if count == length:
            return jnp.full_like(text_BL, mask_id)
        rank_BL = jnp.argsort(jnp.argsort(jax.random.uniform(key, text_BL.shape), axis=1), axis=1)
        return jnp.where(rank_BL < count, mask_id, text_BL)

    def _stratified(self, model, text_BL, encoded_BND, key):
        """The first share of each device's examples by Pa, the others by Cap."""
        groups, batch = data_groups(), text_BL.shape[0]
        each = batch // groups
        count = round(self.pa * each)

        def grouped(x):
            return constrain(x.reshape(groups, -1, *x.shape[1:]), "groups", *(None,) * x.ndim)

        def flat(x):
            return constrain(x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2))

        def cut(x, start, stop):
            return flat(jax.lax.slice_in_dim(grouped(x), start, stop, axis=1))

        # Keys and values are projected for each part by itself, so that they are never cut.
        kv_pa, kv_cap = (model.decoder.image_kv(cut(encoded_BND, *part)) for part in ((0, count), (count, each)))
        pa = self._hidden_pa(model, cut(text_BL, 0, count), kv_pa, key)
        cap = model.decoder.causal(cut(text_BL, count, each), kv_cap, dtype=model.dtype)
        hidden = flat(jnp.concatenate([grouped(pa), grouped(cap)], axis=1))
        return hidden, jnp.tile(jnp.arange(each) < count, groups)

    def flops(self, model_options: CaptionerOptions) -> float:
        """Matmul FLOPs of one training example."""
        return 3 * (model_options.encoder_flops() + model_options.decoder_flops())
