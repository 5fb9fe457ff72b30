"""Feature pyramids: GLIP's golden FPN, grids of odd sides, DropBlock, a ViT's pyramid, devices alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, drawn, under
from flax import nnx
from golden_glip import close, load

from capvl.convert import rules
from capvl.errors import UserError
from capvl.models.features import Level
from capvl.models.parameters import Blueprint
from capvl.models.pyramid import STRIDES, FeaturePyramid, Finer, SimplePyramid, drop_block, enlarge
from capvl.models.vision import ImageOptions
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding


@dataclasses.dataclass(frozen=True)
class FpnOptions:
    """An FPN alone."""

    widths: tuple[int, ...]
    width: int
    drop_block: float = 0.0

    def make(self, rngs: nnx.Rngs) -> FeaturePyramid:
        return FeaturePyramid(self.widths, self.width, drop_block=self.drop_block, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class DetectorOptions(ImageOptions):
    """A ViT with its pyramid."""

    out: int = 16

    def make(self, rngs: nnx.Rngs):
        return Detector(self, rngs=rngs)


class Detector(nnx.Module):
    def __init__(self, options: DetectorOptions, *, rngs: nnx.Rngs):
        self.encoder = options.make_encoder(rngs)
        self.pyramid = SimplePyramid(options.stride, options.encoder_width, options.out, rngs=rngs)

    def __call__(self, image):
        return self.pyramid(self.encoder.levels(self.encoder.normalize(image)))


def level(grid, stride, width, count=2):
    tokens = np.random.default_rng(stride).normal(size=(count, grid[0] * grid[1], width))
    return Level(jnp.asarray(tokens, jnp.float32), grid, stride)


def levels_of(rows, columns, count=2):
    """Levels of a Swin of images of so many pixels: widths 8, 16, 32 and 64."""
    return tuple(
        level((-(-rows // stride), -(-columns // stride)), stride, 2 * stride, count) for stride in (4, 8, 16, 32)
    )


def official(count: int) -> list[rules.Rule]:
    """GLIP's names of an FPN."""
    pairs = [(f"{ours}/{i}", f"{theirs}{i + 2}") for i in range(count) for ours, theirs in NAMES]
    pairs += [(f"coarser/{p}", f"top_blocks.{p}") for p in ("p6", "p7")]
    return [
        rule
        for ours, theirs in pairs
        for rule in (
            rules.Rule(f"{ours}/kernel", (f"{theirs}.weight",), rules.CONV),
            rules.Rule(f"{ours}/bias", (f"{theirs}.bias",)),
        )
    ]


NAMES = (("lateral", "fpn_inner"), ("out", "fpn_layer"))


@pytest.mark.golden
def test_golden_fpn():
    arrays = load("backbone")
    theirs = {k.removeprefix("fpn."): v for k, v in under(arrays, "param").items() if k.startswith("fpn.")}
    params = rules.read(theirs, official(3), lambda _: 1, "FPN")
    inputs = []
    for i in (1, 2, 3):
        x = jnp.asarray(arrays[f"out/stage{i}"].transpose(0, 2, 3, 1))
        inputs.append(Level(x.reshape(len(x), -1, x.shape[-1]), x.shape[1:3], 4 * 2**i))
    widths = tuple(n.tokens_BND.shape[-1] for n in inputs)
    blueprint = Blueprint(FpnOptions(widths, len(params["out/0/bias"])))
    found = jax.jit(lambda params, inputs: blueprint.bind(params)(inputs))(params, tuple(inputs))
    assert [n.stride for n in found] == list(STRIDES)
    for name, n in zip(("P3", "P4", "P5", "P6", "P7"), found, strict=True):
        close(n.map().transpose(0, 3, 1, 2), arrays[f"out/{name}"], name=name)


