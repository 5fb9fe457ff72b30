"""The tower: loop and straight line, recomputed and kept, one device and eight, dropout; what reaches what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from flax import nnx

from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.models.sizes import Size
from capvl.models.tower import DetectionTower
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding


@dataclasses.dataclass(frozen=True)
class Options:
    """A small tower; with plain convolutions, which compile faster, unless told."""

    fusion: str = "both"
    dropout: float = 0.1
    remat: str = "none"
    unroll: bool = False
    blocks: int = 2
    deform: bool = False

    def make(self, rngs):
        kind = dict(fusion_width=8, fusion_heads=2, groups=2, levels=2, rngs=rngs)
        return DetectionTower(8, Size(8, 1, 16, 2), **dataclasses.asdict(self), **kind)


OPTIMIZED = {"xla_backend_optimization_level": 1}
"""As programs are compiled outside of tests. With none of it XLA's CPU compiler gives a loop over blocks with dropout
other gradients than the same blocks in a straight line, whose outputs are equal."""


@functools.cache
def params(deform=False):
    """Parameters far from a new tower's, whose offsets are 0."""
    shapes = Blueprint(Options(deform=deform)).shapes
    rng = np.random.default_rng(1)
    found = {name: 0.3 * rng.normal(size=s.shape) for name, s in shapes.items()}
    # Before the ReLUs of a block stand one and two numbers, at this width: often none of them would be above 0.
    ones = {name: float(name.endswith(("scale/bias", "task/down/bias"))) for name in found}
    return jax.device_put({name: (x + ones[name]).astype(np.float32) for name, x in found.items()})


def inputs(batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    levels = [jnp.asarray(rng.normal(size=(batch, y, x, 8)), dtype) for y, x in ((4, 6), (2, 3))]
    mask = np.ones((batch, 5), bool)
    mask[1::2, 3:] = False
    return levels, jnp.asarray(rng.normal(size=(batch, 5, 8)), dtype), jnp.asarray(mask)


def total(options, key, params, levels, states, mask):
    maps, text = Blueprint(options).bind(params)(levels, states, mask, key)
    return sum((x.astype(jnp.float32) ** 2).sum() for x in (*maps, text)), (maps, text)


def gradients(options, key=None, arrays=None, compiler_options=None):
    """Gradients of parameters, maps and states, and outputs."""
    function = jax.grad(functools.partial(total, options, key), argnums=(0, 1, 2), has_aux=True)
    return jax.jit(function, compiler_options=compiler_options)(params(options.deform), *(arrays or inputs()))


def same(found, expected, tolerance):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b, tolerance, jax.tree_util.keystr(path))


@pytest.mark.long
@pytest.mark.parametrize("change", [dict(unroll=True), dict(remat="full")])
def test_a_loop_is_a_straight_line_and_recomputed_is_kept(change):
    """With dropout, whose masks must be the same when they are drawn again."""
    key = jax.random.key(1)
    same(*(gradients(options, key, None, OPTIMIZED) for options in (Options(**change), Options())), 2e-5)


def test_every_parameter_learns():
    (of_params, of_maps, of_states), _ = gradients(Options(deform=True))
    still = {name for name, x in of_params.items() if not all(np.abs(row).max() > 0 for row in x)}
    assert not still
    assert all(np.abs(x).max() > 0 for x in (*of_maps, of_states))


@pytest.mark.long
def test_eight_devices_are_one():
    arrays = inputs(8)
    key = jax.random.key(1)
    expected = gradients(Options(), key, arrays, OPTIMIZED)
    mesh = make_mesh(MeshOptions(replica=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = {
            name: jax.device_put(x, sharding)
            for (name, x), sharding in zip(params().items(), Blueprint(Options()).shardings(mesh).values(), strict=True)
        }
        spread = jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh)), arrays)
        function = jax.grad(functools.partial(total, Options(), key), argnums=(0, 1, 2), has_aux=True)
        found = jax.jit(function, compiler_options=OPTIMIZED)(placed, *spread)
    same(jax.device_get(found), jax.device_get(expected), 2e-5)


def test_without_fusion_states_leave_as_they_came():
    levels, states, mask = inputs()
    blueprint = Blueprint(Options(fusion="none"))
    given = {name: x for name, x in params().items() if name in blueprint.shapes}
    run = jax.jit(lambda states: blueprint.bind(given)(levels, states, mask))
    maps, text = run(states)
    np.testing.assert_array_equal(text, states)
    other, _ = run(states + 1)
    np.testing.assert_array_equal(maps[0], other[0])


def test_dropout_is_of_training():
    arrays, blueprint, given = inputs(), Blueprint(Options(dropout=0.5)), params()
    run = jax.jit(lambda key: blueprint.bind(given)(*arrays, key)[0][0])
    whole, first, again, other = map(run, (None, *map(jax.random.key, (0, 0, 1))))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - whole).max() > 1e-3 and np.abs(first - other).max() > 1e-3


@pytest.mark.parametrize("fusion", ["both", "separate", "to_image"])
def test_half_precision_goes_through(fusion):
    def run(*arrays):
        return Options(fusion).make(nnx.Rngs(0))(*arrays)

    maps, text = jax.eval_shape(run, *inputs(dtype=jnp.bfloat16), jax.random.key(0))
    assert {x.dtype for x in (*maps, text)} == {jnp.dtype(jnp.bfloat16)}


def test_layer_scales_begin_with_one_by_the_number_of_blocks():
    tower = Options(blocks=4).make(nnx.Rngs(0))
    assert tower.blocks.fusion.image_gate.shape == (4, 8)
    for gate in (tower.blocks.fusion.image_gate, tower.blocks.fusion.text_gate):
        np.testing.assert_array_equal(gate[...], 0.25)


def test_what_a_tower_cannot_be():
    with pytest.raises(UserError, match="Unknown fusion 'bth'. Did you mean 'both'"):
        Options("bth").make(nnx.Rngs(0))
    with pytest.raises(UserError, match="width 9 doesn't divide among 2 heads"):
        DetectionTower(8, Size(8, 1, 16, 2), 1, fusion_width=9, fusion_heads=2, groups=2, rngs=nnx.Rngs(0))
