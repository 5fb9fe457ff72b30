"""Deep fusion: the official code's numbers (golden/glip biattention, vlfuse, bertlayer), and what it must hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import under
from flax import nnx
from glip_parts import HEADS, filled, maps, renamed
from golden_glip import close, load

from capvl.convert import bert, glip_names
from capvl.models.deep_fusion import LIMIT, DeepFusion, FusionToImage, TowerBertLayer
from capvl.models.sizes import Size


def fusion(theirs, **more):
    """A fusion with their parameters."""
    to_image = "t2i_attn.gamma" in theirs
    block, kind = ("t2i_attn", FusionToImage) if to_image else ("b_attn", DeepFusion)
    image, text = (theirs[f"{block}.attn.{part}_proj.weight"].shape for part in ("qk" if to_image else "vl"))
    module = nnx.eval_shape(lambda: kind(image[1], text[1], image[0], HEADS, gate=1.0, rngs=nnx.Rngs(0), **more))
    names = glip_names.fusion_to_image if to_image else glip_names.deep_fusion
    return filled(module, theirs, (glip_names.separate_fusion if more else names)("part", block), HEADS)


def jitted(block):
    """What a module gives, compiled as a whole: op by op it takes longer."""
    return jax.jit(block.__call__)


def tokens(golden, name):
    return jnp.asarray(golden[name]) > 0


@pytest.mark.golden
@pytest.mark.parametrize("case", ["noclamp", "clamp", "clamp_big", "stable2d"])
def test_bidirectional_attention(case):
    """stable2d first takes one number from all logits, which no softmax notices."""
    golden = load("biattention")
    given, out = under(golden, f"in/{case}"), under(golden, f"out/{case}")
    block = fusion(renamed(under(golden, f"param/{case}"), "b_attn."))

    @jax.jit
    def run(image, text, mask):
        changes = block.changes(block.norm_image(image), block.norm_text(text), mask)
        return changes, block.fused(image, text, mask)

    changes, fused = run(given["v"], given["l"], tokens(given, "mask"))
    for name, change, whole in zip("vl", changes, fused, strict=True):
        close(change, out[f"delta_{name}"], name=f"delta_{name}")
        close(whole, out[name], name=name)


@pytest.mark.golden
@pytest.mark.parametrize("case", ["MHA-B", "MHA-B-sep", "MHA-S"])
def test_fusion_of_levels(case):
    golden = load("vlfuse")
    given, out = under(golden, f"in/{case}"), under(golden, f"out/{case}")
    levels = maps(given, "x")
    more = dict(separate=len(levels)) if case == "MHA-B-sep" else {}
    block = fusion(under(golden, f"param/{case}"), **more)
    fused, states = jitted(block)(levels, given["l"], tokens(given, "mask"))
    for level, (actual, expected) in enumerate(zip(fused, maps(out, "y"), strict=True)):
        close(actual, expected, name=f"level {level}")
    close(states, out["l"])


@pytest.mark.golden
def test_layer_on_texts():
    golden = load("bertlayer")
    theirs = renamed(under(golden, "param"), "layer.")
    mlp, width = theirs["layer.intermediate.dense.weight"].shape
    layer = nnx.eval_shape(lambda: TowerBertLayer(Size(width, 1, mlp, HEADS), rngs=nnx.Rngs(0)))
    layer = filled(layer, theirs, bert.layer("part", "layer"), HEADS)
    mask = tokens(golden, "in/mask")[:, None, None]
    close(layer(jnp.asarray(golden["in/h"]), mask=mask), golden["out/h"])


def small(kind=DeepFusion, **more):
    return kind(6, 5, 8, 2, gate=0.5, rngs=nnx.Rngs(0), **more)


def small_inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    levels = [jnp.asarray(rng.normal(size=(2, y, x, 6)), dtype) for y, x in ((3, 4), (2, 2), (1, 1))]
    mask = jnp.asarray([[True, True, True, True], [True, True, False, False]])
    return levels, jnp.asarray(rng.normal(size=(2, 4, 5)), dtype), mask


KINDS = {"both": {}, "separate": dict(separate=3), "to_image": dict(kind=FusionToImage)}


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_a_text_reaches_no_map(kind):
    block, (levels, states, mask) = jitted(small(**KINDS[kind])), small_inputs()
    fused, _ = block(levels, states, mask)
    other, _ = block(levels, states.at[1, 2:].multiply(-3.0), mask)
    seen, _ = block(levels, states.at[1, 1].multiply(-3.0), mask)
    for a, b, c in zip(fused, other, seen, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(c - a)[1].max() > 1e-3


def test_levels_share_one_softmax_only_where_they_are_fused_together():
    levels, states, mask = small_inputs()
    changed = [levels[0], levels[1] * -1.0, levels[2]]
    for kind in KINDS:
        block = jitted(small(**KINDS[kind]))
        (first, *_), text = block(levels, states, mask)
        (other, *_), other_text = block(changed, states, mask)
        np.testing.assert_array_equal(first, other)
        assert (np.abs(text - other_text).max() > 1e-3) == (kind != "to_image")
    block = jitted(small())
    _, alone = block(levels[:1], states, mask)
    _, twice = block([levels[0], levels[0]], states, mask)
    close(twice, alone, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_of_training(kind):
    block, inputs = jitted(small(dropout=0.5, **KINDS[kind])), small_inputs()
    whole, again, other = block(*inputs), block(*inputs, jax.random.key(0)), block(*inputs, jax.random.key(1))
    same = block(*inputs, jax.random.key(0))
    for a, b, c, d in zip(*(jax.tree.leaves(x[0]) for x in (whole, again, other, same)), strict=True):
        assert np.abs(a - b).max() > 1e-3 and np.abs(b - c).max() > 1e-3
        np.testing.assert_array_equal(b, d)


def test_half_precision_keeps_its_dtype():
    for kind in KINDS.values():
        leaves = jax.tree.leaves(jax.eval_shape(small(**kind), *small_inputs(jnp.bfloat16)))
        assert {x.dtype for x in leaves} == {jnp.dtype(jnp.bfloat16)}


def enormous_logits(projection, part):
    """Makes a part of a fused projection some 1e6, where its values still differ."""
    projection.bias[...] = projection.bias[...].at[part].set(1e6)


def test_enormous_logits_are_equal_behind_the_limit_of_fusion():
    """So places mix all tokens' values alike, where one token would get everything."""
    block, (levels, states, mask) = small(FusionToImage), small_inputs()
    enormous_logits(block.image_q, 0)
    enormous_logits(block.text_kv, 0)
    fused, _ = block(levels[:1], states, mask)
    values_BLHK = block.text_kv(block.norm_text(states))[:, :, 1]
    seen = mask.astype(jnp.float32)[..., None, None]
    mean_B1HK = (values_BLHK * seen).sum(1, keepdims=True) / seen.sum(1, keepdims=True)
    expected = block.norm_image(levels[0]) + 0.5 * block.image_out(mean_B1HK)[:, None]
    close(fused[0], expected, 1e-5)


