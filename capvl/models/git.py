"""GIT (arXiv 2205.14100): image tokens as the prefix of a transformer that writes text.

The encoder's tokens, projected and normalised, stand before the embedded text in one transformer: they see each
other, the text sees them and what is before it. `fusion="cross"` is the paper's comparison (section 4.6): blocks with
cross-attention to the projected tokens instead.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capvl.errors import UserError
from capvl.models import git_decoder, sizes
from capvl.models.abilities import Ability
from capvl.models.features import Level
from capvl.models.git_decoder import GitDecoder
from capvl.models.prompts import TextPrompts, check_task
from capvl.models.sizes import Size
from capvl.models.vision import ImageOptions
from capvl.nn import weights
from capvl.nn.weights import weight

TASKS = ("answer", "caption", "classify", "read")


@dataclasses.dataclass(frozen=True)
class GitOptions(ImageOptions):
    """What a GIT is made of; `config.model` of a recipe. The defaults are GIT_B's.

    Attributes:
      text: size of the decoder (`capvl.models.sizes`).
      vocab, start: number of token ids, and the id that is read before a text ([CLS]).
      length: tokens of a text, the end included.
      text_positions: rows of the position table.
      tied: the output layer is the token table with a bias; else it has a kernel of its own.
      fusion: "prefix" or "cross".
      norm: where the decoder's layer norms are: "post" (as BERT's) or "pre".
      projection_norm: a layer norm behind the projection of the image tokens.
      text_activation, text_eps, embedding_eps: of the decoder's MLPs, of its norms, and of the text embedding's norm.
      dropout: in the decoder, in training.
      frames: 0 for images; else the frames of a clip, each with a learned vector.
      frame_pool: "concat" (all frames' tokens) or "mean" (over frames).
      max_side: 0 for square images; else images keep their aspect: short side `res`, long side at most this.
    """

    pool: str = "cls"
    activation: str = "quick_gelu"
    eps: float = 1e-5
    pre_norm: bool = True
    class_position: bool = True
    pixels: str = "clip"
    text: str = "w768d6h12m3072"
    vocab: int = 30_522
    start: int = 101
    length: int = 40
    text_positions: int = 1024
    tied: bool = True
    fusion: str = "prefix"
    norm: str = "post"
    projection_norm: bool = True
    text_activation: str = "gelu"
    text_eps: float = 1e-12
    embedding_eps: float = 1e-8
    dropout: float = 0.1
    frames: int = 0
    frame_pool: str = "concat"
    max_side: int = 0

    reads_start: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        size = sizes.parse_size(self.text)
        self.check_choices(fusion=("prefix", "cross"), norm=("post", "pre"), frame_pool=("concat", "mean"))
        if min(self.vocab, self.length, size.depth) < 1 or not 0 <= self.start < self.vocab:
            raise UserError("model: vocab and length must be at least 1, and start an id below vocab.")
        if self.length > self.text_positions:
            raise UserError(f"model.length={self.length} is more than model.text_positions={self.text_positions}.")
        if self.frames < 0 or not 0 <= self.dropout < 1:
            raise UserError("model.frames must not be negative, and model.dropout must be in [0, 1).")
        if self.max_side and (self.max_side < self.res or self.max_side % self.stride):
            raise UserError(
                f"model.max_side={self.max_side} should be a multiple of the patch {self.stride} and at least "
                f"model.res={self.res}."
            )
        if self.max_side and (self.frames or self.patch_dropout or self.positions != "learned"):
            raise UserError("model.max_side goes with images, learned positions and no patch dropout only.")
        if self.max_side and self.stem == "conv":
            raise UserError("model.max_side needs model.stem='patch': convolutions would read the padding.")

    @property
    def decoder_layers(self) -> int:
        """Depth of the decoder."""
        return sizes.parse_size(self.text).depth

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do. Its decoder reads a start, or a prompt, before it writes: not all at once."""
        return frozenset({Ability.IMAGES, Ability.DECODER} | ({Ability.CLIPS} if self.frames else set()))

    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image, or of a clip, as a batch has it."""
        if self.max_side:
            return (self.max_side, self.max_side, 4)
        return (*((self.frames,) if self.frames else ()), self.res, self.res, 3)

    @property
    def decoder_size(self) -> Size:
        """The decoder's size."""
        return sizes.parse_size(self.text)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raises UserError where a tokenizer's texts begin with another id than the decoder's."""
        if tokenizer.start_id not in (None, self.start):
            raise UserError(
                f"Tokenizer {tokenizer.path!r} begins texts with id {tokenizer.start_id}, and model.start={self.start}."
            )

    def prompts(self, tokenizer: Any, words: dict[str, str] | None = None) -> TextPrompts:
        """How the model is prompted: by a question, or by a task's own `words` where there is none."""
        return TextPrompts(tokenizer, self.length, words or {})

    def prompt(self, tokenizer: Any, task: str, text: str = "") -> np.ndarray:
        """Tokens that begin what is written: the question, or none.

        Raises:
          UserError: an unknown task.
        """
        check_task(task, TASKS)
        return self.prompts(tokenizer)(task, text)[0]

    def kept_patches(self) -> int:
        """Patches of an image that the blocks see; of images that keep their aspect as many as the largest has."""
        if not self.max_side:
            return super().kept_patches()
        return (self.res // self.stride) * (self.max_side // self.stride)

    def image_tokens(self) -> int:
        """Tokens of an image, or of a clip, that the decoder sees in training."""
        return super().image_tokens() * (self.frames if self.frames and self.frame_pool == "concat" else 1)

    def encoder_flops(self) -> float:
        """Forward matmul FLOPs of one image, or of all frames of a clip."""
        return max(1, self.frames) * super().encoder_flops()

    def image_kv_flops(self) -> float:
        """Forward matmul FLOPs of one image's keys and values, which all its texts share."""
        return git_decoder.image_kv_flops(self.decoder_size, self.encoder_width, self.image_tokens(), self.fusion)

    def text_flops(self, length: int = 0) -> float:
        """Forward matmul FLOPs of one text behind them, of `length` tokens; 0 for all."""
        length, tokens = length or self.length, self.image_tokens()
        return git_decoder.text_flops(self.decoder_size, self.vocab, length, tokens, self.fusion)

    def decoder_flops(self, texts: int = 1) -> float:
        """Forward matmul FLOPs of the decoder over one image (or clip) and its texts."""
        return self.image_kv_flops() + texts * self.text_flops()

    def make(self, rngs: nnx.Rngs) -> "Git":
        """Builds the model."""
        return Git(self, rngs=rngs)


class Git(nnx.Module):
    """Images or clips -> tokens -> text. Every method is a pure function of the parameters."""

    def __init__(self, options: GitOptions, *, rngs: nnx.Rngs):
        self.dtype, self.frame_pool = jnp.dtype(options.dtype), options.frame_pool
        self.encoder = options.make_encoder(rngs)
        self.decoder = GitDecoder(options, rngs=rngs)
        frames = (options.frames, options.encoder_width)
        self.frames = weight(rngs, frames, (None, None), weights.zeros) if options.frames else None

    def encode(self, image, *, key: jax.Array | None = None) -> jax.Array | Level:
        """Image tokens (B, N, D) of images (B, R, R, 3) or clips (B, F, R, R, 3) in [-1, 1]; a `key` means training.

        Images with a fourth channel (see `capvl.models.vit.ViT`) give a `Level`, which knows their padding. Clips have
        at most as many frames as the model.

        Raises:
          ValueError: more frames than the model has vectors for.
        """
        pixels = self.encoder.normalize(image.reshape(-1, *image.shape[-3:]))
        encoded = self.encoder(pixels, dtype=self.dtype, key=key)
        if image.ndim == 4:
            return encoded
        batch, frames = image.shape[:2]
        known = 0 if self.frames is None else len(self.frames[...])
        if frames > known:
            raise ValueError(f"a clip of {frames} frames for a model of {known}")
        encoded = encoded.reshape(batch, frames, *encoded.shape[1:])
        if self.frame_pool == "mean":
            return encoded.mean(axis=1)
        encoded = encoded + self.frames[...][:frames].astype(encoded.dtype)[None, :, None]
        return encoded.reshape(batch, -1, encoded.shape[-1])

    def features(self, image) -> jax.Array:
        """Pooled features (B, D) float32 of images; of clips the mean over frames."""
        pooled = self.encoder.pool(self.encode(image.reshape(-1, *image.shape[-3:])))
        return pooled.reshape(image.shape[0], -1, pooled.shape[-1]).mean(axis=1).astype(jnp.float32)

    def logits(self, image, labels_BL) -> jax.Array:
        """Logits (B, L, V) float32 of `labels_BL`."""
        kv = self.decoder.image_kv(self.encode(image))
        return self.decoder.project(self.decoder.causal(labels_BL, kv, dtype=self.dtype))
