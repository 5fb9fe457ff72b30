"""Regions of encoded images: against X-VLM's numbers, and by what may and may not move them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, drawn, load_golden
from test_features import of_xywh
from test_swin import Golden as GoldenSwin

from capvl.convert import hugging_face, rules, timm
from capvl.convert.rules import CONV, ROW
from capvl.models.encoder import EncoderOptions
from capvl.models.features import Level, rows_of, with_summary
from capvl.models.parameters import Blueprint
from capvl.parallel.mesh import MeshOptions, make_mesh
from capvl.parallel.rules import batch_sharding

FORMS = {
    "mean": {},
    "cls": dict(pool="cls"),
    "registers": dict(pool="cls", registers=2, class_position=True, pre_norm=True),
    "swin": dict(encoder="swin-w8d2-2h2-2/4", window=4),
}


def build(**changes):
    options = dict(encoder="w16d3h2m32/8", res=32, dtype="float32") | changes
    blueprint = Blueprint(EncoderOptions(**options))
    return blueprint, drawn(blueprint.shapes)


def batch(groups=2, each=3, rows=4, seed=0):
    """Images, boxes and their owners."""
    rng = np.random.default_rng(seed)
    image = rng.uniform(-1, 1, (groups * each, 32, 32, 3)).astype(np.float32)
    corners = np.sort(rng.uniform(0, 1, (groups, rows, 2, 2)), axis=2).reshape(groups, rows, 4)
    return image, corners.astype(np.float32), rng.integers(0, each, (groups, rows)).astype(np.int32)


def regions(blueprint, local=0):
    def run(params, image, box, owner, key=None):
        return blueprint.bind(params).encoder.regions(image, box, owner, key=key, local=local)

    return jax.jit(run)


class Vit:
    """The golden ViTs, whose pixels are normalised."""

    def __init__(self, name):
        self.arrays = load_golden("xvlm", f"xvlm_{name}.npz")
        sizes = {k.removeprefix("cfg."): int(v) for k, v in self.arrays.items() if k.startswith("cfg.")}
        self.local = sizes["local_attn_depth"]
        encoder = "w{width}d{depth}h{heads}m{mlp_hidden}/{patch_size}".format(**sizes)
        clip = dict(pre_norm=True, activation="quick_gelu", eps=1e-5) if name == "vit_clip" else {}
        common = dict(encoder=encoder, res=sizes["image_res"], pool="cls", class_position=True, dtype="float32")
        options = EncoderOptions(**common | dict(activation="gelu", eps=1e-6) | clip)
        theirs = {k.removeprefix("param."): v for k, v in self.arrays.items() if k.startswith("param.")}
        if clip:
            theirs["patch_embed.bias"] = np.zeros(sizes["width"], np.float32)
            table = [
                rules.Rule("encoder/stem/kernel", ("patch_embed.weight",), CONV),
                rules.Rule("encoder/stem/bias", ("patch_embed.bias",)),
                rules.Rule("encoder/cls", ("class_embedding",), ROW),
                rules.Rule("encoder/positions", ("pos_embed.weight",)),
                *rules.norm("encoder/pre_norm", "pre_layrnorm"),
                *hugging_face.layers("encoder", ""),
                *rules.norm("encoder/norm", "post_layernorm"),
            ]
        else:
            table = timm.vit(options)
        params = rules.read(theirs, table, lambda _: sizes["heads"], name)
        self.blueprint, self.params = Blueprint(options), jax.device_put(params)
        self.image = jnp.asarray(self.arrays["in.image"].transpose(0, 2, 3, 1))
        self.box = of_xywh(self.arrays["in.boxes_xywh"], options.res)[None]
        self.owner = jnp.asarray(self.arrays["in.idx_to_group_img"], jnp.int32)[None]


@pytest.mark.golden
@pytest.mark.parametrize("name", ["vit_clip", "vit_deit"])
def test_golden_vits(name):
    case = Vit(name)
    plain = jax.jit(lambda params, image: case.blueprint.bind(params).encoder(image))(case.params, case.image)
    np.testing.assert_allclose(plain, case.arrays["out.full"], atol=5e-5)
    found = regions(case.blueprint, case.local)(case.params, case.image, case.box, case.owner)
    np.testing.assert_allclose(found.whole.tokens_BND, case.arrays["out.full_in_region_call"], atol=5e-5)
    np.testing.assert_allclose(found.tokens_RND, case.arrays["out.region"], atol=5e-5)
    np.testing.assert_array_equal(found.inside_RN, case.arrays["in.image_atts"].astype(bool))


@pytest.mark.golden
def test_golden_swin():
    case = GoldenSwin()
    box = of_xywh(case.arrays["in.boxes_xywh"], case.options.res)[None]
    owner = jnp.asarray(case.arrays["in.idx_to_group_img"], jnp.int32)[None]
    found = regions(Blueprint(case.options))(case.params, case.image, box, owner)
    np.testing.assert_allclose(found.whole.tokens_BND, case.arrays["out.full"], atol=5e-5)
    np.testing.assert_allclose(found.tokens_RND, case.arrays["out.region"], atol=5e-5)
    np.testing.assert_array_equal(found.inside_RN, case.arrays["in.image_atts"].astype(bool))


def test_rows_are_of_their_images():
    x = jax.random.normal(jax.random.key(0), (6, 4, 5))
    owner = np.array([[2, 0, 2, 1], [0, 0, 1, 2]], np.int32)
    found = jax.jit(rows_of)(x, owner)
    np.testing.assert_array_equal(found, np.asarray(x)[(owner + [[0], [3]]).reshape(-1)])
    half = jax.jit(rows_of)(x.astype(jnp.bfloat16), owner)
    np.testing.assert_array_equal(half, np.asarray(x.astype(jnp.bfloat16))[(owner + [[0], [3]]).reshape(-1)])


@pytest.mark.parametrize("form", FORMS)
def test_without_local_layers_a_region_is_part_of_its_image(form):
    """Tokens are the image's; the first is the mean of those inside."""
    blueprint, params = build(**FORMS[form])
    image, box, owner = batch()
    found = regions(blueprint)(params, image, box, owner)
    whole = np.asarray(found.whole.tokens_BND)
    assert found.whole.prefix == 1 and found.inside_RN[:, 0].all() and found.inside_RN.shape[1] == whole.shape[1]
    tokens = jax.jit(lambda p, x: blueprint.bind(p).encoder(x))(params, image)
    places = np.asarray(tokens)[:, int(blueprint.options.pool == "cls") :]
    summary = np.asarray(tokens)[:, 0] if blueprint.options.pool == "cls" else places.mean(axis=1)
    assert_close(whole, np.concatenate([summary[:, None], places], axis=1), 1e-5)
    of = (owner + np.arange(2)[:, None] * 3).reshape(-1)
    assert_close(found.tokens_RND[:, 1:], places[of], 1e-6)
    for row, inside in enumerate(np.asarray(found.inside_RN)[:, 1:]):
        assert inside.sum() > 0
        assert_close(found.tokens_RND[row, 0], places[of[row]][inside].mean(axis=0), 1e-5)


