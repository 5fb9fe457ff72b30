"""Vision Transformer encoder (arXiv 2010.11929), pre-LN, with mean, MAP or class-token pooling.

The trunk's arithmetic is that of CapPa's reference; registers are from arXiv 2309.16588,
patch dropout from arXiv 2212.00794 (FLIP), and regions from X-VLM (arXiv 2111.08276, section 3.1).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.errors import UserError
from capvl.models import flops, pixels, sizes, stem
from capvl.models.features import Level, Regions, inside_of_rows, regions_of, rows_of
from capvl.models.sizes import Size
from capvl.nn import positions, weights
from capvl.nn.attention import CrossAttention, SelfAttention, input_projection
from capvl.nn.layers import LayerNorm, Mlp, as_row, keep_paths, path_factors
from capvl.nn.stack import part_of, scan, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain


@dataclasses.dataclass(frozen=True)
class ViTKind:
    """What a ViT's name says (`capvl.models.vision.Kind`).

    Attributes:
      size: of its blocks.
      patch: side of a patch in pixels.
    """

    size: Size
    patch: int

    called: ClassVar[str] = "ViT"
    only: ClassVar[Mapping[str, tuple]] = {"window": (7,), "pad_windows": (False,), "level_norms": (False,)}

    @classmethod
    def parse(cls, name: str) -> "ViTKind":
        """Of a name as `capvl.models.sizes` reads it."""
        return cls(*sizes.parse(name))

    @property
    def stride(self) -> int:
        """Pixels from one token to the next."""
        return self.patch

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Stride and width of its one level."""
        return ((self.patch, self.size.width),)

    def check(self, options: Any) -> None:
        """Raises UserError where options don't fit the patches."""
        self.check_side(options.res, options, "model.res=")
        if options.stem == "conv" and self.patch not in (2, 4, 8, 16, 32):
            raise UserError(f"model.stem='conv' needs patches of 2, 4, 8, 16 or 32 pixels, not {self.patch}.")

    def check_side(self, side: int, options: Any, what: str) -> None:
        """Raises UserError where a side is not one of whole patches."""
        if side < self.patch or side % self.patch:
            near = max(1, round(side / self.patch)) * self.patch
            raise UserError(f"{what}{side} is not a multiple of the patch {self.patch}; the nearest is {near}.")

    def flops(self, options: Any) -> float:
        """Forward matmul FLOPs of one image, without a MAP head."""
        tokens = options.kept_patches() + options.registers + (options.pool == "cls")
        whole = tuple(side // self.patch for side in options.image_shape()[-3:-1])
        embedding = stem.flops(options.stem, self.patch, self.size.width, whole)
        return embedding + self.size.depth * flops.layer(tokens, self.size)

    def make(self, options: Any, rngs: nnx.Rngs) -> "ViT":
        """Builds the encoder."""
        return ViT(options, rngs=rngs)


class EncoderBlock(nnx.Module):
    """x += Attention(LN x); x += MLP(LN x); what is added may be scaled (`ImageOptions.layer_scale`)."""

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

    def __call__(self, x_BND, *, mask=None, causal: bool = False, factors_2B=None) -> jax.Array:
        """`factors_2B`: what the two branches of each image are multiplied by (`capvl.nn.layers.path_factors`)."""
        first, second = (None, None) if factors_2B is None else factors_2B
        added = _scaled(self.attn(self.norm1(x_BND), mask=mask, causal=causal), self.scale1)
        x_BND = checkpoint_name(x_BND + keep_paths(added, first), "residual")
        x_BND = x_BND + keep_paths(_scaled(self.mlp(self.norm2(x_BND)), self.scale2), second)
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
    """Images (B, H, W, 3) -> tokens (B, N, D) after the final LN; `normalize` gives the pixels.

    Images may have any sides; what is left of a patch at the right and lower edge is not seen. Learned positions are
    resized to the grid as PyTorch does. Images of unequal sizes are padded to one size at the right and below and have
    a fourth channel, 1 where they are and -1 beyond: each then has the positions of its own grid. Where the model has
    a `max_side`, short sides of images that are padded to its square are at most the model's resolution.
    """

    def __init__(self, options: Any, *, rngs: nnx.Rngs):
        """options: `capvl.models.vision.ImageOptions`."""
        size, patch = sizes.parse(options.encoder)
        width = size.width
        self.patch, self.grid, self.pool_kind = patch, options.grid, options.pool
        self.max_grid = (options.max_side // patch,) * 2
        self.positions_kind, self.class_position = options.positions, options.class_position
        self.registers_count, self.patch_dropout = options.registers, options.patch_dropout
        self.depth, self.drop_path = size.depth, options.drop_path
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
        return pixels.normalize(image_BHWC, self.pixels)

    def embed(self, image_BHWC, dtype) -> jax.Array:
        """Patch embedding without positions: (B, N, D), patches row by row."""
        p = self.patch
        rows, columns = self.grid_of(image_BHWC)
        image = image_BHWC[:, : rows * p, : columns * p, :3].astype(dtype)
        return self.stem(image if self.stem_kind == "conv" else stem.patches(image, p))

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
          key: means training and turns patch dropout and stochastic depth on.
        """
        x, valid, place = self._embedded(image_BHWC, dtype, key)
        mask = None if valid is None else valid[:, None, None]
        x = self._layers(0, self.depth, x, mask, key)
        return (self._finished(x, valid, place, self.grid_of(image_BHWC)),)

    def regions(
        self, image_BHWC, box_QR4, owner_QR, *, dtype=jnp.float32, key: jax.Array | None = None, local: int = 0
    ) -> Regions:
        """Images and regions of them (arXiv 2111.08276, section 3.1), each image embedded once.

        Args:
          image_BHWC: as `normalize` gives them: Q groups of B / Q images, one after the other.
          box_QR4: rows of each group, (x0, y0, x1, y1) in fractions of an image.
          owner_QR: which image of its group each box is of, int32 from 0 to B / Q - 1.
          dtype: of the activations.
          key: means training, as for `levels`.
          local: the last so many layers are run for each region too, where its tokens see each other and the class
            token alone; 0: its tokens are the image's.
        """
        if not 0 <= local <= self.depth:
            raise ValueError(f"{local} local layers of {self.depth}")
        if not local:
            (level,) = self.levels(image_BHWC, dtype=dtype, key=key)
            return regions_of(level, box_QR4, owner_QR)
        x, valid, place = self._embedded(image_BHWC, dtype, key)
        mask = None if valid is None else valid[:, None, None]
        x = self._layers(0, self.depth - local, x, mask, key)
        rows = rows_of(x, owner_QR)
        grid = self.grid_of(image_BHWC)
        whole = self._finished(self._layers(self.depth - local, self.depth, x, mask, key), valid, place, grid)
        inside_RN = inside_of_rows(whole, box_QR4, owner_QR)
        shown_RN = jnp.concatenate([jnp.ones((len(rows), rows.shape[1] - inside_RN.shape[1]), bool), inside_RN], axis=1)
        rows_key = None if key is None else jax.random.fold_in(key, 2)
        rows = self._layers(self.depth - local, self.depth, rows, shown_RN[:, None, None], rows_key)
        rows = self._finished(rows, None, None, grid).tokens_BND
        return regions_of(whole, box_QR4, owner_QR, rows)

    def _embedded(self, image_BHWC, dtype, key) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """What the blocks see (B, N, D), which of it is of the image, and the places of the patches (see `Level`)."""
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
        if valid is not None:
            valid = jnp.pad(valid, ((0, 0), (x.shape[1] - valid.shape[1], 0)), constant_values=True)
        return x, valid, place

    def _layers(self, first: int, last: int, x_BND, mask, key) -> jax.Array:
        """Layers `first` to `last` - 1."""
        if first == last:
            return x_BND
        blocks = self.blocks if last - first == self.depth else part_of(self.blocks, first, last)
        factors = None
        if self.drop_path and key is not None:
            # One draw for all layers, wherever they are cut.
            factors = path_factors(self.drop_path, self.depth, len(x_BND), jax.random.fold_in(key, 1))[first:last]

        def body(block, h, factors_2B):
            return block(h, mask=mask, factors_2B=factors_2B)

        return scan(blocks, body, x_BND, factors, remat=self.remat, unroll=self.unroll)

    def _finished(self, x_BND, valid_BN, place_BP, grid: tuple[int, int]) -> Level:
        """What the blocks gave, without registers, after the final norm."""
        first = 0 if self.cls is None else 1
        if self.registers is not None:
            x_BND = jnp.concatenate([x_BND[:, :first], x_BND[:, first + self.registers_count :]], axis=1)
            valid_BN = valid_BN if valid_BN is None else valid_BN[:, self.registers_count :]
        return Level(self.norm(x_BND), grid, self.patch, first, valid_BN, place_BP)

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
