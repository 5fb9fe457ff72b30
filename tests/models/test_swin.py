"""Swin: against the official code's numbers, loops against straight lines, names, sides, what it refuses; it trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import straight_line
from conftest import assert_close, drawn, load_golden
from test_step import SMOOTH, run

from capvl.bench.step import example_batch
from capvl.convert import rules, swin
from capvl.errors import UserError
from capvl.models import parameters
from capvl.models.encoder import EncoderOptions
from capvl.models.parameters import Blueprint
from capvl.nn.relative_positions import offset_index
from capvl.nn.stack import layer_of
from capvl.nn.windows import shift_mask
from capvl.objectives.cappa import CapPa
from capvl.parallel.mesh import MeshOptions, make_mesh

SMALL = dict(encoder="swin-w8d2-3h2-4/4", res=32, window=4, dtype="float32", activation="gelu", eps=1e-5)


def build(**changes):
    blueprint = Blueprint(EncoderOptions(**SMALL | changes))
    return blueprint, drawn(blueprint.shapes)


def images(side, count=2, columns=0):
    return jax.random.uniform(jax.random.key(1), (count, side, columns or side, 3), minval=-1.0)


def levels(blueprint):
    return jax.jit(lambda params, image, key: blueprint.bind(params).encoder.levels(image, key=key))


class Golden:
    """The golden Swin as a model of ours."""

    def __init__(self):
        self.arrays = load_golden("xvlm", "xvlm_swin.npz")
        theirs = {k.removeprefix("param."): v for k, v in self.arrays.items() if k.startswith("param.")}
        options, heads = swin.options_of(theirs, swin.ORIGINAL, res=int(self.arrays["cfg.image_res"]))
        self.options = EncoderOptions(**dataclasses.asdict(options))
        params = rules.read(theirs, swin.original(len(heads)), swin.heads_by_stage(heads), "Swin")
        self.params = jax.device_put(params)
        self.image = jnp.asarray(self.arrays["in.image"].transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def golden():
    return Golden()


@pytest.mark.golden
@pytest.mark.parametrize("unroll", [False, True])
def test_golden_stages(golden, unroll):
    """The official numbers are of stages after merging; ours are levels, before it."""
    blueprint = Blueprint(dataclasses.replace(golden.options, unroll=unroll))
    arrays = golden.arrays
    assert golden.options.window == arrays["cfg.window_size"]
    assert [size.depth for size in golden.options.encoder_kind.sizes] == arrays["cfg.depths"].tolist()

    @jax.jit
    def run(params, image):
        encoder = blueprint.bind(params).encoder
        levels = encoder.levels(image)
        return levels, [stage.merge(level.map()) for stage, level in zip(encoder.stages, levels[:-1], strict=False)]

    found, merged = run(golden.params, golden.image)
    for i, out in enumerate(merged):
        expected = arrays[f"out.stage{i}"]
        np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=5e-5)
    np.testing.assert_allclose(found[-1].tokens_BND, arrays["out.full"][:, 1:], atol=5e-5)
    assert [level.stride for level in found] == [4, 8, 16, 32]


@pytest.mark.golden
def test_golden_masks(golden):
    masks = {int(name.split(".")[2]): mask for name, mask in golden.arrays.items() if name.endswith("attn_mask")}
    assert masks
    kind = golden.options.encoder_kind
    for stage, mask in masks.items():
        side, window = (values[stage] for values in (kind.sides(golden.options.res), kind.windows(golden.options)))
        np.testing.assert_array_equal(shift_mask(window, (side, side), (window // 2,) * 2), mask)


@functools.cache
def graded(**changes):
    return straight_line.graded(*build(window=2, **changes), images(32))


@pytest.mark.parametrize("changes", straight_line.WAYS, ids=str)
def test_a_loop_is_straight_line_code(changes):
    """Pairs of blocks, with one left over; gradients, and those of what is computed again, are the same."""
    straight_line.same(graded(**changes), graded(unroll=True))


def test_one_window_is_plain_attention_with_a_bias():
    """A stage no larger than its window: every block is unshifted, by a formula over the whole grid."""
    blueprint, params = build(encoder="swin-w8d2h2/4", res=12, window=7)
    assert params["encoder/stages/0/offsets"].shape == (2, 25, 2)

    def by_hand(params, image):
        encoder = blueprint.bind(params).encoder
        x = encoder.stem_norm(encoder.embed(image, jnp.float32)).reshape(2, 9, 8)
        for i in range(2):
            block = layer_of(encoder.stages[0].blocks, i)
            q, k, v = block.attn.project(block.norm1(x))
            bias = params["encoder/stages/0/offsets"][i][offset_index((3, 3))].transpose(2, 0, 1)
            weights = jax.nn.softmax(jnp.einsum("bnhk,bmhk->bhnm", q, k) / 2.0 + bias[None])
            x = x + block.attn.out(jnp.einsum("bhnm,bmhk->bnhk", weights, v))
            x = x + block.mlp(block.norm2(x))
        return encoder.norm(x)

    found = levels(blueprint)(params, images(12), None)[0]
    assert_close(found.tokens_BND, jax.jit(by_hand)(params, images(12)), 1e-5)


def test_shifted_windows_look_across():
    """A pixel moves the tokens of its own window after one block, and those of the shifted one after two."""

    def moved(depth):
        blueprint, params = build(encoder=f"swin-w8d{depth}h2/4", res=32, window=4)

        def total(image, place):
            return blueprint.bind(params).encoder.levels(image)[0].map()[0, place[0], place[1]].sum()

        gradient = jax.jit(jax.vmap(jax.grad(total), in_axes=(None, 0)))(images(32, 1), jnp.asarray([[0, 0], [3, 3]]))
        patches = np.abs(np.asarray(gradient)).reshape(2, 8, 4, 8, 4, 3).max(axis=(2, 4, 5)) > 0
        return patches.sum(axis=(1, 2)).tolist()

    assert moved(1) == [16, 16]
    # The upper left shifted window holds places of four unshifted ones but for the grid's edges, which are masked.
    assert moved(2) == [16, 64]


def test_sides_that_are_not_the_models():
    """The windows go on over a larger image, oblong too: without shifts its windows are as those of parts."""
    blueprint, params = build(encoder="swin-w8d1h2/4", res=16, window=4)
    image = images(32, columns=48)
    (whole,) = levels(blueprint)(params, image, None)
    assert whole.grid == (8, 12)
    parts = image.reshape(2, 2, 16, 3, 16, 3).transpose(0, 1, 3, 2, 4, 5).reshape(12, 16, 16, 3)
    (alone,) = levels(blueprint)(params, parts, None)
    expected = alone.map().reshape(2, 2, 3, 4, 4, 8).transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 12, 8)
    assert_close(whole.map(), expected, 1e-5)
    with pytest.raises(ValueError, match="not divided by windows of 4"):
        levels(blueprint)(params, images(24), None)
    with pytest.raises(ValueError, match="4 channels"):
        levels(blueprint)(params, jnp.zeros((1, 16, 16, 4)), None)


SIZES = [("swin-B/4", 384, 12, 86_878_584), ("swin-B/4", 480, 15, 86_995_896)]
SIZES += [("swin-T/4", 224, 7, 27_519_354), ("swin-L/4", 224, 7, 194_995_476)]


@pytest.mark.parametrize("encoder, res, window, count", SIZES)
def test_published_sizes(encoder, res, window, count):
    options = EncoderOptions(encoder=encoder, res=res, window=window)
    assert parameters.count(Blueprint(options).shapes) == count
    assert (options.stride, options.grid) == (32, (res // 32,) * 2) and options.image_tokens() == (res // 32) ** 2


WRONG = [
    (dict(encoder="swin-X/4"), "Unknown Swin size 'X'"),
    (dict(encoder="swin-B"), "should read swin-SIZE/PATCH, such as 'swin-B/4'"),
    (dict(encoder="swin-w8d2-2h2/4"), "as many heads as depths"),
    (dict(encoder="swin-w6d2-2h2-5/4"), "multiples of the heads"),
    (
        dict(encoder="swin-B/4", res=256, window=7),
        "256 can't .*nearest that can: 224 and 448, or have model.window=2 or 4",
    ),
    (dict(encoder="swin-B/4", res=10, window=7), "the nearest that can: 224"),
    (dict(window=1), "model.window must be at least 2, not 1"),
    (dict(pool="cls"), "is a Swin, which doesn't have model.pool='cls'; set model.pool='mean'"),
    (dict(registers=2, stem="conv"), "model.stem='conv', model.registers=2; set model.stem='patch', model.registers=0"),
    (dict(patch_dropout=0.5), "model.patch_dropout=0.5"),
    (dict(layer_scale=0.1), "model.layer_scale=0.1"),
    (dict(positions="sincos"), "model.positions='sincos'"),
    (dict(pre_norm=True), "model.pre_norm=True"),
    (dict(drop_path=1.0), r"model.drop_path must be in \[0, 1\), not 1.0"),
    (dict(encoder="B/16", window=4), "is a ViT, which doesn't have model.window=4; set model.window=7"),
]


@pytest.mark.parametrize("changes, sentence", WRONG, ids=str)
def test_what_is_refused(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        EncoderOptions(**SMALL | changes)


def test_stochastic_depth():
    """Nothing without a key; with one, an image's branches are dropped or grow, the first layer's never."""
    blueprint, params = build(drop_path=0.9, encoder="swin-w8d2h2/4", window=8)
    plain, _ = build(encoder="swin-w8d2h2/4", window=8)
    image = jnp.concatenate([images(32, 1)] * 32)
    (without,) = levels(plain)(params, image, None)
    (off,) = levels(blueprint)(params, image, None)
    np.testing.assert_array_equal(off.tokens_BND, without.tokens_BND)
    (on,) = levels(blueprint)(params, image, jax.random.key(2))
    kinds = np.unique(np.asarray(on.tokens_BND).round(4).reshape(32, -1), axis=0)
    assert 2 <= len(kinds) <= 4
    first_alone = {
        k: jnp.zeros_like(v).at[0].set(v[0]) if "/out/" in k or "/down/" in k else v for k, v in params.items()
    }
    (bare,) = levels(plain)(first_alone, image, None)
    dropped = np.abs(np.asarray(on.tokens_BND - bare.tokens_BND)).max(axis=(1, 2)) < 1e-4
    assert 0.5 < dropped.mean() < 1.0  # 0.9 ** 2 is expected.


GIT = dict(text="w16d1h2m32", start=2, text_positions=12, pool="mean", pre_norm=False, class_position=False)
MODELS = {
    "cappa": dict(decoder_layers=1, vocab=128, length=12),
    "git": dict(vocab=128, length=12) | GIT,
    "contrastive": dict(vocab=128, length=12, text="w16d1h2m32", projection=8, decoder_layers=1),
    "probe": dict(classes=4, probe_pool="map"),
}


@pytest.mark.parametrize("name", ["git", *(pytest.param(n, marks=pytest.mark.long) for n in MODELS if n != "git")])
def test_every_objective_trains_a_swin(name, tiny_recipe):
    """A config's value: steps lower the loss; CapPa's on eight devices as on one."""
    small = dict(encoder="swin-w8d2-1h2-2/4", res=16, window=2, dtype="float32")
    objective = {"name": name} | ({"locked": False} if name == "probe" else {})
    recipe = tiny_recipe(model=small | MODELS[name], objective=objective, optimizer=SMOOTH)
    batch = example_batch(recipe, 6)
    losses, state = run(recipe, 3, batch=batch)
    assert losses[2] < losses[0]
    if name == "cappa":
        sharded, other = run(recipe, 3, make_mesh(MeshOptions(2, 4, 1)), batch)
        assert_close(sharded, losses, 1e-5)
        for path, value in state.params.items():
            assert_close(other.params[path], value, 1e-4, path)


def test_flops_of_a_recipe():
    """Swin-B at 224 and 384, on paper: 15.5 and 47.1 GMAC (arXiv 2103.14030, table 1 has 15.4 and 47.0)."""
    for res, window, macs in ((224, 7, 15.5e9), (384, 12, 47.1e9)):
        options = CapPa.Model(encoder="swin-B/4", res=res, window=window)
        assert options.encoder_flops() / 2 == pytest.approx(macs, rel=0.01)
        assert options.decoder_size.width == 1024
