"""Vision Transformer encoder (arXiv 2010.11929), pre-LN, with mean, MAP or class-token pooling.

The trunk's arithmetic is that of CapPa's reference; registers are from arXiv 2309.16588 and
patch dropout from arXiv 2212.00794 (FLIP).
"""

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.errors import UserError, nearest
from capvl.models import sizes
from capvl.models.abilities import Ability
from capvl.models.sizes import Size
from capvl.nn import positions, weights
from capvl.nn.attention import CrossAttention, SelfAttention, input_projection
from capvl.nn.layers import ACTIVATIONS, Dense, InstanceNorm, LayerNorm, Mlp, as_row
from capvl.nn.stack import REMAT, scan, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain


class Padded(NamedTuple):
    """Image tokens (B, N, D) of images of unequal sizes, and which (B, N) of them are real."""

    tokens: jax.Array
    seen: jax.Array


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


class ConvStem(nnx.Module):
    """Patch embedding by convolutions (arXiv 2106.14881): 3 x 3, instance norm, GELU; then 1 x 1.

    All have stride 2 but the last 3 x 3, which sees twice as far. Instance norm stands for the paper's batch norm.
    Small models learn from fewer images than with one linear layer.
    """

    def __init__(self, patch: int, width: int, rngs: nnx.Rngs):
        convolutions, channels = sizes.stem(patch, width), 3
        self.strides = tuple(stride for stride, _ in convolutions)
        for i, (_, out) in enumerate(convolutions):
            shape, init = (3, 3, channels, out), weights.lecun_normal(9 * channels)
            setattr(self, f"conv{i}", weight(rngs, shape, (None,) * 4, init))
            setattr(self, f"norm{i}", InstanceNorm(out, rngs=rngs))
            channels = out
        init = weights.lecun_normal(channels)
        self.out = Dense((channels, width), (None, "embed"), init, bias=(width,), rngs=rngs)

    def __call__(self, image_BRRC) -> jax.Array:
        """Tokens (B, N, D), row by row, of images whose sides are multiples of the patch."""
        x = image_BRRC
        for i, stride in enumerate(self.strides):
            kernel = getattr(self, f"conv{i}")[...].astype(x.dtype)
            x = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = ACTIVATIONS["gelu_tanh"](getattr(self, f"norm{i}")(x))
        return self.out(x.reshape(len(x), -1, x.shape[-1]))


class MapHead(nnx.Module):
    """Multi-head attention pooling: one probe attends to all tokens, then x + MLP(LN x): (B, N, D) -> (B, D)."""

    def __init__(self, size: Size, rngs: nnx.Rngs, *, activation: str = "gelu_tanh", eps: float = 1e-6):
        self.probe = weight(rngs, (1, size.width), (None, None), weights.xavier_uniform(1, size.width))
        self.kv = input_projection(size.width, size.heads, 2, bias=True, rngs=rngs)
        self.attn = CrossAttention(size.width, size.heads, rngs=rngs)
        self.norm = LayerNorm(size.width, eps=eps, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, activation=activation, rngs=rngs)

    def __call__(self, tokens_BND) -> jax.Array:
        kv_BNcHK = self.kv(tokens_BND)
        probe_B1D = jnp.broadcast_to(
            self.probe[...].astype(tokens_BND.dtype)[None], (tokens_BND.shape[0], 1, tokens_BND.shape[-1])
        )
        x_B1D = self.attn(probe_B1D, kv_BNcHK[:, :, 0], kv_BNcHK[:, :, 1])
        return (x_B1D + self.mlp(self.norm(x_B1D)))[:, 0]


