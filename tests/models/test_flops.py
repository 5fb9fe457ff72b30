"""What models say of their matmul FLOPs, against the matmuls of their unrolled programs as XLA compiles them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from capvl.models import stem
from capvl.models.encoder import EncoderOptions
from capvl.models.git import GitOptions
from capvl.models.parameters import Blueprint
from capvl.objectives.cappa import CapPa
from capvl.objectives.probe import ProbeOptions
from capvl.planning.work import Program

SMALL = dict(encoder="w64d2h2m256/8", res=32, dtype="float32", unroll=True)
GIT = GitOptions(**SMALL, text="w128d3h4m256", vocab=300, start=2, length=24, text_positions=24, dropout=0.0)


def counted(options, function, *shapes):
    """Of the matmuls and convolutions that XLA makes of function(model, *arrays)."""
    blueprint = Blueprint(options)
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    call = jax.jit(lambda params, *arrays: function(blueprint.bind(params), *arrays))
    program = call.lower(blueprint.shapes, *arrays).compile()
    return Program(program.as_text()).cost.flops


@pytest.mark.parametrize("changes", [{}, dict(pool="cls", registers=3), dict(stem="conv")], ids=str)
def test_an_encoder(changes):
    options = EncoderOptions(**SMALL | changes)
    found = counted(options, lambda model, image: model.encode(image), ((1, 32, 32, 3), jnp.float32))
    beyond = 0
    if options.stem == "conv":  # On paper, convolutions also read what is beyond an image's border; XLA's don't.
        side, inputs = 32, 3
        for stride, outputs in stem.convolutions(8, 64):
            side //= stride
            missing = 1 if stride == 2 else 2  # Taps beyond the border, in each direction.
            beyond += 2 * inputs * outputs * ((3 * side) ** 2 - (3 * side - missing) ** 2)
            inputs = outputs
    assert options.encoder_flops() - beyond == pytest.approx(found, rel=0.001)


@pytest.mark.parametrize("changes", [{}, dict(res=96, window=3), dict(encoder="swin-w16d1h2/8", window=4)], ids=str)
def test_a_swin(changes):
    """Windows, merging, and a last stage that is one window."""
    swin = dict(encoder="swin-w16d2-3-1h1-2-4/4", window=8, res=32)
    options = EncoderOptions(**SMALL | swin | changes)
    side = options.res
    found = counted(options, lambda model, image: model.encode(image), ((1, side, side, 3), jnp.float32))
    assert options.encoder_flops() == pytest.approx(found, rel=0.001)


def test_images_that_keep_their_aspect():
    """All patches of the square are embedded; the blocks see those of the largest image. XLA also resizes positions."""
    options = dataclasses.replace(GIT, max_side=96)
    found = counted(options, lambda model, image: model.encode(image).tokens_BND, ((1, 96, 96, 4), jnp.float32))
    assert options.encoder_flops() == pytest.approx(found, rel=0.01)
    assert options.image_tokens() == 4 * 12 + 1


def test_a_map_head():
    options = ProbeOptions(**SMALL, classes=40, probe_pool="map")
    found = counted(options, lambda model, tokens: model.logits(tokens), ((1, 16, 64), jnp.float32))
    assert options.head_flops() == pytest.approx(found, rel=0.001)


def test_dropped_patches_cost_nothing():
    """The blocks see half of the patches; the patch embedding all."""
    options = EncoderOptions(**SMALL)
    half = dataclasses.replace(options, patch_dropout=0.5)
    stem = 2 * 16 * 8 * 8 * 3 * 64
    assert stem + (options.encoder_flops() - stem) / 2.2 < half.encoder_flops() < stem + options.encoder_flops() / 2
    assert half.image_tokens() == 8 and dataclasses.replace(half, pool="cls").image_tokens() == 9


@pytest.mark.parametrize("changes", [{}, dict(fusion="cross"), dict(frames=2)], ids=str)
def test_gits_decoder(changes):
    """The image once, and three texts behind it."""
    options = dataclasses.replace(GIT, **changes)
    tokens = options.image_tokens()
    assert tokens == 17 * max(1, options.frames)

    def image_kv(model, encoded):
        return model.decoder.image_kv(encoded)[:2]

    def texts(model, encoded, text):
        kv = model.decoder.image_kv(encoded)
        return model.decoder.project(model.decoder.causal(text, kv))

    encoded, text = ((1, tokens, 64), jnp.float32), ((3, 24), jnp.int32)
    assert options.image_kv_flops() == pytest.approx(counted(options, image_kv, encoded), rel=0.001)
    assert options.decoder_flops(3) == pytest.approx(counted(options, texts, encoded, text), rel=0.001)
    shorter = counted(options, texts, encoded, ((3, 12), jnp.int32))
    assert options.image_kv_flops() + 3 * options.text_flops(12) == pytest.approx(shorter, rel=0.001)


def test_a_clip_is_as_many_images_as_frames():
    assert dataclasses.replace(GIT, frames=5).encoder_flops() == 5 * GIT.encoder_flops()


def test_a_large_captioner_on_paper():
    """The step's figure of L/16 with 64 tokens and 32,000 pieces stays what it was, digit by digit."""
    options = CapPa.Model(encoder="L/16", decoder_layers=6)
    assert (options.encoder_flops(), options.decoder_flops()) == (122464763904, 20810039296)
    assert CapPa().flops(options) == 3 * (122464763904 + 20810039296)
