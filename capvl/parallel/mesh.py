"""The device mesh of a recipe."""

import dataclasses
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from capvl.errors import UserError
from capvl.parallel.rules import MESH_AXES


@dataclasses.dataclass(frozen=True)
class MeshOptions:
    """`config.mesh`: devices along each axis; one of them may be -1 for all that are left.

    Attributes:
      replica: copies of the weights; the outermost axis, which may cross slices.
      fsdp: shards of batch and weights.
      tensor: shards of heads, MLP and vocabulary.
    """

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1

    def shape(self, devices: int, slices: int = 1) -> tuple[int, int, int]:
        """Extent of each axis for so many devices of so many slices.

        Raises:
          UserError: the axes don't multiply to the devices, or an axis other than replica crosses slices.
        """
        extents = [self.replica, self.fsdp, self.tensor]
        named = f"mesh replica={self.replica} x fsdp={self.fsdp} x tensor={self.tensor}"
        if extents.count(-1) > 1 or any(e == 0 or e < -1 for e in extents):
            raise UserError(f"{named}: every axis must be positive, and at most one of them -1.")
        known = math.prod(e for e in extents if e != -1)
        if -1 in extents:
            if devices % known:
                raise UserError(f"{named} needs a multiple of {known} devices, but there are {devices}.")
            extents[extents.index(-1)] = devices // known
        elif known != devices:
            raise UserError(f"{named} makes {known} devices, but there are {devices}; -1 takes all that are left.")
        if extents[0] % slices:
            raise UserError(
                f"mesh.replica={extents[0]} should be a multiple of the {slices} slices, which only replicas may "
                f"cross; --config.mesh.replica={slices} is the least."
            )
        return tuple(extents)


def slice_count(devices) -> int:
    """Slices, joined by the data-centre network, that the devices belong to."""
    return len({getattr(d, "slice_index", 0) for d in devices if d.platform == "tpu"}) or 1


def make_mesh(options: MeshOptions, devices: list | None = None) -> jax.sharding.Mesh:
    """The mesh (replica, fsdp, tensor) over all devices, or over the given ones.

    Raises:
      UserError: the axes don't multiply to the devices, or an axis other than replica crosses slices.
    """
    devices = devices or jax.devices()
    slices = slice_count(devices)
    shape = options.shape(len(devices), slices)
    if slices > 1:
        within = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices=devices)
        return jax.sharding.Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
