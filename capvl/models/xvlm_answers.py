"""X-VLM that answers (arXiv 2111.08276, section 4.2; as ALBEF, 2107.07651): the question, read by the text and the
cross-modal encoder, is what a decoder of answers looks at.

Letters: B images, G questions, each image's together, L positions of a question, A of an answer.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capvl.errors import UserError
from capvl.models import flops, fusion, fusion_decoder, sizes
from capvl.models.abilities import Ability
from capvl.models.bert import split_key
from capvl.models.features import with_summary
from capvl.models.fusion import FusionBert
from capvl.models.fusion_decoder import FusionDecoder
from capvl.models.git_decoder import ImageKeys
from capvl.models.prompts import check_task
from capvl.models.sizes import Size
from capvl.models.vision import ImageOptions
from capvl.models.xvlm import TextOptions
from capvl.nn.padding import lengths, real


@dataclasses.dataclass(frozen=True)
class XVlmAnswersOptions(TextOptions, ImageOptions):
    """What it is made of; `config.model` of a recipe.

    Attributes:
      length: tokens of an answer, its end included.
      question_length: tokens of a question, its start and end included.
      answer_layers: of the decoder; as many as `cross_layers` begin as those (`init_from`).
      start, end: ids around a question; the start is also read before an answer.
    """

    length: int = 10
    question_length: int = 40
    answer_layers: int = 6
    start: int = 101
    end: int = 102

    reads_start: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("answer",)

    def __post_init__(self):
        super().__post_init__()
        self.check_text()
        if self.answer_layers < 1 or not 3 <= self.question_length <= self.text_positions - self.first_position:
            raise UserError(
                f"model.answer_layers must be at least 1, and model.question_length={self.question_length} at least 3 "
                f"and within model.text_positions={self.text_positions}."
            )
        if not (0 <= self.start < self.vocab and 0 < self.end < self.vocab):
            raise UserError("model.start and model.end must be ids below model.vocab, and the end not 0.")

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        return frozenset({Ability.IMAGES, Ability.ANSWERS})

    @property
    def decoder_size(self) -> Size:
        """The decoder's size."""
        return dataclasses.replace(sizes.parse_size(self.text), depth=self.answer_layers)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises UserError where a tokenizer's texts begin or end with other ids than the model's."""
        if tokenizer.start_id not in (None, self.start) or tokenizer.eos != self.end:
            raise UserError(
                f"Tokenizer {tokenizer.path!r} has texts from id {tokenizer.start_id} to {tokenizer.eos}, and "
                f"model.start={self.start}, model.end={self.end}."
            )

    def prompt(self, tokenizer: Any, task: str, text: str = "") -> np.ndarray:
        """Tokens of a question, without start and end, cut at its end where it is too long.

        Raises:
          UserError: another task than "answer".
        """
        check_task(task, self.tasks)
        tokens = tokenizer(text, self.question_length)
        return tokens[real(tokens) & (tokens != tokenizer.eos)][: self.question_length - 2]

    def image_tokens(self) -> int:
        """Tokens of an image that questions look at: a summary, and one a place."""
        rows, columns = self.grid
        return rows * columns + 1

    def question_flops(self) -> float:
        """Forward matmul FLOPs of one question that looks at an encoded image, and of the keys and values of it."""
        size, tokens = sizes.parse_size(self.text), self.question_length
        alone = (size.depth - self.cross_layers) * flops.layer(tokens, size)
        image = fusion.fusion_flops(size, self.cross_layers, tokens, self.image_tokens(), self.encoder_width)
        return alone + image + fusion_decoder.image_kv_flops(self.decoder_size, self.answer_layers, tokens, size.width)

    def answer_flops(self) -> float:
        """Forward matmul FLOPs of one answer behind them."""
        return fusion_decoder.text_flops(self.decoder_size, 0, self.vocab, self.length, self.question_length)

    def make(self, rngs: nnx.Rngs) -> "XVlmAnswers":
        """Builds the model."""
        return XVlmAnswers(self, rngs=rngs)


class XVlmAnswers(nnx.Module):
    """Every method is a pure function of the parameters; a `key` means training."""

    def __init__(self, options: XVlmAnswersOptions, *, rngs: nnx.Rngs):
        self.dtype, self.reads_end = jnp.dtype(options.dtype), options.reads_end
        self.start, self.end = options.start, options.end
        self.encoder = options.make_encoder(rngs)
        how = dict(dtype=options.dtype, remat=options.remat, unroll=options.unroll)
        reading, writing = options.bert_options("none", **how), options.bert_options("words", **how)
        width = sizes.parse_size(options.text).width
        self.text = FusionBert(reading, options.cross_layers, options.encoder_width, rngs=rngs)
        self.answers = FusionBert(writing, options.answer_layers, width, lower=0, rngs=rngs)

    @property
    def decoder(self) -> FusionDecoder:
        """What writes answers."""
        return FusionDecoder(self.answers, self.start)

    def encode(self, image_BHWC, *, key: jax.Array | None = None) -> jax.Array:
        """Image tokens (B, N, C), a summary first, of images (B, H, W, 3) in [-1, 1]."""
        image_BHWC = self.encoder.normalize(image_BHWC)
        return with_summary(self.encoder.levels(image_BHWC, dtype=self.dtype, key=key)[-1]).tokens_BND

    def features(self, image_BHWC) -> jax.Array:
        """Summaries (B, C) float32 of images."""
        return self.encode(image_BHWC)[:, 0].astype(jnp.float32)

    def read(self, question_GP) -> jax.Array:
        """Questions as they are read, (G, P + 2): start, tokens, and, unless `reads_end` is False, end."""
        text_GL = jnp.pad(question_GP, ((0, 0), (1, 1))).at[:, 0].set(self.start)
        if not self.reads_end:
            return text_GL
        place_1L = jnp.arange(text_GL.shape[1], dtype=jnp.int32)[None]
        return jnp.where(place_1L == lengths(question_GP)[:, None] + 1, self.end, text_GL)

    def states(self, image_BNC, text_GL, *, key=None) -> jax.Array:
        """States (G, L, D) of questions, as `read` gives them, that look at encoded images."""
        keys = split_key(key, 2)
        alone_GLD = self.text.states(text_GL, key=keys[0])
        return self.text.fuse(alone_GLD, text_GL, image_BNC, key=keys[1])

    def ask(self, image_BHWC, question_GP, *, key=None) -> ImageKeys:
        """What `decoder` writes answers behind: keys and values of the states of questions.

        Args:
          image_BHWC: in [-1, 1].
          question_GP: int32 tokens without start and end, 0 behind them; G / B consecutive ones are of one image.
          key: means training.
        """
        keys, text_GL = split_key(key, 2), self.read(question_GP)
        states_GLD = self.states(self.encode(image_BHWC, key=keys[0]), text_GL, key=keys[1])
        return self.decoder.image_kv(states_GLD, real(text_GL))
