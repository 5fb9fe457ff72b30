"""The image encoder: blocks and stems by hand; images of any sides, padded or not, with patches dropped or not."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, drawn

from capvl.errors import UserError
from capvl.models.encoder import EncoderOptions
from capvl.models.parameters import Blueprint
from capvl.models.vision import ImageOptions
from capvl.nn import positions

SMALL = dict(encoder="w16d1h2m16/4", res=16, dtype="float32")
FORMS = [
    dict(),
    dict(pool="map"),
    dict(pool="cls", class_position=True, pre_norm=True, pixels="clip"),
    dict(registers=3, pool="cls"),
    dict(positions="sincos"),
]


def build(**changes):
    blueprint = Blueprint(EncoderOptions(**SMALL | changes))
    return blueprint, drawn(blueprint.shapes)


def pictures(*sizes, seed=0):
    """Images (H, W, 3) in [-1, 1]."""
    rng = np.random.default_rng(seed)
    return [rng.uniform(-1, 1, (*size, 3)).astype(np.float32) for size in sizes]


def padded(images, height, width):
    """One batch (B, H, W, 4), noise where there is no image."""
    canvas = np.random.default_rng(1).uniform(-1, 1, (len(images), height, width, 4)).astype(np.float32)
    canvas[..., 3] = -1.0
    for row, image in zip(canvas, images, strict=True):
        row[: image.shape[0], : image.shape[1], :3] = image
        row[: image.shape[0], : image.shape[1], 3] = 1.0
    return canvas


@pytest.mark.parametrize("changes", FORMS, ids=str)
def test_a_padded_image_is_as_it_is_alone(changes):
    """In a bucket whose images are larger than the model's own, too: tokens, places and features."""
    blueprint, params = build(**changes)
    height, width = 32, 24
    images = pictures((height, width), (12, 20), (4, 8), (0, 0))

    @jax.jit
    def run(params, image):
        model = blueprint.bind(params)
        (level,) = model.encoder.levels(model.encoder.normalize(image))
        return level, model.features(image)

    together, features = run(params, padded(images, height, width))
    assert (together.grid, together.stride) == ((height // 4, width // 4), 4)
    maps = together.map()
    for i, image in enumerate(images[:3]):
        alone, feature = run(params, image[None])
        rows, columns = alone.grid
        assert alone.valid_BN is None and alone.tokens_BND.shape[1] == alone.prefix + rows * columns
        assert_close(maps[i, :rows, :columns], alone.map()[0], 1e-5)
        assert (maps[i, rows:] == 0).all() and (maps[i, :, columns:] == 0).all()
        assert_close(features[i], feature[0], 1e-5)
    assert np.isfinite(features[3]).all()  # There is no image.


def test_positions_are_of_the_grid():
    """Of another grid than the model's, learned positions are resized, and sine-cosine ones go on."""
    (image,) = pictures((8, 28))
    blueprint, params = build()

    def embedded(blueprint, params):
        encoder = blueprint.bind(params).encoder
        x = encoder.embed(image[None], jnp.float32)
        return encoder.add_positions(x, encoder.grid_of(image[None])) - x

    own = np.asarray(params["encoder/positions"])
    expected = positions.resize(own, (4, 4), (2, 7), "hugging_face")
    assert_close(jax.jit(embedded, static_argnums=0)(blueprint, params)[0], expected, 1e-5)
    blueprint, params = build(positions="sincos")
    found = jax.jit(embedded, static_argnums=0)(blueprint, params)[0].reshape(2, 7, 16)
    assert_close(found[:, :4], positions.sincos_2d(4, 4, 16).reshape(4, 4, 16)[:2], 1e-5)


def test_dropped_patches_leave_the_others_where_they_were():
    """Without blocks each token is its patch's own: those that are kept stand where they stood, the others are none."""
    blueprint, params = build(patch_dropout=0.5, pool="cls", registers=2)
    params = {k: jnp.zeros_like(v) if "/out/" in k or "/down/" in k else v for k, v in params.items()}
    images = pictures((16, 24), (12, 16))

    @jax.jit
    def level(params, image, key):
        return blueprint.bind(params).encoder.levels(image, key=key)[0]

    for batch in (np.stack([images[0]] * 2), padded(images, 16, 24)):
        whole = level(params, batch, None)
        dropped = level(params, batch, jax.random.key(3))
        assert dropped.tokens_BND.shape[1] - dropped.prefix == 12 and dropped.place_BP.shape == (2, 12)
        assert len({tuple(row) for row in np.asarray(dropped.place_BP)}) == 2
        kept = np.zeros((2, 24), bool)
        np.put_along_axis(kept, np.asarray(dropped.place_BP), True, axis=1)
        there = np.asarray(whole.map()) * kept.reshape(2, 4, 6, 1)
        assert_close(dropped.map(), there, 1e-6)
        box = jnp.asarray([[[0.2, 0.1, 0.7, 0.9]]] * 2)
        inside = np.asarray(whole.in_boxes(box))[:, 0, whole.prefix :]
        found = np.asarray(dropped.in_boxes(box))[:, 0, dropped.prefix :]
        np.testing.assert_array_equal(found, np.take_along_axis(inside, np.asarray(dropped.place_BP), axis=1))


def test_short_sides_of_a_models_square_are_at_most_its_resolution():
    """Of a square of `max_side` only as many patches are computed as an image may have."""

    @dataclasses.dataclass(frozen=True)
    class Aspect(ImageOptions):
        max_side: int = 32

        make = EncoderOptions.make

    blueprint = Blueprint(Aspect(**SMALL))
    _, params = build()
    images = pictures((16, 32), (28, 16), (8, 8))

    @jax.jit
    def level(params, image):
        return blueprint.bind(params).encoder.levels(image)[0]

    together = level(params, padded(images, 32, 32))
    assert together.tokens_BND.shape[1] == 4 * 8 and together.valid_BN.sum(axis=1).tolist() == [32, 28, 4]
    for i, image in enumerate(images):
        alone = level(params, image[None])
        assert_close(together.map()[i, : alone.grid[0], : alone.grid[1]], alone.map()[0], 1e-5)
    assert level(params, padded(images, 32, 36)).tokens_BND.shape[1] == math.prod((8, 9))


def test_layer_scale():
    """At 0 the blocks add nothing, at 1 what they add without it."""
    base = dict(encoder="w16d2h2m16/4", res=8, dtype="float32")
    plain, scaled = Blueprint(EncoderOptions(**base)), Blueprint(EncoderOptions(**base, layer_scale=0.1))
    params = jax.jit(scaled.init)(jax.random.key(0))
    names = [name for name in params if name not in plain.shapes]
    assert len(names) == 2 and all((params[name] == np.float32(0.1)).all() for name in names)
    image = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))

    def encode(value):
        given = params | {name: jnp.full_like(params[name], value) for name in names}
        return jax.jit(lambda p, x: scaled.bind(p).encoder(x))(given, image)

    whole = jax.jit(lambda p, x: plain.bind(p).encoder(x))({k: params[k] for k in plain.shapes}, image)
    assert_close(encode(1.0), whole, 1e-6)
    no_blocks = {k: jnp.zeros_like(v) if "/out/" in k or "/down/" in k else v for k, v in params.items()}
    bare = jax.jit(lambda p, x: plain.bind(p).encoder(x))({k: no_blocks[k] for k in plain.shapes}, image)
    assert_close(encode(0.0), bare, 1e-6)
    assert np.abs(np.asarray(encode(0.5) - whole)).max() > 1e-3


