"""Feature pyramids: the levels of an image encoder made five maps of one width, of strides 8 to 128 (P3 to P7).

Letters: B images, Y and X rows and columns of a level, N its places, C width of the encoder's levels, D of the pyramid.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.errors import UserError
from capvl.models.features import Level
from capvl.nn import weights
from capvl.nn.anchors import STRIDES
from capvl.nn.convolution import Conv
from capvl.nn.layers import ACTIVATIONS, Dense, LayerNorm, as_row
from capvl.nn.weights import weight
from capvl.parallel.rules import constrain

_BLOCK = 3
_SIMPLE = (8, 16, 32)


def drop_block(x_BYXD, rate: float, key: jax.Array | None, block: int = _BLOCK) -> jax.Array:
    """DropBlock (arXiv 1810.12890): squares of a map are 0 in all channels, the rest grows by all places / those left.

    As GLIP's code has it: a square is dropped around each place with probability rate / block² (the paper's also makes
    up for what borders cut off), and what is left is counted over the whole batch.

    Args:
      x_BYXD: maps.
      rate: about the share that is dropped.
      key: None, which means not training, gives x itself.
      block: side of a square, odd.
    """
    if key is None or not rate:
        return x_BYXD
    centre_BYX = jax.random.bernoulli(key, rate / block**2, x_BYXD.shape[:3])
    window, around = (1, block, block), ((0, 0), *((block // 2,) * 2,) * 2)
    dropped_BYX = jax.lax.reduce_window(centre_BYX, False, jax.lax.bitwise_or, window, (1, 1, 1), around)
    left = jnp.maximum((~dropped_BYX).sum(dtype=jnp.float32), 1.0)
    kept_BYX1 = jnp.where(dropped_BYX, 0.0, dropped_BYX.size / left)[..., None]
    return x_BYXD * kept_BYX1.astype(x_BYXD.dtype)


def enlarge(x_BYXD, grid: tuple[int, int]) -> jax.Array:
    """Maps at twice their size, each place four times (nearest neighbours), or one row or column less for odd sides.

    Raises:
      ValueError: the grid is another.
    """
    if tuple(-(-side // 2) for side in grid) != x_BYXD.shape[1:3]:
        raise ValueError(f"a map of {x_BYXD.shape[1:3]} places is not half of {grid}")
    return x_BYXD.repeat(2, axis=1).repeat(2, axis=2)[:, : grid[0], : grid[1]]


def _shrink(x_BYXD, by: int) -> jax.Array:
    """The maxima of squares of so many places; those at the lower and right edge may be cut."""
    around = ((0, 0), *((0, -side % by) for side in x_BYXD.shape[1:3]), (0, 0))
    return jax.lax.reduce_window(x_BYXD, -jnp.inf, jax.lax.max, (1, by, by, 1), (1, by, by, 1), around)


def _levels(maps: list[jax.Array]) -> tuple[Level, ...]:
    """Maps from P3 on as levels."""
    return tuple(
        Level(constrain(x.reshape(len(x), -1, x.shape[-1]), "batch", None, None), x.shape[1:3], stride)
        for x, stride in zip(maps, STRIDES, strict=True)
    )


class Coarser(nnx.Module):
    """P6 and P7 of P5: a convolution of stride 2, and one of what is positive of P6 (RetinaNet, arXiv 1708.02002)."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.p6, self.p7 = (Conv(width, width, stride=2, rngs=rngs) for _ in "67")

    def __call__(self, p5_BYXD) -> list[jax.Array]:
        p6 = self.p6(p5_BYXD)
        return [p6, self.p7(jax.nn.relu(p6))]


class FeaturePyramid(nnx.Module):
    """FPN (arXiv 1612.03144) of an encoder's levels of strides 8, 16 and 32: coarse maps are enlarged and added to
    finer ones."""

    def __init__(self, widths: tuple[int, int, int], width: int, *, drop_block: float = 0.0, rngs: nnx.Rngs):
        """
        Args:
          widths: of the encoder's levels of strides 8, 16 and 32.
          width: of the pyramid's.
          drop_block: in training, the share that DropBlock drops of P3 and P4 before their last convolutions.
        """
        self.drop_block = drop_block
        self.lateral = nnx.List([Conv(w, width, 1, rngs=rngs) for w in widths])
        self.out = nnx.List([Conv(width, width, rngs=rngs) for _ in widths])
        self.coarser = Coarser(width, rngs)

    def __call__(self, levels: tuple[Level, ...], *, key: jax.Array | None = None) -> tuple[Level, ...]:
        """P3 to P7 of an encoder's levels; those of other strides are not read.

        Args:
          levels: as `capvl.models.swin.Swin.levels` gives them.
          key: means training.

        Raises:
          ValueError: a level of stride 8, 16 or 32 is not there.
        """
        by_stride = {level.stride: level for level in levels}
        wanted = STRIDES[: len(self.lateral)]
        if not set(wanted) <= set(by_stride):
            raise ValueError(f"an FPN needs levels of strides {wanted}, not {tuple(by_stride)}")
        merged, maps = None, []
        for i in reversed(range(len(wanted))):
            side_BYXD = self.lateral[i](by_stride[wanted[i]].map())
            if merged is None:
                merged = shown = side_BYXD
            else:
                merged = side_BYXD + enlarge(merged, side_BYXD.shape[1:3])
                shown = drop_block(merged, self.drop_block, None if key is None else jax.random.fold_in(key, i))
            maps.insert(0, self.out[i](shown))
        return _levels(maps + self.coarser(maps[-1]))