def layer_on_texts():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 4)), jnp.float32)
    return TowerBertLayer(Size(4, 1, 8, 2), rngs=nnx.Rngs(0)), x


def test_enormous_logits_are_equal_behind_the_limit_of_the_layer_on_texts():
    layer, x = layer_on_texts()
    enormous_logits(layer.attn.qkv, slice(0, 2))
    mean = layer.attn.out(layer.attn.project(x)[2].mean(1, keepdims=True))
    close(layer.attended(x), layer.norm1(x + mean), 1e-5)


def test_layer_on_texts_has_a_limit_in_its_mlp_and_at_its_end():
    layer, x = layer_on_texts()
    assert np.abs(layer(x)).max() < 10
    layer.mlp.up.bias[...] = jnp.full(8, 1e6)
    expected = jnp.clip(LIMIT * layer.mlp.down.kernel[...].sum(0), -LIMIT, LIMIT)
    close(layer.mlp(x, LIMIT), jnp.broadcast_to(expected, x.shape), 1e-6)
    layer.mlp.down.bias[...] = jnp.asarray([1e7, -1e8, 0.0, 0.0])
    np.testing.assert_array_equal(layer.mlp(x, LIMIT)[0, 0, :2], [LIMIT, -LIMIT])
    attended = layer.attended(x)
    close(layer(x), layer.norm2(attended + layer.mlp(attended, LIMIT)), 1e-6)
    layer.norm2.scale[...] = jnp.full(4, 1e6)
    assert np.abs(layer(x)).max() == LIMIT
