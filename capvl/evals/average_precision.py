"""Average precision of boxes: COCO's twelve metrics, and LVIS' with its rare, common and frequent classes.

Numbers are those of pycocotools and of the lvis package, from their definitions in NumPy. COCO: arXiv 1405.0312 and
its detection evaluation. LVIS: 1908.03195, section 3 (a federated data set); fixed AP: 2102.01066, as GLIP has it.

Letters: N objects, D detections, T thresholds of IoU, R recalls, K classes, A ranges of area, M limits of detections.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
AREAS = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
"""Least and most square pixels, by what stands behind a metric's name."""
LIMITS = (1, 10, 100)
"""Detections of a class in an image that COCO's recalls are taken at."""
FIXED = 10_000
"""Detections of a class in the whole set that fixed AP takes."""
FREQUENCIES = "rcf"
"""LVIS' classes in at most 10 training images, in at most 100, and in more."""
NONE = -1.0
"""What stands for a number that there is none of: no object of that kind is in the set."""


class Objects(NamedTuple):
    """What is in the images of a set.

    Attributes:
      image: (N,) int, number of its image.
      label: (N,) int, number of its class.
      box: (N, 4) float64 of x, y, width and height in pixels.
      area: (N,) float64, square pixels by the annotation: of the mask, where there is one.
      ignored: (N,) bool: found or not, it doesn't count.
      crowd: (N,) bool: any number of detections may lie on it.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    area: np.ndarray
    ignored: np.ndarray
    crowd: np.ndarray


class Found(NamedTuple):
    """What was found in the images of a set; of equal scores in an image what stands first is taken first.

    Attributes:
      image, label, box: as those of `Objects`, (D,) and (D, 4).
      score: (D,) float64.
      excused: (D,) bool: where it meets no object it is not wrong, as not all of its class are annotated there.
    """

    image: np.ndarray
    label: np.ndarray
    box: np.ndarray
    score: np.ndarray
    excused: np.ndarray

    def take(self, chosen: np.ndarray) -> "Found":
        """Detections by their numbers or by a mask."""
        return Found(*(column[chosen] for column in self))


@dataclasses.dataclass(frozen=True)
class Precision:
    """What all metrics are means of; NONE where a class has no object.

    Attributes:
      precision: (T, R, K, A, M) float64: the best precision at that recall or a higher one.
      recall: (T, K, A, M) float64: of all detections.
    """

    precision: np.ndarray
    recall: np.ndarray

    def ap(self, *, iou: float | None = None, area: str = "", limit: int = -1, classes=slice(None)) -> float:
        """Mean of precisions, over all thresholds or at one of IOUS; of a key of AREAS, of the limit of that number,
        of some classes."""
        part = self.precision[:, :, :, list(AREAS).index(area), limit][:, :, classes]
        return _mean(part if iou is None else part[_place(iou)])

    def ar(self, *, area: str = "", limit: int = -1) -> float:
        """Mean recall, as `ap`."""
        return _mean(self.recall[:, :, list(AREAS).index(area), limit])

    def per_class(self, iou: float | None = None) -> np.ndarray:
        """AP (K,) of each class; NONE where it has no object."""
        return np.array([self.ap(iou=iou, classes=[k]) for k in range(self.precision.shape[2])])

    def curve(self, iou: float | None = None) -> np.ndarray:
        """Precision (R,) at RECALLS, the mean of the classes that have objects; of the mean of all thresholds, or at
        one of IOUS. NONE where no class has any."""
        part = self.precision[:, :, :, 0, -1]
        part = part.mean(axis=0) if iou is None else part[_place(iou)]
        there = part[0] > NONE
        return part[:, there].mean(axis=1) if there.any() else np.full(len(part), NONE)


def _place(iou: float) -> int:
    return int(np.abs(IOUS - iou).argmin())


def _mean(values: np.ndarray) -> float:
    values = values[values > NONE]
    return float(values.mean()) if values.size else NONE


def coco(objects: Objects, found: Found, classes: int) -> tuple[dict[str, float], Precision]:
    """COCO's metrics: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl; NONE where there is none.

    Args:
      objects: of the set.
      found: of the set, of any number an image; of a class the best LIMITS[-1] count.
      classes: K.
    """
    result = measure(objects, found, classes, LIMITS)
    values = _precisions(result)
    values |= {f"AR{limit}": result.ar(limit=m) for m, limit in enumerate(LIMITS)}
    return values | {f"AR{area}": result.ar(area=area) for area in AREAS if area}, result


def class_agnostic(objects: Objects, found: Found) -> tuple[dict[str, float], Precision]:
    """As `coco`, of all classes as one: whether things are found, whatever they are taken for."""
    objects, found = (
        type(rows)(*(column[np.argsort(rows.label, kind="stable")] for column in rows)) for rows in (objects, found)
    )
    one = (rows._replace(label=np.zeros_like(rows.label)) for rows in (objects, found))
    return coco(*one, 1)


@dataclasses.dataclass(frozen=True)
class Federated:
    """What LVIS says of its images and classes: each image was searched for some classes alone.

    Attributes:
      frequency: a letter of FREQUENCIES of each class.
      negative: (P, 2) int of (image, label): the class is not in the image.
      not_exhaustive: (P, 2) int: not all of the class in the image are annotated.
    """

    frequency: Sequence[str]
    negative: np.ndarray
    not_exhaustive: np.ndarray


def lvis(objects: Objects, found: Found, federated: Federated) -> tuple[dict[str, float], Precision]:
    """LVIS' metrics: AP, AP50, AP75, APs, APm, APl, APr, APc, APf, AR, ARs, ARm, ARl; NONE where there is none.

    Detections of a class count in images alone that were searched for it; where not all of it are annotated, those that
    meet none are not wrong.

    Args:
      objects, federated: of the set.
      found: of the set, limited by `best_of_images` (300 an image: the standard) or `best_of_classes` (fixed AP).
    """
    classes = len(federated.frequency)

    def keys(image, label):
        return np.asarray(image, np.int64) * classes + np.asarray(label, np.int64)

    own = keys(found.image, found.label)
    searched = np.concatenate([keys(objects.image, objects.label), keys(*federated.negative.reshape(-1, 2).T)])
    excused = found.excused | np.isin(own, keys(*federated.not_exhaustive.reshape(-1, 2).T))
    found = found._replace(excused=excused).take(np.isin(own, searched))
    result = measure(objects, found, classes, (0,))
    values = _precisions(result)
    for letter in FREQUENCIES:
        chosen = [k for k, own in enumerate(federated.frequency) if own == letter]
        values[f"AP{letter}"] = result.ap(classes=chosen) if chosen else NONE
    return values | {f"AR{area}": result.ar(area=area) for area in AREAS}, result


def _precisions(result: Precision) -> dict[str, float]:
    values = {"AP": result.ap(), "AP50": result.ap(iou=0.5), "AP75": result.ap(iou=0.75)}
    return values | {f"AP{area}": result.ap(area=area) for area in AREAS if area}


def best_of_images(found: Found, most: int) -> Found:
    """The best so many detections of each image, whatever their classes."""
    return _best(found, found.image, most)


def best_of_classes(found: Found, most: int = FIXED) -> Found:
    """The best so many detections of each class in the whole set."""
    return _best(found, found.label, most)


def _best(found: Found, group: np.ndarray, most: int) -> Found:
    order = np.lexsort((-found.score, group))
    kept = order[_ranks(group[order]) < most]
    return found.take(np.sort(kept))


def _ranks(*keys: np.ndarray) -> np.ndarray:
    """(D,) int: of rows sorted by keys, how many rows of the same keys stand before each."""
    if not len(keys[0]):
        return np.zeros(0, int)
    new = np.ones(len(keys[0]), bool)
    new[1:] = np.any([key[1:] != key[:-1] for key in keys], axis=0)
    first = np.flatnonzero(new)
    return np.arange(len(new)) - np.repeat(first, np.diff([*first, len(new)]))


def measure(objects: Objects, found: Found, classes: int, limits: Sequence[int]) -> Precision:
    """Precision and recall of every class.

    Args:
      objects, found: of the set.
      classes: K.
      limits: how many of the best detections of a class in an image are taken, rising; 0 for all.
    """
    objects = Objects(*(column[np.lexsort((objects.image, objects.label))] for column in objects))
    found = found.take(np.lexsort((-found.score, found.image, found.label)))
    rank = _ranks(found.label, found.image)
    if limits[-1]:
        found, rank = found.take(rank < limits[-1]), rank[rank < limits[-1]]
    shape = (len(IOUS), len(RECALLS), classes, len(AREAS), len(limits))
    precision, recall = np.full(shape, NONE), np.full((shape[0], *shape[2:]), NONE)
    for k in range(classes):
        own, these = (slice(*np.searchsorted(rows.label, (k, k + 1))) for rows in (objects, found))
        part, there = Objects(*(column[own] for column in objects)), found.take(these)
        ignored_AN = part.ignored | _outside(part.area)
        count_A = (~ignored_AN).sum(axis=1)
        if not count_A.any():
            continue
        hit_ATD, ignored_ATD = _matched(part, ignored_AN, there)
        for m, limit in enumerate(limits):
            kept = np.flatnonzero(rank[these] < limit) if limit else np.arange(len(there.score))
            kept = kept[np.argsort(-there.score[kept], kind="stable")]
            for a in np.flatnonzero(count_A):
                curves = _curves(hit_ATD[a][:, kept], ignored_ATD[a][:, kept], count_A[a])
                precision[:, :, k, a, m], recall[:, k, a, m] = curves
    return Precision(precision, recall)


def _outside(area: np.ndarray) -> np.ndarray:
    """(A, N) bool: which are of none of a range."""
    low, high = (np.array(ends)[:, None] for ends in zip(*AREAS.values(), strict=True))
    return (area[None] < low) | (area[None] > high)


def _matched(objects: Objects, ignored_AN: np.ndarray, found: Found) -> tuple[np.ndarray, np.ndarray]:
    """Of the detections of one class, those of an image side by side, best first: whether each meets an object, and
    whether it is left out; both (A, T, D) bool."""
    hit_ATD = np.zeros((len(AREAS), len(IOUS), len(found.score)), bool)
    ignored_ATD = np.zeros_like(hit_ATD)
    for image in np.unique(objects.image):
        own, these = (slice(*np.searchsorted(rows.image, (image, image + 1))) for rows in (objects, found))
        part = Objects(*(column[own] for column in objects))
        iou_DN = ious(found.box[these], part.box, part.crowd)
        hit_ATD[:, :, these], ignored_ATD[:, :, these] = _match(iou_DN, ignored_AN[:, own], part.crowd)
    alone_AD = _outside(found.box[:, 2] * found.box[:, 3]) | found.excused
    return hit_ATD, ignored_ATD | (~hit_ATD & alone_AD[:, None])


def ious(a: np.ndarray, b: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU (D, N) float64 of boxes (D, 4) with boxes (N, 4) of x, y, width and height; where the latter is a crowd (N,)
    the share of the former that lies in it."""
    a, b = a[:, None], b[None]
    sides = np.minimum(a[..., :2] + a[..., 2:], b[..., :2] + b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    inner = np.where((sides > 0).all(axis=-1), sides.prod(axis=-1), 0.0)
    first, second = (np.broadcast_to(box[..., 2] * box[..., 3], inner.shape) for box in (a, b))
    union = np.where(crowd[None], first, first + second - inner)
    return np.divide(inner, union, out=np.zeros_like(inner), where=inner > 0)


def _match(iou_DN: np.ndarray, ignored_AN: np.ndarray, crowd_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the detections of a class in an image, best first: whether each meets an object that no better one has, and
    whether that is ignored; both (A, T, D) bool. An object that counts goes before an ignored one; of equal IoU the
    last is taken."""
    least_T = np.minimum(IOUS, 1 - 1e-10)
    free_ATN = np.ones((len(ignored_AN), len(IOUS), len(crowd_N)), bool)
    hit_ATD = np.zeros((*free_ATN.shape[:2], len(iou_DN)), bool)
    met_ATD = np.zeros_like(hit_ATD)
    ignored_ATN = np.broadcast_to(ignored_AN[:, None], free_ATN.shape)
    for d in np.flatnonzero((iou_DN >= least_T[0]).any(axis=1)):
        can = free_ATN & (iou_DN[d] >= least_T[:, None])
        counts = can & ~ignored_ATN
        can = np.where(counts.any(axis=2, keepdims=True), counts, can)
        best = len(crowd_N) - 1 - np.where(can, iou_DN[d], -1.0)[..., ::-1].argmax(axis=2)[..., None]
        hit = can.any(axis=2)
        hit_ATD[..., d] = hit
        met_ATD[..., d] = hit & np.take_along_axis(ignored_ATN, best, 2)[..., 0]
        now = np.take_along_axis(free_ATN, best, 2) & ~(hit[..., None] & ~crowd_N[best])
        np.put_along_axis(free_ATN, best, now, 2)
    return hit_ATD, met_ATD


def _curves(hit_TD: np.ndarray, ignored_TD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, R) and recall (T,) of detections, best first, of `count` objects."""
    right, wrong = ((own & ~ignored_TD).cumsum(axis=1).astype(float) for own in (hit_TD, ~hit_TD))
    recall = right / count
    precision = right / (wrong + right + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    last = recall[:, -1] if recall.shape[1] else np.zeros(len(recall))
    place_TR = np.stack([np.searchsorted(row, RECALLS, side="left") for row in recall])
    # Behind the last detection precision is 0.
    return np.take_along_axis(np.pad(precision, ((0, 0), (0, 1))), place_TR, 1), last
