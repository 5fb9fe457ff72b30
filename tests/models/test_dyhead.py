"""DyHead blocks: the original's numbers, resizing, the two readings of offsets, switches, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, drawn, under
from flax import nnx
from golden_glip import close, load

from capvl.models.dyhead import DyHeadBlock, DyReLU, resize
from capvl.models.parameters import Blueprint
from capvl.nn.deformable import flat_reading, modulated_deformable


@dataclasses.dataclass(frozen=True)
class Options:
    """A block alone, or its dynamic ReLU."""

    width: int = 8
    groups: int = 2
    offsets: str = "flat"
    deform: bool = True
    weigh: bool = True
    dynamic: bool = True

    def make(self, rngs):
        return DyHeadBlock(**dataclasses.asdict(self), rngs=rngs)


@dataclasses.dataclass(frozen=True)
class ReluOptions:
    width: int

    def make(self, rngs):
        return DyReLU(self.width, rngs)


def dyrelu(theirs, prefix, names):
    """Parameters of a dynamic ReLU, by our names."""
    width = theirs[f"{prefix}0.weight"].shape[1]
    return {
        f"{names}down/kernel": theirs[f"{prefix}0.weight"].T,
        f"{names}down/bias": theirs[f"{prefix}0.bias"],
        f"{names}up/kernel": theirs[f"{prefix}2.weight"].T.reshape(-1, 4, width),
        f"{names}up/bias": theirs[f"{prefix}2.bias"].reshape(4, width),
    }


def block(theirs):
    """Parameters of a block, by our names."""
    params = dyrelu(theirs, "relu.fc.", "task/")
    params["scale/kernel"] = theirs["AttnConv.1.weight"][:, :, 0, 0].T
    params["scale/bias"] = theirs["AttnConv.1.bias"]
    for number, name in enumerate(("coarser", "same", "finer")):
        params[f"{name}/conv/kernel"] = theirs[f"DyConv.{number}.conv.weight"].transpose(2, 3, 1, 0)
        params[f"{name}/conv/bias"] = theirs[f"DyConv.{number}.conv.bias"]
        params[f"{name}/norm/scale"] = theirs[f"DyConv.{number}.bn.weight"]
        params[f"{name}/norm/bias"] = theirs[f"DyConv.{number}.bn.bias"]
    if "offset.weight" in theirs:
        params["steering/kernel"] = theirs["offset.weight"].transpose(2, 3, 1, 0)
        params["steering/bias"] = theirs["offset.bias"]
    return params


def maps(arrays, prefix):
    """x0, x1, … channels last."""
    count = sum(name.startswith(prefix) for name in arrays)
    return [jnp.moveaxis(jnp.asarray(arrays[f"{prefix}{i}"]), 1, -1) for i in range(count)]


def compute(options, params, *args):
    blueprint = Blueprint(options)
    params = jax.device_put(params)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in blueprint.shapes.items()}
    return jitted(options)(params, *args)


@functools.cache
def jitted(options):
    """(params, …) -> what the module of these options gives."""
    blueprint = Blueprint(options)
    return jax.jit(lambda params, *args: blueprint.bind(params)(*args))


@pytest.mark.golden
def test_the_dynamic_relu_is_the_originals():
    arrays = load("dyrelu")
    x, expected = (jnp.moveaxis(jnp.asarray(arrays[name]), 1, -1) for name in ("in/x", "out/y"))
    close(compute(ReluOptions(x.shape[-1]), dyrelu(under(arrays, "param"), "fc.", ""), x), expected)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["deform", "plain"])
def test_the_block_is_the_originals(case):
    arrays = load("dyconv")
    theirs = under(arrays, f"param/{case}")
    levels = maps(arrays, f"in/{case}/x")
    width = levels[0].shape[-1]
    found = []
    # The file doesn't say how many groups its norms have; the README's of small files come first.
    for groups in sorted((n for n in range(1, width + 1) if width % n == 0), key=lambda n: n not in (2, 4)):
        options = Options(width, groups, deform="offset.weight" in theirs)
        found = compute(options, block(theirs), levels)
        if np.allclose(found[0], maps(arrays, f"out/{case}/y")[0], atol=1e-2):
            break
    for level, (ours, expected) in enumerate(zip(found, maps(arrays, f"out/{case}/y"), strict=True)):
        close(ours, expected, name=f"level {level}")


SIZES = [(7, 10), (4, 5), (2, 3), (1, 2)]


def levels(width=8, batch=2, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jax.device_put([rng.normal(size=(batch, *size, width)).astype(dtype) for size in SIZES])


def random_params(options):
    return drawn(Blueprint(options).shapes, 0.5)


def block_of(options):
    return options.make(nnx.Rngs(0))


def test_resize_aligns_corners():
    x = jnp.asarray([0.0, 1.0, 4.0]).reshape(1, 1, 3, 1) * jnp.asarray([1.0, 3.0]).reshape(1, 2, 1, 1)
    y = resize(x, (3, 5))[0, :, :, 0]
    np.testing.assert_allclose(y[0], [0, 0.5, 1, 2.5, 4])
    np.testing.assert_allclose(y[1], 2 * y[0])
    np.testing.assert_allclose(resize(x, (1, 2))[0, 0, :, 0], [0, 4])
    np.testing.assert_allclose(resize(x[:, :1, :1] + 2, (2, 2)), 2)
    assert resize(x.astype(jnp.bfloat16), (3, 5)).dtype == jnp.bfloat16


@pytest.mark.parametrize("offsets, read", [("flat", flat_reading), ("clean", lambda x, size: x[:, ::2, ::2])])
def test_readings_of_the_offsets(offsets, read):
    """Clean: a coarse place has the offsets of where it lands; of 2n - 1 and n places, i lands on 2i."""
    params = random_params(Options(offsets=offsets))
    fine, coarse = (jax.random.normal(jax.random.key(i), (1, *size, 8)) for i, size in enumerate([(7, 9), (4, 5)]))

    def coarser(model):
        offset, mask = model._steering(fine)
        conv = model.coarser.conv
        moved = modulated_deformable(coarse, read(offset, (4, 5)), read(mask, (4, 5)), conv.kernel[...], conv.bias[...])
        return model.coarser.norm(moved), model._steered([fine, coarse])[2]

    expected, (found,) = jax.jit(lambda params: coarser(Blueprint(Options(offsets=offsets)).bind(params)))(params)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("offsets", ["flat", "clean"])
def test_without_offsets_both_readings_are_plain_convolutions(offsets):
    options = Options(offsets=offsets)
    params = random_params(options)
    steered = compute(options, params, levels())
    params["steering/kernel"] = jnp.zeros_like(params["steering/kernel"])
    params["steering/bias"] = jnp.zeros_like(params["steering/bias"])
    still = compute(options, params, levels())
    # No offsets, masks of 1/2: half a plain convolution, which the group norm makes a whole one again.
    plain = Options(deform=False)
    kept = {name: params[name] * (0.5 if name.endswith("conv/kernel") else 1) for name in Blueprint(plain).shapes}
    for ours, expected, moved in zip(still, compute(plain, kept, levels()), steered, strict=True):
        assert_close(ours, expected, 1e-4)
        assert np.abs(ours - moved).max() > 1e-3


def test_without_scale_and_task_attention():
    options = Options(weigh=False, dynamic=False)
    params = random_params(options)
    assert not any(name.startswith(("scale", "task")) for name in Blueprint(options).shapes)
    plain = compute(options, params, levels())
    # Scale attention whose weights are all hard_sigmoid(3) = 1.
    weighed = params | {"scale/kernel": jnp.zeros((8, 1)), "scale/bias": jnp.full((1,), 3.0)}
    for ours, expected in zip(compute(Options(dynamic=False), weighed, levels()), plain, strict=True):
        assert_close(ours, expected, 1e-5)
        assert (np.asarray(ours) >= 0).all() and np.asarray(ours).any()


def test_without_norms():
    names = Blueprint(Options(groups=0)).shapes
    assert not any("norm" in name for name in names)
    assert all(np.isfinite(x).all() for x in compute(Options(groups=0), random_params(Options(groups=0)), levels()))


def test_a_level_alone_and_bfloat16():
    options = Options()
    params = random_params(options)
    alone = compute(options, params, levels()[:1])
    assert len(alone) == 1 and alone[0].shape == levels()[0].shape
    low = compute(options, params, levels(dtype=jnp.bfloat16))
    assert all(x.dtype == jnp.bfloat16 for x in low)


@pytest.mark.parametrize("offsets", ["flat", "clean"])
def test_all_parameters_learn(offsets):
    options = Options(offsets=offsets)
    blueprint, params = Blueprint(options), random_params(options)

    def loss(params):
        return sum(jnp.square(x).sum() for x in blueprint.bind(params)(levels()))

    for name, gradient in jax.jit(jax.grad(loss))(params).items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name


def test_a_new_dynamic_relu_learns():
    """Of GLIP's width: its coefficients, and most of the units that they come from."""
    options = ReluOptions(256)
    blueprint, x = Blueprint(options), jax.random.normal(jax.random.key(0), (2, 5, 7, 256))
    gradient = jax.grad(lambda p: jnp.square(blueprint.bind(p)(x)).sum())
    gradients = jax.jit(lambda key: gradient(blueprint.init(key)))(jax.random.key(0))
    assert (np.abs(gradients["up/bias"]) > 0).all()
    units = np.abs(gradients["down/kernel"]).max(axis=0) > 0
    assert units.mean() > 0.6 and (np.abs(gradients["up/kernel"][np.flatnonzero(units)]) > 0).all()


def test_refuses_levels_that_do_not_halve():
    block = block_of(Options())
    with pytest.raises(ValueError, match=r"\(2, 3\) places can't follow one of \(7, 10\)"):
        block(levels()[::2])
    with pytest.raises(ValueError, match="known: flat, clean"):
        block_of(Options(offsets="nearest"))
