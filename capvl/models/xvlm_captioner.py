"""X-VLM as a captioner (arXiv 2111.08276, section 4.2): its whole BERT is a causal language model that looks at the
image, and its parameters are those of `capvl.models.xvlm.XVlm` without heads."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capvl.errors import UserError
from capvl.models import fusion_decoder, sizes
from capvl.models.abilities import Ability
from capvl.models.features import with_summary
from capvl.models.fusion import FusionBert
from capvl.models.fusion_decoder import FusionDecoder
from capvl.models.prompts import TextPrompts, check_task
from capvl.models.sizes import Size
from capvl.models.vision import ImageOptions
from capvl.models.xvlm import TextOptions


@dataclasses.dataclass(frozen=True)
class XVlmCaptionerOptions(TextOptions, ImageOptions):
    """What the captioner is made of; `config.model` of a recipe.

    Attributes:
      length: tokens of a caption, its prompt and its end included.
      start: id that is read before a text ([CLS]).
      words: what every caption begins with, and is not part of it.
    """

    start: int = 101
    words: str = "a picture of"

    reads_start: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("caption",)

    def __post_init__(self):
        super().__post_init__()
        self.check_text()
        if not 0 <= self.start < self.vocab or not self.reads_end:
            raise UserError("model.start must be an id below model.vocab, and model.reads_end True: captions end.")

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        return frozenset({Ability.IMAGES, Ability.DECODER})

    @property
    def decoder_size(self) -> Size:
        """The size of the whole BERT."""
        return sizes.parse_size(self.text)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises UserError where a tokenizer's texts begin with another id than the decoder's."""
        if tokenizer.start_id not in (None, self.start):
            raise UserError(
                f"Tokenizer {tokenizer.path!r} begins texts with id {tokenizer.start_id}, and model.start={self.start}."
            )

    def prompts(self, tokenizer: Any, words: dict[str, str] | None = None) -> TextPrompts:
        """How captions begin: with `words`, unless others are given."""
        return TextPrompts(tokenizer, self.length, {"caption": self.words} | (words or {}))

    def prompt(self, tokenizer: Any, task: str, text: str = "") -> np.ndarray:
        """Tokens that begin what is written.

        Raises:
          UserError: another task than "caption".
        """
        check_task(task, self.tasks)
        return self.prompts(tokenizer)(task, text)[0]

    def image_tokens(self) -> int:
        """Tokens of an image that texts look at: a summary, and one a place."""
        rows, columns = self.grid
        return rows * columns + 1

    def image_kv_flops(self) -> float:
        """Forward matmul FLOPs of one image's keys and values, which all its texts share."""
        tokens, width = self.image_tokens(), self.encoder_width
        return fusion_decoder.image_kv_flops(self.decoder_size, self.cross_layers, tokens, width)

    def text_flops(self, length: int = 0) -> float:
        """Forward matmul FLOPs of one text behind them, of `length` tokens; 0 for all."""
        size, tokens = self.decoder_size, self.image_tokens()
        lower = size.depth - self.cross_layers
        return fusion_decoder.text_flops(size, lower, self.vocab, length or self.length, tokens)

    def decoder_flops(self, texts: int = 1) -> float:
        """Forward matmul FLOPs of the decoder over one image and its texts."""
        return self.image_kv_flops() + texts * self.text_flops()

    def make(self, rngs: nnx.Rngs) -> "XVlmCaptioner":
        """Builds the model."""
        return XVlmCaptioner(self, rngs=rngs)


class XVlmCaptioner(nnx.Module):
    """Images -> tokens -> text. Every method is a pure function of the parameters; a `key` means training."""

    def __init__(self, options: XVlmCaptionerOptions, *, rngs: nnx.Rngs):
        self.dtype, self.start = jnp.dtype(options.dtype), options.start
        self.encoder = options.make_encoder(rngs)
        how = dict(dtype=options.dtype, remat=options.remat, unroll=options.unroll)
        bert = options.bert_options("words", **how)
        self.text = FusionBert(bert, options.cross_layers, options.encoder_width, rngs=rngs)

    @property
    def decoder(self) -> FusionDecoder:
        """The BERT as what writes."""
        return FusionDecoder(self.text, self.start)

    def encode(self, image_BHWC, *, key: jax.Array | None = None) -> jax.Array:
        """Image tokens (B, N, C), a summary first, of images (B, H, W, 3) in [-1, 1]."""
        return with_summary(
            self.encoder.levels(self.encoder.normalize(image_BHWC), dtype=self.dtype, key=key)[-1]
        ).tokens_BND

    def features(self, image_BHWC) -> jax.Array:
        """Summaries (B, C) float32 of images."""
        return self.encode(image_BHWC)[:, 0].astype(jnp.float32)

    def logits(self, image_BHWC, labels_BL) -> jax.Array:
        """Logits (B, L, V) float32 of `labels_BL`."""
        kv = self.decoder.image_kv(self.encode(image_BHWC))
        return self.decoder.project(self.decoder.causal(labels_BL, kv, dtype=self.dtype))
