"""Sets of rows (features of images, tokens of texts) that the devices of all hosts divide, and search in them.

Batches leave the model divided over the mesh's data axes, and here they stay so: row n of a set is row n % B of batch
n // B, and a device keeps its rows of every batch. No host ever has all of them. Similarities are made for a batch of
queries and a block of candidates at a time; what comes to the host is a few numbers a query.

Letters: S batches of a set, B rows of a batch, C those of them that a device has, E width, K best candidates.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from capvl.evals import Context, NotFiniteError, to_host
from capvl.evals.encode import check_decoded, image_transform, over_batches, row_batches
from capvl.parallel.rules import RULES

AXES = RULES["batch"]
DIVIDED, WHOLE = P(None, AXES), P()


@dataclasses.dataclass(frozen=True)
class ShardedRows:
    """A set of rows.

    Attributes:
      rows: global arrays (S, B, …), B over the mesh's data axes: one, or several in a tuple or dict.
      count: N; the rows behind them are padding.
      mesh: of devices.
    """

    rows: Any
    count: int
    mesh: Mesh

    @property
    def shape(self) -> tuple[int, int]:
        """(S, B)."""
        return jax.tree.leaves(self.rows)[0].shape[:2]

    @classmethod
    def of_batches(cls, mesh: Mesh, batches: Sequence[Any], count: int) -> "ShardedRows":
        """Batches of B rows each as they are on the devices; the last one may end with padding."""
        divided = NamedSharding(mesh, DIVIDED)
        stack = jax.jit(lambda batches: jax.tree.map(lambda *x: jnp.stack(x), *batches), out_shardings=divided)
        return cls(stack(list(batches)), count, mesh)

    @classmethod
    def of_host(cls, mesh: Mesh, rows: Any, batch: int) -> "ShardedRows":
        """NumPy arrays (N, …) that every host has; each device gets its rows."""
        count, sharding = len(jax.tree.leaves(rows)[0]), NamedSharding(mesh, DIVIDED)
        steps = -(-count // batch)

        def divide(x: np.ndarray) -> jax.Array:
            padding = np.zeros((steps * batch - count, *x.shape[1:]), x.dtype)
            padded = np.concatenate([x, padding]).reshape(steps, batch, *x.shape[1:])
            return jax.make_array_from_callback(padded.shape, sharding, lambda index: padded[index])

        return cls(jax.tree.map(divide, rows), count, mesh)

    def take(self, index: np.ndarray) -> Any:
        """Rows by their numbers (B,), which may repeat, as a batch on the devices: (B, …), B over the data axes."""
        return _take(self.mesh, self.rows, np.asarray(index, np.int32))

    def check_finite(self, what: str) -> None:
        """Raises NotFiniteError where a row holds NaN or infinity."""
        bad = int(to_host(_not_finite(self.mesh, self.rows, self.count)))
        if bad:
            raise NotFiniteError(bad, self.count, what)


def shard_images(context: Context, source, function, params, what: str) -> ShardedRows:
    """Outputs of a compiled function for every image of a data set; arguments as for `encode.over_images`.

    Raises:
      UserError: an image can't be decoded.
      NotFiniteError: an output is NaN or infinite.
    """
    outputs: list[Any] = []

    def keep(batch) -> jax.Array:
        outputs.append(function(params, batch["image"]))
        return batch["mask"]

    masks = over_batches(context, source, image_transform(context), keep, what)
    check_decoded(source, int(np.concatenate(masks).sum()))
    found = ShardedRows.of_batches(context.mesh, outputs, len(source))
    found.check_finite(what)
    return found


def shard_rows(context: Context, rows: Any, function, params, what: str) -> ShardedRows:
    """Outputs of a compiled function for rows of arrays; arguments as for `encode.over_rows`.

    Raises:
      NotFiniteError: an output is NaN or infinite.
    """
    outputs = [function(params, batch) for batch, _ in row_batches(context, rows, what)]
    found = ShardedRows.of_batches(context.mesh, outputs, len(jax.tree.leaves(rows)[0]))
    found.check_finite(what)
    return found


def ranks(
    queries: ShardedRows, candidates: ShardedRows, query_groups: np.ndarray, candidate_groups: np.ndarray
) -> np.ndarray:
    """Of each query, how many candidates of other groups have at least the dot product that the best one of its own
    group has: (N,) int. A query without a candidate of its own group has the number of all.

    Args:
      queries, candidates: embeddings (S, B, E) float32.
      query_groups, candidate_groups: whole numbers (N,) and (M,), not negative: what belongs together has the same.
    """
    groups = (_padded(query_groups, queries), _padded(candidate_groups, candidates))
    found = [
        to_host(
            _ranks(queries.mesh, queries.rows, candidates.rows, np.int32(step), np.int32(candidates.count), *groups)
        )
        for step in range(queries.shape[0])
    ]
    return np.concatenate(found)[: queries.count]


def top(queries: ShardedRows, candidates: ShardedRows, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (N, K) int and dot products (N, K) float32 of the candidates with the highest dot products, best first;
    of equal ones the lower number first. K is k, or the number of all candidates where that is less.

    Args:
      queries, candidates: embeddings (S, B, E) float32.
      k: candidates of a query.
    """
    how, found = functools.partial(_top, queries.mesh, min(k, candidates.count)), []
    for step in range(queries.shape[0]):
        part = how(queries.rows, candidates.rows, np.int32(step), np.int32(candidates.count))
        found.append([to_host(x) for x in part])
    numbers, dots = (np.concatenate(column)[: queries.count] for column in zip(*found, strict=True))
    return numbers, dots