@pytest.mark.parametrize("rows, columns", [(256, 384), (200, 328), (24, 40)])
def test_grids(rows, columns):
    """A level of stride s has the side divided by s, rounded up, however odd the sides; nothing is unread."""
    blueprint = Blueprint(FpnOptions((16, 32, 64), 8))
    inputs = levels_of(rows, columns)

    def loss(params, inputs):
        out = blueprint.bind(params)(inputs)
        return sum((n.tokens_BND**2).sum() for n in out), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (of_params, of_inputs), found = run(drawn(blueprint.shapes), inputs)
    assert [n.grid for n in found] == [(-(-rows // s), -(-columns // s)) for s in STRIDES]
    assert all(np.abs(g).max() > 0 for g in of_params.values())
    assert np.abs(of_inputs[0].tokens_BND).max() == 0
    assert all((np.abs(n.tokens_BND).max(axis=-1) > 0).all() for n in of_inputs[1:])


def test_nearest_neighbours():
    """As PyTorch's: place i of a side of n has what is at floor(i m / n) of m."""
    for rows, columns in ((8, 6), (7, 5), (1, 2)):
        half = (-(-rows // 2), -(-columns // 2))
        x = jnp.arange(half[0] * half[1] * 1.0).reshape(1, *half, 1)
        y, x_at = (np.floor(np.arange(n) * m / n).astype(int) for n, m in zip((rows, columns), half, strict=True))
        np.testing.assert_array_equal(enlarge(x, (rows, columns))[0, :, :, 0], np.asarray(x)[0, :, :, 0][y][:, x_at])
    with pytest.raises(ValueError, match="not half of"):
        enlarge(jnp.zeros((1, 3, 3, 1)), (4, 6))
    with pytest.raises(ValueError, match=r"strides \(8, 16, 32\)"):
        Blueprint(FpnOptions((16, 32, 64), 8)).options.make(nnx.Rngs(0))(levels_of(64, 64)[:3])


def test_drop_block():
    """Squares of 3 x 3, the same in all channels; the mean stays; about the stated share; none without a key."""
    x = jnp.ones((64, 16, 20, 3))
    dropped = np.asarray(jax.jit(lambda key: drop_block(x, 0.3, key))(jax.random.key(0)))
    zero = dropped[..., 0] == 0
    assert (np.unique(dropped).size, dropped.mean()) == (2, pytest.approx(1.0, abs=1e-5))
    assert (zero[..., None] == (dropped == 0)).all()
    # 1 - (1 - .3 / 9)^9 but for the borders; each dropped place is in a square that is dropped or cut by a border.
    assert zero.mean() == pytest.approx(0.26, abs=0.02)
    around = np.pad(zero, ((0, 0), (2, 2), (2, 2)), constant_values=True)
    squares = np.lib.stride_tricks.sliding_window_view(around, (3, 3), axis=(1, 2)).all(axis=(3, 4))
    covered = np.zeros_like(around)
    for y, c in np.ndindex(3, 3):
        covered[:, y : y + squares.shape[1], c : c + squares.shape[2]] |= squares
    assert (covered[:, 2:-2, 2:-2] == zero).all()
    assert drop_block(x, 0.3, None) is x and drop_block(x, 0.0, jax.random.key(0)) is x


def test_drop_block_is_before_the_last_convolutions():
    """Of P3 and P4 alone, and in training alone: what goes on to finer maps, and P5, are as without."""
    inputs, key = levels_of(64, 96), jax.random.key(0)
    plain, dropping = (Blueprint(FpnOptions((16, 32, 64), 8, rate)) for rate in (0.0, 0.5))
    params = drawn(plain.shapes)

    def by_hand(params):
        fpn = plain.bind(params)
        c3, c4, c5 = (lateral(n.map()) for lateral, n in zip(fpn.lateral, inputs[1:], strict=True))
        p4 = c4 + enlarge(c5, (4, 6))
        p3 = c3 + enlarge(p4, (8, 12))
        keys = [jax.random.fold_in(key, i) for i in (0, 1)]
        return [out(drop_block(x, 0.5, k)) for out, x, k in zip(fpn.out[:2], (p3, p4), keys, strict=True)]

    runs = [jax.jit(lambda params, key, b=b: b.bind(params)(inputs, key=key)) for b in (plain, dropping)]
    expected, found, off = runs[0](params, key), runs[1](params, key), runs[1](params, None)
    for n, other in zip(found[:2], jax.jit(by_hand)(params), strict=True):
        assert_close(n.map(), other, 1e-5)
    same = [np.array_equal(a.tokens_BND, b.tokens_BND) for a, b in zip(expected, found, strict=True)]
    assert same == [False, False, True, True, True]
    assert all(np.array_equal(a.tokens_BND, b.tokens_BND) for a, b in zip(expected, off, strict=True))


SIDES = [(8, 32, 48), (16, 32, 48), (32, 64, 96), (16, 80, 48)]


@pytest.mark.parametrize("patch, rows, columns", SIDES)
def test_a_vits_pyramid(patch, rows, columns):
    """Oblong images give P3 to P7, and gradients reach every parameter and pixel."""
    blueprint = Blueprint(DetectorOptions(encoder=f"w16d1h2m32/{patch}", res=64, dtype="float32"))
    image = jax.random.uniform(jax.random.key(1), (2, rows, columns, 3), minval=-1.0)

    def loss(params, image):
        out = blueprint.bind(params)(image)
        return sum((n.tokens_BND[..., :3] ** 3).sum() for n in out), out

    (of_params, of_image), found = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(drawn(blueprint.shapes), image)
    assert [n.grid for n in found] == [(-(-rows // s), -(-columns // s)) for s in STRIDES]
    assert [n.stride for n in found] == list(STRIDES)
    for name, gradient in of_params.items():
        assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0, name
    assert (np.abs(of_image).max(axis=(0, 3)) > 0).mean() > 0.99


def test_finer_maps():
    """A transposed convolution: each place's four are products with the four parts of the kernel."""
    finer = Finer(5, 3, nnx.Rngs(0))
    finer.bias[...] = jnp.arange(3.0)
    x = jax.random.normal(jax.random.key(1), (2, 4, 6, 5))
    found = finer(x)
    assert found.shape == (2, 8, 12, 3)
    for down, right in np.ndindex(2, 2):
        expected = x @ finer.places.kernel[...][:, down, right] + jnp.arange(3.0)[None, None, None]
        assert_close(found[:, down::2, right::2], expected, 1e-5)


@pytest.mark.parametrize("changes", [{}, dict(pool="cls", registers=2), dict(positions="sincos")], ids=str)
def test_padded_images_of_a_vit(changes):
    """An image padded to a bucket: its places are as without padding, but for what convolutions see at the edge."""
    blueprint = Blueprint(DetectorOptions(encoder="w16d2h2m32/16", res=64, dtype="float32", **changes))
    params = drawn(blueprint.shapes)
    small = jax.random.uniform(jax.random.key(1), (2, 64, 96, 3), minval=-1.0)
    alpha = jnp.ones((2, 64, 96, 1))
    wide = jnp.full((2, 128, 160, 4), -1.0).at[:, :64, :96].set(jnp.concatenate([small, alpha], axis=-1))
    run = jax.jit(lambda params, image: [n.map() for n in blueprint.bind(params)(image)])
    alone, found = run(params, small), run(params, wide)
    assert_close(found[0][:, :7, :11], alone[0][:, :7, :11], 1e-4)
    noise = jnp.where(wide[..., 3:] > 0, wide[..., :3], 0.7)
    for a, b in zip(run(params, jnp.concatenate([noise, wide[..., 3:]], axis=-1)), found, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("patch", [14, 4, 64])
def test_patches_that_make_no_pyramid(patch):
    with pytest.raises(UserError, match=f"needs patches of 8, 16, 32 pixels, not {patch}"):
        SimplePyramid(patch, 16, 16, rngs=nnx.Rngs(0))


def test_other_levels_are_refused():
    pyramid = SimplePyramid(16, 8, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="of stride 16, not 8"):
        pyramid((level((4, 4), 8, 8),))


def test_in_bfloat16():
    """Activations keep their dtype all the way."""
    inputs = jax.tree.map(lambda x: x.astype(jnp.bfloat16), levels_of(64, 96))

    def run(inputs, key):
        fpn = FpnOptions((16, 32, 64), 8, 0.3).make(nnx.Rngs(0))
        return fpn(inputs, key=key) + SimplePyramid(8, 16, 8, rngs=nnx.Rngs(0))(inputs[1:2])

    found = jax.eval_shape(run, inputs, jax.random.key(0))
    assert {n.tokens_BND.dtype for n in found} == {jnp.dtype(jnp.bfloat16)}


def test_eight_devices_are_one():
    """An FPN with DropBlock, whose share is that of the whole batch."""
    blueprint, key = Blueprint(FpnOptions((16, 32, 64), 8, 0.3)), jax.random.key(3)
    params, inputs = drawn(blueprint.shapes), levels_of(56, 72, count=8)
    mesh = make_mesh(MeshOptions(2, 4, 1))

    def loss(params, inputs):
        return sum((n.tokens_BND**2).sum() for n in blueprint.bind(params)(inputs, key=key))

    expected, gradient = jax.jit(jax.value_and_grad(loss))(params, inputs)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, blueprint.shardings(mesh)), jax.device_put(inputs, batch_sharding(mesh))
        found, other = jax.jit(jax.value_and_grad(loss))(*spread)
    assert_close(found, expected, 1e-5)
    for name in gradient:
        assert_close(other[name], gradient[name], 1e-4, name)
