"""Position embeddings of a 2-D patch grid: learned, sine-cosine, and resizing between grids."""

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


def resize_grid(positions_ND: np.ndarray, new_tokens: int) -> np.ndarray:
    """Resizes square-grid positions bilinearly, corners onto corners: (N, D) -> (new_tokens, D).

    Raises:
      ValueError: either number of tokens is not a square.
    """
    old, new = round(len(positions_ND) ** 0.5), round(new_tokens**0.5)
    if old * old != len(positions_ND) or new * new != new_tokens:
        raise ValueError(
            f"positions are resized between square grids only, not from {len(positions_ND)} to {new_tokens} tokens"
        )
    if old == new:
        return np.asarray(positions_ND)
    grid = np.asarray(positions_ND).reshape(old, old, -1)
    resized = ndimage.zoom(grid, (new / old, new / old, 1), order=1)
    return resized.reshape(new_tokens, -1).astype(positions_ND.dtype)
