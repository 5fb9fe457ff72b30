"""A stack of equal layers, stored with a leading `layers` axis and run by `jax.lax.scan` or one after the other.

Scanned and unrolled forms share one layout of the parameters, so a checkpoint of one is a
checkpoint of the other.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

NAMED_ACTIVATIONS = ("qkv", "attention", "softmax", "residual", "mlp_up", "cross_q")

_POLICIES = jax.checkpoint_policies

REMAT = {
    "none": None,
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "named": _POLICIES.save_only_these_names(*NAMED_ACTIVATIONS),
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(NAMED_ACTIVATIONS),
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": _POLICIES.nothing_saveable,
}


def stack(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> nnx.Module:
    """`depth` copies of a module as one module whose parameters have a leading `layers` axis."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def build(layer_rngs):
        return make(layer_rngs)

    layers = build(rngs)
    for _, variable in nnx.iter_graph(layers):
        if isinstance(variable, nnx.Param):
            variable.set_metadata(axes=("layers", *variable.axes))
    return layers


def scan(
    layers: nnx.Module,
    body: Callable[[Any, jax.Array, Any], jax.Array],
    x: jax.Array,
    xs: Any = None,
    *,
    remat: str = "none",
    unroll: bool = False,
    together: int = 0,
) -> jax.Array:
    """x <- body(layer, x, xs[layer]) through the stack.

    Args:
      layers: what `stack` returned.
      body: one layer's forward pass.
      x: the carry, of one shape all along.
      xs: optional pytree with a leading layer axis, one slice a layer.
      remat: a key of REMAT: what a layer's backward pass recomputes.
      unroll: straight-line code instead of a loop (longer compilation, fewer copies).
      together: not 0: a step of the loop is so many layers, of which `body` gets a list, and as many slices of `xs`; a
        last step has the layers that are left over.
    """
    if not together:
        return scan_outputs(layers, lambda *a: (body(*a), None), x, xs, remat=remat, unroll=unroll)[0]
    return _scan_together(layers, body, x, xs, together, remat, unroll)


def scan_outputs(
    layers: nnx.Module,
    body: Callable[[nnx.Module, Any, Any], tuple[Any, Any]],
    x: Any,
    xs: Any = None,
    *,
    remat: str = "none",
    unroll: bool = False,
) -> tuple[Any, Any]:
    """As `scan`, where a layer also gives something out: x, outputs[layer] <- body(layer, x, xs[layer]).

    The carry x may be a pytree of arrays of one dtype.
    """
    graphdef, params = _split(layers, jax.tree.leaves(x)[0].dtype, unroll)

    def step(carry, layer):
        layer_params, layer_xs = layer
        return body(nnx.merge(graphdef, layer_params), carry, layer_xs)

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=unroll)
    if not unroll:
        return jax.lax.scan(step, x, (params, xs))
    outputs = []
    for layer in _layers((params, xs)):
        x, out = step(x, layer)
        outputs.append(out)
    return x, jax.tree.map(lambda *rows: jnp.stack(rows), *outputs)


def _split(layers: nnx.Module, dtype, unroll: bool) -> tuple[nnx.GraphDef, nnx.State]:
    graphdef, params = nnx.split(layers)
    if not unroll:
        # Kernels are cast before the loop, which would otherwise save a cast copy of each for the backward pass.
        params = jax.tree.map(lambda p: p.astype(dtype) if p.ndim > 2 else p, params)
    return graphdef, params


def _scan_together(layers: nnx.Module, body, x: jax.Array, xs: Any, together: int, remat: str, unroll: bool):
    """`scan` with several layers a step."""
    graphdef, params = _split(layers, x.dtype, unroll)

    def step(carry, group):
        group_params, group_xs = group
        return body([nnx.merge(graphdef, layer) for layer in _layers(group_params)], carry, group_xs), None

    if remat != "none":
        step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=unroll)
    depth = len(jax.tree.leaves(params)[0])
    whole = depth // together * together
    if whole:
        groups = jax.tree.map(lambda v: v[:whole].reshape(-1, together, *v.shape[1:]), (params, xs))
        if unroll:
            for group in _layers(groups):
                x, _ = step(x, group)
        else:
            x, _ = jax.lax.scan(step, x, groups)
    if whole < depth:
        x, _ = step(x, jax.tree.map(lambda v: v[whole:], (params, xs)))
    return x


def part_of(layers: nnx.Module, first: int, last: int) -> nnx.Module:
    """Layers `first` to `last` - 1 of a stack, as a stack."""
    graphdef, params = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[first:last], params))


def layer_of(layers: nnx.Module, number: int) -> nnx.Module:
    """One layer of a stack."""
    graphdef, params = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[number], params))


def _layers(stacked: Any) -> list:
    """The slices of a pytree along its leading axis; their gradients come together by one concatenation."""
    leaves, treedef = jax.tree.flatten(stacked)
    depth = len(leaves[0])
    columns = [[part[0] for part in jax.lax.split(leaf, (1,) * depth)] for leaf in leaves]
    return [jax.tree.unflatten(treedef, row) for row in zip(*columns, strict=True)]
