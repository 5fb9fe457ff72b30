"""Where phrases are in images: by a box head, by Grad-CAM of the matching head, or as the best of candidate boxes.

X-VLM (arXiv 2111.08276, sections 3.2 and 4.4): the cross-modal encoder's box head; or, where no box was trained, the
cross-attention of one of its layers weighed by its gradient (Grad-CAM, 1610.02391, as ALBEF has it, 2107.07651).

Letters: B images, S phrases of each, L tokens, D candidate boxes of an image, Y and X rows and columns of a map, N
image tokens, H heads, R rows of phrases.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError, decode
from capvl.data.images.drawing import draw_boxes, enlarged, heat_map
from capvl.data.images.encoded import encoded
from capvl.data.images.geometry import Size
from capvl.data.randomness import Uniforms
from capvl.data.text.tokenizers import too_long
from capvl.errors import UserError, nearest
from capvl.inference.compiled import Function
from capvl.inference.inputs import Images, Texts, as_list, check_whole_number
from capvl.inference.loaded import Loaded
from capvl.inference.matching import text_vectors
from capvl.models.abilities import Ability, abilities, require
from capvl.nn.padding import real
from capvl.nn.positions import bicubic

METHODS = {
    "box": (Ability.BOXES,),
    "gradcam": (Ability.MATCHES,),
    "itc": (Ability.REGIONS, Ability.TEXTS),
    "itm": (Ability.REGIONS, Ability.MATCHES),
}
"""What a method of grounding needs."""
CELLS = {"gradcam": 32, "itc": 5, "itm": 5}
"""Side of the grid whose rectangles are the candidates, where none are given."""
TRUE, FOUND = (40, 190, 60), (230, 50, 50)
"""Colours of boxes in pictures: what is right, and what was found."""


def method_of(options: Any, method: str = "") -> str:
    """A method of METHODS; of "" the box head where a model has one, else Grad-CAM.

    Raises:
      UserError: it is unknown, or the model lacks what it needs.
    """
    if not isinstance(method, str):
        raise UserError(f"method should be a text, not {method!r}.")
    if not method:
        require(options, "Grounding", Ability.BOXES, Ability.MATCHES)
        method = "box" if Ability.BOXES in abilities(options) else "gradcam"
    if method not in METHODS:
        raise UserError(f"Grounding has no method {method!r}." + nearest(method, METHODS))
    for ability in METHODS[method]:
        require(options, f"Grounding by method={method!r}", ability)
    return method


def layer_of_map(options: Any, layer: int) -> int:
    """Number of the cross-modal layer whose attention Grad-CAM takes; -1 is the paper's: the first of the upper half
    (X-VLM's layer 9 of BERT's 12, of which 6 to 11 are cross-modal).

    Raises:
      UserError: there is no such layer.
    """
    count = options.cross_layers
    check_whole_number("layer", layer, -1)
    if not -1 <= layer < count:
        raise UserError(f"layer={layer}: the model's cross-modal layers are 0 to {count - 1}; -1 is the paper's.")
    return count // 2 if layer == -1 else layer


def whole(crop: Crop) -> Crop:
    """The crop that shows all of an image, squashed, as X-VLM is evaluated: fractions of it are fractions of the
    image. A central square would cut off what is asked for."""
    return dataclasses.replace(crop, kind="squash", fraction=1.0)


def locator(options: Any, method: str, *, layer: int = -1, cells: int = 0, given: bool = False) -> Function:
    """The function (model, rows) -> found of a method.

    Rows are a dict: `image` (B, R, R, 3), `text` (B, S, L), and with `given` the arrays of `candidates`. What is found
    is a dict: `box` (B, S, 4) in fractions of the image, `score` (B, S), and of Grad-CAM `heat` (B, S, Y, X).

    Args:
      options: of the model.
      method: of METHODS.
      layer: see `layer_of_map`.
      cells: side of the grid whose rectangles are the candidates where none are given; 0 for CELLS.
      given: candidates are.

    Raises:
      UserError: see `method_of` and `layer_of_map`.
    """
    method = method_of(options, method)
    if method == "box":
        if given:
            raise UserError("A box head finds boxes of its own; given ones need method='gradcam', 'itc' or 'itm'.")
        return by_head
    cells = cells or CELLS[method]
    if method == "gradcam":
        how = dict(layer=layer_of_map(options, layer), grid=options.grid, cells=cells)
        return functools.partial(by_gradcam, given=given, **how)
    return functools.partial(by_regions, by=method, cells=cells, given=given)


def by_head(model, rows) -> dict[str, jax.Array]:
    """See `locator`; the score is 1: the head has none."""
    text_BSL = rows["text"]
    found = model.locate(model.encode(rows["image"]), text_BSL.reshape(-1, text_BSL.shape[-1]))
    box_BS4 = jnp.clip(found, 0.0, 1.0).reshape(*text_BSL.shape[:2], 4)
    return {"box": box_BS4, "score": jnp.ones(text_BSL.shape[:2])}


def by_gradcam(model, rows, *, layer: int, grid: Size, cells: int, given: bool) -> dict[str, jax.Array]:
    """See `locator`: the candidate with the most heat, which is the sum of the map in it over the root of its area."""
    heat_BSYX = heat_maps(model, rows["image"], rows["text"], layer=layer, grid=grid)
    if given:
        sums = (heat_BSYX, rows["rows"], rows["columns"])
        sum_BSD = jnp.einsum("bsyx,bdy,bdx->bsd", *sums, precision=jax.lax.Precision.HIGHEST)
        box_BS4, score_BS = best_of(sum_BSD * rows["inverse_root"][:, None], rows["boxes"], rows["there"])
    else:
        up_y, up_x = (jnp.asarray(bicubic(side, cells), jnp.float32) for side in grid)
        finer = jnp.einsum("yr,xc,bsrc->bsyx", up_y, up_x, heat_BSYX, precision=jax.lax.Precision.HIGHEST)
        box, score = best_rectangles(finer.reshape(-1, cells, cells))
        box_BS4, score_BS = box.reshape(*heat_BSYX.shape[:2], 4), score.reshape(heat_BSYX.shape[:2])
    return {"box": box_BS4, "score": score_BS, "heat": heat_BSYX}


def by_regions(model, rows, *, by: str, cells: int, given: bool) -> dict[str, jax.Array]:
    """See `locator`: the candidate whose region has the highest cosine ("itc") or matching score ("itm")."""
    image = rows["image"]
    if given:
        box_BD4, there_BD = rows["boxes"], rows["there"]
    else:
        box_D4 = jnp.asarray(rectangles(cells, cells))
        box_BD4 = jnp.broadcast_to(box_D4[None], (len(image), *box_D4.shape))
        there_BD = jnp.ones(box_BD4.shape[:2], bool)
    box_BS4, score_BS = best_of(region_scores(model, image, box_BD4, rows["text"], by), box_BD4, there_BD)
    return {"box": box_BS4, "score": score_BS}


def heat_maps(model, image_BRRC, text_BSL, *, layer: int, grid: Size) -> jax.Array:
    """Grad-CAM of phrases: where the image tokens are that made the matching head say yes, (B, S, Y, X) float32.

    With A the cross-attention of a layer and G the gradient of the summed matching scores by it: the mean over heads
    and all L tokens of A max(G, 0), padding's tokens being 0, without the image's summary (X-VLM's code).
    """
    (batch, phrases, length), (height, width) = text_BSL.shape, grid
    text_RL = text_BSL.reshape(-1, length)
    weights_RHLN, score = model.opened_match(model.encode(image_BRRC), text_RL, layer)
    gradient_RHLN = jax.grad(lambda weights: score(weights).sum())(weights_RHLN)
    heat_RHLN = jnp.where(real(text_RL)[:, None, :, None], weights_RHLN * jnp.maximum(gradient_RHLN, 0.0), 0.0)
    return heat_RHLN.mean(axis=(1, 2))[:, 1:].reshape(batch, phrases, height, width)


def region_scores(model, image_BRRC, box_BD4, text_BSL, by: str) -> jax.Array:
    """Scores (B, S, D) float32 of phrases with regions, which are encoded from their image's tokens: cosines ("itc") or
    the matching head's ("itm")."""
    (batch, count), (_, phrases, length) = box_BD4.shape[:2], text_BSL.shape
    regions = model.regions(image_BRRC, box_BD4, jnp.zeros((batch, count), jnp.int32))
    if by == "itc":
        region_BDE = model.embed_tokens(regions.tokens_RND).reshape(batch, count, -1)
        text_BSE = text_vectors(model, text_BSL.reshape(-1, length)).reshape(batch, phrases, -1)
        return jnp.einsum("bse,bde->bsd", text_BSE, region_BDE)

    def score(text_BL):
        states, text = (jnp.repeat(x, count, axis=0) for x in (model.states(text_BL), text_BL))
        return model.match(regions.tokens_RND, text, regions.inside_RN, states_BLD=states).reshape(batch, count)

    return jnp.swapaxes(jax.lax.map(score, jnp.swapaxes(text_BSL, 0, 1)), 0, 1)


def best_of(score_BSD, box_BD4, there_BD) -> tuple[jax.Array, jax.Array]:
    """Box (B, S, 4) and score (B, S) of the best candidate of each phrase that is there."""
    score_BSD = jnp.where(there_BD[:, None], score_BSD, -jnp.inf)
    box_BS4 = jax.vmap(lambda boxes, best: boxes[best])(box_BD4, score_BSD.argmax(axis=2))
    return box_BS4, score_BSD.max(axis=2)


def rectangles(rows: int, columns: int) -> np.ndarray:
    """All boxes (D, 4) float32 of a grid: (x0, y0, x1, y1) in fractions; rows times columns of pairs of borders."""
    (top, bottom), (left, right) = (np.triu_indices(count + 1, 1) for count in (rows, columns))
    y0, x0 = np.meshgrid(top / rows, left / columns, indexing="ij")
    y1, x1 = np.meshgrid(bottom / rows, right / columns, indexing="ij")
    return np.stack([x0, y0, x1, y1], axis=-1).reshape(-1, 4).astype(np.float32)


def best_rectangles(map_BYX) -> tuple[jax.Array, jax.Array]:
    """Of all rectangles of a map's places the one with the most in it: its sum over the root of its area, which is in
    places. An exact search: an integral image, then all pairs of columns (P of them) with each pair of rows.

    Returns:
      Boxes (B, 4) in fractions and those values (B,).
    """
    rows, columns = map_BYX.shape[1:]
    (top, bottom), (left, right) = (np.triu_indices(count + 1, 1) for count in (rows, columns))
    integral = jnp.pad(map_BYX.cumsum(axis=1).cumsum(axis=2), ((0, 0), (1, 0), (1, 0)))
    across_BYP = integral[:, :, right] - integral[:, :, left]

    def step(carry, pair):
        best_B, value_B = carry
        number, first, last, root_P = pair
        value_BP = (across_BYP[:, last] - across_BYP[:, first]) / root_P[None]
        found_B = number * len(left) + value_BP.argmax(axis=1)
        better = value_BP.max(axis=1) > value_B
        return (jnp.where(better, found_B, best_B), jnp.where(better, value_BP.max(axis=1), value_B)), None

    root = np.sqrt(np.outer(bottom - top, right - left)).astype(np.float32)
    pairs = (jnp.arange(len(top)), top, bottom, root)
    nothing = jnp.zeros(len(map_BYX), jnp.int32), jnp.full(len(map_BYX), -jnp.inf)
    (best_B, value_B), _ = jax.lax.scan(step, nothing, jax.tree.map(jnp.asarray, pairs))
    return jnp.asarray(rectangles(rows, columns))[best_B], value_B


def candidates(boxes_D4, size: Size, grid: Size, slots: int = 0) -> dict[str, np.ndarray]:
    """Candidate boxes of one image as rows of a `locator`.

    `rows` (D, Y) and `columns` (D, X) say how much each place of a map counts in a box whose corners are rounded down
    to whole pixels, of the map enlarged to the image's size (bicubic); `inverse_root` is one over the root of the
    area, which isn't rounded. So the sum needs no enlarged map (X-VLM's code makes one).

    Args:
      boxes_D4: (x0, y0, x1, y1) in fractions of the image.
      size: (height, width) of the image in pixels.
      grid: rows and columns of the map.
      slots: how many boxes there is room for; by default as many as there are.
    """
    boxes = np.asarray(boxes_D4, np.float64).reshape(-1, 4)
    (height, width), count, slots = size, len(boxes), slots or len(boxes)
    # What was cut out of pixels comes back to them, whatever dividing by the size did to its last bits.
    pixels = boxes * np.array([[width, height, width, height]]) + 1e-3
    x0, y0, x1, y1 = np.clip(pixels.astype(int), 0, np.array([[width, height, width, height]])).T
    up = [np.pad(bicubic(g, n).cumsum(axis=0), ((1, 0), (0, 0))) for g, n in zip(grid, size, strict=True)]
    area = (boxes[:, 2] - boxes[:, 0]) * width * (boxes[:, 3] - boxes[:, 1]) * height
    found = {"boxes": boxes, "rows": up[0][y1] - up[0][y0], "columns": up[1][x1] - up[1][x0]}
    found["inverse_root"] = 1 / np.sqrt(np.maximum(area, 1e-9))
    padded = {k: np.pad(v, ((0, slots - count), *[(0, 0)] * (v.ndim - 1))) for k, v in found.items()}
    return {k: v.astype(np.float32) for k, v in padded.items()} | {"there": np.arange(slots) < count}


@dataclasses.dataclass(frozen=True)
class Grounding:
    """Where a phrase is in an image.

    Attributes:
      phrase: what was asked for.
      box: (x0, y0, x1, y1) in fractions of the upright image.
      score: how well the phrase belongs to the image, by the matching head; None where the model has none.
      heat: Grad-CAM's map of the whole image, (Y, X) float32; None where the model has no matching head.
      image: the encoded image.
    """

    phrase: str
    box: tuple[float, float, float, float]
    score: float | None
    heat: np.ndarray | None
    image: bytes = dataclasses.field(repr=False)

    def picture(self, *, heat: bool = True) -> Image.Image:
        """The upright image, enlarged where it is small, with the box, and with the heat map where there is one and
        `heat` is True."""
        return Image.fromarray(picture(decode(self.image), self.phrase, self.box, heat=self.heat if heat else None))


def picture(pixels: np.ndarray, phrase: str, found, *, true: Sequence = (), heat: np.ndarray | None = None):
    """uint8 (H, W, 3): an image under a map, with what is right in green and what was found in red; small images by a
    whole factor larger, so that lines and names hide little."""
    pixels = enlarged(pixels)
    if heat is not None:
        rows, columns = (bicubic(g, n) for g, n in zip(heat.shape, pixels.shape[:2], strict=True))
        pixels = heat_map(pixels, np.maximum(rows @ heat @ columns.T, 0.0))
    boxes = [*true, found]
    return draw_boxes(pixels, boxes, [""] * len(true) + [phrase], [TRUE] * len(true) + [FOUND])


# What follows is a method of `capvl.inference.face.LoadedModel`.


def ground(
    self: Loaded, images: Images, phrases: Texts, *, method: str = "", layer: int = -1, boxes: Any = None
) -> Grounding | list[Grounding]:
    """Where phrases are in images.

    Args:
      images: one or several.
      phrases: one for each image; several of one image too.
      method: "box" (the box head), "gradcam" (the hottest rectangle of the matching head's heat map), "itc" or "itm"
        (the best of `boxes`, or of all rectangles of a coarse grid); "" for the first of these that the model has.
      layer: of the heat map: a cross-modal layer, from 0; -1 for the paper's.
      boxes: what to choose from, (D, 4) in fractions of the one upright image; not for method "box".

    Returns:
      A `Grounding` for one image and one phrase that is no list, else a list of them.

    Raises:
      UserError: the model lacks what the method needs, an image can't be read, phrases are not as many as images, or
        longer than the model reads.
    """
    method = method_of(self.options, method)
    several = images if isinstance(images, list | tuple) else [images]
    texts = as_list(phrases)
    if not several or len(several) not in (1, len(texts)):
        raise UserError(f"There are {len(texts)} phrases for {len(several)} images; give one for each image.")
    if long := too_long(self.tokenizer, texts, self.options.length):
        raise UserError(f"The phrase {long[0]!r} has more than the {self.options.length} tokens that the model reads.")
    data, crop = [encoded(image) for image in several], whole(self.crop)
    geometries, pixels = _seen(crop, data)
    repeats = len(texts) if len(several) == 1 else 1
    rows = {"image": np.repeat(pixels, repeats, axis=0), "text": self.ids(texts)[:, None]}
    if boxes is not None:
        rows |= _given(boxes, geometries, self.options.grid, len(texts))
    how = dict(layer=layer, given=boxes is not None)
    found = self.run(("ground", method, *how.values()), _with_score(self.options, method, how), rows)
    groundings = []
    for i, phrase in enumerate(texts):
        own = i // repeats
        box = tuple(map(float, geometries[own].upright_boxes(found["box"][i])[0]))
        score, heat = (found[key][i, 0] if key in found else None for key in ("match", "heat"))
        groundings.append(Grounding(phrase, box, None if score is None else float(score), heat, data[own]))
    single = isinstance(phrases, str) and not isinstance(images, list | tuple)
    return groundings[0] if single else groundings


def _seen(crop: Crop, data: list[bytes]):
    """Geometries of images, and their pixels (N, R, R, 3)."""
    geometries, pixels = [], []
    for number, image in enumerate(data):
        try:
            geometries.append(crop.draw({"image": image}, Uniforms(0, 0)))
            pixels.append(crop.pixels({"image": image}, Uniforms(0, 0), geometries[-1]))
        except BadImageError as e:
            raise UserError(f"Image {number} can't be used: {e}") from e
    return geometries, np.stack(pixels)


def _given(boxes: Any, geometries: list, grid: Size, count: int) -> dict[str, np.ndarray]:
    if len(geometries) > 1:
        raise UserError("Boxes to choose from can be given for one image at a time.")
    try:
        boxes = np.asarray(boxes, np.float32)
    except (TypeError, ValueError) as e:
        raise UserError("Boxes to choose from should be numbers (D, 4): x0, y0, x1, y1 in fractions.") from e
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise UserError(f"Boxes to choose from should be (D, 4): x0, y0, x1, y1 in fractions, not {boxes.shape}.")
    if not ((boxes >= 0) & (boxes <= 1)).all() or not (boxes[:, 2:] > boxes[:, :2]).all():
        raise UserError("Boxes to choose from should be x0 < x1 and y0 < y1, in fractions of the upright image.")
    one = candidates(boxes, geometries[0].upright, grid)
    return {key: np.repeat(value[None], count, axis=0) for key, value in one.items()}


def _with_score(options, method: str, how: dict[str, Any]) -> Function:
    """What a method finds, and where there is a matching head its score, `match` (B, S), and the heat map."""
    find = locator(options, method, **how)
    if Ability.MATCHES not in abilities(options):
        return find
    map_of = functools.partial(heat_maps, layer=layer_of_map(options, how["layer"]), grid=options.grid)

    def function(model, rows):
        text_BSL, found = rows["text"], find(model, rows)
        score_R = model.match(model.encode(rows["image"]), text_BSL.reshape(-1, text_BSL.shape[-1]))
        return {"heat": map_of(model, rows["image"], text_BSL), **found, "match": score_R.reshape(text_BSL.shape[:2])}

    return function
