"""A Swin that pads its windows: GLIP's golden numbers, whom windows meet, padded images, loops and devices alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import straight_line
from conftest import assert_close, drawn, under
from golden_glip import close, load

from capvl.convert import rules, swin
from capvl.errors import UserError
from capvl.models import parameters
from capvl.models.encoder import EncoderOptions
from capvl.models.parameters import Blueprint
from capvl.nn import windows
from capvl.nn.relative_positions import offset_index
from capvl.nn.stack import layer_of
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

SMALL = dict(encoder="swin-w8d2-3h2-4/4", window=4, dtype="float32", activation="gelu", eps=1e-5, pad_windows=True)


def build(**changes):
    blueprint = Blueprint(EncoderOptions(**dict(res=32) | SMALL | changes))
    return blueprint, drawn(blueprint.shapes)


def images(rows, columns, count=2):
    return jax.random.uniform(jax.random.key(1), (count, rows, columns, 3), minval=-1.0)


def maps(blueprint, params, image):
    """The maps of all levels."""
    run = jax.jit(lambda params, image: [level.map() for level in blueprint.bind(params).encoder.levels(image)])
    return run(params, image)


class Golden:
    """The Swin of glip_backbone as a model of ours."""

    def __init__(self, unroll: bool):
        self.arrays = load("backbone")
        theirs = under(self.arrays, "param")
        theirs = {k.removeprefix("body."): v for k, v in theirs.items() if k.startswith("body.")}
        theirs = swin.without_buffers(theirs)
        image = jnp.asarray(self.arrays["in/x"].transpose(0, 2, 3, 1))
        how = dict(pad_windows=True, level_norms=True, unroll=unroll)
        options, heads = swin.options_of(theirs, swin.ORIGINAL, image.shape[1], **how)
        table = swin.original(len(heads), level_norms=True)
        params = rules.read(theirs, table, swin.heads_by_stage(heads), "Swin")
        blueprint = Blueprint(EncoderOptions(**vars(options)))
        self.found = maps(blueprint, jax.device_put(params), image)


@pytest.mark.golden
@pytest.mark.parametrize("unroll", [False, True])
def test_golden_stages(unroll):
    golden = Golden(unroll)
    for i, found in enumerate(golden.found):
        close(found.transpose(0, 3, 1, 2), golden.arrays[f"out/stage{i}"], name=f"stage {i}")


def test_padding_by_hand():
    """One block on a grid of 3 x 6 and windows of 4: zeros after the norm, as many as are missing, and attended to."""
    blueprint, params = build(encoder="swin-w8d1h2/4")
    image = images(12, 24)

    def by_hand(params, image):
        encoder = blueprint.bind(params).encoder
        x = encoder.stem_norm(encoder.embed(image, jnp.float32)).reshape(2, 3, 6, 8)
        block = layer_of(encoder.stages[0].blocks, 0)
        padded = jnp.zeros((2, 4, 8, 8)).at[:, :3, :6].set(block.norm1(x))
        bias = params["encoder/stages/0/offsets"][0][offset_index((4, 4))].transpose(2, 0, 1)
        parts = []
        for first in (0, 4):
            q, k, v = block.attn.project(padded[:, :, first : first + 4].reshape(2, 16, 8))
            weights = jax.nn.softmax(jnp.einsum("bnhk,bmhk->bhnm", q, k) / 2.0 + bias[None])
            parts.append(block.attn.out(jnp.einsum("bhnm,bmhk->bnhk", weights, v)).reshape(2, 4, 4, 8))
        x = x + jnp.concatenate(parts, axis=2)[:, :3, :6]
        x = x + block.mlp(block.norm2(x))
        return encoder.norm(x)

    (found,) = maps(blueprint, params, image)
    assert_close(found, jax.jit(by_hand)(params, image), 1e-5)


def test_nothing_changes_where_windows_divide():
    """With larger grids than windows padding or not is the same; a stage as low as its window is shifted there too."""
    changes = dict(res=64, encoder="swin-w8d2-2h2-4/4")
    (padded, params), (plain, others) = build(**changes), build(**changes, pad_windows=False)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in others.items()}
    for side, same in ((64, [True, True]), (32, [True, False])):
        image = images(side, 64)
        pairs = zip(maps(padded, params, image), maps(plain, params, image), strict=True)
        assert [np.array_equal(found, expected) for found, expected in pairs] == same


def test_what_is_inside():
    """The places that are of a grid of 3 x 5 in windows of 4, before and after the roll."""
    whole = windows.inside(4, (3, 5), (0, 0)).reshape(2, 4, 4)
    expected = np.zeros((4, 8), bool)
    expected[:3, :5] = True
    np.testing.assert_array_equal(np.concatenate(whole, axis=1), expected)
    rolled = windows.inside(4, (3, 5), (-2, -2)).reshape(2, 4, 4)
    np.testing.assert_array_equal(np.concatenate(rolled, axis=1), np.roll(expected, (-2, -2), (0, 1)))
    assert windows.inside(4, (4, 8), (-2, -2)) is None


def test_grids_of_any_sides():
    """What is left of a place is one; nothing beyond the image is read, and every pixel is."""
    blueprint, params = build(encoder="swin-w8d1-1-1h2-2-4/4", level_norms=True)
    image = images(30, 51)
    assert [m.shape[1:3] for m in maps(blueprint, params, image)] == [(8, 13), (4, 7), (2, 4)]

    def total(image):
        return sum((m**2).sum() for m in maps(blueprint, params, image))

    assert (np.abs(jax.jit(jax.grad(total))(image)).max(axis=(0, 3)) > 0).all()


def test_padded_images():
    """Beyond an image are zeros after normalising, whatever was there before; they are seen as any other place."""
    blueprint, params = build(pixels="imagenet")
    small = images(20, 28)
    wide = jnp.full((2, 36, 44, 4), -1.0).at[:, :20, :28].set(jnp.concatenate([small, jnp.ones((2, 20, 28, 1))], -1))

    def run(params, image):
        encoder = blueprint.bind(params).encoder
        return [level.map() for level in encoder.levels(encoder.normalize(image))]

    def padded_after(params, image):
        encoder = blueprint.bind(params).encoder
        normal = jnp.pad(encoder.normalize(image), ((0, 0), (0, 16), (0, 16), (0, 0)))
        return [level.map() for level in encoder.levels(normal)]

    expected = jax.jit(padded_after)(params, small)
    for fill in (-1.0, 0.7):
        image = wide.at[..., :3].set(jnp.where(wide[..., 3:] > 0, wide[..., :3], fill))
        for found, other in zip(jax.jit(run)(params, image), expected, strict=True):
            np.testing.assert_array_equal(found, other)
    assert np.abs(expected[-1][:, -1, -1]).min() > 0
    # Zero is as good as -1: alpha as fractions of 1.
    zero = wide.at[..., 3].set(jnp.maximum(wide[..., 3], 0.0))
    np.testing.assert_array_equal(jax.jit(run)(params, zero)[-1], expected[-1])


@functools.cache
def graded(**changes):
    return straight_line.graded(*build(encoder="swin-w8d1-3h2-4/4", **changes), images(22, 50))


@pytest.mark.parametrize("changes", straight_line.WAYS, ids=str)
def test_a_loop_is_straight_line_code(changes):
    """With padding in all stages; gradients, and those of what is computed again, are the same."""
    straight_line.same(graded(**changes), graded(unroll=True))


def test_eight_devices_are_one():
    blueprint, params = build(level_norms=True)
    mesh = make_mesh(MeshOptions(2, 4, 1))
    image = images(22, 50, count=8)

    def loss(params, image):
        return sum((m.tokens_BND**2).sum() for m in blueprint.bind(params).encoder.levels(image))

    expected, gradient = jax.jit(jax.value_and_grad(loss))(params, image)
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, blueprint.shardings(mesh)), jax.device_put(image, batch_sharding(mesh))
        found, other = jax.jit(jax.value_and_grad(loss))(*spread)
    assert_close(found, expected, 1e-5)
    for name in gradient:
        assert_close(other[name], gradient[name], 1e-4, name)


def test_regions_of_a_grid_that_reaches_beyond():
    """Of an image of 24 columns and places of 16 pixels: the left half is 12 pixels, which is in the first place."""
    blueprint, params = build(encoder="swin-w8d1-1-1h2-2-2/4")
    box = jnp.asarray([[[0.0, 0.0, 0.5, 1.0]], [[0.5, 0.0, 1.0, 1.0]]])
    owner = jnp.zeros((2, 1), jnp.int32)
    encode = jax.jit(lambda params, image: blueprint.bind(params).encoder.regions(image, box, owner))
    inside = np.asarray(encode(params, images(16, 24)).inside_RN[:, 1:])
    np.testing.assert_array_equal(inside, [[True, False], [True, True]])


def test_sizes():
    """Every stage has a table of whole windows, every level but the first a norm; costs count what is padded."""
    kind = dict(encoder="swin-T/4", window=7)
    options = EncoderOptions(**kind, res=800, pad_windows=True, level_norms=True)
    shapes = Blueprint(options).shapes
    assert {n.shape[1] for name, n in shapes.items() if name.endswith("offsets")} == {169}
    norms = [name for name in shapes if name.endswith("norm/scale") and "merge" not in name and "stem" not in name]
    assert norms == ["encoder/norm/scale", "encoder/stages/1/norm/scale", "encoder/stages/2/norm/scale"]
    assert parameters.count(shapes) == 27_519_354 + 2 * (192 + 384)
    assert options.grid == (25, 25) and EncoderOptions(**kind, res=801, pad_windows=True).grid == (26, 26)
    # Windows of 7 over 200, 100, 50 and 25 places are 29, 15, 8 and 4.
    larger = EncoderOptions(**kind, res=896, pad_windows=True).encoder_flops()
    assert 0.9 * larger < options.encoder_flops() < larger


WRONG = [
    (dict(res=3), "model.res=3 is less than a patch of 4 pixels"),
    (dict(window=1), "model.window must be at least 2, not 1"),
    (dict(pad_windows=False, res=24), "model.res=24 can't be divided into windows"),
    (
        dict(encoder="B/16", window=7),
        "is a ViT, which doesn't have model.pad_windows=True; set model.pad_windows=False",
    ),
    (dict(encoder="B/16", window=7, pad_windows=False, level_norms=True), "doesn't have model.level_norms=True"),
]


@pytest.mark.parametrize("changes, sentence", WRONG, ids=str)
def test_what_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        EncoderOptions(**dict(res=32) | SMALL | changes)


def test_other_frameworks_have_no_such_swin():
    for changes in (dict(), dict(pad_windows=False, level_norms=True)):
        blueprint, params = build(**changes)
        for write in (swin.write_timm, swin.write_hugging_face):
            with pytest.raises(UserError, match="pad_windows=False|level_norms=False"):
                write(blueprint.options, params)


def test_names_go_there_and_back():
    blueprint, params = build(level_norms=True, encoder="swin-w8d2-1-2h2-4-4/4")
    table = swin.original(3, level_norms=True)
    theirs = rules.write(params, table, "Swin")
    assert (
        theirs["norm1.weight"].shape == (16,) and theirs["norm2.weight"].shape == (32,) and "norm0.weight" not in theirs
    )
    back = rules.read(theirs, table, swin.heads_by_stage([2, 4, 4]), "Swin")
    assert sorted(back) == sorted(params)
    for name, value in back.items():
        np.testing.assert_array_equal(value, params[name])
