"""Question answering with X-VLM (arXiv 2111.08276, section 4.2; as ALBEF, 2107.07651): a decoder writes the answers
behind the states of a question that looks at the image.

Loss of a question: the sum over its answers of weight times negative log-likelihood, the weight being the share of the
people who gave it.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from capvl.data.examples.answers import QuestionAnswers
from capvl.data.images.crops import Crop
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.losses.vocabulary import vocabulary_loss
from capvl.models.bert import split_key
from capvl.models.xvlm_answers import XVlmAnswers, XVlmAnswersOptions
from capvl.nn.padding import real
from capvl.objectives.images import unit_range


@dataclasses.dataclass(frozen=True)
class XVlmAnswering:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      questions: of an image, which share its encoding.
      answers: different ones of a question; the commonest where there are more.
      lone: what a question weighs that has one answer only, as Visual Genome's have (official code: 0.5).
      chunk: tokens whose logits a device holds at a time.
    """

    questions: int = 1
    answers: int = 10
    lone: float = 1.0
    chunk: int = 1024

    Model: ClassVar[type] = XVlmAnswersOptions

    def __post_init__(self):
        if min(self.questions, self.answers, self.chunk) < 1:
            raise UserError("objective.questions, answers and chunk must be at least 1.")
        if not 0 < self.lone <= 1:
            raise UserError(f"objective.lone={self.lone:g} should be above 0 and at most 1.")

    def check(self, model_options: XVlmAnswersOptions, batch_per_device: int, micro_batches: int) -> None:
        """Nothing contradicts."""

    def frozen(self, model_options: XVlmAnswersOptions) -> tuple[str, ...]:
        """All parameters train but a MAP head, which nothing reads."""
        return model_options.unread

    def features(self) -> tuple[str, ...]:
        """An image and questions with answers."""
        return ("image", "questions")

    def transform(self, model_options: XVlmAnswersOptions, data, *, train: bool):
        """Crop, flip, and tokens of questions and answers."""
        tokenizer = tokenizers.load(data.tokenizer_path(), model_options.reads_start)
        model_options.check_tokenizer(tokenizer)
        return QuestionAnswers(
            Crop.of_model(data, model_options, train=train),
            functools.partial(model_options.prompt, tokenizer, "answer"),
            model_options.question_length - 2,
            tokenizer,
            model_options.length,
            self.questions,
            self.answers,
            data.flip and train,
            self.lone,
        )

    def batch_spec(self, model_options: XVlmAnswersOptions, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, R, R, 3), flip bool (B,); question int32 (B, Q, P) without start and end, answer int32
        (B, Q, A, L), weight float32 (B, Q, A)."""
        slots = (batch, self.questions)
        return {
            "image": jax.ShapeDtypeStruct((batch, *model_options.image_shape()), jnp.uint8),
            "flip": jax.ShapeDtypeStruct((batch,), jnp.bool_),
            "question": jax.ShapeDtypeStruct((*slots, model_options.question_length - 2), jnp.int32),
            "answer": jax.ShapeDtypeStruct((*slots, self.answers, model_options.length), jnp.int32),
            "weight": jax.ShapeDtypeStruct((*slots, self.answers), jnp.float32),
        }

    def prompt(self, model_options: XVlmAnswersOptions, tokenizer, task: str, text: str = "") -> np.ndarray:
        """The question's tokens, and nothing but answers is trained."""
        return model_options.prompt(tokenizer, task, text)

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1] and flipped where asked; the loss weights of a batch have the sum B."""
        weight = batch["weight"]
        if "mask" in batch:
            weight = jnp.where(batch["mask"][:, None, None], weight, 0.0)
        asked = (weight > 0).any(axis=2).sum().astype(jnp.float32)
        return {
            "image": unit_range(batch["image"], batch["flip"] if train else None),
            "question": batch["question"],
            "answer": batch["answer"],
            "weight": weight * (len(weight) / jnp.maximum(asked, 1.0)),
        }

    def loss(self, model: XVlmAnswers, batch, key):
        """Mean over questions of the weighted sum over answers of -log p(answer)."""
        images, count = batch["question"].shape[:2]
        keys = split_key(key, 2)
        kv = model.ask(batch["image"], batch["question"].reshape(images * count, -1), key=keys[0])
        answer = batch["answer"].reshape(-1, batch["answer"].shape[-1])
        hidden = model.decoder.causal(answer, kv, dtype=model.dtype, key=keys[1])
        weights = jnp.where(real(answer), batch["weight"].reshape(-1, 1), 0.0)
        total, _ = vocabulary_loss(hidden, answer, weights, *model.decoder.output_layer(), 0.0, self.chunk)
        loss = total / images
        return loss, {"loss": loss}

    def flops(self, model_options: XVlmAnswersOptions) -> float:
        """Matmul FLOPs of training on one image with its questions."""
        one = model_options.question_flops() + self.answers * model_options.answer_flops()
        return 3 * (model_options.encoder_flops() + self.questions * one)
