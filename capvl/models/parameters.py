"""Parameters of any model as a flat dict {"encoder/blocks/mlp/up/kernel": array}, and back.

The flat dict is what is trained, sharded, checkpointed and converted.
"""

import functools
import re
from typing import Any

import jax
from flax import nnx

from capvl.parallel import rules


def flatten(model: nnx.Module) -> dict[str, Any]:
    """The model's parameters by path."""
    return {_name(path): variable[...] for path, variable in nnx.state(model, nnx.Param).flat_state()}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _abstract(options: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """A model without arrays."""
    return nnx.split(nnx.eval_shape(lambda: options.make(nnx.Rngs(params=jax.random.key(0)))))


# One run asks for it several times, and each time all of the model would be traced.
_abstract_once = functools.lru_cache(maxsize=32)(_abstract)


class Blueprint:
    """A model without its arrays: shapes, logical axes, and how to build it.

    Attributes:
      shapes: path -> ShapeDtypeStruct (float32).
      axes: path -> logical axes.
    """

    def __init__(self, options: Any):
        """options: the model's options, with a `make(rngs)` that builds it."""
        self.options = options
        # Options of one's own may be a dataclass that isn't frozen.
        make = _abstract_once if type(options).__hash__ else _abstract
        self.graphdef, self._state = make(options)
        variables = dict(self._state.flat_state())
        self._paths = {_name(path): path for path in variables}
        self.shapes = {
            name: jax.ShapeDtypeStruct(variables[path].shape, variables[path].dtype)
            for name, path in sorted(self._paths.items())
        }
        self.axes = {name: variables[path].axes for name, path in sorted(self._paths.items())}

    def init(self, key: jax.Array) -> dict[str, jax.Array]:
        """Fresh parameters; jit it with `shardings` to create them where they belong."""
        return flatten(self.options.make(nnx.Rngs(params=key)))

    def bind(self, params: dict[str, jax.Array]) -> nnx.Module:
        """The model with these parameters."""
        flat = [(path, variable.replace(params[_name(path)])) for path, variable in self._state.flat_state()]
        return nnx.merge(self.graphdef, nnx.State.from_flat_path(dict(flat)))

    def shardings(self, mesh) -> dict[str, jax.sharding.NamedSharding]:
        """Sharding of each parameter on a mesh."""
        return {
            name: jax.sharding.NamedSharding(mesh, rules.spec(self.axes[name], shape.shape, mesh))
            for name, shape in self.shapes.items()
        }

    def batch_dims(self) -> dict[str, int]:
        """1 for the parameters with a leading `layers` axis, 0 for the others."""
        return {name: int(axes[0] == "layers") for name, axes in self.axes.items()}


def count(params: dict[str, Any], pattern: str = ".*") -> int:
    """Number of scalars in the parameters whose whole path matches."""
    total = 0
    for path, value in params.items():
        if re.fullmatch(pattern, path):
            size = 1
            for n in value.shape:
                size *= n
            total += size
    return total