def _padded(groups: np.ndarray, of: ShardedRows) -> np.ndarray:
    steps, batch = of.shape
    return np.pad(np.asarray(groups, np.int32), (0, steps * batch - of.count), constant_values=-1)


def _numbers(step, own: int) -> jax.Array:
    """(C,) numbers, in the set, of the rows of batch `step` that this device has."""
    device, devices = jax.lax.axis_index(AXES), jax.lax.axis_size(AXES)
    return (step * devices + device) * own + jnp.arange(own)


def _dots(query_BE, candidate_CE) -> jax.Array:
    # Float32 in full, whatever the chip takes for its default: ties and ranks are made of these.
    return jnp.einsum("be,ce->bc", query_BE, candidate_CE, precision=jax.lax.Precision.HIGHEST)


def _batch(rows_SCE, step) -> jax.Array:
    """(B, E): a whole batch on every device."""
    own_CE = jax.lax.dynamic_index_in_dim(rows_SCE, step, keepdims=False)
    return jax.lax.all_gather(own_CE, AXES, tiled=True)


@functools.partial(jax.jit, static_argnums=0)
def _not_finite(mesh: Mesh, rows, count) -> jax.Array:
    def local(rows, count):
        each = [~jnp.isfinite(x).reshape(*x.shape[:2], -1).all(axis=2) for x in jax.tree.leaves(rows)]
        bad_SC = functools.reduce(jnp.logical_or, each)
        number_SC = jax.vmap(lambda step: _numbers(step, bad_SC.shape[1]))(jnp.arange(bad_SC.shape[0]))
        return jax.lax.psum((bad_SC & (number_SC < count)).sum(), AXES)

    return jax.shard_map(local, mesh=mesh, in_specs=(DIVIDED, WHOLE), out_specs=WHOLE, check_vma=False)(rows, count)


