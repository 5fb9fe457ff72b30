"""Transfer of an encoder to captioning, classification by generation and question answering at once.

A small decoder learns on a frozen (or tuned) encoder; a token in front of the text says which task
it is (CapPa, section 4.1; the "LiT decoder" of arXiv 2303.17376). The ids of these tokens are the
last of the vocabulary.

What the decoder reads and writes: TASK [question EOS] target EOS. Only the target counts in the loss.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from capvl import flops
from capvl.data.sources import as_text
from capvl.data.transforms import ImageText
from capvl.errors import UserError, nearest
from capvl.losses.vocabulary import vocabulary_loss
from capvl.models.captioner import Captioner, CaptionerOptions
from capvl.objectives.images import unit_range

TASKS = ("caption", "classify", "answer")


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
        for task in self.tasks:
            if task not in TASKS:
                raise UserError(f"objective.tasks: {task!r} is unknown." + nearest(task, TASKS))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise UserError("objective.tasks should name one task or more, each once.")
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
        images = ImageText.from_options(data, res=model_options.res, length=model_options.length, train=train)
        reserved = model_options.vocab - len(TASKS)
        if images.tokenizer.vocab > reserved:
            raise UserError(
                f"Tokenizer {images.tokenizer.path!r} has {images.tokenizer.vocab} pieces, and {len(TASKS)} ids are "
                f"for the tasks: model.vocab must be at least {images.tokenizer.vocab + len(TASKS)}, not "
                f"{model_options.vocab}."
            )
        return TaskText(images, self.tasks, model_options.vocab)

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
        if task not in self.tasks:
            raise UserError(f"This model wasn't trained for the task {task!r}; it knows {', '.join(self.tasks)}.")
        return prompt_tokens(task, text, tokenizer, model_options.vocab, model_options.length)

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1], and the loss weight of each token of the targets."""
        image = unit_range(batch["image"], batch.get("flip") if train else None)
        text = batch["text"]
        weights = (text != 0) & (jnp.arange(text.shape[1])[None] >= batch["prompt"][:, None])
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
        return (1 if self.locked else 3) * flops.encoder(model_options) + 3 * flops.decoder(model_options)


def prompt_tokens(task: str, question: str, tokenizer, vocab: int, length: int) -> np.ndarray:
    """TASK, or TASK question EOS, at most half of the text positions (the question is cut at its end)."""
    first = vocab - len(TASKS) + TASKS.index(task)
    if not question:
        return np.array([first], np.int32)
    tokens = tokenizer(question, max(2, length // 2 - 1))
    return np.concatenate([[first], tokens[tokens != 0]]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class TaskText:
    """image, flip, text int32 (L,) of a prompt and its target, and prompt int32: the tokens of the prompt.

    Attributes:
      images: how images are cropped, and the tokenizer.
      tasks: to draw from.
      vocab: number of ids, those of the tasks included.
    """

    images: ImageText
    tasks: tuple[str, ...]
    vocab: int

    def __call__(self, example: dict, uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used."""
        choices = list(self._choices(example))
        out = self.images({"image": example["image"], "text": []}, uniforms)
        if not choices:  # Nothing to learn from this one: all padding.
            return out | {"text": np.zeros_like(out["text"]), "prompt": np.int32(0)}
        task, candidates = choices[uniforms.below(len(choices))]
        question, target = candidates[uniforms.below(len(candidates))]
        tokenizer, length = self.images.tokenizer, self.images.length
        prompt = prompt_tokens(task, question, tokenizer, self.vocab, length)
        text = np.concatenate([prompt, tokenizer(target, length - len(prompt))])
        return out | {"text": text.astype(np.int32), "prompt": np.int32(len(prompt))}

    def _choices(self, example: dict):
        """(task, its (question, target) pairs) of every task that the example serves."""
        if "caption" in self.tasks and len(example.get("text") or ()):
            yield "caption", [("", text) for text in example["text"]]
        if "classify" in self.tasks and example.get("class_name"):
            yield "classify", [("", example["class_name"])]
        questions = example.get("questions")
        if "answer" in self.tasks and questions is not None and len(questions["question"]):
            pairs = zip(questions["question"], questions["answer"], strict=True)
            yield "answer", [(as_text(q), a) for q, a in pairs]
