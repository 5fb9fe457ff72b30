"""DyHead block: scale, spatial and task attention over a feature pyramid (arXiv 2106.08322, section 3).

GLIP's detection tower (arXiv 2112.03857, section 3.2) is a stack of these. For level l of features f:

* spatial: offsets and masks, from f_l, steer three deformable convolutions: of f_l, of the finer f_{l-1} with stride 2,
  of the coarser f_{l+1}, resized to f_l's places; each with a group norm. These are the level's candidates.
* scale: one weight an image and candidate, from the candidate's mean; the candidates are averaged with it.
* task: a dynamic ReLU (arXiv 2003.10027).

Letters beside those of `capvl.nn.deformable`: S values of scale, one a candidate.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capvl.nn import weights
from capvl.nn.convolution import Conv, GroupNorm
from capvl.nn.deformable import flat_reading, modulated_deformable
from capvl.nn.layers import Dense

READINGS = ("flat", "clean")
TAPS = 9


def hard_sigmoid(x: jax.Array) -> jax.Array:
    """min(max(x + 3, 0), 6) / 6."""
    return jax.nn.relu6(x + 3) / 6


class DyReLU(nnx.Module):
    """max(a1 x + b1, a2 x + b2), coefficients of each channel from the map's mean (arXiv 2003.10027, DY-ReLU-B).

    a1 is within 0 and 2, a2 within -1 and 1, b1 and b2 within ±1/2.
    """

    def __init__(self, width: int, rngs: nnx.Rngs):
        hidden = width // 4
        self.down = Dense(
            (width, hidden), ("embed", None), weights.xavier_uniform(width, hidden), bias=(hidden,), rngs=rngs
        )
        init = weights.xavier_uniform(hidden, 4 * width)
        self.up = Dense((hidden, 4, width), (None, None, "embed"), init, bias=(4, width), rngs=rngs)

    def __call__(self, x_BYXC: jax.Array) -> jax.Array:
        x = x_BYXC.astype(jnp.float32)
        s_B4C = hard_sigmoid(self.up(jax.nn.relu(self.down(x.mean((1, 2)))))) - 0.5
        a1, b1, a2, b2 = (s_B4C[:, i, None, None] for i in range(4))
        return jnp.maximum(x * (2 * a1 + 1) + b1, x * (2 * a2) + b2).astype(x_BYXC.dtype)


def resize(x_BYXC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Bilinear resizing in which the outermost places stay the outermost ("align corners").

    Place i of n reads the place i (m - 1) / (n - 1) of m.

    Float32 inside; products with two small matrices, for TPUs are slow to gather.
    """
    if x_BYXC.shape[1:3] == size:
        return x_BYXC
    rows, columns = (_resizing(old, new) for old, new in zip(x_BYXC.shape[1:3], size, strict=True))
    high = jax.lax.Precision.HIGHEST
    x = jnp.einsum("yi,bixc->byxc", rows, x_BYXC.astype(jnp.float32), precision=high)
    return jnp.einsum("xj,byjc->byxc", columns, x, precision=high).astype(x_BYXC.dtype)


def _resizing(old: int, new: int) -> np.ndarray:
    """The matrix (new, old) of `resize` along one axis."""
    at = np.arange(new) * ((old - 1) / max(new - 1, 1))
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))).astype(np.float32)


class Candidate(nnx.Module):
    """A 3 x 3 convolution, deformable or not, and a group norm (none for `groups=0`)."""

    def __init__(self, width: int, groups: int, stride: int, rngs: nnx.Rngs):
        # The norm takes the scale away again.
        self.conv = Conv(width, width, stride=stride, init=weights.normal(0.01), rngs=rngs)
        self.norm = GroupNorm(width, groups, rngs=rngs) if groups else None

    def __call__(self, x_BYXC, steering) -> jax.Array:
        """steering: offsets and masks of the output's places; None: a plain convolution."""
        if steering is None:
            y = self.conv(x_BYXC)
        else:
            kernel = self.conv.kernel[...].astype(x_BYXC.dtype)
            y = modulated_deformable(x_BYXC, *steering, kernel, self.conv.bias[...], stride=self.conv.stride)
        return y if self.norm is None else self.norm(y)


