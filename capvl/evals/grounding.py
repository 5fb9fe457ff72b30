"""Visual grounding: is the box that is found for a phrase the right one? (RefCOCO/+/g, Flickr30k Entities, scenes.)

X-VLM (arXiv 2111.08276, section 4.4) has it supervised, by the box head, and weakly supervised, by Grad-CAM.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from capvl.data.images.crops import Crop
from capvl.data.images.decode import decode, image_size
from capvl.data.randomness import Uniforms
from capvl.data.reading import lookup, sources
from capvl.data.reading.regions import FEATURES, regions
from capvl.errors import UserError
from capvl.evals import Context, Pictures, boxes, check_limits, detections, finite
from capvl.evals.encode import over_batches, tokenize
from capvl.inference.compiled import compiled
from capvl.inference.grounding import candidates, locator, method_of, picture, whole
from capvl.terminal import say

PHRASES = 4
"""Phrases that an image is encoded for at once."""
SHOWN = 16
TRAINING = 5_000
"""Training images whose boxes the baselines know."""


@dataclasses.dataclass(frozen=True)
class Grounding:
    """Yields `accuracy`: the share of phrases whose box is found, with an IoU of at least 0.5; `accuracy/low` and
    `accuracy/high`: its 95 % bootstrap interval over images; `accuracy/pixel`: with the IoU of RefCOCO's code
    (`capvl.evals.boxes.pixel_ious`); `iou`: the mean IoU; `count` of phrases. Beside them, always, the accuracy of what
    doesn't look: `chance` (a random box of the training set), `centre` (the middle, half as wide and high as the
    image), `mean_box` (the mean size at the mean place of the training set); and `Pictures`, the true boxes in green.

    A phrase that belongs to several boxes of an image is found where one of them is, or, with `merged`, the box around
    all of them (Flickr30k Entities, arXiv 1505.04870). Images are squashed to the model's square.

    Attributes:
      name: data set whose regions have phrases; "" for the training set's, of kinds the last one's.
      split: one, or several with commas between them, such as "val,testA,testB"; then SPLIT/ begins the names.
      limit: phrases of a split; 0 for all.
      method: "box", "gradcam", "itc" or "itm" (`capvl.inference.grounding.METHODS`); "" for "box" where the model has a
        box head, else "gradcam".
      detections: file of boxes that are chosen from (`capvl.evals.detections`), for all methods but "box"; "" for all
        rectangles of a grid; {data_dir} is where prepared data sets are.
      cells: side of that grid; 0 for 32 of a heat map, which is enlarged to it, and 5 where each box is scored.
      layer: of Grad-CAM: a cross-modal layer, from 0; -1 for the paper's.
      merged: see above.
      train: split that the baselines are fitted on; "" for none of these.
    """

    name: str = ""
    split: str = "val"
    limit: int = 0
    method: str = ""
    detections: str = ""
    cells: int = 0
    layer: int = -1
    merged: bool = False
    train: str = "train"

    def __post_init__(self):
        check_limits(self, "limit", "cells")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        method = method_of(context.model, self.method)
        how = dict(layer=self.layer, cells=self.cells, given=bool(self.detections))
        find = compiled(context.blueprint, locator(context.model, method, **how))
        name = self.name or list(context.data.kinds().values())[-1].parts()[0][0]
        file = context.path(self.detections)
        found = detections.read(file) if file else None
        parts = {split: self._asked(context, name, split, found, file) for split in self.split.split(",")}
        known = None
        if self.train:
            rows = read_rows(opened(context, name, self.train), TRAINING)
            known = np.concatenate([row.boxes for row in rows])

        def evaluate(params):
            for split, asked in parts.items():
                prefix = f"{split}/" if len(parts) > 1 else ""
                box_N4, heats, size_N2 = run(context, asked, find, params)
                yield from ((prefix + key, value) for key, value in results(asked.rows, box_N4, size_N2, context.seed))
                yield from ((prefix + key, value) for key, value in baselines(asked.rows, known))
                yield f"{prefix}pictures", pictures(asked, box_N4, heats, f"{name}, {split}")

        return evaluate

    def _asked(self, context: Context, name: str, split: str, found: lookup.Names | None, file: str) -> "Asked":
        source = opened(context, name, split)
        rows = read_rows(source, limit=self.limit, merged=self.merged)
        if not rows:
            raise UserError(
                f"Data set {name!r} has no regions with phrases in its split {split!r}, which grounding needs."
            )
        given, what = None, f"{name!r}, split {split!r}"
        if found is not None:
            images = sorted({row.image for row in rows})
            records = source.annotations(lookup.NAMED_BY, images)
            names = [lookup.names_in(record, i) for i, record in zip(images, records, strict=True)]
            given = dict(zip(images, detections.of_images(found, file, names, what), strict=True))
        tokens = tokenize(context, [row.phrase for row in rows])
        crop = whole(Crop.of_model(context.data, context.model, train=False))
        return Asked(what, source, rows, tokens, crop, context.model.grid, given)


class Row(NamedTuple):
    """One phrase: the image's number, and the boxes (T, 4) of which any is right."""

    image: int
    phrase: str
    boxes: np.ndarray


