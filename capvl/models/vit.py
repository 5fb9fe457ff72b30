"""Vision Transformer encoder (arXiv 2010.11929), pre-LN, with mean, MAP or class-token pooling.

The trunk's arithmetic is that of CapPa's reference; registers are from arXiv 2309.16588 and
patch dropout from arXiv 2212.00794 (FLIP).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.errors import UserError, nearest
from capvl.models import flops, sizes, stem
from capvl.models.abilities import Ability
from capvl.models.features import Level, Regions, pooled_regions
from capvl.models.sizes import Size
from capvl.nn import positions, weights
from capvl.nn.attention import CrossAttention, SelfAttention, input_projection
from capvl.nn.layers import ACTIVATIONS, LayerNorm, Mlp, as_row
from capvl.nn.stack import REMAT, scan, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain

# Mean and standard deviation of the pixels (0 to 1) that an encoder was trained with.
PIXELS = {
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclasses.dataclass(frozen=True)
class ViTOptions:
    """What an image encoder is made of; the options of models that have one begin with these.

    Attributes:
      encoder: SIZE/PATCH of the ViT (`capvl.models.sizes`).
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

    reads_start: ClassVar[bool] = True
    """Whether texts begin with the tokenizer's start id, where it has one; else the decoder begins by itself."""

    frames: ClassVar[int] = 0
    """Frames of a clip, where the model reads clips."""

    max_side: ClassVar[int] = 0
    """Long side of images that keep their aspect; 0 where all are square."""

    def __post_init__(self):
        _, patch = sizes.parse(self.encoder)
        if self.res < patch or self.res % patch:
            near = max(1, round(self.res / patch)) * patch
            raise UserError(f"model.res={self.res} is not a multiple of the patch {patch}; the nearest is {near}.")
        if self.stem == "conv" and patch not in (2, 4, 8, 16, 32):
            raise UserError(f"model.stem='conv' needs patches of 2, 4, 8, 16 or 32 pixels, not {patch}.")
        self.check_choices(
            stem=("patch", "conv"),
            pool=("mean", "map", "cls"),
            positions=("learned", "sincos"),
            activation=tuple(ACTIVATIONS),
            pixels=tuple(PIXELS),
            dtype=("bfloat16", "float32"),
            remat=tuple(REMAT),
        )
        if self.registers < 0 or self.layer_scale < 0 or self.eps <= 0:
            raise UserError("model: registers and layer_scale must not be negative, and eps must be positive.")
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"model.patch_dropout must be in [0, 1), not {self.patch_dropout}.")
        if self.class_position and (self.pool != "cls" or self.positions != "learned"):
            raise UserError("model.class_position needs model.pool='cls' and model.positions='learned'.")

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        return frozenset({Ability.IMAGES})

    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image as a batch has it."""
        return (self.res, self.res, 3)

    def check_choices(self, **known: tuple[str, ...]) -> None:
        """Raises UserError where an option is not among the known ones."""
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"model.{name}={getattr(self, name)!r} is unknown." + nearest(getattr(self, name), choices)
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of `res`."""
        side = self.res // sizes.parse(self.encoder)[1]
        return side, side

    @property
    def encoder_width(self) -> int:
        """Width of the encoder's tokens."""
        return sizes.parse(self.encoder)[0].width

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens that come out of the encoder."""
        return self.grid

    def check_local_layers(self, count: int) -> None:
        """Raises UserError where so many last layers can't see regions alone (`ViT.regions`)."""
        depth = sizes.parse(self.encoder)[0].depth
        if not 0 <= count < depth or (count and self.pool != "cls"):
            raise UserError(
                f"model.local_layers={count} should be less than the encoder's {depth} layers, and needs "
                f"model.pool='cls'."
            )

    def kept_patches(self) -> int:
        """Patches of an image that the blocks see in training."""
        rows, columns = self.grid
        return max(1, round(rows * columns * (1 - self.patch_dropout)))

    def image_tokens(self) -> int:
        """Tokens of an image that what stands behind the encoder sees in training."""
        return self.kept_patches() + (self.pool == "cls")

    def encoder_flops(self) -> float:
        """Forward matmul FLOPs of one image, without a MAP head."""
        size, patch = sizes.parse(self.encoder)
        tokens = self.kept_patches() + self.registers + (self.pool == "cls")
        whole = tuple(side // patch for side in self.image_shape()[-3:-1])
        return stem.flops(self.stem, patch, size.width, whole) + size.depth * flops.layer(tokens, size)

    def map_head_flops(self) -> float:
        """Forward matmul FLOPs of pooling one image by a MAP head."""
        size, _ = sizes.parse(self.encoder)
        tokens, width = self.kept_patches(), size.width
        kv = 2 * flops.dense(tokens, width, width)
        return kv + flops.cross_attention(1, tokens, width) + 2 * flops.dense(1, width, size.mlp)

    def make_encoder(self, rngs: nnx.Rngs) -> "ViT":
        """Builds the encoder."""
        return ViT(self, rngs=rngs)


class EncoderBlock(nnx.Module):
    """x += Attention(LN x); x += MLP(LN x); what is added may be scaled (`ViTOptions.layer_scale`)."""

    def __init__(
        self, size: Size, rngs: nnx.Rngs, *, activation: str = "gelu_tanh", eps: float = 1e-6, layer_scale: float = 0.0
    ):
        self.norm1 = LayerNorm(size.width, eps=eps, rngs=rngs)
        self.attn = SelfAttention(size.width, size.heads, rngs=rngs)
        self.norm2 = LayerNorm(size.width, eps=eps, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, activation=activation, rngs=rngs)
        self.scale1, self.scale2 = (
            weight(rngs, (size.width,), (None,), weights.constant(layer_scale)) if layer_scale else None for _ in "12"
        )

    def __call__(self, x_BND, *, mask=None, causal: bool = False) -> jax.Array:
        added = _scaled(self.attn(self.norm1(x_BND), mask=mask, causal=causal), self.scale1)
        x_BND = checkpoint_name(x_BND + added, "residual")
        x_BND = x_BND + _scaled(self.mlp(self.norm2(x_BND)), self.scale2)
        return constrain(x_BND, "batch", None, None)


def _scaled(x: jax.Array, scale: nnx.Param | None) -> jax.Array:
    return x if scale is None else x * as_row(scale[...].astype(x.dtype), x)


class MapHead(nnx.Module):
    """Multi-head attention pooling: one probe attends to all tokens, then x + MLP(LN x): (B, N, D) -> (B, D)."""

    def __init__(self, size: Size, rngs: nnx.Rngs, *, activation: str = "gelu_tanh", eps: float = 1e-6):
        self.probe = weight(rngs, (1, size.width), (None, None), weights.xavier_uniform(1, size.width))
        self.kv = input_projection(size.width, size.heads, 2, bias=True, rngs=rngs)
        self.attn = CrossAttention(size.width, size.heads, rngs=rngs)
        self.norm = LayerNorm(size.width, eps=eps, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, activation=activation, rngs=rngs)

    def __call__(self, tokens_BND, valid_BN=None) -> jax.Array:
        kv_BNcHK = self.kv(tokens_BND)
        probe_B1D = jnp.broadcast_to(
            self.probe[...].astype(tokens_BND.dtype)[None], (tokens_BND.shape[0], 1, tokens_BND.shape[-1])
        )
        mask = None if valid_BN is None else valid_BN[:, None, None]
        x_B1D = self.attn(probe_B1D, kv_BNcHK[:, :, 0], kv_BNcHK[:, :, 1], mask=mask)
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]


