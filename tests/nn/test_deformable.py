"""Modulated deformable convolution: the original operator's numbers, plain loops, gradients, dtypes, devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from golden_glip import close, load
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capvl.nn.deformable import flat_reading, modulated_deformable

deformed = jax.jit(modulated_deformable, static_argnames="stride")


def last(array):
    """(B, C, Y, X) as (B, Y, X, C)."""
    return jnp.moveaxis(jnp.asarray(array), 1, -1)


def golden(case):
    arrays = load("dcnv2")
    names = [name.removeprefix("in/").split("/") for name in arrays if name.startswith("in/")]
    if case not in {name for name, _ in names}:
        pytest.skip(f"no case {case}")
    x, offset, mask = (last(arrays[f"in/{case}/{name}"]) for name in ("x", "offset", "mask"))
    kernel = jnp.asarray(arrays[f"in/{case}/weight"].transpose(2, 3, 1, 0))
    return arrays, (x, offset, mask, kernel, jnp.asarray(arrays[f"in/{case}/bias"]))


@pytest.mark.golden
@pytest.mark.parametrize("case", ["s1", "s2", "grp"])
def test_outputs_and_gradients_are_the_originals(case):
    arrays, args = golden(case)
    expected = last(arrays[f"out/{case}/y"])
    stride = -(-args[0].shape[1] // expected.shape[1])

    @jax.jit
    def run(args, cotangent):
        y, pull = jax.vjp(lambda *args: modulated_deformable(*args, stride=stride), *args)
        return y, pull(cotangent)

    y, found = run(args, last(arrays[f"in/{case}/cotangent"]))
    close(y, expected)
    gradients = dict(zip(("x", "offset", "mask", "weight", "bias"), found, strict=True))
    for name, gradient in gradients.items():
        theirs = arrays[f"grad/{case}/{name}"]
        theirs = theirs.transpose(2, 3, 1, 0) if name == "weight" else theirs if theirs.ndim == 1 else last(theirs)
        close(gradient, theirs, 1e-3, name)


@pytest.mark.golden
def test_the_flat_reading_is_the_originals():
    arrays, (x, offset, mask, kernel, bias) = golden("flat")
    size = x.shape[1:3]
    y = deformed(x, flat_reading(offset, size), flat_reading(mask, size), kernel, bias)
    close(y, last(arrays["out/flat/y"]))


def random(shape, seed):
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def inputs(size=(5, 4), stride=1, width=3, out=2, batch=2, spread=2.0):
    places = tuple(-(-n // stride) for n in size)
    offset = spread * random((batch, *places, 18), 1)
    return (
        random((batch, *size, width), 0),
        offset,
        np.abs(random((batch, *places, 9), 2)),
        random((3, 3, width, out), 3),
        random((out,), 4),
    )


def by_loops(x, offset, mask, kernel, bias, stride):
    """The definition, a scalar at a time."""
    batch, rows, columns, _ = x.shape
    y = np.zeros((*mask.shape[:3], kernel.shape[-1])) + bias
    for b, i, j, tap in np.ndindex(mask.shape):
        at = [
            stride * place + step - 1 + offset[b, i, j, 2 * tap + axis]
            for axis, (place, step) in enumerate(zip((i, j), divmod(tap, 3), strict=True))
        ]
        value = np.zeros(x.shape[-1])
        for row in range(rows):
            for column in range(columns):
                near = max(0, 1 - abs(at[0] - row)) * max(0, 1 - abs(at[1] - column))
                value += near * x[b, row, column]
        y[b, i, j] += mask[b, i, j, tap] * value @ kernel[divmod(tap, 3)]
    return y


@pytest.mark.parametrize("stride, size", [(1, (5, 4)), (2, (5, 4)), (1, (3, 7))])
def test_equals_the_definition(stride, size):
    """Points far outside and on whole places, the last ones too, are among them."""
    args = inputs(size, stride)
    args[1][:, :2] = np.round(args[1][:, :2])
    args[1][0, -1] = 50.0
    y = deformed(*map(jnp.asarray, args), stride=stride)
    assert_close(y, by_loops(*args, stride), 1e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_without_offsets_it_is_a_convolution(stride):
    x, offset, mask, kernel, _ = map(jnp.asarray, inputs((6, 7), stride))
    y = deformed(x, jnp.zeros_like(offset), jnp.ones_like(mask), kernel, stride=stride)
    layout = ("NHWC", "HWIO", "NHWC")
    plain = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, ((1, 1),) * 2, dimension_numbers=layout)
    assert_close(y, plain, 1e-5)


def test_gradients_are_finite_differences():
    args = inputs((4, 3), spread=1.0)
    cotangent = random((2, 4, 3, 2), 9)
    gradients = jax.jit(jax.grad(lambda *a: (modulated_deformable(*a) * cotangent).sum(), argnums=range(5)))(*args)
    for which, gradient in enumerate(gradients):
        direction, step = random(args[which].shape, 20 + which), 1e-5
        moved = [[*args] for _ in range(2)]
        for change, side in zip((step, -step), moved, strict=True):
            side[which] = np.asarray(args[which], np.float64) + change * direction
        high, low = (float((by_loops(*side, 1) * cotangent).sum()) for side in moved)
        assert float((gradient * direction).sum()) == pytest.approx((high - low) / (2 * step), rel=1e-3)


def test_bfloat16_maps_keep_float32_coordinates():
    """A bfloat16 coordinate beyond 256 has no fraction and misses every second place."""
    x = jnp.broadcast_to(jnp.arange(400.0)[None, None, :, None] / 400, (1, 3, 400, 2)).astype(jnp.bfloat16)
    offset = jnp.full((1, 3, 400, 18), 0.25)
    kernel = jnp.zeros((3, 3, 2, 1), jnp.bfloat16).at[1, 1, 0, 0].set(1)
    y, pull = jax.vjp(lambda x, offset: modulated_deformable(x, offset, jnp.ones((1, 3, 400, 9)), kernel), x, offset)
    assert y.dtype == jnp.bfloat16
    of_x, of_offset = pull(jnp.ones_like(y))
    assert of_x.dtype == jnp.bfloat16 and of_offset.dtype == jnp.float32
    row = np.asarray(x[0, 1, :, 0].astype(jnp.float32))
    np.testing.assert_allclose(y[0, 0, :-1, 0].astype(jnp.float32), 0.75 * row[:-1] + 0.25 * row[1:], atol=4e-3)
    # Along x the slope at the centre tap is that of the row.
    np.testing.assert_allclose(of_offset[0, 0, :-1, 9], np.diff(row), atol=1e-6)


def test_what_is_no_number_is_not_hidden():
    x, offset, mask, kernel, bias = map(jnp.asarray, inputs())
    y = np.asarray(deformed(x, offset.at[0, 2, 1, 4].set(jnp.nan), mask, kernel, bias))
    assert np.isnan(y[0, 2, 1]).all() and np.isnan(y).sum() == y.shape[-1]


def test_flat_reading_takes_the_head_of_the_buffer():
    maps = random((2, 5, 6, 4), 0)
    read = flat_reading(jnp.asarray(maps), (3, 3))
    for image, found in zip(maps, read, strict=True):
        head = image.transpose(2, 0, 1).reshape(-1)[: 4 * 9]
        np.testing.assert_array_equal(found, head.reshape(4, 3, 3).transpose(1, 2, 0))
    np.testing.assert_array_equal(flat_reading(jnp.asarray(maps), (5, 6)), maps)
    with pytest.raises(ValueError, match="5 x 6 places can't be read as 7 x 5"):
        flat_reading(jnp.asarray(maps), (7, 5))


def test_images_stay_on_their_devices():
    """8 devices give one's numbers, and no map travels."""
    args = [jnp.asarray(arg) for arg in inputs(batch=8)]
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))

    def value_and_gradients(*args):
        y, pull = jax.vjp(modulated_deformable, *args)
        return y, pull(jnp.cos(y))

    expected = jax.jit(value_and_gradients)(*args)
    sharded = [
        jax.device_put(arg, NamedSharding(mesh, P("data") if arg.ndim == 4 and len(arg) == 8 else P())) for arg in args
    ]
    compiled = jax.jit(value_and_gradients).lower(*sharded).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    for found, wanted in zip(jax.tree.leaves(compiled(*sharded)), jax.tree.leaves(expected), strict=True):
        assert_close(found, wanted, 1e-5)


@pytest.mark.parametrize(
    "which, shape, message",
    [
        (1, (2, 4, 4, 18), "should have"),
        (1, (2, 5, 4, 9), "offsets and 9 masks"),
        (2, (2, 5, 4, 8), "8 masks"),
        (3, (2, 2, 3, 2), "odd square"),
        (3, (3, 3, 2, 2), "for 3 channels"),
    ],
)
def test_refuses_shapes_that_do_not_belong_together(which, shape, message):
    args = [jnp.asarray(arg) for arg in inputs()]
    args[which] = jnp.zeros(shape)
    with pytest.raises(ValueError, match=message):
        modulated_deformable(*args)