class DyHeadBlock(nnx.Module):
    """One block: a list of maps (B, Y, X, C), finest first, each half as large as the one before -> the same.

    Odd sides are halved upwards, as a convolution of stride 2 does.

    Offsets and masks are predicted at f_l's places, in places of whichever map they are applied to. The coarser map's
    convolution needs them at that map's fewer places:

    * "flat": `capvl.nn.deformable.flat_reading`, what all published weights were trained with.
    * "clean": offsets and masks are resized to the coarser map by `resize`, which also brings its candidate to f_l. So
      a coarse place moves by what was predicted at the very place of f_l that it is resized to.

    Args:
      width: channels.
      groups: of the group norms; 0: no norms.
      offsets: a reading.
      deform: deformable convolutions; else plain ones, and no offsets.
      weigh: scale attention; else the candidates' plain mean.
      dynamic: dynamic ReLU; else a ReLU.

    Raises:
      ValueError: an unknown reading.
    """

    def __init__(
        self,
        width: int,
        groups: int,
        *,
        offsets: str = "flat",
        deform: bool = True,
        weigh: bool = True,
        dynamic: bool = True,
        rngs: nnx.Rngs,
    ):
        if offsets not in READINGS:
            raise ValueError(f"offsets={offsets!r}; known: {', '.join(READINGS)}")
        self.reading = offsets
        self.coarser = Candidate(width, groups, 1, rngs)
        self.same = Candidate(width, groups, 1, rngs)
        self.finer = Candidate(width, groups, 2, rngs)
        # From zero: at first the taps stand on their grid, and all masks are 1/2 (arXiv 1811.11168, section 3.1).
        self.steering = Conv(width, 3 * TAPS, init=weights.zeros, rngs=rngs) if deform else None
        self.scale = Dense((width, 1), (None, None), weights.normal(0.01), bias=(1,), rngs=rngs) if weigh else None
        self.task = DyReLU(width, rngs) if dynamic else None

    def __call__(self, levels: Sequence[jax.Array]) -> list[jax.Array]:
        """The next features of all levels.

        Raises:
          ValueError: a level isn't half as large as the one before.
        """
        sizes = [level.shape[1:3] for level in levels]
        for fine, coarse in zip(sizes[:-1], sizes[1:], strict=True):
            if coarse != tuple(-(-side // 2) for side in fine):
                raise ValueError(f"a level of {coarse} places can't follow one of {fine}")
        return [self._level(levels, level) for level in range(len(levels))]

    def _level(self, levels, level: int) -> jax.Array:
        x, steering = levels[level], self._steering(levels[level])
        candidates = [self.same(x, steering)]
        if level > 0:
            candidates.append(self.finer(levels[level - 1], steering))
        if level < len(levels) - 1:
            coarse = levels[level + 1]
            moved = self.coarser(coarse, self._read(steering, coarse.shape[1:3]))
            candidates.append(resize(moved, x.shape[1:3]))
        mixed = self._mix(candidates)
        return jax.nn.relu(mixed) if self.task is None else self.task(mixed)

    def _steering(self, x_BYXC):
        """Offsets (B, Y, X, 2 K) and masks (B, Y, X, K) in float32; None for plain convolutions."""
        if self.steering is None:
            return None
        both = self.steering(x_BYXC).astype(jnp.float32)
        return both[..., : 2 * TAPS], jax.nn.sigmoid(both[..., 2 * TAPS :])

    def _read(self, steering, size):
        if steering is None:
            return None
        read = flat_reading if self.reading == "flat" else resize
        return tuple(read(part, size) for part in steering)

    def _mix(self, candidates) -> jax.Array:
        """The mean of the candidates, each times its weight."""
        if self.scale is None:
            return sum(candidates) / len(candidates)
        means_BSC = jnp.stack([x.astype(jnp.float32).mean((1, 2)) for x in candidates], axis=1)
        scale_BS1 = hard_sigmoid(jax.nn.relu(self.scale(means_BSC)))
        parts = (x.astype(jnp.float32) * scale_BS1[:, i, None, None] for i, x in enumerate(candidates))
        return (sum(parts) / len(candidates)).astype(candidates[0].dtype)