class ViT(nnx.Module):
    """Images (B, H, W, 3) -> tokens (B, N, D) after the final LN; `PIXELS` says what the pixels are.

    Images may have any sides; what is left of a patch at the right and lower edge is not seen. Learned positions are
    resized to the grid as PyTorch does. Images of unequal sizes are padded to one size at the right and below and have
    a fourth channel, 1 where they are and -1 beyond: each then has the positions of its own grid. Where the model has
    a `max_side`, short sides of images that are padded to its square are at most the model's resolution.
    """

    def __init__(self, options: ViTOptions, *, rngs: nnx.Rngs):
        size, patch = sizes.parse(options.encoder)
        width = size.width
        self.patch, self.grid, self.pool_kind = patch, options.grid, options.pool
        self.max_grid = (options.max_side // patch,) * 2
        self.positions_kind, self.class_position = options.positions, options.class_position
        self.registers_count, self.patch_dropout = options.registers, options.patch_dropout
        self.remat, self.unroll = options.remat, options.unroll
        self.pixels = options.pixels
        kind = dict(activation=options.activation, eps=options.eps)
        self.stem, self.stem_kind = stem.make_stem(options.stem, patch, width, rngs), options.stem
        if options.positions == "learned":
            count = self.grid[0] * self.grid[1] + int(options.class_position)
            self.positions = weight(rngs, (count, width), (None, "embed"), weights.normal(width**-0.5))
        self.cls = weight(rngs, (1, width), (None, None), weights.zeros) if options.pool == "cls" else None
        registers = (options.registers, width)
        self.registers = weight(rngs, registers, (None, None), weights.normal(0.02)) if options.registers else None
        self.pre_norm = LayerNorm(width, eps=options.eps, rngs=rngs) if options.pre_norm else None
        self.blocks = stack(lambda r: EncoderBlock(size, r, **kind, layer_scale=options.layer_scale), size.depth, rngs)
        self.norm = LayerNorm(width, eps=options.eps, rngs=rngs)
        self.map = MapHead(size, rngs, **kind) if options.pool == "map" else None

    def normalize(self, image_BHWC) -> jax.Array:
        """Images in [-1, 1] -> pixels as this encoder wants them; a fourth channel stays."""
        if self.pixels == "half":
            return image_BHWC
        mean, std = (jnp.asarray(row, image_BHWC.dtype)[None, None, None] for row in PIXELS[self.pixels])
        return jnp.concatenate([(image_BHWC[..., :3] * 0.5 + 0.5 - mean) / std, image_BHWC[..., 3:]], axis=-1)

    def embed(self, image_BHWC, dtype) -> jax.Array:
        """Patch embedding without positions: (B, N, D), patches row by row."""
        p = self.patch
        b, rows, columns = image_BHWC.shape[0], *self.grid_of(image_BHWC)
        image = image_BHWC[:, : rows * p, : columns * p, :3].astype(dtype)
        if self.stem_kind == "conv":
            return self.stem(image)
        patches = image.reshape(b, rows, p, columns, p, 3).transpose(0, 1, 3, 2, 4, 5)
        return self.stem(patches.reshape(b, -1, p, p, 3))

    def grid_of(self, image_BHWC) -> tuple[int, int]:
        """Rows and columns of the patches of images."""
        return image_BHWC.shape[1] // self.patch, image_BHWC.shape[2] // self.patch

    def add_positions(self, x_BND, grid: tuple[int, int] | None = None) -> jax.Array:
        """Adds the position embedding of the patches of a grid (rows, columns), the model's own by default."""
        grid = grid or self.grid
        if self.positions_kind != "learned":
            table = jnp.asarray(positions.sincos_2d(*grid, x_BND.shape[-1]))
        elif grid == self.grid:
            table = self.positions[...][int(self.class_position) :]
        else:
            table = self._resized(*(jnp.full((1,), n, jnp.int32) for n in grid), grid)[0]
        return x_BND + table.astype(x_BND.dtype)[None]

    def _add_own_positions(self, x_BND, rows_B, columns_B, grid: tuple[int, int]) -> jax.Array:
        """As `add_positions`, for images that fill the first rows and columns of a grid."""
        if self.positions_kind != "learned":
            return self.add_positions(x_BND, grid)
        return x_BND + self._resized(rows_B, columns_B, grid).astype(x_BND.dtype)

    def _resized(self, rows_B, columns_B, grid: tuple[int, int]) -> jax.Array:
        table = self.positions[...][int(self.class_position) :].astype(jnp.float32)
        return positions.resize_on_device(table, self.grid, (rows_B, columns_B), grid)

    def _patches(self, image_BHWC, dtype) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Patches with positions (B, N, D); of padded images also their places and which are valid (see `Level`)."""
        grid = self.grid_of(image_BHWC)
        if image_BHWC.shape[-1] == 3:
            return self.add_positions(self.embed(image_BHWC, dtype), grid), None, None
        last = self.patch - 1
        valid_BYX = image_BHWC[:, last :: self.patch, last :: self.patch, 3] > 0
        rows_B, columns_B = valid_BYX[:, :, 0].sum(axis=1), valid_BYX[:, 0].sum(axis=1)
        x = self._add_own_positions(self.embed(image_BHWC, dtype), rows_B, columns_B, grid)
        valid_BN = valid_BYX.reshape(len(valid_BYX), -1)
        if grid != self.max_grid or grid == self.grid:
            return x, None, valid_BN
        # No image fills such a square: the patches of the largest go first, the others are left out.
        place_BN = jnp.argsort(~valid_BN, axis=1, stable=True)[:, : self.grid[0] * grid[0]]
        x = jnp.take_along_axis(x, place_BN[..., None], axis=1)
        return x, place_BN, jnp.take_along_axis(valid_BN, place_BN, axis=1)

    def levels(self, image_BHWC, *, dtype=jnp.float32, key: jax.Array | None = None) -> tuple[Level, ...]:
        """Encoded images as levels, of which a ViT has one.

        Args:
          image_BHWC: as `normalize` gives them.
          dtype: of the activations.
          key: means training and turns patch dropout on.
        """
        x, place, valid = self._patches(image_BHWC, dtype)
        if self.patch_dropout and key is not None:
            kept = _kept_patches(*x.shape[:2], self.patch_dropout, key)
            x = jnp.take_along_axis(x, kept[:, :, None], axis=1)
            valid = valid if valid is None else jnp.take_along_axis(valid, kept, axis=1)
            place = kept if place is None else jnp.take_along_axis(place, kept, axis=1)
        prefix = [p[...].astype(dtype) for p in (self.cls, self.registers) if p is not None]
        if self.class_position:
            prefix[0] = prefix[0] + self.positions[...][:1].astype(dtype)
        if prefix:
            table = jnp.concatenate(prefix)
            x = jnp.concatenate([jnp.broadcast_to(table[None], (x.shape[0], *table.shape)), x], axis=1)
        x = constrain(x, "batch", None, None)
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        mask = None
        if valid is not None:
            valid = jnp.pad(valid, ((0, 0), (x.shape[1] - valid.shape[1], 0)), constant_values=True)
            mask = valid[:, None, None]
        x = scan(self.blocks, lambda block, h, _: block(h, mask=mask), x, remat=self.remat, unroll=self.unroll)
        first = 0 if self.cls is None else 1
        if self.registers is not None:
            x = jnp.concatenate([x[:, :first], x[:, first + self.registers_count :]], axis=1)
            valid = valid if valid is None else valid[:, self.registers_count :]
        return (Level(self.norm(x), self.grid_of(image_BHWC), self.patch, first, valid, place),)

    def regions(
        self, image_BHWC, box_QS4, owner_QS, *, dtype=jnp.float32, key: jax.Array | None = None, local: int = 0
    ) -> Regions:
        """Images and regions of them (X-VLM, arXiv 2111.08276, official code).

        Args:
          image_BHWC: as `normalize` gives them, Q groups of B / Q.
          box_QS4: (x0, y0, x1, y1) in fractions of the image.
          owner_QS: each region's image in its group.
          dtype, key: as for `levels`.
          local: last layers in which the tokens of regions, copies of their image's, see only the class token and those
            inside; 0: they are the image's own, and their mean is the summary.
        """
        if not local:
            return pooled_regions(self.levels(image_BHWC, dtype=dtype, key=key)[-1], box_QS4, owner_QS)
        raise NotImplementedError

    def __call__(self, image_BHWC, *, dtype=jnp.float32, key: jax.Array | None = None) -> jax.Array | Level:
        """Tokens (B, N, D) of images as `levels` encodes them; of padded ones their level, which knows the padding."""
        (level,) = self.levels(image_BHWC, dtype=dtype, key=key)
        return level.tokens_BND if level.valid_BN is None else level

    def pool(self, encoded: jax.Array | Level) -> jax.Array:
        """The pooled feature (B, D) of encoded tokens (B, N, D), or of a level: padding doesn't count."""
        tokens_BND, valid_BN = (encoded.tokens_BND, encoded.valid_BN) if isinstance(encoded, Level) else (encoded, None)
        if self.pool_kind == "map":
            return self.map(tokens_BND, valid_BN)
        if self.pool_kind == "cls":
            return tokens_BND[:, 0]
        if valid_BN is None:
            return tokens_BND.mean(axis=1)
        weights_BN1 = valid_BN[..., None].astype(tokens_BND.dtype)
        return (tokens_BND * weights_BN1).sum(axis=1) / jnp.maximum(weights_BN1.sum(axis=1), 1)


def _kept_patches(batch: int, count: int, rate: float, key) -> jax.Array:
    """A random (1 - rate) of each image's patches, their numbers (B, kept) in order."""
    keep = max(1, round(count * (1 - rate)))
    noise = jax.random.uniform(key, (batch, count))
    return jnp.sort(jnp.argsort(noise, axis=1)[:, :keep], axis=1)