@pytest.mark.parametrize("form", ["mean", "cls", "registers"])
def test_in_local_layers_a_region_sees_itself_alone(form):
    """With all layers local, pixels outside a box move none of its tokens; with one, they do through the others."""
    blueprint, params = build(**FORMS[form])
    image, _, owner = batch(groups=1, each=1, rows=1)
    box = np.array([[[0.25, 0.25, 0.75, 0.5]]], np.float32)
    inside = np.zeros((32, 32, 1), bool)
    inside[8:16, 8:24] = True
    other = np.where(inside, image, -image)
    for local, moves in ((3, False), (1, True)):
        run = regions(blueprint, local)
        here, there = (run(params, x, box, owner) for x in (image, other))
        shown = np.asarray(here.inside_RN)[0]
        assert shown.sum() == 3
        differences = np.abs(np.asarray(here.tokens_RND - there.tokens_RND))[0, shown].max(axis=1)
        assert (differences > 1e-3).all() == moves and (differences < 1e-5).all() != moves
        assert np.abs(np.asarray(here.whole.tokens_BND - there.whole.tokens_BND)).max() > 1e-3
    whole = jax.jit(lambda p, x: blueprint.bind(p).encoder(x))(params, image)
    assert_close(here.whole.tokens_BND[:, -16:], whole[:, -16:], 1e-5)
    everything = run(params, image, np.array([[[0.0, 0.0, 1.0, 1.0]]], np.float32), owner)
    assert_close(everything.tokens_RND, everything.whole.tokens_BND, 1e-5)


