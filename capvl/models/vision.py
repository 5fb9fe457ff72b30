"""Image encoders: the options of models that have one, whichever kind it is, and the kinds by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from flax import nnx

from capvl.errors import UserError, nearest
from capvl.models import flops, swin, vit
from capvl.models.abilities import Ability
from capvl.models.pixels import PIXELS
from capvl.models.sizes import Size
from capvl.nn.layers import ACTIVATIONS
from capvl.nn.stack import REMAT


class Kind(Protocol):
    """What the name of an encoder says, and what follows from it for its kind.

    Attributes:
      called: the kind, in messages.
      only: values of the options that it has no other values of.
      size: of the layers whose tokens come out.
      stride: pixels from one of these tokens to the next.
      levels: stride and width of each level that it gives.
    """

    called: ClassVar[str]
    only: ClassVar[Mapping[str, tuple]]
    size: Size
    stride: int
    levels: tuple[tuple[int, int], ...]

    def check(self, options: Any) -> None:
        """Raises UserError where options don't go together, or it can't read images of `res`."""

    def check_side(self, side: int, options: Any, what: str) -> None:
        """Raises UserError, which begins with `what`, where an encoder of these options can't read images of a side."""

    def flops(self, options: Any) -> float:
        """Forward matmul FLOPs of one image, without a MAP head."""

    def make(self, options: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The encoder: `normalize`, `levels`, `regions`, `__call__` and `pool` as `capvl.models.vit.ViT` has them."""


def kind_of(encoder: str) -> Kind:
    """The kind of an encoder: "swin-…" of a Swin, all others of ViTs.

    Raises:
      UserError: there is no such encoder.
    """
    return swin.SwinKind.parse(encoder) if encoder.startswith("swin-") else vit.ViTKind.parse(encoder)


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """What an image encoder is made of; the options of models that have one begin with these.

    Attributes:
      encoder: SIZE/PATCH of a ViT (`capvl.models.sizes`), or swin-SIZE/PATCH (`capvl.models.swin`).
      res: image side in pixels.
      stem: "patch" (one linear layer) or "conv" (3 x 3 convolutions of stride 2; patches of 2, 4, 8, 16 or 32 pixels).
      pool: "mean", "map" or "cls".
      positions: "learned" or "sincos".
      registers: extra learned tokens that the blocks see and the output drops.
      patch_dropout: share of patches dropped in training.
      layer_scale: not 0: what the blocks add is scaled by learned vectors that begin at this value (arXiv 2103.17239).
      activation: of the MLPs: "gelu_tanh", "gelu" (exact) or "quick_gelu".
      eps: of the layer norms.
      pre_norm: a layer norm before the blocks (CLIP).
      class_position: the class token has a position of its own (CLIP, the first ViT).
      pixels: a key of PIXELS: how pixels are normalised.
      dtype: of activations and matmuls, "bfloat16" or "float32".
      remat: what the backward pass recomputes: "none", "dots", "named", "offload" or "full".
      unroll: straight-line layers instead of a loop.
      window: side of a Swin's windows, in tokens.
      pad_windows: grids of a Swin are padded to whole windows, which are `window` wide and shifted in all stages, as in
        detectors; else windows must divide them, and a stage that is no larger is one window.
      level_norms: each level of a Swin but the first has a layer norm of its own, as in detectors; else the last alone.
      drop_path: in training, the share of images for which the last layer adds nothing; it grows to this from 0 at the
        first layer (stochastic depth, arXiv 1603.09382).
    """

    encoder: str = "B/16"
    res: int = 224
    stem: str = "patch"
    pool: str = "mean"
    positions: str = "learned"
    registers: int = 0
    patch_dropout: float = 0.0
    layer_scale: float = 0.0
    activation: str = "gelu_tanh"
    eps: float = 1e-6
    pre_norm: bool = False
    class_position: bool = False
    pixels: str = "half"
    dtype: str = "bfloat16"
    remat: str = "none"
    unroll: bool = False
    window: int = 7
    pad_windows: bool = False
    level_norms: bool = False
    drop_path: float = 0.0

    reads_start: ClassVar[bool] = True
    """Whether texts begin with the tokenizer's start id, where it has one; else the decoder begins by itself."""

    frames: ClassVar[int] = 0
    """Frames of a clip, where the model reads clips."""

    max_side: ClassVar[int] = 0
    """Long side of images that keep their aspect; 0 where all are square."""

    def __post_init__(self):
        self.check_choices(
            stem=("patch", "conv"),
            pool=("mean", "map", "cls"),
            positions=("learned", "sincos"),
            activation=tuple(ACTIVATIONS),
            pixels=tuple(PIXELS),
            dtype=("bfloat16", "float32"),
            remat=tuple(REMAT),
        )
        kind = self.encoder_kind
        wrong = [name for name, known in kind.only.items() if getattr(self, name) not in known]
        if wrong:
            found = ", ".join(f"model.{name}={getattr(self, name)!r}" for name in wrong)
            right = ", ".join(f"model.{name}={kind.only[name][0]!r}" for name in wrong)
            raise UserError(
                f"model.encoder={self.encoder!r} is a {kind.called}, which doesn't have {found}; set {right}."
            )
        kind.check(self)
        if self.registers < 0 or self.layer_scale < 0 or self.eps <= 0:
            raise UserError("model: registers and layer_scale must not be negative, and eps must be positive.")
        for name in ("patch_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"model.{name} must be in [0, 1), not {getattr(self, name)}.")
        if self.class_position and (self.pool != "cls" or self.positions != "learned"):
            raise UserError("model.class_position needs model.pool='cls' and model.positions='learned'.")

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        return frozenset({Ability.IMAGES})

    @property
    def encoder_kind(self) -> Kind:
        """What the encoder's name says."""
        return kind_of(self.encoder)

    @property
    def encoder_size(self) -> Size:
        """Of the layers whose tokens come out."""
        return self.encoder_kind.size

    @property
    def encoder_width(self) -> int:
        """Of the tokens that come out."""
        return self.encoder_size.width

    @property
    def stride(self) -> int:
        """Pixels from one of these tokens to the next."""
        return self.encoder_kind.stride

    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image as a batch has it."""
        return (self.res, self.res, 3)

    def check_side(self, side: int, what: str) -> None:
        """Raises UserError, which begins with `what`, where the encoder can't read images of a side."""
        self.encoder_kind.check_side(side, self, what)

    def check_choices(self, **known: tuple[str, ...]) -> None:
        """Raises UserError where an option is not among the known ones."""
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"model.{name}={getattr(self, name)!r} is unknown." + nearest(getattr(self, name), choices)
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of an image of `res`."""
        side = -(-self.res // self.stride)
        return side, side

    @property
    def unread(self) -> tuple[str, ...]:
        """Regexes of the encoder's parameters that nothing reads but what pools an image: of a MAP head."""
        return ("encoder/map/.*",) if self.pool == "map" else ()

    def kept_patches(self) -> int:
        """Tokens of an image's places that come out in training."""
        rows, columns = self.grid
        return max(1, round(rows * columns * (1 - self.patch_dropout)))

    def image_tokens(self) -> int:
        """Tokens of an image that what stands behind the encoder sees in training."""
        return self.kept_patches() + (self.pool == "cls")

    def encoder_flops(self) -> float:
        """Forward matmul FLOPs of one image, without a MAP head."""
        return self.encoder_kind.flops(self)

    def map_head_flops(self) -> float:
        """Forward matmul FLOPs of pooling one image by a MAP head."""
        size = self.encoder_size
        tokens, width = self.kept_patches(), size.width
        kv = 2 * flops.dense(tokens, width, width)
        return kv + flops.cross_attention(1, tokens, width) + 2 * flops.dense(1, width, size.mlp)

    def make_encoder(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the encoder."""
        return self.encoder_kind.make(self, rngs)
