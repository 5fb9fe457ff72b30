"""GIT (arXiv 2205.14100): one language model of text behind an image, for every task.

What the decoder reads and writes is one text: a prompt (nothing for captions and class names, the question for
answers), the target, and its end. The loss is the cross-entropy of the target and its end (section 3.1), averaged over
tokens; with label smoothing, less the entropy of the smoothed target, as the official code has it. `kind="masked"` is
the paper's comparison: masked language modelling of the same texts.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from capvl.data.examples.tasks import TaskText, check_tasks
from capvl.data.images.buckets import Bucket, Bucketed, square
from capvl.data.images.crops import Crop
from capvl.data.reading.texts import FEATURES
from capvl.data.text import tokenizers
from capvl.errors import UserError, nearest
from capvl.losses.vocabulary import vocabulary_loss
from capvl.models import git
from capvl.models.git import GitOptions
from capvl.models.prompts import check_task
from capvl.models.text_decoder import shift_right
from capvl.nn.padding import real
from capvl.objectives.images import unit_range


@dataclasses.dataclass(frozen=True)
class Git:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      tasks: of `capvl.data.examples.tasks.TASKS`; an example serves one that it has the features for, drawn at every
        visit; one that is named twice, twice as often.
      prompts: (task, words) pairs: what is put in front where there is no question. Tasks that are only asked for, such
        as ("read", "what does it say"), may stand here too.
      kind: "causal" (language modelling) or "masked" (masked language modelling).
      mask_ratio, mask_id: masked only: share of the tokens that are hidden, and the id that hides them.
      smoothing: label smoothing.
      sides: image sides that batches go through in turn (section 4.1); () for model.res alone.
      texts: 0 for one text of an image; else so many, which share the image's encoding.
      locked: the encoder is not trained.
      blind: images are made grey: what the texts alone teach.
      chunk: tokens whose logits a device holds at a time.
    """

    tasks: tuple[str, ...] = ("caption",)
    prompts: tuple[tuple[str, str], ...] = ()
    kind: str = "causal"
    mask_ratio: float = 0.15
    mask_id: int = 103
    smoothing: float = 0.1
    sides: tuple[int, ...] = ()
    texts: int = 0
    locked: bool = False
    blind: bool = False
    chunk: int = 1024

    Model: ClassVar[type] = GitOptions

    def __post_init__(self):
        check_tasks(self.tasks)
        if self.kind not in ("causal", "masked"):
            raise UserError(f"objective.kind={self.kind!r} is unknown." + nearest(self.kind, ("causal", "masked")))
        if self.texts < 0:
            raise UserError(f"objective.texts must not be negative, not {self.texts}.")
        if not 0 <= self.smoothing < 1 or not 0 < self.mask_ratio <= 1 or self.chunk < 1:
            raise UserError(
                "objective.smoothing must be in [0, 1), mask_ratio above 0 and at most 1, chunk at least 1."
            )

    def check(self, model_options: GitOptions, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where options contradict each other."""
        for side in self.sides:
            model_options.check_side(side, "objective.sides: ")
        if self.sides and (model_options.max_side or model_options.positions != "learned"):
            raise UserError("objective.sides goes with square images and learned positions only.")
        if self.kind == "masked" and not 0 <= self.mask_id < model_options.vocab:
            raise UserError(f"objective.mask_id={self.mask_id} is not an id below model.vocab={model_options.vocab}.")
        if self.kind == "masked" and model_options.text_positions <= model_options.length:
            raise UserError(
                f"objective.kind='masked' reads a start token and model.length={model_options.length} others: "
                f"model.text_positions must be at least {model_options.length + 1}."
            )
        if model_options.length < 4:
            raise UserError(f"model.length={model_options.length} leaves no room behind a prompt; 4 is the least.")

    def frozen(self, model_options: GitOptions) -> tuple[str, ...]:
        """The encoder where it is locked; a MAP head is not used by the decoder."""
        if self.locked:
            return ("encoder/.*",)
        return model_options.unread

    def features(self) -> tuple[str, ...]:
        """An image or the frames of a clip, where there are any, and what any task needs."""
        return ("image?", "frames?", *(FEATURES[task] + "?" for task in dict.fromkeys(self.tasks)))

    def buckets(self, model_options: GitOptions) -> tuple[Bucket, ...]:
        """Squares: `sides`, or the model's own, which images that keep their aspect are padded to."""
        return tuple(map(square, self.sides)) or (Bucket(*model_options.image_shape()[-3:-1]),)

    def transform(self, model_options: GitOptions, data, *, train: bool):
        """Draws a task and makes its tokens."""
        tokenizer = tokenizers.load(data.tokenizer_path(), model_options.reads_start)
        model_options.check_tokenizer(tokenizer)
        if data.flip and model_options.max_side:
            raise UserError("data.flip goes with square images only, and model.max_side keeps the aspect.")
        crop = Crop.of_model(data, model_options, train=train)
        prompts, length = model_options.prompts(tokenizer, dict(self.prompts)), model_options.length
        made = TaskText(crop, self.tasks, prompts, tokenizer, length, data.flip and train, self.texts)
        return Bucketed(made, self.buckets(model_options)) if train else made

    def batch_spec(
        self, model_options: GitOptions, batch: int, bucket: Bucket | None = None
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, …) (see `GitOptions.image_shape`), flip and has_image bool (B,); text int32 (B, L),
        or (B, T, L) with `texts`, prompt int32: how many of its tokens aren't predicted, and cut bool: its prompt was
        too long."""
        several = (batch, self.texts) if self.texts else (batch,)
        *frames, height, width, channels = model_options.image_shape()
        image = (*frames, *(bucket or (height, width)), channels)
        return {
            "image": jax.ShapeDtypeStruct((batch, *image), jnp.uint8),
            "flip": jax.ShapeDtypeStruct((batch,), jnp.bool_),
            "has_image": jax.ShapeDtypeStruct((batch,), jnp.bool_),
            "text": jax.ShapeDtypeStruct((*several, model_options.length), jnp.int32),
            "prompt": jax.ShapeDtypeStruct(several, jnp.int32),
            "cut": jax.ShapeDtypeStruct(several, jnp.bool_),
        }

    def prompt(self, model_options: GitOptions, tokenizer, task: str, text: str = "") -> np.ndarray:
        """The question, or the task's own words."""
        check_task(task, sorted({*self.tasks, *dict(self.prompts)}))
        return model_options.prompts(tokenizer, dict(self.prompts))(task, text)[0]

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1] and flipped where asked; texts row by row (B T, L), and the loss weight of each token.

        The weights of the tokens that are learned have the sum B T over the batch, so that the loss is a mean over
        tokens however the batch is split (`capvl.objectives.Objective.loss`).
        """
        text, image = batch["text"], unit_range(batch["image"], batch.get("flip") if train else None)
        if self.blind:
            image = jnp.zeros_like(image) if image.shape[-1] == 3 else image.at[..., :3].set(0.0)
        length = text.shape[-1]
        text, prompt = text.reshape(-1, length), batch["prompt"].reshape(-1)
        learned = real(text) & (jnp.arange(length)[None] >= prompt[:, None])
        if "mask" in batch:
            learned = learned & jnp.repeat(batch["mask"], len(text) // len(image))[:, None]
        learned = learned.astype(jnp.float32)
        count = (self._hidden_count(learned) if self.kind == "masked" else learned.sum(axis=1)).sum()
        return {
            "image": image,
            "text": text,
            "weights": learned * (len(text) / jnp.maximum(count, 1.0)),
            "has_image": batch.get("has_image", jnp.ones(len(image), bool)),
            "cut": batch.get("cut", jnp.zeros(len(image), bool)),
        }

    def loss(self, model: git.Git, batch, key):
        """Mean over tokens of cross-entropy less the smoothed target's entropy; metrics `nll` (with it) and `cut`."""
        keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        encoded = model.encode(batch["image"], key=None if self.locked else keys[0])
        kv = model.decoder.image_kv(encoded, key=keys[1])
        kv = kv._replace(valid=kv.valid & batch["has_image"][None, :, None])
        if self.kind == "causal":
            hidden, weights = model.decoder.causal(batch["text"], kv, dtype=model.dtype, key=keys[2]), batch["weights"]
        else:
            hidden, weights = self._masked(model, batch, kv, keys)
        smoothing, scale, entropy = self.smoothed(model.decoder.vocab)
        total, _ = vocabulary_loss(hidden, batch["text"], weights, *model.decoder.output_layer(), smoothing, self.chunk)
        nll = scale * total / len(batch["text"])
        loss = nll - entropy
        return loss, {"loss": loss, "nll": nll, "cut": batch["cut"].astype(jnp.float32).mean()}

    def smoothed(self, vocab: int) -> tuple[float, float, float]:
        """How the loss is smoothed: `capvl.losses.vocabulary`'s smoothing, a factor of it, and what is taken off."""
        return self.smoothing, 1.0, smoothed_entropy(self.smoothing, vocab)

    def _masked(self, model: git.Git, batch, kv, keys):
        """Hidden states (B, L, D) that predict hidden tokens from all others, and the weights of the hidden ones.

        The start token is read in front of the text as ever, so position l + 1 of the decoder stands for token l.
        """
        text, weights = batch["text"], batch["weights"]
        rank = jnp.where(weights > 0, jax.random.uniform(keys[3], text.shape), -1.0)
        count_B1 = self._hidden_count((weights > 0).astype(jnp.float32))[:, None].astype(jnp.int32)
        hidden_BL = (jnp.argsort(jnp.argsort(-rank, axis=1), axis=1) < count_B1) & (weights > 0)
        inputs = shift_right(jnp.pad(jnp.where(hidden_BL, self.mask_id, text), ((0, 0), (0, 1))), model.decoder.start)
        there = jnp.pad(real(text), ((0, 0), (1, 0)), constant_values=True)[:, None, None]
        states = model.decoder(inputs, kv, mask=there, dtype=model.dtype, key=keys[2])
        return states[:, 1:], jnp.where(hidden_BL, weights, 0.0)

    def _hidden_count(self, learned_BL) -> jax.Array:
        """How many of each text's tokens are hidden, (B,) float32: a share of them, and at least one where any is."""
        count_B = learned_BL.sum(axis=1)
        return jnp.where(count_B > 0, jnp.maximum(jnp.round(self.mask_ratio * count_B), 1.0), 0.0)

    def flops(self, model_options: GitOptions) -> float:
        """Matmul FLOPs of training on one example, of the mean one with `sides`: a locked encoder has no backward
        pass."""
        models = [dataclasses.replace(model_options, res=side) for side in self.sides] or [model_options]
        encoders = (1 if self.locked else 3) * sum(model.encoder_flops() for model in models)
        return (encoders + 3 * sum(model.decoder_flops(max(1, self.texts)) for model in models)) / len(models)


def smoothed_entropy(smoothing: float, vocab: int) -> float:
    """Entropy of a target of 1 - s on one class and s / (V - 1) on each other, in nats."""
    if not smoothing:
        return 0.0
    return -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing / (vocab - 1))