def opened(context: Context, name: str, split: str) -> sources.Source:
    """A data set with images and whatever says something of regions."""
    return sources.open_source(name, split, context.data.directory(), features=("image", *FEATURES))


def read_rows(source: sources.Source, images: int = 0, *, limit: int = 0, merged: bool = False) -> list[Row]:
    """Phrases of the regions of a source; boxes without area are left out, and counted.

    Boxes of one thing are asked for once a phrase, or as often as it was said of that thing alone. Two things that one
    expression happens to name are asked for one by one, as in RefCOCO, where the other's box is then wrong.

    Args:
      source: the opened data set.
      images: the first so many; 0 for all.
      limit: phrases; 0 for all.
      merged: several boxes of a phrase become the one around them.
    """
    rows, empty = [], 0
    chosen = range(min(images or len(source), len(source)))
    for i, record in enumerate(source.annotations(FEATURES, chosen, likely=limit)):
        said: dict[tuple, list] = {}
        for region in regions(record):
            x0, y0, x1, y1 = region.box
            if x0 < x1 and y0 < y1:
                for place, phrase in enumerate(region.phrases):
                    before = region.phrases[:place].count(phrase)
                    said.setdefault((phrase, region.chain, before), []).append(region.box)
            else:
                empty += 1
        for (phrase, *_), own in said.items():
            true = np.array(own)
            if merged:
                true = np.concatenate([true[:, :2].min(axis=0), true[:, 2:].max(axis=0)])[None]
            if phrase.strip():
                rows.append(Row(i, phrase, true))
        if limit and len(rows) >= limit:
            break
    if empty:
        say(f"{empty} regions of {source.name!r} have no area and are left out.")
    return rows[: limit or None]


