"""A ring of the data-parallel devices: what each has goes around and meets what all others have.

For functions of every pair of rows of a batch, of which a device holds one block at a time. The functions here are
called under `mapped`, but for `mapped`, `rows` and `take_rows`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from capvl.parallel.rules import RULES, data_groups

CHUNK = 1024


def rows() -> P:
    """Spec of an array whose rows are divided over the devices."""
    return P(_axes())


def mapped(local, in_specs, out_specs):
    """`local` on every data-parallel device of the mesh in force; called as it is where there is one."""
    if data_groups() == 1:
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def around(visit, travelling, carry):
    """Lets what travels visit all devices and come home: (travelling, carry) <- visit(travelling, carry) on each."""
    count = data_groups()

    def body(_, state):
        travelling, carry = visit(*state)
        return jax.lax.ppermute(travelling, _axes(), [(i, (i + 1) % count) for i in range(count)]), carry

    if count == 1:
        return visit(travelling, carry)
    return jax.lax.fori_loop(0, count, body, (travelling, carry))


def chunks(block, image_ID, row_I, passing: Any, column_T, carry, chunk: int):
    """Runs `block` over chunks of the texts that are here; what it gives for each text is put together again."""
    count = len(column_T)
    pieces = next(p for p in range(-(-count // chunk), count + 1) if count % p == 0)
    if pieces == 1:
        return block(image_ID, passing, row_I, column_T, carry)
    cut = jax.tree.map(lambda x: x.reshape(pieces, count // pieces, *x.shape[1:]), (passing, column_T))

    def body(carry, piece):
        return block(image_ID, piece[0], row_I, piece[1], carry)

    carry, given = jax.lax.scan(body, carry, cut)
    return carry, jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), given)


def own_rows(count: int) -> jax.Array:
    """Numbers of this device's rows in the global batch, where it has so many."""
    first = jax.lax.axis_index(_axes()) * count if data_groups() > 1 else 0
    return first + jnp.arange(count, dtype=jnp.int32)


def sum_over_devices(x: jax.Array) -> jax.Array:
    """The sum of what each device has."""
    return jax.lax.psum(x, _axes()) if data_groups() > 1 else x


@jax.custom_vjp
def take_rows(x: Any, index_B) -> Any:
    """Rows of a batch that is divided over the devices, by their numbers in it, each to the device that asks for it.

    Args:
      x: arrays (B, …), a pytree.
      index_B: int32 numbers of rows.

    Returns:
      Arrays (B, …): row i is row index_B[i] of x. Every device's rows visit every device, so that none holds all.
    """
    return _taken(x, index_B)


def _taken(x, index_B):
    def local(x, index_I):

        def visit(travelling, out):
            passing, first = travelling
            place_I, here_I = _places(index_I, first, len(index_I))

            def pick(block, out):
                here = here_I.reshape(-1, *(1,) * (block.ndim - 1))
                return jnp.where(here, block[place_I], out)

            return (passing, first), jax.tree.map(pick, passing, out)

        first = own_rows(len(index_I))[0]
        _, out = around(visit, (x, first), jax.tree.map(jnp.zeros_like, x))
        return out

    return mapped(local, (rows(), rows()), rows())(x, index_B)


def _places(index_I, first, count):
    """Places of rows in a block that begins with the row `first`, and which are in it."""
    place_I = index_I - first
    here_I = (place_I >= 0) & (place_I < count)
    return jnp.where(here_I, place_I, 0), here_I


def _given_back(index_B, gradient):
    """The other way: the gradient of each row goes back to where the row came from."""

    def local(index_I, gradient):

        def visit(travelling, carry):
            sums, first = travelling
            place_I, here_I = _places(index_I, first, len(index_I))

            def add(total, g):
                here = here_I.reshape(-1, *(1,) * (g.ndim - 1))
                # A product with ones and zeros, as scatter-adds run row by row on TPUs.
                chosen_II = jax.nn.one_hot(place_I, len(index_I), dtype=jnp.float32, axis=0)
                kept = jnp.where(here, g, jnp.zeros((), g.dtype)).astype(jnp.float32)
                return total + jnp.tensordot(chosen_II, kept, axes=(1, 0))

            return (jax.tree.map(add, sums, gradient), first), carry

        zeros = jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), gradient)
        first = own_rows(len(index_I))[0]
        (sums, _), _ = around(visit, (zeros, first), ())
        return jax.tree.map(lambda total, g: total.astype(g.dtype), sums, gradient)

    return mapped(local, (rows(), rows()), rows())(index_B, gradient)


def _take_backward(index_B, gradient):
    leaves, structure = jax.tree.flatten(gradient)
    # Whole numbers have gradients of type float0, which stay as they are.
    floats = [jnp.issubdtype(g.dtype, jnp.inexact) for g in leaves]
    back = iter(_given_back(index_B, [g for g, is_float in zip(leaves, floats, strict=True) if is_float]))
    leaves = [next(back) if is_float else g for g, is_float in zip(leaves, floats, strict=True)]
    return jax.tree.unflatten(structure, leaves), None


take_rows.defvjp(lambda x, index_B: (_taken(x, index_B), index_B), _take_backward)


def _axes() -> tuple[str, ...]:
    return RULES["batch"]
