"""Windows of a grid, and attention within them (Swin, arXiv 2103.14030, section 3.2).

Letters: B images, Y and X rows and columns of a grid, W windows of a grid, N places of a window, H heads, K head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

_HIDDEN = -100.0
"""What is added to the logits of keys that only the shift brought into a window, in the original code too."""


def split(x_BYXD, window: int) -> jax.Array:
    """A grid's windows, row by row, and the places in them, row by row: (B, W, N, D)."""
    batch, rows, columns, width = x_BYXD.shape
    parts = x_BYXD.reshape(batch, rows // window, window, columns // window, window, width)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, window * window, width)


def join(x_BWND, window: int, grid: tuple[int, int]) -> jax.Array:
    """The grid (rows, columns) of such windows: (B, Y, X, D)."""
    rows, columns = (side // window for side in grid)
    parts = x_BWND.reshape(len(x_BWND), rows, columns, window, window, -1)
    return parts.transpose(0, 1, 3, 2, 4, 5).reshape(len(x_BWND), *grid, -1)


def shift(x_BWND, window: int, grid: tuple[int, int], by: tuple[int, int]) -> jax.Array:
    """Windows of the grid rolled by so many rows and columns."""
    return split(jnp.roll(join(x_BWND, window, grid), by, axis=(1, 2)), window)


def padded_to(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """The grid that so many rows and columns become when they are padded to whole windows."""
    return tuple(-(-side // window) * window for side in grid)


def _split_places(values_YX: np.ndarray, window: int) -> np.ndarray:
    """As `split`, of one value a place: (W, N)."""
    rows, columns = (side // window for side in values_YX.shape)
    parts = values_YX.reshape(rows, window, columns, window)
    return parts.transpose(0, 2, 1, 3).reshape(-1, window * window)


def inside(window: int, grid: tuple[int, int], by: tuple[int, int]) -> np.ndarray | None:
    """Which places of windows are of a grid that was padded at the bottom and right, bool (W, N); None for all.

    Args:
      window: its side.
      grid: before padding.
      by: rows and columns by which the padded grid was then rolled.
    """
    padded = padded_to(grid, window)
    if padded == grid:
        return None
    y_Y1, x_1X = np.arange(padded[0])[:, None], np.arange(padded[1])[None]
    return _split_places(np.roll((y_Y1 < grid[0]) & (x_1X < grid[1]), by, axis=(0, 1)), window)


def shift_mask(window: int, grid: tuple[int, int], by: tuple[int, int]) -> np.ndarray:
    """What is added to logits in windows of a grid that was rolled by (-rows, -columns): (W, N, N) float32.

    A window at the edge then holds places of both ends of the grid, which are not to see each other.
    """
    places = [np.arange(side) for side in grid]
    # Along an axis: before the last window, its places from this end of the grid, and those from the other end.
    parts = [
        (p >= side - window).astype(int) + (p >= side - step) if step else 0 * p
        for p, side, step in zip(places, grid, by, strict=True)
    ]
    region_WN = _split_places(parts[0][:, None] * 3 + parts[1][None], window)
    return np.where(region_WN[:, :, None] == region_WN[:, None], 0.0, _HIDDEN).astype(np.float32)


@jax.custom_vjp
def attend(q_BWNHK, k_BWNHK, v_BWNHK, bias_HNN, mask_WNN) -> jax.Array:
    """Attention within windows: softmax(q kᵀ / sqrt(K) + bias + mask) v, the softmax in float32.

    Args:
      q_BWNHK, k_BWNHK, v_BWNHK: queries, keys, values.
      bias_HNN: added to the logits of each head, float32.
      mask_WNN: added to those of each window, float32, without a gradient; None for 0.

    Returns:
      (B, W, N, H, K) in the queries' dtype.
    """
    return _forward(q_BWNHK, k_BWNHK, v_BWNHK, bias_HNN, mask_WNN)[0]


def _forward(q, k, v, bias_HNN, mask_WNN):
    """As `capvl.nn.attention`: exp(logits - maximum) is kept in the activations' dtype, its sum divides the output."""
    logits_BWHNM = jnp.einsum("bwnhk,bwmhk->bwhnm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    logits_BWHNM = logits_BWHNM + bias_HNN[None, None]
    if mask_WNN is not None:
        logits_BWHNM = logits_BWHNM + mask_WNN[None, :, None]
    peak = checkpoint_name(logits_BWHNM.max(axis=-1, keepdims=True), "softmax")
    exp_BWHNM = jnp.exp(logits_BWHNM - peak)
    inverse_BWNH1 = checkpoint_name(jnp.swapaxes(1 / exp_BWHNM.sum(axis=-1), 2, 3)[..., None], "softmax")
    exp_BWHNM = exp_BWHNM.astype(v.dtype)
    mixed = jnp.einsum("bwhnm,bwmhk->bwnhk", exp_BWHNM, v, preferred_element_type=jnp.float32)
    mixed = checkpoint_name((mixed * inverse_BWNH1).astype(q.dtype), "attention")
    return mixed, (q, k, v, exp_BWHNM, inverse_BWNH1, mixed)


def _backward(saved, gradient):
    """As `capvl.nn.attention`; the bias' gradient is that of the logits, summed over images and windows."""
    q, k, v, exp_BWHNM, inverse_BWNH1, mixed = saved
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    gradient_f32 = gradient.astype(jnp.float32) * inverse_BWNH1
    along_BWHN1 = jnp.swapaxes((gradient_f32 * mixed.astype(jnp.float32)).sum(-1), 2, 3)[..., None]
    gradient = gradient_f32.astype(dtype)
    dexp = jnp.einsum("bwnhk,bwmhk->bwhnm", gradient, v, preferred_element_type=jnp.float32)
    dlogits = exp_BWHNM.astype(jnp.float32) * (dexp - along_BWHN1)
    dbias_HNN = dlogits.sum(axis=(0, 1))
    dlogits = dlogits.astype(dtype)
    dq = jnp.einsum("bwhnm,bwmhk->bwnhk", dlogits, k) * scale
    dk = jnp.einsum("bwhnm,bwnhk->bwmhk", dlogits, q) * scale
    dv = jnp.einsum("bwhnm,bwnhk->bwmhk", exp_BWHNM, gradient)
    return dq, dk, dv, dbias_HNN, None


attend.defvjp(_forward, _backward)
