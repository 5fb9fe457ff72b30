"""Self-critical sequence training of a GIT (arXiv 1612.00563): the last stage of captioning.

Captions are sampled; each is worth its CIDEr-D less that of the greedy caption, and its log-probability is raised or
lowered by that (equation 7). Sampling, scores and gradient are one program on the device.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from capvl.data.examples import slots
from capvl.data.images.crops import Crop
from capvl.data.reading.sources import default_data_dir
from capvl.data.text import frequencies, tokenizers
from capvl.decoding.generate import GREEDY, Decoding, generate, with_prompt
from capvl.errors import UserError
from capvl.losses.cider import cider_d
from capvl.losses.vocabulary import vocabulary_loss
from capvl.models.git import Git, GitOptions
from capvl.models.prompts import check_task
from capvl.nn.padding import lengths, real
from capvl.objectives.images import unit_range


@dataclasses.dataclass(frozen=True)
class Scst:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      frequencies: file of `python -m capvl.data.frequencies`, {data_dir} standing for where prepared data sets are.
      samples: captions sampled of each image.
      references: people's captions of each image that are compared with.
      top_p: of the samples.
      end: id of the tokenizer's end.
      chunk: tokens whose logits a device holds at a time.
    """

    frequencies: str = ""
    samples: int = 5
    references: int = 5
    top_p: float = 1.0
    end: int = 102
    chunk: int = 1024

    Model: ClassVar[type] = GitOptions
    room: ClassVar[int] = 0
    """Most tokens of a caption's prompt."""

    def __post_init__(self):
        if min(self.samples, self.references, self.chunk, self.end) < 1:
            raise UserError("objective.samples, references, end and chunk must be at least 1.")
        Decoding(temperature=1.0, top_p=self.top_p)

    def check(self, model_options: GitOptions, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where the frequencies can't be read."""
        self._table()

    def _table(self) -> tuple[np.ndarray, int]:
        return frequencies.read(self.frequencies.replace("{data_dir}", default_data_dir()))

    def frozen(self, model_options: GitOptions) -> tuple[str, ...]:
        """All parameters train but a MAP head, which the decoder doesn't use."""
        return model_options.unread

    def features(self) -> tuple[str, ...]:
        """An image, or the frames of a clip, and captions."""
        return ("image?", "frames?", "text")

    def transform(self, model_options: GitOptions, data, *, train: bool):
        """Crop, and tokens of the references."""
        tokenizer = tokenizers.load(data.tokenizer_path(), model_options.reads_start)
        model_options.check_tokenizer(tokenizer)
        if tokenizer.eos != self.end:
            raise UserError(
                f"Tokenizer {tokenizer.path!r} ends texts with id {tokenizer.eos}, not objective.end={self.end}."
            )
        crop = Crop.of_model(data, model_options, train=train)
        prompt = model_options.prompt(tokenizer, "caption")
        if len(prompt) > self.room:
            raise UserError(f"A caption's prompt has {len(prompt)} tokens, more than the {self.room} that SCST takes.")
        prompt = np.pad(prompt, (0, self.room - len(prompt))).astype(np.int32)
        return ImageReferences(crop, tokenizer, model_options.length, self.references, prompt)

    def batch_spec(self, model_options: GitOptions, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, …), references int32 (B, R, L) without their ends; prompt int32 (B, P), 0 behind it, where
        captions have one."""
        references = (batch, self.references, model_options.length)
        prompt = {"prompt": jax.ShapeDtypeStruct((batch, self.room), jnp.int32)} if self.room else {}
        return prompt | {
            "image": jax.ShapeDtypeStruct((batch, *model_options.image_shape()), jnp.uint8),
            "references": jax.ShapeDtypeStruct(references, jnp.int32),
        }

    def prompt(self, model_options: GitOptions, tokenizer, task: str, text: str = "") -> np.ndarray:
        """The model's own for a caption; nothing else is trained."""
        check_task(task, ("caption",))
        return model_options.prompt(tokenizer, task)

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1]."""
        return batch | {"image": unit_range(batch["image"])}

    def loss(self, model: Git, batch, key):
        """Mean over samples of -(reward - greedy reward) * log-probability; metrics `reward` and `greedy`."""
        decoder, (images, _, length) = model.decoder, batch["references"].shape
        prompt_BP = batch.get("prompt", jnp.zeros((images, 0), jnp.int32))
        kv = decoder.image_kv(model.encode(batch["image"]))
        still = jax.lax.stop_gradient(kv)
        sampling = Decoding(temperature=1.0, top_p=self.top_p)
        how = dict(prompt_BP=prompt_BP, key=key)
        sampled, _ = generate(model, still, length, self.end, sampling, **how, samples=self.samples)
        greedy, _ = generate(model, still, length, self.end, GREEDY, prompt_BP=prompt_BP)
        sampled, greedy = jax.lax.stop_gradient((sampled, greedy))
        table, documents = self._table()

        def rewards(tokens_XL, references_XRL):
            return cider_d(jnp.where(tokens_XL == self.end, 0, tokens_XL), references_XRL, table, documents)

        baseline_B = rewards(greedy, batch["references"])
        reward_X = rewards(sampled, jnp.repeat(batch["references"], self.samples, axis=0))
        advantage_X = reward_X - jnp.repeat(baseline_B, self.samples)
        prompt_XP = jnp.repeat(prompt_BP, self.samples, axis=0)
        whole_XT = with_prompt(prompt_XP, sampled)[:, :length]
        written_XT = real(whole_XT) & (jnp.arange(whole_XT.shape[1])[None] >= lengths(prompt_XP)[:, None])
        weights_XT = jnp.where(written_XT, advantage_X[:, None], 0.0)
        hidden = decoder.causal(whole_XT, kv, dtype=model.dtype)
        total, _ = vocabulary_loss(hidden, whole_XT, weights_XT, *decoder.output_layer(), 0.0, self.chunk)
        return total / len(sampled), {
            "loss": total / len(sampled),
            "reward": reward_X.mean(),
            "greedy": baseline_B.mean(),
        }

    def flops(self, model_options: GitOptions) -> float:
        """Matmul FLOPs of one example without the writing of samples: encoder once, a text for each sample."""
        return 3 * model_options.encoder_flops() + 3 * model_options.decoder_flops(self.samples)


@dataclasses.dataclass(frozen=True)
class ImageReferences:
    """image (see `Crop`) and references int32 (R, L): captions without their ends, drawn where there are more.

    Attributes:
      crop: how images become pixels.
      tokenizer: of the captions.
      length: L.
      count: R.
      prompt: int32 (P,), what captions begin with; P may be 0.
    """

    crop: Crop
    tokenizer: Any
    length: int
    count: int
    prompt: np.ndarray

    def __call__(self, example: dict, uniforms) -> dict[str, np.ndarray]:
        """Raises BadImageError where the image can't be used."""
        drawn = slots.choose(example["text"], self.count, uniforms)
        rows = [{"references": self.tokenizer(text, self.length)} for text in drawn]
        references = slots.fill(rows, self.count, {"references": np.zeros(self.length, np.int32)})["references"]
        references[references == self.tokenizer.eos] = 0
        prompt = {"prompt": self.prompt} if len(self.prompt) else {}
        return prompt | {"image": self.crop(example, uniforms), "references": references}
