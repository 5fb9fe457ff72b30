"""Modulated deformable convolution (DCNv2, arXiv 1811.11168, equation 1) as a gather and a matrix product.

    y(p) = Σ_k W_k m_k(p) x(s p + k + d_k(p))

x between its places is bilinear, and 0 outside. The four neighbours of a point are one row of 4 C channels, so one
gather of rows finds them: the maps with borders of zeros are written once as rows of their 2 x 2 cells. Taps are taken
one after the other, so that a tap's points are all that is in memory; the backward pass gathers again instead of
keeping them. All levels of a pyramid go through one such loop, for XLA takes long to compile one.

Letters: B images; Y, X rows and columns of a map; C, D channels in and out; K taps (9 of a 3 x 3 kernel); P places of
the outputs; R cells of the maps; M deformable groups, each with offsets of its own, of E = C / M channels; G
groups of the convolution, I = C / G; F = 4 E.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Steered = tuple[int, jax.Array, jax.Array]


def modulated_deformable(
    x_BYXC: jax.Array,
    offset_BYXO: jax.Array,
    mask_BYXN: jax.Array,
    kernel_HWID: jax.Array,
    bias_D: jax.Array | None = None,
    *,
    stride: int = 1,
) -> jax.Array:
    """The modulated deformable convolution of maps, with size // 2 zeros around them.

    Coordinates and bilinear weights are float32 whatever the dtype of the maps; a tap whose point is not inside
    (-1, Y) x (-1, X) gives 0.

    Args:
      x_BYXC: maps.
      offset_BYXO: displacements in places of x, one map of the output's size; channels (group, tap, (dy, dx)), taps row
        by row, so O = 2 M K.
      mask_BYXN: what each tap is multiplied by; N = M K channels (group, tap).
      kernel_HWID: (size, size, C / G, D), of the maps' dtype.
      bias_D: added, if given.
      stride: of the taps' centres, in places of x.

    Raises:
      ValueError: shapes that don't belong together.
    """
    groups = mask_BYXN.shape[-1] // _side(kernel_HWID) ** 2
    if not groups or x_BYXC.shape[-1] % groups:
        raise ValueError(
            f"{mask_BYXN.shape[-1]} masks a place for a kernel {kernel_HWID.shape} and {x_BYXC.shape[-1]} channels"
        )
    return Cells([x_BYXC], groups).convolve([(0, offset_BYXO, mask_BYXN)], kernel_HWID, bias_D, stride=stride)[0]


class Cells:
    """Maps of one width and dtype, the levels of a pyramid, ready for modulated deformable convolutions.

    Attributes:
      rows: (B, M, R, F): the maps' cells one after the other.
      sizes: (rows, columns) of each map.
      starts: the first row of each map.
    """

    def __init__(self, maps: Sequence[jax.Array], groups: int = 1):
        """groups: deformable groups, each with offsets of its own."""
        self.sizes = [x.shape[1:3] for x in maps]
        self.rows = jnp.concatenate([_cells(x, groups) for x in maps], axis=2)
        self.starts = np.cumsum([0, *((rows + 1) * _across(columns) for rows, columns in self.sizes)])

    def convolve(
        self, steered: Sequence[Steered], kernel_HWID: jax.Array, bias_D: jax.Array | None = None, *, stride: int = 1
    ) -> list[jax.Array]:
        """The modulated deformable convolution of some of the maps: one output for each of `steered`.

        Args:
          steered: (which map, its offsets, its masks), the latter as `modulated_deformable` has them.
          kernel_HWID, bias_D, stride: as there, the same for all.

        Raises:
          ValueError: shapes that don't belong together.
        """
        size, (inner, out) = _side(kernel_HWID), kernel_HWID.shape[2:]
        batch, groups, _, fourfold = self.rows.shape
        width = groups * fourfold // 4
        found = []
        for which, offset, mask in steered:
            _check(self.sizes[which], groups, width, offset, mask, kernel_HWID, stride)
            index, weight = _points(offset, mask, self.sizes[which], size, stride)
            found.append((index + int(self.starts[which]), weight))
        index, weight = (jnp.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))
        kernel_KIGD = kernel_HWID.reshape(size * size, inner, width // inner, -1)
        y = _sum_of_taps(self.rows, index, weight, kernel_KIGD.swapaxes(1, 2))
        y = y if bias_D is None else y + bias_D.astype(y.dtype).reshape(1, 1, -1)
        places = [mask.shape[1:3] for _, _, mask in steered]
        parts = jnp.split(y, np.cumsum([rows * columns for rows, columns in places])[:-1], axis=1)
        return [part.reshape(batch, *at, out) for part, at in zip(parts, places, strict=True)]


def flat_reading(map_BYXC: jax.Array, size: tuple[int, int]) -> jax.Array:
    """A map (B, Y, X, C) read as one of fewer places, as the CUDA operator does with one larger than its output.

    Of each image the first C * rows * columns numbers in the order channel, row, column are taken as (C, rows,
    columns). That is no resampling: only the first channels are read, and places lose their neighbours. The published
    weights of DyHead and GLIP were trained with it (github.com/microsoft/DynamicHead/issues/25).

    Args:
      map_BYXC: offsets or masks.
      size: (rows, columns) to read it as.

    Raises:
      ValueError: the map has fewer places than that.
    """
    batch, rows, columns, channels = map_BYXC.shape
    places, wanted = rows * columns, size[0] * size[1]
    if wanted > places:
        raise ValueError(f"a map of {rows} x {columns} places can't be read as {size[0]} x {size[1]}")
    needed = -(-channels * wanted // places)
    flat = jnp.moveaxis(map_BYXC[..., :needed], -1, 1).reshape(batch, -1)[:, : channels * wanted]
    return jnp.moveaxis(flat.reshape(batch, channels, *size), 1, -1)


def _side(kernel_HWID) -> int:
    side, across = kernel_HWID.shape[:2]
    if side != across or side % 2 == 0:
        raise ValueError(f"a kernel of {side} x {across}; an odd square is wanted")
    return side


def _check(size, groups, width, offset, mask, kernel, stride) -> None:
    taps, places = _side(kernel) ** 2, tuple(-(-n // stride) for n in size)
    if mask.shape[1:3] != places or offset.shape[1:3] != places:
        raise ValueError(f"offsets {offset.shape} and masks {mask.shape} should have {places} places")
    if mask.shape[-1] != groups * taps or offset.shape[-1] != 2 * mask.shape[-1]:
        raise ValueError(f"{offset.shape[-1]} offsets and {mask.shape[-1]} masks a place for {groups} x {taps} taps")
    inner, out = kernel.shape[2:]
    if width % inner or out % (width // inner):
        raise ValueError(f"a kernel {kernel.shape} for {width} channels")


def _across(columns: int) -> int:
    """Cells in a row of cells: columns + 1, and more up to a multiple of 8, the height of a TPU's tile."""
    return -(-(columns + 1) // 8) * 8


def _cells(x_BYXC, groups: int) -> jax.Array:
    """Rows of the 2 x 2 cells of maps with a border of zeros: upper left, upper right, lower left, lower right."""
    batch, rows, columns, width = x_BYXC.shape
    across = _across(columns)
    around = ((0, 0), (1, 1), (1, across - columns), (0, 0), (0, 0))
    x = jnp.moveaxis(jnp.pad(x_BYXC.reshape(batch, rows, columns, groups, -1), around), 3, 1)
    corners = [x[:, :, i : i + rows + 1, j : j + across] for i in (0, 1) for j in (0, 1)]
    return jnp.concatenate(corners, axis=-1).reshape(batch, groups, -1, 4 * width // groups)


def _points(offset_BYXO, mask_BYXN, size, side: int, stride: int) -> tuple[jax.Array, jax.Array]:
    """Where taps look: cells (K, B, M, P), int32, and weights (4, K, B, M, P) of their corners, mask included."""
    batch, rows, columns, _ = mask_BYXN.shape

    def by_tap(values):
        return jnp.transpose(values.astype(jnp.float32).reshape(batch, rows * columns, -1, side * side), (3, 0, 2, 1))

    tap, place = np.arange(side * side), np.arange(rows * columns)
    y, x = (
        at(place, columns)[None, None, None] * stride + (at(tap, side) - side // 2)[:, None, None, None]
        for at in (np.floor_divide, np.mod)
    )
    y = by_tap(offset_BYXO[..., 0::2]) + y.astype(np.float32)
    x = by_tap(offset_BYXO[..., 1::2]) + x.astype(np.float32)
    # A coordinate that isn't a number counts as inside, so that the output isn't one either.
    outside = (y <= -1) | (y >= size[0]) | (x <= -1) | (x >= size[1])
    mask = jnp.where(outside, 0, by_tap(mask_BYXN))
    top, left = (jnp.where(outside, 0, jnp.floor(at)) for at in (y, x))
    below, right = (jnp.where(outside, 0, at - first) for at, first in ((y, top), (x, left)))
    across = _across(size[1])
    index = (top.astype(jnp.int32) + 1) * across + left.astype(jnp.int32) + 1
    index = jnp.clip(index, 0, (size[0] + 1) * across - 1)
    upper, lower = (1 - below) * mask, below * mask
    return index, jnp.stack([upper * (1 - right), upper * right, lower * (1 - right), lower * right])


@jax.custom_vjp
def _sum_of_taps(cells_BMRF, index_KBMP, weight_4KBMP, kernel_KGID) -> jax.Array:
    """Σ_k kernel_k (Σ_j weight_jk corner_j of cell index_k): (B, P, G D)."""
    return _forward(cells_BMRF, index_KBMP, weight_4KBMP, kernel_KGID)[0]


def _forward(cells, index, weight, kernel):
    _, batch, _, places = index.shape

    def add(total_BPD, tap):
        index_BMP, weight_4BMP, kernel_GID = tap
        points_BPC = _interpolate(_take(cells, index_BMP), weight_4BMP, cells.dtype)
        parts = zip(jnp.split(points_BPC, len(kernel_GID), axis=-1), kernel_GID, strict=True)
        return total_BPD + jnp.concatenate([_product("bpi,id->bpd", *part) for part in parts], axis=-1), None

    total = jnp.zeros((batch, places, kernel.shape[1] * kernel.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add, total, (index, jnp.moveaxis(weight, 1, 0), kernel))
    return total.astype(cells.dtype), (cells, index, weight, kernel)


def _backward(saved, gradient_BPD):
    cells, index, weight, kernel = saved
    gradients = jnp.split(gradient_BPD, kernel.shape[1], axis=-1)

    def add(of_cells, tap):
        index_BMP, weight_4BMP, kernel_GID = tap
        corners = _take(cells, index_BMP)
        points = jnp.split(_interpolate(corners, weight_4BMP, cells.dtype), len(kernel_GID), axis=-1)
        pairs = zip(points, gradients, strict=True)
        of_kernel = jnp.stack([_product("bpi,bpd->id", *pair) for pair in pairs])
        pairs = zip(gradients, kernel_GID, strict=True)
        of_points = jnp.concatenate([_product("bpd,id->bpi", *pair) for pair in pairs], axis=-1)
        of_points = _by_group(of_points, cells.shape[1])
        # As a product: on CPUs a sum over the last axis takes twice as long.
        of_weight = [_product("bmpe,bmpe->bmp", of_points, part.astype(jnp.float32)) for part in _corners(corners)]
        of_corners = jnp.concatenate([of_points * part[..., None] for part in weight_4BMP], axis=-1)
        return _add_rows(of_cells, index_BMP, of_corners), (jnp.stack(of_weight), of_kernel)

    zeros = jnp.zeros(cells.shape, jnp.float32)
    of_cells, (of_weight, of_kernel) = jax.lax.scan(add, zeros, (index, jnp.moveaxis(weight, 1, 0), kernel))
    return of_cells.astype(cells.dtype), None, jnp.moveaxis(of_weight, 0, 1), of_kernel.astype(kernel.dtype)


_sum_of_taps.defvjp(_forward, _backward)


def _product(equation: str, x, y) -> jax.Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _each_map(function):
    """The function of one map's rows, over batch and groups: gathers with batch dimensions stay on their devices."""
    return jax.vmap(jax.vmap(function))


def _take(cells_BMRF, index_BMP) -> jax.Array:
    return _each_map(lambda rows, index: rows.at[index].get(mode="promise_in_bounds"))(cells_BMRF, index_BMP)


def _add_rows(cells_BMRF, index_BMP, rows_BMPF) -> jax.Array:
    add = _each_map(lambda into, index, rows: into.at[index].add(rows, mode="promise_in_bounds"))
    return add(cells_BMRF, index_BMP, rows_BMPF)


def _corners(rows_BMPF) -> list[jax.Array]:
    return jnp.split(rows_BMPF, 4, axis=-1)


def _interpolate(rows_BMPF, weight_4BMP, dtype) -> jax.Array:
    """Σ_j weight_j corner_j, summed in float32: (B, P, C)."""
    parts = zip(_corners(rows_BMPF), weight_4BMP, strict=True)
    points_BMPE = sum(part.astype(jnp.float32) * weight[..., None] for part, weight in parts).astype(dtype)
    batch, _, places, _ = points_BMPE.shape
    return jnp.moveaxis(points_BMPE, 1, 2).reshape(batch, places, -1)


def _by_group(points_BPC, groups: int) -> jax.Array:
    """(B, M, P, E)."""
    batch, places, _ = points_BPC.shape
    return jnp.moveaxis(points_BPC.reshape(batch, places, groups, -1), 2, 1)
