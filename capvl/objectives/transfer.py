"""Transfer of an encoder to captioning, classification by generation and question answering at once.

A small decoder learns on a frozen (or tuned) encoder; a token in front of the text says which task
it is (CapPa, section 4.1; the "LiT decoder" of arXiv 2303.17376). The ids of these tokens are the
last of the vocabulary.

What the decoder reads and writes: TASK [question EOS] target EOS. Only the target counts in the loss.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from capvl.data.examples.tasks import TASKS, TaskText, check_tasks
from capvl.data.images.crops import Crop
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.losses.vocabulary import vocabulary_loss
from capvl.models.captioner import Captioner, CaptionerOptions
from capvl.models.prompts import check_task
from capvl.nn.padding import real
from capvl.objectives.images import unit_range


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      tasks: of TASKS; an example serves one that it has the features for, drawn anew at every visit.
      locked: the encoder is not trained.
      smoothing: label smoothing.
      chunk: tokens whose logits a device holds at a time.
    """

    tasks: tuple[str, ...] = TASKS
    locked: bool = True
    smoothing: float = 0.0
    chunk: int = 1024

    Model: ClassVar[type] = CaptionerOptions

    def __post_init__(self):
        check_tasks(self.tasks)
        if not 0 <= self.smoothing < 1 or self.chunk < 1:
            raise UserError("objective.smoothing must be in [0, 1), and objective.chunk at least 1.")

    def check(self, model_options: CaptionerOptions, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where the text positions leave no room for a target."""
        if model_options.length < 4:
            raise UserError(f"model.length={model_options.length} leaves no room behind a prompt; 4 is the least.")

    def frozen(self, model_options: CaptionerOptions) -> tuple[str, ...]:
        """The encoder where it is locked; its MAP head is not used by the decoder."""
        return ("encoder/.*",) if self.locked else (("encoder/map/.*",) if model_options.pool == "map" else ())

    def features(self) -> tuple[str, ...]:
        """An image, and what any task needs."""
        return ("image", "text?", "class_name?", "questions?")

    def transform(self, model_options: CaptionerOptions, data, *, train: bool):
        """Draws a task and makes its tokens."""
        options, tokenizer = model_options, tokenizers.load(data.tokenizer_path(), model_options.reads_start)
        if tokenizer.vocab > options.vocab - len(TASKS):
            raise UserError(
                f"Tokenizer {tokenizer.path!r} has {tokenizer.vocab} pieces, and {len(TASKS)} ids are for the tasks: "
                f"model.vocab must be at least {tokenizer.vocab + len(TASKS)}, not {options.vocab}."
            )
        crop = Crop.of_model(data, options, train=train)
        prompts = TaskTokens(tokenizer, options.vocab, options.length)
        return TaskText(crop, self.tasks, prompts, tokenizer, options.length, data.flip and train)

    def batch_spec(self, model_options: CaptionerOptions, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, R, R, 3), text int32 (B, L), prompt int32 (B,): how many aren't predicted, flip bool (B,)."""
        res, length = model_options.res, model_options.length
        return {
            "image": jax.ShapeDtypeStruct((batch, res, res, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((batch, length), jnp.int32),
            "prompt": jax.ShapeDtypeStruct((batch,), jnp.int32),
            "flip": jax.ShapeDtypeStruct((batch,), jnp.bool_),
        }

    def prompt(self, model_options: CaptionerOptions, tokenizer, task: str, text: str = "") -> np.ndarray:
        """The task's token, and the question behind it."""
        check_task(task, self.tasks)
        return TaskTokens(tokenizer, model_options.vocab, model_options.length)(task, text)[0]

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1], and the loss weight of each token of the targets."""
        image = unit_range(batch["image"], batch.get("flip") if train else None)
        text = batch["text"]
        weights = real(text) & (jnp.arange(text.shape[1])[None] >= batch["prompt"][:, None])
        weights = weights.astype(jnp.float32)
        return {"image": image, "text": text, "weights": weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)}

    def loss(self, model: Captioner, batch, key):
        """Mean over examples of the mean cross-entropy of their targets."""
        encoded = model.encode(batch["image"], key=None if self.locked else key)
        hidden = model.decoder.causal(batch["text"], model.decoder.image_kv(encoded), dtype=model.dtype)
        total, _ = vocabulary_loss(
            hidden, batch["text"], batch["weights"], *model.decoder.output_layer(), self.smoothing, self.chunk
        )
        loss = total / len(batch["text"])
        return loss, {"loss": loss}

    def flops(self, model_options: CaptionerOptions) -> float:
        """Matmul FLOPs of training on one example: a locked encoder has no backward pass."""
        return (1 if self.locked else 3) * model_options.encoder_flops() + 3 * model_options.decoder_flops()


@dataclasses.dataclass(frozen=True)
class TaskTokens:
    """Prompts TASK, or TASK question EOS.

    Attributes:
      tokenizer: of the texts.
      vocab: number of ids, those of the tasks included.
      length: text positions; a prompt takes half of them at most, and is cut at its end.
    """

    tokenizer: Any
    vocab: int
    length: int

    def __call__(self, task: str, question: str) -> tuple[np.ndarray, bool]:
        """The prompt's tokens, and whether it was cut."""
        first = self.vocab - len(TASKS) + TASKS.index(task)
        if not question:
            return np.array([first], np.int32), False
        room = max(2, self.length // 2 - 1)
        tokens = self.tokenizer(question, room + 1)
        tokens = tokens[real(tokens)]
        cut = len(tokens) > room
        tokens = self.tokenizer(question, room) if cut else tokens
        return np.concatenate([[first], tokens]).astype(np.int32), cut