class Finer(nnx.Module):
    """A map of twice the size: each place becomes 2 x 2 (a transposed convolution of stride 2)."""

    def __init__(self, width: int, out: int, rngs: nnx.Rngs):
        init = weights.lecun_normal(width)
        self.places = Dense((width, 2, 2, out), ("embed", None, None, None), init, rngs=rngs)
        self.bias = weight(rngs, (out,), (None,), weights.zeros)

    def __call__(self, x_BYXC) -> jax.Array:
        batch, rows, columns, _ = x_BYXC.shape
        y_BYX22D = self.places(x_BYXC)
        y = y_BYX22D.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * rows, 2 * columns, -1)
        return y + as_row(self.bias[...].astype(y.dtype), y)


class SimpleLevel(nnx.Module):
    """One level of a `SimplePyramid`: the encoder's map made finer or coarser, then 1 x 1 and 3 x 3 convolutions, each
    with a layer norm."""

    def __init__(self, width: int, out: int, scale: float, eps: float, rngs: nnx.Rngs):
        """scale: how many times as many rows the level has as the encoder's map: a power of 2."""
        self.by, widths = round(1 / scale), [width]
        while scale > 1:
            widths, scale = [*widths, max(1, widths[-1] // 2)], scale / 2
        steps = list(zip(widths[:-1], widths[1:], strict=True))
        self.finer = nnx.List([Finer(*step, rngs) for step in steps])
        self.between = nnx.List([LayerNorm(w, eps=eps, rngs=rngs) for _, w in steps[:-1]])
        self.inner = Conv(widths[-1], out, 1, bias=False, rngs=rngs)
        self.inner_norm = LayerNorm(out, eps=eps, rngs=rngs)
        self.outer = Conv(out, out, bias=False, rngs=rngs)
        self.outer_norm = LayerNorm(out, eps=eps, rngs=rngs)

    def __call__(self, x_BYXC) -> jax.Array:
        for i, finer in enumerate(self.finer):
            x_BYXC = finer(x_BYXC)
            if i < len(self.between):
                x_BYXC = ACTIVATIONS["gelu"](self.between[i](x_BYXC))
        if self.by > 1:
            x_BYXC = _shrink(x_BYXC, self.by)
        return self.outer_norm(self.outer(self.inner_norm(self.inner(x_BYXC))))


class SimplePyramid(nnx.Module):
    """ViTDet's simple feature pyramid (arXiv 2203.16527, section 3), from the one map of a plain ViT.

    P3 to P5 each come from this map alone; P6 and P7 are as an FPN's. Padding of images is 0 in the map.
    """

    def __init__(self, stride: int, width: int, out: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        """
        Args:
          stride: of the ViT, its patch.
          width: of its tokens.
          out: width of the pyramid.
          eps: of the layer norms.

        Raises:
          UserError: P3 to P5 can't be made of maps of this stride.
        """
        if stride not in _SIMPLE:
            raise UserError(
                f"A feature pyramid of a ViT needs patches of {', '.join(map(str, _SIMPLE))} pixels, not {stride}."
            )
        self.stride = stride
        wanted = STRIDES[: len(_SIMPLE)]
        self.levels = nnx.List([SimpleLevel(width, out, stride / s, eps, rngs) for s in wanted])
        self.coarser = Coarser(out, rngs)

    def __call__(self, levels: tuple[Level, ...], *, key: jax.Array | None = None) -> tuple[Level, ...]:
        """P3 to P7 of the one level that `capvl.models.vit.ViT.levels` gives.

        Args:
          levels: the one.
          key: not used: nothing here is random.

        Raises:
          ValueError: there are more levels, or it has another stride.
        """
        (level,) = levels
        if level.stride != self.stride:
            raise ValueError(f"a pyramid of a map of stride {self.stride}, not {level.stride}")
        whole_BYXC = level.map()
        maps = [make(whole_BYXC) for make in self.levels]
        return _levels(maps + self.coarser(maps[-1]))


def make_pyramid(
    levels: tuple[tuple[int, int], ...], width: int, *, drop_block: float = 0.0, eps: float = 1e-6, rngs: nnx.Rngs
) -> FeaturePyramid | SimplePyramid:
    """The pyramid of an encoder: an FPN where it has levels of strides 8, 16 and 32, a simple one where it has one.

    Args:
      levels: stride and width of each that the encoder gives.
      width: of the pyramid.
      drop_block: of `FeaturePyramid`.
      eps: of `SimplePyramid`.
      rngs: of the weights.

    Raises:
      UserError: there is no pyramid of such levels, or DropBlock is asked for where nothing is merged.
    """
    widths = dict(levels)
    wanted = STRIDES[: len(_SIMPLE)]
    if set(wanted) <= set(widths):
        return FeaturePyramid(tuple(widths[s] for s in wanted), width, drop_block=drop_block, rngs=rngs)
    if len(levels) > 1:
        raise UserError(f"A feature pyramid needs levels of strides {wanted}, and the encoder has {tuple(widths)}.")
    if drop_block:
        raise UserError("model.drop_block drops what an FPN merges, and the pyramid of a plain ViT merges nothing.")
    return SimplePyramid(*levels[0], width, eps=eps, rngs=rngs)
