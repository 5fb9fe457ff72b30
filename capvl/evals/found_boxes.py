"""Data sets with boxes of classes, and a detector run over their images: what evaluators of detection share.

Every host reads what is true of all images and runs the detector on its rows of each batch; what is found comes to all
hosts, in the images' order, so that numbers don't depend on how many hosts or devices there are, or on the batch size.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from capvl.data.images.crops import Crop
from capvl.data.images.decode import image_size
from capvl.data.randomness import Uniforms
from capvl.data.reading import sources
from capvl.data.reading.classes import Category, categories
from capvl.data.reading.regions import DETECTION, FEATURES, Region, crowds, looked_for, regions
from capvl.errors import UserError, nearest
from capvl.evals import Context, finite
from capvl.evals.average_precision import Federated, Found, Objects
from capvl.evals.encode import over_batches
from capvl.inference.detecting import Seen, bucket_of, buckets


@dataclasses.dataclass(frozen=True)
class Truth:
    """What is in the images of a set.

    Attributes:
      source: of the images.
      what: they are, for messages.
      categories: the classes that are asked for, by label.
      sizes: (I, 2) int: height and width of each image in pixels.
      objects: boxes of these classes.
      federated: what was looked for, where the data set says so; else None.
    """

    source: sources.Source
    what: str
    categories: tuple[Category, ...]
    sizes: np.ndarray
    objects: Objects
    federated: Federated | None

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return [category.name for category in self.categories]


def opened(context: Context, name: str, split: str) -> sources.Source:
    """A data set with images and whatever says something of boxes."""
    return sources.open_source(name, split, context.data.directory(), features=("image", *FEATURES))


def read_truth(source: sources.Source, split: str, chosen: Sequence[str] = (), limit: int = 0) -> Truth:
    """What is in the images of a prepared data set.

    Args:
      source: the opened data set.
      split: for messages.
      chosen: names of the classes that count, in their order; () for all.
      limit: the first so many images; 0 for all.

    Raises:
      UserError: there is no closed list of classes, one is unknown, or no box of these classes is there; or boxes of an
        image have no class, so that nothing says whether it was searched for these.
    """
    what, known = f"{source.name!r}, split {split!r}", categories(source)
    if not known:
        raise UserError(f"Data set {source.name!r} has no closed list of classes, which detection is evaluated by.")
    by_name = {category.name: category for category in known}
    for name in chosen:
        if name not in by_name:
            raise UserError(f"Data set {source.name!r} has no class {name!r}." + nearest(name, by_name))
    kept = tuple(by_name[name] for name in dict.fromkeys(chosen)) or tuple(known)
    labels = {category.name: label for label, category in enumerate(kept)}
    count = min(limit or len(source), len(source))
    sizes, rows, lists = np.zeros((count, 2), int), [], []
    for i, record in enumerate(source.annotations((*FEATURES, *DETECTION, "height?", "width?"), range(count))):
        sizes[i] = _size(source, i, record)
        every = regions(record), crowds(record)
        if any(every) and not any(region.category or region.label >= 0 for found in every for region in found):
            raise UserError(
                f"Data set {what}, has an image ({sources.name_of(source, i)}) whose boxes have no class: it wasn't "
                "searched for the classes. Prepare such images as a data set of their own."
            )
        for crowd, found in zip((False, True), every, strict=True):
            for region in found:
                label = labels.get(region.category or (known[region.label].name if region.label >= 0 else ""), -1)
                if label >= 0:
                    rows.append((i, label, *_pixels(region, sizes[i]), crowd))
        lists.append(looked_for(record))
    if not rows or all(row[-1] for row in rows):
        raise UserError(f"Data set {what}, has no box of {'its' if not chosen else 'the chosen'} classes.")
    image, label, box, area, crowd = (np.array(column) for column in zip(*rows, strict=True))
    objects = Objects(image, label, box, area, crowd, crowd)
    return Truth(source, what, kept, sizes, objects, _federated(kept, labels, lists))


def _size(source: sources.Source, index: int, record: dict[str, Any]) -> tuple[int, int]:
    height, width = int(record.get("height", 0)), int(record.get("width", 0))
    return (height, width) if height and width else image_size(source.read(index, ("image",))["image"])


def _pixels(region: Region, size: np.ndarray) -> tuple[np.ndarray, float]:
    """Box of x, y, width and height, and area."""
    x0, y0, x1, y1 = np.array(region.box, np.float64) * size[[1, 0, 1, 0]]
    box = np.array([x0, y0, x1 - x0, y1 - y0])
    return box, region.area if region.area > 0 else float(box[2] * box[3])


def _federated(kept: Sequence[Category], labels: dict[str, int], lists: list) -> Federated | None:
    if not any(lists):
        return None
    pairs = [
        np.array(
            [(i, labels[name]) for i, own in enumerate(lists) if own for name in own[which] if name in labels], int
        ).reshape(-1, 2)
        for which in (0, 1)
    ]
    return Federated([category.frequency for category in kept], *pairs)


@dataclasses.dataclass(frozen=True)
class Images:
    """Some images of a source with what they are asked for: a source for `over_batches`, and its transform.

    Attributes:
      name: for messages.
      source: of the images.
      numbers: of the images.
      seen: how they become pixels.
      asked: number of an image -> further arrays of its row.
    """

    name: str
    source: sources.Source
    numbers: np.ndarray
    seen: Seen
    asked: Callable[[int], dict[str, np.ndarray]]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> dict[str, Any]:
        number = int(self.numbers[place])
        return {"image": self.source.read(number, ("image",))["image"], "number": number}

    def transform(self, example: dict[str, Any], uniforms: Uniforms) -> dict[str, np.ndarray]:
        """What `Seen` and `asked` give, and number int32."""
        row = self.seen(example, uniforms) | self.asked(example["number"])
        return row | {"number": np.int32(example["number"])}


def run(context: Context, source: sources.Source, sizes: np.ndarray, find, what: str, asked=lambda number: {}) -> Found:
    """What a detector finds in images; boxes in pixels, image by image, best first.

    Args:
      context: of the run.
      source: of the images.
      sizes: (I, 2) their heights and widths: the first so many are looked at.
      find: a batch on the devices -> `capvl.models.postprocess.Detections`.
      what: they are, for messages.
      asked: see `Images`.

    Raises:
      UserError: an image can't be decoded.
      NotFiniteError: a score is NaN.
    """
    crop = Crop.of_model(context.data, context.model, train=False)
    of_image = [bucket_of(context.model, tuple(size)) for size in sizes.tolist()]
    rows, seen = [], np.zeros(len(sizes), bool)

    def found(batch):
        mask, number = batch.pop("mask"), batch.pop("number")
        batch.pop("index")
        return find(batch), mask, number

    def real(arrays):
        detections, mask, number = arrays
        score, valid = detections.score_BM, detections.valid_BM & mask[:, None]
        finite(score[mask], f"scores of {what}")
        columns = np.broadcast_to(number[:, None], score.shape), detections.label_BM, detections.box_BM4, score
        return [column[valid] for column in columns], number[mask]

    for bucket in buckets(context.model):
        numbers = np.flatnonzero([own == bucket for own in of_image])
        if not len(numbers):
            continue
        images = Images(what, source, numbers, Seen(crop.in_bucket(bucket)), asked)
        title = f"images of {what}, {bucket}"
        for columns, there in over_batches(context, images, images.transform, found, title, after=real):
            rows.append(columns)
            seen[there] = True
    if not seen.all():
        raise UserError(f"Data set {what} has images that can't be decoded; prepare it again.")
    return _collected(rows, sizes)


def _collected(rows: list[list[np.ndarray]], sizes: np.ndarray) -> Found:
    image, label, box, score = (np.concatenate(column) for column in zip(*rows, strict=True))
    # Batches come by their images' sizes.
    order = np.lexsort((-score, image))
    box = box[order].astype(np.float64) * sizes[image[order]][:, [1, 0, 1, 0]]
    box[:, 2:] -= box[:, :2]
    return Found(image[order], label[order], box, score[order].astype(np.float64), np.zeros(len(order), bool))


def corners(box: np.ndarray, size: np.ndarray) -> np.ndarray:
    """(…, 4) of x, y, width and height in pixels -> (x0, y0, x1, y1) in fractions of an image of (height, width)."""
    ends = np.concatenate([box[..., :2], box[..., :2] + box[..., 2:]], axis=-1)
    return ends / np.asarray(size, np.float64)[[1, 0, 1, 0]]