@dataclasses.dataclass(frozen=True)
class Asked:
    """Images with PHRASES of their phrases each: a source for `over_batches`, and its transform.

    Attributes:
      name: for messages.
      source: of the images.
      rows, tokens: phrases and their tokens (N, L).
      crop: see `capvl.inference.grounding.whole`.
      grid: rows and columns of a heat map.
      given: image's number -> detections, (D, 4) of x, y, width and height in pixels.
    """

    name: str
    source: sources.Source
    rows: list[Row]
    tokens: np.ndarray
    crop: Crop
    grid: tuple[int, int]
    given: dict[int, np.ndarray] | None

    def __post_init__(self):
        parts: list[list[int]] = []
        for number, row in enumerate(self.rows):
            if not parts or len(parts[-1]) == PHRASES or self.rows[parts[-1][0]].image != row.image:
                parts.append([])
            parts[-1].append(number)
        object.__setattr__(self, "parts", parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        own = self.parts[number]
        return {"image": self.image(self.rows[own[0]]), "rows": own}

    def image(self, row: Row) -> bytes:
        """The encoded image of a phrase."""
        return self.source.read(row.image, ("image",))["image"]

    def transform(self, example: dict[str, Any], uniforms: Uniforms) -> dict[str, np.ndarray]:
        """image, text (S, L), row int32 (S,) of each (-1 where none is), size (2,) of the image, and with detections
        the arrays of `candidates`."""
        own, image = example["rows"], example["image"]
        padded = own + own[:1] * (PHRASES - len(own))  # So that no text is empty.
        row_S = np.array(own + [-1] * (PHRASES - len(own)), np.int32)
        size = image_size(image)
        out = {"image": self.crop(example, uniforms), "text": self.tokens[padded], "row": row_S}
        out["size"] = np.array(size, np.int32)
        if self.given is not None:
            index = self.rows[own[0]].image
            name = lookup.names_of(self.source, index)[0]
            boxes_D4 = detections.in_fractions(self.given[index], size, name)
            out |= candidates(boxes_D4, size, self.grid, max(map(len, self.given.values())))
        return out


def run(context: Context, asked: Asked, find, params) -> tuple[np.ndarray, dict[int, np.ndarray], np.ndarray]:
    """Boxes (N, 4) found for all phrases, heat maps of those to show by their numbers, where there are any, and sizes
    (N, 2) of the images.

    Raises:
      UserError: an image can't be decoded.
      NotFiniteError: a box is NaN.
    """
    box_N4, size_N2 = np.full((len(asked.rows), 4), np.nan), np.zeros((len(asked.rows), 2))
    heats, seen, shown = {}, np.zeros(len(asked.rows), bool), boxes.to_show([row.image for row in asked.rows], SHOWN)

    def ask(batch):
        own = {key: batch.pop(key) for key in ("row", "mask", "size")}
        batch.pop("index")
        found = find(params, batch)
        if len(heats) == len(shown):
            found.pop("heat", None)
        return found | own

    def keep(found) -> None:
        there = (found["row"] >= 0) & found["mask"][:, None]
        rows = found["row"][there]
        box_N4[rows], seen[rows] = found["box"][there], True
        size_N2[rows] = np.repeat(found["size"][:, None], PHRASES, axis=1)[there]
        if "heat" in found:
            heats.update((n, heat) for n, heat in zip(rows.tolist(), found["heat"][there], strict=True) if n in shown)

    over_batches(context, asked, asked.transform, ask, f"phrases of {asked.name}", after=keep)
    if not seen.all():
        raise UserError(f"Data set {asked.name} has images that can't be decoded; prepare it again.")
    return finite(box_N4, f"boxes of {asked.name}"), heats, size_N2


def best_ious(rows: list[Row], box_N4: np.ndarray) -> np.ndarray:
    """IoU (N,) of each box with the nearest of those that are right."""
    return np.array([boxes.ious(box[None], row.boxes).max() for box, row in zip(box_N4, rows, strict=True)])


def results(rows: list[Row], box_N4: np.ndarray, size_N2: np.ndarray, seed: int) -> Iterator[tuple[str, float]]:
    """(name, value) of what `Grounding` yields of the model."""
    iou_N = best_ious(rows, box_N4)
    right_N = iou_N >= boxes.RIGHT
    yield "accuracy", float(right_N.mean())
    low, high = boxes.interval(right_N.astype(np.float64), np.array([row.image for row in rows]), seed)
    yield "accuracy/low", low
    yield "accuracy/high", high
    triples = zip(box_N4, rows, size_N2, strict=True)
    pixel_N = [boxes.pixel_ious(box[None], row.boxes, size).max() >= boxes.RIGHT for box, row, size in triples]
    yield "accuracy/pixel", float(np.mean(pixel_N))
    yield "iou", float(iou_N.mean())
    yield "count", float(len(rows))


def baselines(rows: list[Row], known_M4: np.ndarray | None) -> Iterator[tuple[str, float]]:
    """(name, accuracy) of boxes that were found without looking; `known_M4` are those of the training set."""
    always = {"centre": np.array(boxes.CENTRE)}
    if known_M4 is not None:
        yield "chance", float(boxes.chances([row.boxes for row in rows], known_M4).mean())
        always["mean_box"] = boxes.mean_box(known_M4)
    for name, box in always.items():
        iou_N = best_ious(rows, np.repeat(box[None], len(rows), axis=0))
        yield name, float((iou_N >= boxes.RIGHT).mean())


def pictures(asked: Asked, box_N4: np.ndarray, heats: dict[int, np.ndarray], title: str) -> Pictures:
    """SHOWN phrases, drawn."""
    drawn, captions = [], []
    for number in boxes.to_show([row.image for row in asked.rows], SHOWN):
        row = asked.rows[number]
        pixels = decode(asked.image(row))
        drawn.append(picture(pixels, "", box_N4[number], true=row.boxes, heat=heats.get(number)))
        captions.append(f"{row.phrase}: IoU {best_ious([row], box_N4[number : number + 1])[0]:.2f}")
    return Pictures(f"{title}: green is right, red was found", drawn, captions)
