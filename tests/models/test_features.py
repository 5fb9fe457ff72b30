"""Levels and the regions of their grids: by drawing boxes into images, by hand, and against X-VLM's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden

from capvl.models.features import Level, places_in_boxes, pool_regions

GRID, STRIDE = (3, 5), 8
HEIGHT, WIDTH = GRID[0] * STRIDE, GRID[1] * STRIDE


def boxes_in_pixels(count, seed=0):
    """(x0, y0, x1, y1) of whole pixels, none empty."""
    rng = np.random.default_rng(seed)
    x, y = (np.sort(rng.integers(0, side, (count, 2)), axis=1) for side in (WIDTH, HEIGHT))
    return np.stack([x[:, 0], y[:, 0], x[:, 1] + 1, y[:, 1] + 1], axis=1)


def fractions(boxes):
    return jnp.asarray(boxes / [WIDTH, HEIGHT, WIDTH, HEIGHT], jnp.float32)[None]


def painted(box):
    """The places of which a box paints a pixel."""
    image = np.zeros((HEIGHT, WIDTH), bool)
    x0, y0, x1, y1 = box
    image[y0:y1, x0:x1] = True
    return image.reshape(GRID[0], STRIDE, GRID[1], STRIDE).any(axis=(1, 3)).reshape(-1)


def test_a_box_has_the_places_that_it_paints():
    boxes = np.concatenate([boxes_in_pixels(60), [[0, 0, WIDTH, HEIGHT], [8, 8, 16, 16], [7, 15, 17, 16]]])
    found = np.asarray(jax.jit(lambda b: places_in_boxes(b, GRID))(fractions(boxes)))
    np.testing.assert_array_equal(found[0], [painted(box) for box in boxes])
    assert found[0, -3].all() and found[0, -2].sum() == 1 and found[0, -1].sum() == 3


def test_borders_are_no_places_whatever_the_rounding():
    """Boxes of whole places, whose fractions are rounded, have these and no others, in grids of any size."""
    for rows, columns in ((7, 7), (33, 49)):
        edges = [(r, c) for r in range(rows) for c in range(columns)]
        boxes = [(c / columns, r / rows, (c + 1) / columns, (r + 1) / rows) for r, c in edges]
        places = jax.jit(places_in_boxes, static_argnums=1)
        found = np.asarray(places(jnp.asarray(boxes, jnp.float32)[None], (rows, columns)))[0]
        np.testing.assert_array_equal(found, np.eye(rows * columns, dtype=bool))


def test_a_box_has_at_least_one_place():
    """Also an empty one at the right lower border, or beyond."""
    boxes = jnp.asarray([[[1.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.2, 1.2, 1.5, 1.5]]])
    found = np.asarray(places_in_boxes(boxes, GRID))[0]
    assert found.sum(axis=1).tolist() == [1, 1, 1] and found[0, -1] and found[1, 7] and found[2, -1]


def test_a_region_is_the_mean_of_its_places():
    """Tokens that are the mean colours of an image's patches: a region's is the mean of what it paints."""
    rng = np.random.default_rng(1)
    colors = rng.integers(0, 256, (1, GRID[0] * GRID[1], 3)).astype(np.float32)
    boxes = boxes_in_pixels(20, seed=2)
    tokens = jnp.concatenate([jnp.full((1, 1, 3), 1e6), jnp.asarray(colors)], axis=1)
    level = Level(tokens, GRID, STRIDE, prefix=1)
    pool = jax.jit(lambda level, boxes: pool_regions(level.tokens_BND, level.in_boxes(boxes)))
    pooled = np.asarray(pool(level, fractions(boxes)))
    assert_close(pooled[0], [colors[0, painted(box)].mean(axis=0) for box in boxes], 1e-5)
    nothing = pool_regions(tokens, jnp.zeros((1, 2, 16), bool))
    assert (np.asarray(nothing) == 0).all()


def test_a_mean_in_bfloat16_is_as_large_as_what_it_is_of():
    """1 / 49 is no bfloat16; the mean of 49 ones is 1."""
    pooled = pool_regions(jnp.ones((1, 49, 4), jnp.bfloat16), jnp.ones((1, 1, 49), bool))
    assert pooled.dtype == jnp.bfloat16 and (pooled == 1).all()


def test_padding_is_in_no_region():
    valid = np.zeros((1, *GRID), bool)
    valid[:, :2, :3] = True
    tokens = np.where(valid[..., None], 1.0, 1e6).astype(np.float32).reshape(1, -1, 1)
    level = Level(jnp.asarray(tokens), GRID, STRIDE, valid_BN=jnp.asarray(valid.reshape(1, -1)))
    box = jnp.asarray([[[0.0, 0.0, 1.0, 1.0], [0.9, 0.9, 1.0, 1.0]]])
    inside = level.in_boxes(box)
    assert inside.sum(axis=2).tolist() == [[6, 0]]
    assert np.asarray(pool_regions(level.tokens_BND, inside)).ravel().tolist() == [1.0, 0.0]
    assert level.map()[0, ..., 0].sum() == 6


def test_a_level_goes_through_jit_and_its_grid_stays_static():
    level = Level(jnp.ones((2, 16, 4)), GRID, STRIDE, prefix=1)

    @jax.jit
    def double(level):
        assert level.grid == GRID and isinstance(level.stride, int)
        return jax.tree.map(lambda x: 2 * x, level)

    out = double(level)
    assert (out.grid, out.stride, out.prefix, out.valid_BN) == (GRID, STRIDE, 1, None)
    assert out.map().shape == (2, *GRID, 4) and (out.map() == 2).all()


@pytest.mark.golden
def test_golden_boxes():
    golden = load_golden("xvlm", "xvlm_boxes.npz")
    for name in (n for n in golden if n.endswith("_boxes_xywh")):
        mask = name.removeprefix("in.").removesuffix("_boxes_xywh")
        res, patch = golden[f"in.{mask}_res_patch"].tolist()
        found = np.asarray(places_in_boxes(of_xywh(golden[name], res)[None], (res // patch,) * 2))
        np.testing.assert_array_equal(found[0], golden[f"out.{mask}"][:, 1:].astype(bool), err_msg=mask)


@pytest.mark.golden
def test_golden_regions():
    """X-VLM's [CLS] of a region over Swin's last level."""
    golden = load_golden("xvlm", "xvlm_swin.npz")
    image, box = golden["in.idx_to_group_img"], of_xywh(golden["in.boxes_xywh"], int(golden["cfg.image_res"]))
    tokens = jnp.asarray(golden["out.full"][image][:, 1:])
    side = round(tokens.shape[1] ** 0.5)
    level = Level(tokens, (side, side), int(golden["cfg.image_res"]) // side)
    inside = level.in_boxes(box[:, None])
    np.testing.assert_array_equal(inside[:, 0], golden["in.image_atts"][:, 1:].astype(bool))
    assert_close(pool_regions(level.tokens_BND, inside)[:, 0], golden["out.region"][:, 0], 1e-6)


def of_xywh(boxes, side):
    """Boxes x, y, width, height in pixels as corners in fractions."""
    return jnp.asarray(np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1) / side, jnp.float32)