class ViT(nnx.Module):
    """Images (B, R, R, 3) -> tokens (B, N, D) after the final LN; `PIXELS` says what the pixels are.

    Images may have other sides than the model's resolution; its learned positions are then resized as PyTorch does,
    and what is left of a patch at the right and lower edge is not seen. Images of unequal sizes are padded to one
    and have a fourth channel, 1 where they are and -1 beyond; short sides are at most the model's resolution.
    """

    def __init__(self, options: ViTOptions, *, rngs: nnx.Rngs):
        size, patch = sizes.parse(options.encoder)
        grid, width = options.res // patch, size.width
        self.patch, self.grid, self.pool_kind = patch, grid, options.pool
        self.positions_kind, self.class_position = options.positions, options.class_position
        self.registers_count, self.patch_dropout = options.registers, options.patch_dropout
        self.remat, self.unroll = options.remat, options.unroll
        self.pixels = options.pixels
        kind = dict(activation=options.activation, eps=options.eps)
        self.stem = _make_stem(options, patch, width, rngs)
        if options.positions == "learned":
            count = grid * grid + int(options.class_position)
            self.positions = weight(rngs, (count, width), (None, "embed"), weights.normal(width**-0.5))
        self.cls = weight(rngs, (1, width), (None, None), weights.zeros) if options.pool == "cls" else None
        registers = (options.registers, width)
        self.registers = weight(rngs, registers, (None, None), weights.normal(0.02)) if options.registers else None
        self.pre_norm = LayerNorm(width, eps=options.eps, rngs=rngs) if options.pre_norm else None
        self.blocks = stack(lambda r: EncoderBlock(size, r, **kind, layer_scale=options.layer_scale), size.depth, rngs)
        self.norm = LayerNorm(width, eps=options.eps, rngs=rngs)
        self.map = MapHead(size, rngs, **kind) if options.pool == "map" else None

    def normalize(self, image_BRRC) -> jax.Array:
        """Images in [-1, 1] -> pixels as this encoder wants them; a fourth channel stays."""
        if self.pixels == "half":
            return image_BRRC
        mean, std = (jnp.asarray(row, image_BRRC.dtype)[None, None, None] for row in PIXELS[self.pixels])
        return jnp.concatenate([(image_BRRC[..., :3] * 0.5 + 0.5 - mean) / std, image_BRRC[..., 3:]], axis=-1)

    def embed(self, image_BRRC, dtype) -> jax.Array:
        """Patch embedding without positions: (B, N, D), patches row by row."""
        p = self.patch
        b, rows, columns = image_BRRC.shape[0], *(side // p for side in image_BRRC.shape[1:3])
        image = image_BRRC[:, : rows * p, : columns * p, :3].astype(dtype)
        if isinstance(self.stem, ConvStem):
            return self.stem(image)
        patches = image.reshape(b, rows, p, columns, p, 3).transpose(0, 1, 3, 2, 4, 5)
        return self.stem(patches.reshape(b, -1, p, p, 3))

    def add_positions(self, x_BND, grid: tuple[int, int] | None = None) -> jax.Array:
        """Adds the position embedding of the patches of a grid, the model's own by default."""
        own = (self.grid, self.grid)
        grid = grid or own
        if self.positions_kind != "learned":
            table = jnp.asarray(positions.sincos_2d(*grid, x_BND.shape[-1]))
        elif grid == own:
            table = self.positions[...][int(self.class_position) :]
        else:
            table = self._positions_of(*(jnp.full((1,), n, jnp.int32) for n in grid), grid)[0]
        return x_BND + table.astype(x_BND.dtype)[None]

    def _positions_of(self, rows_B, columns_B, shape: tuple[int, int]) -> jax.Array:
        table = self.positions[...][int(self.class_position) :].astype(jnp.float32)
        return positions.resize_on_device(table, (self.grid, self.grid), (rows_B, columns_B), shape)

    def _embed_padded(self, image_BRRC, dtype) -> tuple[jax.Array, jax.Array]:
        """Patches with positions of each image's own grid, real ones first: (B, N, D), and which are real (B, N)."""
        p = self.patch
        shape = tuple(side // p for side in image_BRRC.shape[1:3])
        real = image_BRRC[:, p - 1 :: p, p - 1 :: p, 3] > 0
        rows_B, columns_B = real[:, :, 0].sum(axis=1), real[:, 0].sum(axis=1)
        x = self.embed(image_BRRC, dtype) + self._positions_of(rows_B, columns_B, shape).astype(dtype)
        seen = real.reshape(len(real), -1)
        order = jnp.argsort(~seen, axis=1, stable=True)[:, : min(self.grid, *shape) * max(shape)]
        return jnp.take_along_axis(x, order[..., None], axis=1), jnp.take_along_axis(seen, order, axis=1)

    def __call__(self, image_BRRC, *, dtype=jnp.float32, key: jax.Array | None = None) -> "jax.Array | Padded":
        """Encodes images; a `key` means training and turns patch dropout on."""
        seen = None
        if image_BRRC.shape[-1] == 4:
            x, seen = self._embed_padded(image_BRRC, dtype)
        else:
            grid = tuple(side // self.patch for side in image_BRRC.shape[1:3])
            x = self.add_positions(self.embed(image_BRRC, dtype), grid)
        if self.patch_dropout and key is not None:
            x = _drop_patches(x, self.patch_dropout, key)
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
        if seen is not None:
            seen = jnp.pad(seen, ((0, 0), (x.shape[1] - seen.shape[1], 0)), constant_values=True)
            mask = seen[:, None, None]
        x = scan(self.blocks, lambda block, h, _: block(h, mask=mask), x, remat=self.remat, unroll=self.unroll)
        if self.registers is not None:
            first = 0 if self.cls is None else 1
            x = jnp.concatenate([x[:, :first], x[:, first + self.registers_count :]], axis=1)
            seen = seen if seen is None else seen[:, self.registers_count :]
        return self.norm(x) if seen is None else Padded(self.norm(x), seen)

    def pool(self, tokens_BND) -> jax.Array:
        """The pooled feature (B, D) of encoded tokens."""
        if self.pool_kind == "map":
            return self.map(tokens_BND)
        if self.pool_kind == "cls":
            return tokens_BND[:, 0]
        return tokens_BND.mean(axis=1)


def _make_stem(options: ViTOptions, patch: int, width: int, rngs: nnx.Rngs):
    if options.stem == "conv":
        return ConvStem(patch, width, rngs)
    shape, init = (patch, patch, 3, width), weights.lecun_normal(patch * patch * 3)
    return Dense(shape, (None, None, None, "embed"), init, contract=3, bias=(width,), rngs=rngs)


def _drop_patches(x_BND, rate: float, key) -> jax.Array:
    """Keeps a random (1 - rate) of each image's tokens, in order."""
    b, n, _ = x_BND.shape
    keep = max(1, round(n * (1 - rate)))
    noise = jax.random.uniform(key, (b, n))
    kept = jnp.sort(jnp.argsort(noise, axis=1)[:, :keep], axis=1)
    return jnp.take_along_axis(x_BND, kept[:, :, None], axis=1)