def test_a_loop_is_straight_line_code():
    image, box, owner = batch()
    expected = None
    for changes in ({}, dict(unroll=True), dict(remat="full")):
        blueprint, params = build(pool="cls", **changes)

        def loss(params, blueprint=blueprint):
            found = blueprint.bind(params).encoder.regions(image, box, owner, local=2)
            return (
                jnp.where(found.inside_RN[..., None], found.tokens_RND**2, 0.0).sum()
                + (found.whole.tokens_BND**3).sum()
            )

        value, gradient = jax.jit(jax.value_and_grad(loss))(params)
        expected = expected or (value, gradient)
        assert_close(value, expected[0], 1e-5)
        for name, leaf in gradient.items():
            assert_close(leaf, expected[1][name], 1e-4, name)


@pytest.mark.parametrize("form, local", [("cls", 2), ("swin", 0)])
def test_eight_devices_are_one(form, local):
    """Each has a group, and nothing moves between them."""
    blueprint, params = build(**FORMS[form])
    arrays = batch(groups=8, each=2, rows=3)
    run = regions(blueprint, local)
    alone = run(params, *arrays)
    mesh = make_mesh(MeshOptions(2, 4, 1))
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, batch_sharding(mesh)) for x in arrays]
        program = regions(blueprint, local).lower(params, *sharded).compile()
        found = program(params, *sharded)
    text = program.as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    assert found.tokens_RND.sharding.shard_shape(found.tokens_RND.shape)[0] == 3
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, alone)


def test_dropped_and_padded_places_are_in_no_region():
    blueprint, params = build(pool="cls", patch_dropout=0.5)
    image, box, owner = batch()
    for local in (0, 2):
        found = regions(blueprint, local)(params, image, box, owner, jax.random.key(1))
        everything = regions(build(pool="cls")[0], local)(params, image, box, owner)
        of = (owner + np.arange(2)[:, None] * 3).reshape(-1)
        place = np.asarray(found.whole.place_BP)[of]
        expected = np.take_along_axis(np.asarray(everything.inside_RN)[:, 1:], place, axis=1)
        np.testing.assert_array_equal(found.inside_RN[:, 1:], expected)
        assert np.isfinite(np.asarray(found.tokens_RND)).all()
    there = np.broadcast_to(np.where(np.arange(32)[:, None, None] < 16, 1.0, -1.0), (*image.shape[:3], 1))
    padded = np.concatenate([image, there], axis=3).astype(np.float32)
    for local in (0, 2):
        found = regions(build(pool="cls")[0], local)(params, padded, box, owner)
        assert not np.asarray(found.inside_RN)[:, 1 + 8 :].any() and np.asarray(found.inside_RN)[:, 1:].any()


def test_summaries():
    tokens = jnp.arange(12.0).reshape(1, 4, 3)
    plain = with_summary(Level(tokens, (2, 2), 8))
    assert_close(plain.tokens_BND[0, 0], [4.5, 5.5, 6.5], 1e-6)
    assert plain.prefix == 1 and with_summary(plain) is plain
    valid = with_summary(Level(tokens, (2, 2), 8, valid_BN=jnp.asarray([[True, True, False, False]])))
    assert_close(valid.tokens_BND[0, 0], [1.5, 2.5, 3.5], 1e-6)
    assert valid.valid_BN.tolist() == [[True, True, True, False, False]]


def test_stochastic_depth_of_a_vit():
    """Nothing without a key; with one, images differ in what was dropped, also in layers that are run for regions."""
    blueprint, params = build(pool="cls", drop_path=0.8)
    plain, _ = build(pool="cls")
    image, box, owner = batch(groups=1, each=1, rows=8)
    owner, box = np.zeros_like(owner), np.broadcast_to(box[:, :1], box.shape)
    off, expected = (regions(b, 2)(params, image, box, owner) for b in (blueprint, plain))
    np.testing.assert_array_equal(off.tokens_RND, expected.tokens_RND)
    on = regions(blueprint, 2)(params, image, box, owner, jax.random.key(1))
    again = regions(blueprint, 2)(params, image, box, owner, jax.random.key(1))
    np.testing.assert_array_equal(on.tokens_RND, again.tokens_RND)
    assert len(np.unique(np.asarray(on.tokens_RND).round(4).reshape(8, -1), axis=0)) > 1


def test_a_swin_has_no_local_layers():
    blueprint, params = build(**FORMS["swin"])
    with pytest.raises(ValueError, match="windows see no regions"):
        regions(blueprint, 1)(params, *batch())
    blueprint, params = build()
    with pytest.raises(ValueError, match="4 local layers of 3"):
        regions(blueprint, 4)(params, *batch())
    assert dataclasses.is_dataclass(blueprint.options)
