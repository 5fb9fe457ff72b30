"""Modulated deformable convolution (DCNv2, arXiv 1811.11168, equation 1) as a gather and a matrix product.

    y(p) = Σ_k W_k m_k(p) x(s p + k + d_k(p))

x between its places is bilinear, and 0 outside. The four neighbours of a point are one row of 4 C channels, so one
gather of rows finds them: the map with a border of zeros is written once as rows of its 2 x 2 cells. Taps are taken one
after the other, so that a tap's points are all that is in memory; the backward pass gathers again instead of keeping
them.

Letters: B images; Y, X rows and columns of a map; C, D channels in and out; K taps (9 of a 3 x 3 kernel); P places of
the output; R cells of the padded map; M deformable groups, each with offsets of its own, of E = C / M channels; G
groups of the convolution, I = C / G; F = 4 E.
"""

import jax
import jax.numpy as jnp
import numpy as np


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
    size, _, inner, out = kernel_HWID.shape
    batch, rows, columns, width = x_BYXC.shape
    taps, places = size * size, mask_BYXN.shape[1:3]
    groups = mask_BYXN.shape[-1] // taps
    _check(x_BYXC, offset_BYXO, mask_BYXN, kernel_HWID, stride)
    index, weight = _points(offset_BYXO, mask_BYXN, (rows, columns), size, stride)
    kernel_KIGD = kernel_HWID.reshape(taps, inner, width // inner, -1)
    y = _sum_of_taps(_cells(x_BYXC, groups), index, weight, kernel_KIGD.swapaxes(1, 2))
    y = y.reshape(batch, *places, out)
    return y if bias_D is None else y + bias_D.astype(y.dtype).reshape(1, 1, 1, -1)


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


def _check(x, offset, mask, kernel, stride) -> None:
    size, across, inner, out = kernel.shape
    taps, width = size * size, x.shape[-1]
    places = tuple(-(-n // stride) for n in x.shape[1:3])
    groups = mask.shape[-1] // taps
    if size != across or size % 2 == 0:
        raise ValueError(f"a kernel of {size} x {across}; an odd square is wanted")
    if mask.shape[1:3] != places or offset.shape[1:3] != places:
        raise ValueError(f"offsets {offset.shape} and masks {mask.shape} should have {places} places")
    if not groups or mask.shape[-1] % taps or offset.shape[-1] != 2 * mask.shape[-1] or width % groups:
        raise ValueError(
            f"{offset.shape[-1]} offsets and {mask.shape[-1]} masks a place for {taps} taps, {width} channels"
        )
    if width % inner or out % (width // inner):
        raise ValueError(f"a kernel {kernel.shape} for {width} channels")


def _cells(x_BYXC, groups: int) -> jax.Array:
    """Rows (B, M, R, 4 E) of the 2 x 2 cells of the maps with a border of zeros: upper left, upper right, lower left,
    lower right."""
    batch, rows, columns, width = x_BYXC.shape
    x = jnp.pad(x_BYXC.reshape(batch, rows, columns, groups, -1), ((0, 0), (1, 1), (1, 1), (0, 0), (0, 0)))
    x = jnp.moveaxis(x, 3, 1)
    corners = [x[:, :, i : i + rows + 1, j : j + columns + 1] for i in (0, 1) for j in (0, 1)]
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
    index = (top.astype(jnp.int32) + 1) * (size[1] + 1) + left.astype(jnp.int32) + 1
    index = jnp.clip(index, 0, (size[0] + 1) * (size[1] + 1) - 1)
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
