"""Parts of a model with the golden GLIP's parameters, by the official names."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capvl.convert import rules

HEADS = 4
"""Of every golden part: no array says it, but its README does."""


def filled(module: nnx.Module, theirs: dict[str, np.ndarray], table: list[rules.Rule], heads: Callable | int):
    """The module, which needs no arrays (`nnx.eval_shape`), with their parameters; the table names it "part", and there
    and back it loses nothing."""
    params = rules.read(theirs, table, heads if callable(heads) else lambda name: heads, "part")
    written = rules.write(params, table, "part")
    assert set(written) == set(theirs)
    for name, x in theirs.items():
        np.testing.assert_array_equal(written[name], x, err_msg=name)
    params = jax.device_put({name.removeprefix("part/"): x for name, x in params.items()})
    graphdef, state = nnx.split(module)
    paths = {"/".join(map(str, path)): path for path, _ in state.flat_state()}
    variables = dict(state.flat_state())
    assert {name: variables[path].shape for name, path in paths.items()} == {n: x.shape for n, x in params.items()}
    flat = {path: variables[path].replace(params[name]) for name, path in paths.items()}
    return nnx.merge(graphdef, nnx.State.from_flat_path(flat))


def renamed(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays with a prefix before their names."""
    return {prefix + name: x for name, x in arrays.items()}


def maps(golden: dict[str, np.ndarray], name: str) -> list[jax.Array]:
    """Feature maps `name`0, `name`1, …, channels last as ours are."""
    levels = sum(key.removeprefix(name).isdigit() for key in golden if key.startswith(name))
    return [jnp.moveaxis(jnp.asarray(golden[f"{name}{level}"]), 1, -1) for level in range(levels)]