def test_convolutional_stem():
    """Tokens are those of 3 x 3 convolutions of stride 2, and one of stride 1, by hand."""
    options = EncoderOptions(encoder="w16d1h2m16/4", res=8, stem="conv", dtype="float32")
    blueprint = Blueprint(options)
    params = jax.jit(blueprint.init)(jax.random.key(0))
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32)
    found = jax.jit(lambda p, x: blueprint.bind(p).encoder.embed(x, jnp.float32))(params, jnp.asarray(image))
    x = image[0].astype(np.float64)
    for i, stride in enumerate((2, 2, 1)):
        kernel = np.asarray(params[f"encoder/stem/conv{i}"], np.float64)
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
        side = len(x) // stride
        out = np.zeros((side, side, kernel.shape[-1]))
        for row in range(side):
            for column in range(side):
                patch = padded[stride * row :, stride * column :][:3, :3]
                out[row, column] = np.einsum("yxc,yxco->o", patch, kernel)
        out = (out - out.mean((0, 1))) / np.sqrt(out.var((0, 1)) + 1e-5)
        x = np.asarray(jax.nn.gelu(jnp.asarray(out, jnp.float32), approximate=True), np.float64)
    expected = x.reshape(-1, x.shape[-1]) @ np.asarray(params["encoder/stem/out/kernel"], np.float64)
    assert_close(found[0], expected, 1e-5)
    with pytest.raises(UserError, match="patches of 2, 4, 8, 16 or 32 pixels, not 6"):
        EncoderOptions(encoder="w16d1h2m16/6", res=12, stem="conv")
