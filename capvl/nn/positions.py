"""Position embeddings of a 2-D patch grid: learned, sine-cosine, and resizing between grids."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import ndimage


def sincos_2d(height: int, width: int, channels: int, temperature: float = 10_000.0) -> np.ndarray:
    """Fixed 2-D sine-cosine embedding, (height * width, channels) float32 (MoCo v3, section 4.3).

    Raises:
      ValueError: `channels` is not a multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {channels}")
    y, x = np.mgrid[:height, :width]
    omega = np.arange(channels // 4) / max(channels // 4 - 1, 1)
    omega = 1.0 / temperature**omega
    y, x = y.reshape(-1, 1) * omega, x.reshape(-1, 1) * omega
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1).astype(np.float32)


def resize_grid(positions_ND: np.ndarray, new_tokens: int, rule: str = "big_vision", first: int = 0) -> np.ndarray:
    """Resizes the positions of a square grid to those of another, known by their numbers: see `resize_table`.

    Raises:
      ValueError: either number of tokens is not a square.
    """
    old, new = round((len(positions_ND) - first) ** 0.5), round((new_tokens - first) ** 0.5)
    if old * old + first != len(positions_ND) or new * new + first != new_tokens:
        raise ValueError(
            f"{len(positions_ND)} and {new_tokens} positions are not both of square grids, so their sides aren't known"
        )
    return resize_table(positions_ND, (old, old), (new, new), rule, first)


def resize_table(
    positions_ND: np.ndarray, old: tuple[int, int], new: tuple[int, int], rule: str, first: int = 0
) -> np.ndarray:
    """Resizes the positions of a grid: (first + old rows * columns, D) -> (first + new rows * columns, D).

    Args:
      positions_ND: row by row, behind `first` rows of other tokens, which stay as they are.
      old, new: rows and columns.
      rule: see `resize`.
      first: rows before the grid.

    Raises:
      ValueError: there are not as many positions as `old` has.
    """
    if len(positions_ND) != first + old[0] * old[1]:
        raise ValueError(f"{len(positions_ND)} positions are not those of a grid of {old} behind {first} others")
    if old == new:
        return np.asarray(positions_ND)
    resized = resize(np.asarray(positions_ND[first:]), old, new, rule)
    return np.concatenate([positions_ND[:first], resized]).astype(positions_ND.dtype)


def resize(positions_ND: np.ndarray, old: tuple[int, int], new: tuple[int, int], rule: str) -> np.ndarray:
    """Positions of a grid of `old` (rows, columns) for one of `new`, by the rule of where they come from.

    Args:
      positions_ND: row by row, (N, D).
      old, new: rows and columns.
      rule: "big_vision" (bilinear, corners onto corners), "hugging_face" (bicubic, a = -0.75, four neighbours)
        or "timm" (bicubic, a = -0.5, widened where the grid shrinks).
    """
    grid = positions_ND.reshape(*old, -1)
    if rule == "big_vision":
        zoomed = ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
        return zoomed.reshape(new[0] * new[1], -1)
    rows, columns = (bicubic(o, n, rule == "timm") for o, n in zip(old, new, strict=True))
    return np.einsum("yr,xc,rcd->yxd", rows, columns, grid.astype(np.float64)).reshape(new[0] * new[1], -1)


def bicubic(old: int, new: int, antialias: bool = False) -> np.ndarray:
    """Weights (new, old) of cubic convolution along one axis (Keys, 1981), pixel centres at halves."""
    scale = old / new
    a, width = (-0.5, max(scale, 1.0)) if antialias else (-0.75, 1.0)
    weights = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * scale
        if antialias:
            taps = np.arange(max(0, int(centre - 2 * width + 0.5)), min(old, int(centre + 2 * width + 0.5)))
        else:
            taps = np.floor(centre - 0.5) + np.arange(-1, 3)
        x = np.abs((taps + 0.5 - centre) / width)
        near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
        values = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
        np.add.at(weights[i], np.clip(taps, 0, old - 1).astype(int), values / values.sum())
    return weights


def resize_on_device(positions_ND, old: tuple[int, int], new_B: tuple[jax.Array, jax.Array], shape: tuple[int, int]):
    """Positions of each image's own grid, by the rule "hugging_face" of `resize`; for images of many sizes in a batch.

    Args:
      positions_ND: row by row, of a grid of `old` (rows, columns).
      new_B: rows (B,) and columns (B,) of the images' grids, int32.
      shape: rows and columns of the result, at least as many as any image has; what is beyond an image's is arbitrary.

    Returns:
      (B, rows * columns, D).
    """
    rows, columns = (_bicubic_on_device(o, n, size) for o, n, size in zip(old, new_B, shape, strict=True))
    grid = positions_ND.reshape(*old, -1)
    resized = jnp.einsum("byr,bxc,rcd->byxd", rows, columns, grid)
    return resized.reshape(len(resized), shape[0] * shape[1], -1)


def _bicubic_on_device(old: int, new_B, size: int) -> jax.Array:
    """As `bicubic` without widening, with the new length of each image: (B, size, old) float32."""
    scale_B1 = old / new_B.astype(jnp.float32)[:, None]
    centre_BS1 = ((jnp.arange(size, dtype=jnp.float32) + 0.5)[None] * scale_B1)[..., None]
    taps_BS4 = jnp.floor(centre_BS1 - 0.5) + jnp.arange(-1.0, 3.0)[None, None]
    x, a = jnp.abs(taps_BS4 + 0.5 - centre_BS1), -0.75
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
    values = jnp.where(x <= 1, near, jnp.where(x < 2, far, 0.0))
    place = jnp.clip(taps_BS4, 0, old - 1).astype(jnp.int32)
    return (values[..., None] * jax.nn.one_hot(place, old)).sum(axis=2)
