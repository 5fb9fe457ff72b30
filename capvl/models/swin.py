"""Swin Transformer (arXiv 2103.14030): attention within windows that every second block shifts, in stages.

Letters: B images, Y and X rows and columns of a stage's grid, W windows, N places of a window, L blocks of a stage, H
heads, D width, O offsets between two places of a window.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from capvl.errors import UserError, nearest
from capvl.models import flops, pixels, stem
from capvl.models.features import Level, Regions, regions_of
from capvl.models.sizes import Size
from capvl.models.vit import MapHead
from capvl.nn import weights, windows
from capvl.nn.attention import SelfAttention
from capvl.nn.layers import Dense, LayerNorm, Mlp, keep_paths, path_factors
from capvl.nn.relative_positions import offset_index
from capvl.nn.stack import scan, stack
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain

# Width of the first stage, blocks and heads of each (section 3.3).
SIZES = {
    "T": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "S": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "B": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "L": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
_MLP = 4
_LARGEST_ADVISED = 16


@dataclasses.dataclass(frozen=True)
class SwinKind:
    """What a Swin's name says (`capvl.models.vision.Kind`): "swin-B/4", or "swin-w8d2-2-2h1-2-4/4" spelled out.

    Attributes:
      sizes: of the blocks of each stage.
      patch: side of a patch in pixels.
    """

    sizes: tuple[Size, ...]
    patch: int

    called: ClassVar[str] = "Swin"
    only: ClassVar[Mapping[str, tuple]] = {
        "stem": ("patch",),
        "pool": ("mean", "map"),
        "positions": ("learned",),
        "registers": (0,),
        "patch_dropout": (0.0,),
        "layer_scale": (0.0,),
        "pre_norm": (False,),
        "class_position": (False,),
    }

    @classmethod
    def parse(cls, name: str) -> "SwinKind":
        """Of a name: width of the first stage, blocks and heads of each, and patch.

        Raises:
          UserError: there is no such Swin.
        """
        match = re.fullmatch(r"swin-([A-Za-z0-9-]+)/(\d+)", name)
        if not match or int(match[2]) == 0:
            raise UserError(f"Model {name!r} should read swin-SIZE/PATCH, such as 'swin-B/4'.")
        spelled = re.fullmatch(r"w(\d+)d([\d-]+)h([\d-]+)", match[1])
        if spelled:
            width = int(spelled[1])
            depths, heads = ([int(n or 0) for n in group.split("-")] for group in spelled.groups()[1:])
        elif match[1] in SIZES:
            width, depths, heads = SIZES[match[1]]
        else:
            raise UserError(f"Unknown Swin size {match[1]!r}." + nearest(match[1], SIZES))
        widths = [width * 2**i for i in range(len(depths))]
        fits = len(depths) == len(heads) and min(width, *depths, *heads) > 0
        if not fits or any(w % h for w, h in zip(widths, heads, strict=True)):
            raise UserError(
                f"Swin size {match[1]!r} needs as many heads as depths, none of them 0, and widths (which double) that "
                f"are multiples of the heads."
            )
        each = zip(widths, depths, heads, strict=True)
        return cls(tuple(Size(w, d, _MLP * w, h) for w, d, h in each), int(match[2]))

    @property
    def size(self) -> Size:
        """Of the last stage."""
        return self.sizes[-1]

    @property
    def stride(self) -> int:
        """Pixels from one token of the last stage to the next."""
        return self.patch * 2 ** (len(self.sizes) - 1)

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Stride and width of each stage's level."""
        return tuple((self.patch * 2**i, size.width) for i, size in enumerate(self.sizes))

    def sides(self, res: int) -> list[int]:
        """Side of each stage's grid; what is left of a place is one, where grids are padded."""
        return [-(-res // (self.patch * 2**i)) for i in range(len(self.sizes))]

    def windows(self, options: Any) -> list[int]:
        """Side of each stage's windows: without padding, a stage that is no larger than a window is one."""
        if options.pad_windows:
            return [options.window] * len(self.sizes)
        return [min(options.window, side) for side in self.sides(options.res)]

    def check(self, options: Any) -> None:
        """Raises UserError where images of `res` can't be divided into windows and aren't padded."""
        if options.window < 2:
            raise UserError(f"model.window must be at least 2, not {options.window}.")
        if options.max_side and not options.pad_windows:
            raise UserError("model.max_side makes images of any aspect; a Swin needs model.pad_windows=True for them.")
        if options.pad_windows:
            return self.check_side(options.res, options, "model.res=")
        res, step = options.res, self.stride
        if self._divides(res, options.window):
            return
        below, above = (
            next((r for r in candidates if self._divides(r, options.window)), None)
            for candidates in (range(res // step * step, 0, -step), range((res // step + 1) * step, 100_000, step))
        )
        near = " and ".join(str(r) for r in (below, above) if r)
        others = [w for w in range(2, _LARGEST_ADVISED + 1) if self._divides(res, w)]
        advice = f", or have model.window={' or '.join(map(str, others))}" if others else ""
        raise UserError(
            f"model.res={res} can't be divided into windows of model.window={options.window} in all stages of "
            f"{options.encoder!r}; the nearest that can: {near}{advice}."
        )

    def check_side(self, side: int, options: Any, what: str) -> None:
        """Raises UserError where a side is not one of whole windows of a model that is made for `res`, nor padded."""
        if options.pad_windows:
            if side < self.patch:
                raise UserError(f"{what}{side} is less than a patch of {self.patch} pixels.")
            return
        if side % self.stride or any(n % w for n, w in zip(self.sides(side), self.windows(options), strict=True)):
            at = f"{options.encoder!r} has at model.res={options.res}"
            raise UserError(f"{what}{side} can't be divided into the windows that {at}.")

    def _divides(self, res: int, window: int) -> bool:
        sides = self.sides(res)
        return res % self.stride == 0 and res > 0 and all(n <= window or n % window == 0 for n in sides)

    def flops(self, options: Any) -> float:
        """Forward matmul FLOPs of one image, without a MAP head."""
        grids = list(zip(*map(self.sides, options.image_shape()[-3:-1]), strict=True))
        total = stem.flops("patch", self.patch, self.sizes[0].width, grids[0])
        for size, grid, window in zip(self.sizes, grids, self.windows(options), strict=True):
            rows, columns = windows.padded_to(grid, window)
            inside = window * window
            total += size.depth * (rows * columns // inside) * flops.layer(inside, size)
        merged = zip(self.sizes[:-1], grids[1:], strict=True)
        return total + sum(flops.dense(y * x, 4 * size.width, 2 * size.width) for size, (y, x) in merged)

    def make(self, options: Any, rngs: nnx.Rngs) -> "Swin":
        """Builds the encoder."""
        return Swin(options, self, rngs=rngs)


class Block(nnx.Module):
    """x += Attention(LN x) within windows; x += MLP(LN x)."""

    def __init__(self, size: Size, rngs: nnx.Rngs, *, activation: str, eps: float):
        self.norm1 = LayerNorm(size.width, eps=eps, rngs=rngs)
        self.attn = SelfAttention(size.width, size.heads, rngs=rngs)
        self.norm2 = LayerNorm(size.width, eps=eps, rngs=rngs)
        self.mlp = Mlp(size.width, size.mlp, activation=activation, rngs=rngs)

    def __call__(self, x_BWND, bias_HNN, mask_WNN, factors_2B, inside_WN=None) -> jax.Array:
        """`inside_WN`: which places are of the grid rather than of its padding; None for all.

        What is padded is zeros after the norm and attended to, as in the original code. Its own sum x is not 0, but
        nothing else ever reads it.
        """
        first, second = (None, None) if factors_2B is None else factors_2B
        normal = self.norm1(x_BWND)
        if inside_WN is not None:
            normal = jnp.where(inside_WN[None, :, :, None], normal, jnp.zeros((), normal.dtype))
        qkv = checkpoint_name(self.attn.qkv(normal), "qkv")
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        added = self.attn.out(windows.attend(q, k, v, bias_HNN, mask_WNN))
        x_BWND = checkpoint_name(x_BWND + keep_paths(added, first), "residual")
        x_BWND = x_BWND + keep_paths(self.mlp(self.norm2(x_BWND)), second)
        return constrain(x_BWND, "batch", None, None, None)


class Merge(nnx.Module):
    """Four neighbours become one token of twice the width (section 3.1); zeros stand for those beyond an odd side."""

    def __init__(self, width: int, rngs: nnx.Rngs, *, eps: float):
        self.norm = LayerNorm(4 * width, eps=eps, rngs=rngs)
        init = weights.xavier_uniform(4 * width, 2 * width)
        self.out = Dense((4 * width, 2 * width), ("embed", None), init, rngs=rngs)

    def __call__(self, x_BYXD) -> jax.Array:
        x_BYXD = _pad(x_BYXD, windows.padded_to(x_BYXD.shape[1:3], 2))
        batch, rows, columns, width = x_BYXD.shape
        parts = x_BYXD.reshape(batch, rows // 2, 2, columns // 2, 2, width)
        # Upper left, lower left, upper right, lower right, as in the original code.
        parts = parts.transpose(0, 1, 3, 4, 2, 5).reshape(batch, rows // 2, columns // 2, 4 * width)
        return self.out(self.norm(parts))


def _pad(x_BYXD, grid: tuple[int, int]) -> jax.Array:
    """Zeros at the bottom and right of a grid up to another."""
    more = [(0, new - old) for new, old in zip(grid, x_BYXD.shape[1:3], strict=True)]
    return jnp.pad(x_BYXD, ((0, 0), *more, (0, 0))) if any(n for _, n in more) else x_BYXD


class Stage(nnx.Module):
    """Blocks over one grid, and the merging of what they give, but after the last stage.

    A stage may have a norm for its level: what is merged has not passed it.
    """

    def __init__(self, size: Size, window: int, options: Any, rngs: nnx.Rngs, *, norm: bool, last: bool):
        kind = dict(activation=options.activation, eps=options.eps)
        self.window, self.depth, self.pads = window, size.depth, options.pad_windows
        self.remat, self.unroll = options.remat, options.unroll
        self.blocks = stack(lambda r: Block(size, r, **kind), size.depth, rngs)
        shape, axes = (size.depth, (2 * window - 1) ** 2, size.heads), ("layers", None, "heads")
        self.offsets = weight(rngs, shape, axes, weights.normal(0.02))
        self.norm = LayerNorm(size.width, eps=options.eps, rngs=rngs) if norm else None
        self.merge = None if last else Merge(size.width, rngs, eps=options.eps)

    def biases(self) -> jax.Array:
        """What is added to the logits of each block, float32 (L, H, N, N): one gather for all."""
        table_LOH = self.offsets[...].astype(jnp.float32)
        bias = jnp.take(table_LOH, offset_index((self.window,) * 2).reshape(-1), axis=1)
        return bias.reshape(self.depth, self.window**2, self.window**2, -1).transpose(0, 3, 1, 2)

    def __call__(self, x_BYXD, factors_L2B) -> jax.Array:
        """(B, Y, X, D) -> the same, before merging.

        Between two blocks that aren't shifted tokens stay in windows, so that each pair moves them there and back once.
        """
        original, window = x_BYXD.shape[1:3], self.window
        grid = windows.padded_to(original, window)
        if grid != original and not self.pads:
            raise ValueError(f"a grid of {original} is not divided by windows of {window}")
        by = tuple(window // 2 if self.pads or side > window else 0 for side in grid)
        back, together = tuple(-n for n in by), 2 if any(by) else 1
        mask_WNN = jnp.asarray(windows.shift_mask(window, grid, by)) if any(by) else None
        inside = [windows.inside(window, original, n) for n in ((0, 0), back)]
        inside_2WN = [None if n is None else jnp.asarray(n) for n in inside]

        def body(blocks, x, xs):
            bias, factors = xs
            for i, block in enumerate(blocks):
                factors_2B = None if factors is None else factors[i]
                x = windows.shift(x, window, grid, back) if i else x
                x = block(x, bias[i], mask_WNN if i else None, factors_2B, inside_2WN[i])
                x = windows.shift(x, window, grid, by) if i else x
            return x

        xs = (self.biases(), factors_L2B)
        x = windows.split(_pad(x_BYXD, grid), window)
        x = scan(self.blocks, body, x, xs, remat=self.remat, unroll=self.unroll, together=together)
        x = windows.join(x, window, grid)
        return x if grid == original else x[:, : original[0], : original[1]]


class Swin(nnx.Module):
    """Images (B, H, W, 3) -> tokens (B, N, D) of the last stage after the final LN; `normalize` gives the pixels.

    Images may have other sides than the model's where its windows divide them. With `pad_windows` they may have any:
    zeros are added at the bottom and right to whole patches, then in each stage to whole windows, which are always
    shifted, as in detectors (github.com/SwinTransformer/Swin-Transformer-Object-Detection, and GLIP). Such images may
    have a fourth channel, positive where they are: what they themselves were padded with becomes 0 there, and is seen.
    """

    def __init__(self, options: Any, kind: SwinKind, *, rngs: nnx.Rngs):
        """options: `capvl.models.vision.ImageOptions`."""
        sizes, eps = kind.sizes, options.eps
        self.patch, self.pool_kind, self.pixels = kind.patch, options.pool, options.pixels
        self.depths, self.drop_path = tuple(size.depth for size in sizes), options.drop_path
        self.pads = options.pad_windows
        self.stem = stem.make_stem("patch", kind.patch, sizes[0].width, rngs)
        self.stem_norm = LayerNorm(sizes[0].width, eps=eps, rngs=rngs)
        last = len(sizes) - 1
        stages = [
            Stage(size, window, options, rngs, norm=options.level_norms and 0 < i < last, last=i == last)
            for i, (size, window) in enumerate(zip(sizes, kind.windows(options), strict=True))
        ]
        self.stages = nnx.List(stages)
        self.norm = LayerNorm(kind.size.width, eps=eps, rngs=rngs)
        shape = dict(activation=options.activation, eps=eps)
        self.map = MapHead(kind.size, rngs, **shape) if options.pool == "map" else None

    def normalize(self, image_BHWC) -> jax.Array:
        """Images in [-1, 1] -> pixels as this encoder wants them; a fourth channel stays."""
        return pixels.normalize(image_BHWC, self.pixels)

    def embed(self, image_BHWC, dtype) -> jax.Array:
        """Patch embedding before its norm: (B, N, D), patches row by row."""
        image = image_BHWC.astype(dtype)
        if image.shape[-1] == 4:
            image = jnp.where(image[..., 3:] > 0, image[..., :3], jnp.zeros((), dtype))
        image = _pad(image, windows.padded_to(image.shape[1:3], self.patch))
        return self.stem(stem.patches(image, self.patch))

    def levels(self, image_BHWC, *, dtype=jnp.float32, key: jax.Array | None = None) -> tuple[Level, ...]:
        """Encoded images as levels, one a stage, whose strides double; the last is after the final norm, with
        `level_norms` all but the first are after one.

        Args:
          image_BHWC: as `normalize` gives them.
          dtype: of the activations.
          key: means training and turns stochastic depth on.

        Raises:
          ValueError: the windows don't divide an image, or it is padded, and the model isn't made for that.
        """
        batch, height, width, channels = image_BHWC.shape
        stride = self.patch * 2 ** (len(self.depths) - 1)
        if channels not in (3, 4) or not self.pads and (channels != 3 or height % stride or width % stride):
            raise ValueError(f"a Swin of stride {stride} for images of {height} x {width} pixels, {channels} channels")
        factors = None
        if self.drop_path and key is not None:
            factors = path_factors(self.drop_path, sum(self.depths), batch, jax.random.fold_in(key, 1))
        x = self.stem_norm(self.embed(image_BHWC, dtype))
        x = x.reshape(batch, *(-(-side // self.patch) for side in (height, width)), x.shape[-1])
        levels, first = [], 0
        for i, (stage, depth) in enumerate(zip(self.stages, self.depths, strict=True)):
            x = stage(x, None if factors is None else factors[first : first + depth])
            norm = self.norm if stage.merge is None else stage.norm
            out = x if norm is None else norm(x)
            levels.append(Level(out.reshape(batch, -1, out.shape[-1]), out.shape[1:3], self.patch * 2**i))
            x, first = x if stage.merge is None else stage.merge(x), first + depth
        return tuple(levels)

    def __call__(self, image_BHWC, *, dtype=jnp.float32, key: jax.Array | None = None) -> jax.Array:
        """Tokens (B, N, D) of the last level; see `levels`."""
        return self.levels(image_BHWC, dtype=dtype, key=key)[-1].tokens_BND

    def regions(
        self, image_BHWC, box_QR4, owner_QR, *, dtype=jnp.float32, key: jax.Array | None = None, local: int = 0
    ) -> Regions:
        """Images and regions of them, as `capvl.models.vit.ViT.regions`: always of the images' own tokens.

        Raises:
          ValueError: there are to be `local` layers, which a Swin can't have.
        """
        if local:
            raise ValueError(f"{local} local layers of a Swin, whose windows see no regions")
        level = self.levels(image_BHWC, dtype=dtype, key=key)[-1]
        # The last places of a padded grid reach beyond the image.
        y, x = (n / (m * level.stride) for n, m in zip(image_BHWC.shape[1:3], level.grid, strict=True))
        if (y, x) != (1.0, 1.0):
            box_QR4 = box_QR4 * jnp.asarray((x, y, x, y), box_QR4.dtype)[None, None]
        return regions_of(level, box_QR4, owner_QR)

    def pool(self, encoded_BND) -> jax.Array:
        """The pooled feature (B, D) of encoded tokens (B, N, D)."""
        return encoded_BND.mean(axis=1) if self.map is None else self.map(encoded_BND)
