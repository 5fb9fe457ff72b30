"""Logical axes of weights and activations -> mesh axes. The only place that names mesh axes.

The mesh is (replica, fsdp, tensor). `replica` is outermost and may cross slices: gradients are
averaged over it. `fsdp` shards both the batch and the weights. `tensor` splits heads, the MLP
and the vocabulary.
"""

import math

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
    "token": None,  # Rows of a token table that has one more than the vocabulary, or is looked up only.
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


def dividing_fsdp(axes: dict[str, tuple], shapes: dict[str, jax.ShapeDtypeStruct], mesh) -> int:
    """The largest divisor of the mesh's `fsdp` over which the widths of all weights divide.

    Args:
      axes, shapes: of the parameters, by path.
      mesh: concrete or abstract.
    """
    widths = {n for name in shapes for axis, n in zip(axes[name], shapes[name].shape, strict=True) if axis == "embed"}
    return math.gcd(mesh.shape["fsdp"], *widths)


def fsdp_advice(axes: dict[str, tuple], shapes: dict[str, jax.ShapeDtypeStruct], mesh) -> str:
    """A sentence where weights stay whole because their width doesn't divide by `fsdp`; "" where all is well."""
    now, better = mesh.shape["fsdp"], dividing_fsdp(axes, shapes, mesh)
    if now == better:
        return ""
    return (
        f"Weights whose width doesn't divide by mesh.fsdp={now} are whole on every device; --config.mesh.replica="
        f"{mesh.shape['replica'] * now // better} --config.mesh.fsdp={better} divides all of them."
    )


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
