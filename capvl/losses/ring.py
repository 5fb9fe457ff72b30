"""A ring of the data-parallel devices: what each has goes around and meets what all others have.

For functions of every pair of rows of a batch, of which a device holds one block at a time. The functions here are
called under `mapped`, but for `mapped` and `rows` themselves.
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


def _axes() -> tuple[str, ...]:
    return RULES["batch"]
