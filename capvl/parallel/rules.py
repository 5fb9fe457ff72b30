"""Logical axes of weights and activations -> mesh axes. The only place that names mesh axes.

The mesh is (replica, fsdp, tensor). `replica` is outermost and may cross slices: gradients are
averaged over it. `fsdp` shards both the batch and the weights. `tensor` splits heads, the MLP
and the vocabulary.
"""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("replica", "fsdp", "tensor")

RULES = {
    "batch": ("replica", "fsdp"),
    "groups": ("replica", "fsdp"),
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
}


def _extent(mesh, axes) -> int:
    names = axes if isinstance(axes, tuple) else (axes,)
    extent = 1
    for name in names:
        extent *= mesh.shape[name]
    return extent


def spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh) -> P:
    """PartitionSpec of an array with logical `axes`; a dimension that doesn't divide stays whole.

    Raises:
      ValueError: two dimensions map to one mesh axis, or the axes don't fit the shape.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{len(axes)} logical axes {axes} for an array of shape {shape}")
    entries, used = [], set()
    for axis, size in zip(axes, shape, strict=True):
        target = RULES[axis] if axis is not None else None
        if target is None or size % _extent(mesh, target):
            entries.append(None)
            continue
        names = set(target) if isinstance(target, tuple) else {target}
        if names & used:
            raise ValueError(f"logical axes {axes} put two dimensions on mesh axis {sorted(names & used)}")
        used |= names
        entries.append(target)
    return P(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Asks for the sharding that `axes` mean on the mesh in force; does nothing without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh))


def data_groups() -> int:
    """Over how many devices the batch is spread on the mesh in force (1 without a mesh)."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _extent(mesh, RULES["batch"])


def batch_sharding(mesh) -> NamedSharding:
    """Sharding of a batch: its first dimension over all data axes."""
    return NamedSharding(mesh, P(RULES["batch"]))


def replicated(mesh) -> NamedSharding:
    """Sharding of a whole copy on every device."""
    return NamedSharding(mesh, P())