@functools.partial(jax.jit, static_argnums=0)
def _take(mesh: Mesh, rows, index_B) -> Any:
    def local(rows, index_B):
        device, devices = jax.lax.axis_index(AXES), jax.lax.axis_size(AXES)

        def one(x_SC):
            batch, place = index_B // (devices * x_SC.shape[1]), index_B % (devices * x_SC.shape[1])
            here_B = place // x_SC.shape[1] == device
            found = x_SC[batch, place % x_SC.shape[1]]
            found = jnp.where(here_B.reshape(-1, *(1,) * (found.ndim - 1)), found, jnp.zeros((), found.dtype))
            summed = found.astype(jnp.uint8) if found.dtype == jnp.bool_ else found
            return jax.lax.psum_scatter(summed, AXES, tiled=True).astype(x_SC.dtype)

        return jax.tree.map(one, rows)

    return jax.shard_map(local, mesh=mesh, in_specs=(DIVIDED, WHOLE), out_specs=P(AXES), check_vma=False)(rows, index_B)


@functools.partial(jax.jit, static_argnums=0)
def _ranks(mesh: Mesh, queries, candidates, step, count, query_groups, candidate_groups) -> jax.Array:
    """`ranks` of batch `step` of the queries: (B,) int32."""

    def local(queries, candidates, step, count, query_groups, candidate_groups):
        query_BE = _batch(queries, step)
        group_B = jax.lax.dynamic_slice_in_dim(query_groups, step * len(query_BE), len(query_BE))

        def block(carry, inputs):
            number, candidate_CE = inputs
            least_B, best_B, above_B = carry
            number_C = _numbers(number, len(candidate_CE))
            own_BC = candidate_groups[number_C][None] == group_B[:, None]
            other_BC = ~own_BC & (number_C < count)[None]
            dots_BC = _dots(query_BE, candidate_CE)
            best_B = jnp.maximum(best_B, jnp.where(own_BC, dots_BC, -jnp.inf).max(axis=1))
            above_B = above_B + (other_BC & (dots_BC >= least_B[:, None])).sum(axis=1)
            return (least_B, best_B, above_B), None

        def turn(least_B, _):
            nothing = (least_B, jnp.full(len(query_BE), -jnp.inf), jnp.zeros(len(query_BE), jnp.int32))
            (_, best_B, above_B), _ = jax.lax.scan(block, nothing, (jnp.arange(len(candidates)), candidates))
            return jax.lax.pmax(best_B, AXES), jax.lax.psum(above_B, AXES)

        # Twice the same program: a tie is one only between dot products that were computed alike.
        _, above_TB = jax.lax.scan(turn, jnp.full(len(query_BE), jnp.inf), length=2)
        return above_TB[1]

    specs = (DIVIDED, DIVIDED, *[WHOLE] * 4)
    whole = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=WHOLE, check_vma=False)
    return whole(queries, candidates, step, count, query_groups, candidate_groups)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _top(mesh: Mesh, k: int, queries, candidates, step, count) -> tuple[jax.Array, jax.Array]:
    """`top` of batch `step` of the queries: (B, K) int32 and (B, K) float32."""

    def best(number_BX, dot_BX):
        lost_BX, number_BX = jax.lax.sort((-dot_BX, number_BX), num_keys=2)
        return number_BX[:, :k], -lost_BX[:, :k]

    def local(queries, candidates, step, count):
        query_BE = _batch(queries, step)
        rows = len(query_BE)

        def block(carry, inputs):
            number, candidate_CE = inputs
            number_C = _numbers(number, len(candidate_CE))
            dots_BC = jnp.where((number_C < count)[None], _dots(query_BE, candidate_CE), -jnp.inf)
            number_BC = jnp.broadcast_to(number_C[None], dots_BC.shape)
            both = zip(carry, (number_BC, dots_BC), strict=True)
            return best(*(jnp.concatenate(pair, axis=1) for pair in both)), None

        nothing = (jnp.full((rows, k), jnp.iinfo(jnp.int32).max), jnp.full((rows, k), -jnp.inf))
        found, _ = jax.lax.scan(block, nothing, (jnp.arange(len(candidates)), candidates))
        return best(*(jax.lax.all_gather(x, AXES, axis=1, tiled=True) for x in found))

    specs = (DIVIDED, DIVIDED, WHOLE, WHOLE)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=WHOLE, check_vma=False)(
        queries, candidates, step, count
    )
