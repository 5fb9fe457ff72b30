"""Detection: average precision of the boxes that a list of classes finds, as COCO measures it (arXiv 1405.0312).

GLIP (2112.03857) is asked by prompts of the classes' names, zero-shot or tuned (section 4.1; ODinW: 4.3).
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from capvl.data.examples.grounded import vocabulary
from capvl.data.images.decode import decode
from capvl.data.images.drawing import draw_boxes, enlarged
from capvl.data.reading import sources
from capvl.data.reading.classes import Category
from capvl.data.text import category_prompts
from capvl.errors import UserError
from capvl.evals import Confusion, Context, Curves, Pictures, average_precision, check_limits, found_boxes, submissions
from capvl.evals.average_precision import NONE, RECALLS, Found, Objects, Precision
from capvl.evals.found_boxes import Truth
from capvl.inference.compiled import compiled
from capvl.inference.detecting import How, detect, prompts_of, states_of
from capvl.inference.grounding import FOUND, TRUE
from capvl.lines import read_json
from capvl.models.abilities import Ability
from capvl.terminal import say

SHOWN, SURE, UPON = 16, 0.3, 0.7
"""Pictures; and the least score of what is drawn, and counted in the confusion."""
COMMON = 20
"""Classes of the confusion."""


@dataclasses.dataclass(frozen=True)
class Asking:
    """A data set, and how a detector is asked for its classes: options of `Detection` and `Lvis`.

    Attributes:
      name: data set with boxes of a closed list of classes; "" for the training set's, the first.
      split: of it.
      limit: images; 0 for all.
      classes: names of those that are asked for and count; () for all.
      words: JSON file {class: {"said", "prefix", "suffix", "description"}} of how prompts say classes; "" for their
        names; {data_dir} is where prepared data sets are.
      described: what the data set says of a class stands behind its name.
      prefix: what stands before the classes, such as "object detection : "; "" for what stood there in training, a
        blank for nothing.
      chunk: classes of a prompt at most; 0 for as many as it has room for.
      kind, threshold, per_level, overlap, across: see `capvl.inference.detecting.How`.
      submission: whether what was found is written to submissions/, as COCO's, LVIS' and EvalAI's servers take it.
    """

    name: str = ""
    split: str = "val"
    limit: int = 0
    classes: tuple[str, ...] = ()
    words: str = ""
    described: bool = False
    prefix: str = ""
    chunk: int = 0
    kind: str = "mean"
    threshold: float = 0.05
    per_level: int = 1000
    overlap: float = 0.6
    across: float = 0.0
    submission: bool = False

    def __post_init__(self):
        check_limits(self, "limit", "chunk")
        self.how(1, 0)

    def how(self, most: int, kept: int) -> How:
        """See `capvl.inference.detecting.How`."""
        return How(self.kind, self.threshold, self.per_level, self.overlap, most, kept, self.across)

    def truth(self, context: Context) -> Truth:
        """What is in the images."""
        name = self.name or context.data.parts()[0][0]
        return found_boxes.read_truth(
            found_boxes.opened(context, name, self.split), self.split, self.classes, self.limit
        )

    def finder(self, context: Context, truth: Truth, how: How):
        """params -> what is found (`Found`). The classes are encoded once."""
        context.require(Ability.DETECTS, type(self).__name__.lower())
        asked = prompts_of(self._vocabulary(context, truth).prompts(self.chunk))
        encode = compiled(context.blueprint, states_of)

        def function(model, rows):
            return detect(model, *rows, how=how)

        find = compiled(context.blueprint, function)

        def found(params) -> Found:
            states = encode(params, asked.tokens_RPL)

            def of_batch(batch):
                return find(params, (batch, asked, states))

            return found_boxes.run(context, truth.source, truth.sizes, of_batch, truth.what)

        return found

    def _vocabulary(self, context: Context, truth: Truth):
        """Classes as the model reads them."""
        words = self._words(context, truth.names)
        said = [self._said(category, words) for category in truth.categories]
        tokenizer = None if context.model.classes else context.tokenizer()
        prefix = self.prefix or getattr(context.objective, "prefix", "")
        listed = vocabulary(context.model, tokenizer, said, prefix=prefix)
        for doubt in listed.doubts():
            say(f"{truth.what}: {doubt}")
        return listed

    def _words(self, context: Context, names: Sequence[str]) -> dict[str, dict[str, str]]:
        if not self.words:
            return {}
        path = context.path(self.words)
        words = read_json(path, "How classes are said")
        if not isinstance(words, dict) or not all(isinstance(own, dict) for own in words.values()):
            raise UserError(f'{path!r} should be a JSON object such as {{"stingray": {{"suffix": "flat and round"}}}}.')
        if not set(words) & set(names):
            raise UserError(f"{path!r} says how classes are said, and none of them is one of {sorted(names)[:5]}.")
        return words

    def _said(self, category: Category, words: dict[str, dict[str, str]]) -> category_prompts.Category:
        own = {"name": category.name}
        if self.described and category.definition:
            own["description"] = category.definition
        return category_prompts.categories([own | words.get(category.name, {})])[0]


@dataclasses.dataclass(frozen=True)
class Detection(Asking):
    """Yields COCO's AP (mean over IoU .5 to .95), AP50, AP75, APs, APm, APl (of small, medium, large objects), AR1,
    AR10, AR100 (recall with so many detections a class and image), ARs, ARm, ARl; those that no object stands for are
    left out. Besides `agnostic/AP` and `agnostic/AR100` of all classes as one, and `images`, `objects`. To be shown:
    pictures, true boxes in green, precision by recall, and what is taken for what.

    Crowds are ignored as COCO does. Images without any box count: what is found there is wrong.

    Attributes:
      most: detections of an image.
      unseen: classes that training never had; yields `unseen/AP`, `unseen/AP50`, `seen/AP` and `seen/AP50`.
      each: yields `AP/CLASS` of each class too.
    """

    most: int = 100
    unseen: tuple[str, ...] = ()
    each: bool = False

    def setup(self, context: Context):
        """See `capvl.evals`."""
        truth = self.truth(context)
        if truth.federated is not None:
            say(f"{truth.what}: images were searched for some classes each, and here all else that is found is wrong.")
        find = self.finder(context, truth, self.how(self.most, self.most))
        for name in self.unseen:
            if name not in truth.names:
                raise UserError(f"detection.unseen names {name!r}, which is none of the classes that are asked for.")

        def evaluate(params):
            found = find(params)
            if self.submission:
                dump(context, truth, found, self.split)
            values, precision = average_precision.coco(truth.objects, found, len(truth.categories))
            agnostic, _ = average_precision.class_agnostic(truth.objects, found)
            values |= {f"agnostic/{key}": agnostic[key] for key in ("AP", "AR100")}
            values |= self._parts(truth, precision)
            yield from ((name, value) for name, value in values.items() if value > NONE)
            yield "images", float(len(truth.sizes))
            yield "objects", float((~truth.objects.ignored).sum())
            yield from shown(truth, found, precision)

        return evaluate

    def _parts(self, truth: Truth, precision: Precision) -> dict[str, float]:
        values = {}
        if self.unseen:
            for part, wanted in (("unseen", True), ("seen", False)):
                chosen = [k for k, name in enumerate(truth.names) if (name in self.unseen) is wanted]
                values |= {
                    f"{part}/AP": precision.ap(classes=chosen),
                    f"{part}/AP50": precision.ap(iou=0.5, classes=chosen),
                }
        if self.each:
            values |= {f"AP/{name}": value for name, value in zip(truth.names, precision.per_class(), strict=True)}
        return values


def dump(context: Context, truth: Truth, found: Found, split: str) -> None:
    """Writes what was found to submissions/NAME_SPLIT.json, in COCO's form of results.

    Raises:
      UserError: classes or images have no ids by which a server knows them.
    """
    ids = [category.id for category in truth.categories]
    if not all(ids):
        raise UserError(f"A submission names classes by their ids, and data set {truth.source.name!r} has none.")
    images = sources.names(truth.source, len(truth.sizes))
    rows = zip(found.image.tolist(), found.label.tolist(), found.box.tolist(), found.score.tolist(), strict=True)
    boxes = [submissions.FoundBox(images[i], ids[label], tuple(box), score) for i, label, box, score in rows]
    submissions.write_boxes(context.folder, f"{truth.source.name}_{split}", boxes)


def shown(truth: Truth, found: Found, precision: Precision) -> Iterator[tuple[str, Pictures | Curves | Confusion]]:
    """What reports show of detections: of boxes of SURE or more the best, where several lie upon one another."""
    sure = uppermost(found.take(found.score >= SURE))
    yield "pictures", pictures(truth, sure)
    named = {
        "IoU 0.5": precision.curve(0.5),
        "IoU 0.75": precision.curve(0.75),
        "mean of IoU 0.5 to 0.95": precision.curve(),
    }
    lines = {name: (RECALLS, values) for name, values in named.items()}
    yield "curves", Curves(f"{truth.what}: precision by recall", "recall", "precision", lines)
    yield "confusion", confusion(truth.what, truth.objects, sure, truth.names)


def uppermost(found: Found) -> Found:
    """Without the detections whose box overlaps a better one of the same image, of any class, with an IoU above UPON:
    what else might be there is no finding for those who look."""
    kept = []
    for image in np.unique(found.image).tolist():
        own = np.flatnonzero(found.image == image)
        own = own[np.argsort(-found.score[own], kind="stable")]
        iou_DD = average_precision.ious(found.box[own], found.box[own], np.zeros(len(own), bool))
        first: list[int] = []
        for d in range(len(own)):
            if not first or iou_DD[d, first].max() <= UPON:
                first.append(d)
        kept += own[first].tolist()
    return found.take(np.sort(np.array(kept, int)))


def pictures(truth: Truth, found: Found) -> Pictures:
    """The first SHOWN images with boxes, what is true in green, what is found in red."""
    drawn, captions = [], []
    with_boxes = np.unique(truth.objects.image[~truth.objects.ignored])
    for number in with_boxes[:SHOWN].tolist():
        pixels = enlarged(decode(truth.source.read(number, ("image",))["image"]))
        true = (truth.objects.image == number) & ~truth.objects.ignored
        own = np.flatnonzero(found.image == number)
        boxes = found_boxes.corners(np.concatenate([truth.objects.box[true], found.box[own]]), truth.sizes[number])
        labels = [""] * int(true.sum()) + [f"{truth.names[found.label[i]]} {found.score[i]:.2f}" for i in own]
        drawn.append(draw_boxes(pixels, boxes, labels, [TRUE] * int(true.sum()) + [FOUND] * len(own)))
        named = collections.Counter(truth.names[label] for label in truth.objects.label[true])
        captions.append(", ".join(f"{count} x {name}" if count > 1 else name for name, count in named.items()))
    return Pictures(f"{truth.what}: green is true, red was found (scores from {SURE}, the best here)", drawn, captions)


def confusion(title: str, objects: Objects, found: Found, names: Sequence[str]) -> Confusion:
    """What objects are taken for: each detection meets the object that it overlaps most, whatever the
    class, with an IoU of at least 0.5, the best first; an object is met once. Rows are the COMMON commonest classes of
    objects; the last row and column stand for nothing: what is found where nothing is, and what isn't found."""
    counted = collections.Counter(objects.label[~objects.ignored].tolist()).most_common(COMMON)
    place = {label: i for i, label in enumerate(sorted(label for label, _ in counted))}
    rare, nothing = len(place), len(place) + 1
    counts = np.zeros((nothing + 1, nothing + 1), np.int64)
    for image in np.union1d(np.unique(objects.image), np.unique(found.image)).tolist():
        own = Objects(*(column[objects.image == image] for column in objects))
        these = found.take(found.image == image)
        met = meetings(own, these)
        for label, number in zip(these.label.tolist(), met.tolist(), strict=True):
            if number < 0 or not own.ignored[number]:
                row = nothing if number < 0 else place.get(int(own.label[number]), rare)
                counts[row, place.get(label, rare)] += 1
        for number in np.flatnonzero(~own.ignored & ~np.isin(np.arange(len(own.label)), met)):
            counts[place.get(int(own.label[number]), rare), nothing] += 1
    # Of the rare ones it isn't told which are which.
    counts[rare, rare] = 0
    kept = [*range(rare), *([rare] if counts[rare].any() or counts[:, rare].any() else []), nothing]
    return Confusion(
        f"{title}: objects and what they are taken for",
        [[*(names[label] for label in place), "(rarer)", "(nothing)"][i] for i in kept],
        counts[np.ix_(kept, kept)],
        "found",
    )


def meetings(objects: Objects, found: Found) -> np.ndarray:
    """Of detections of an image, best first, the number (D,) of the object that each meets, whatever its class; -1 for
    none. A crowd may be met again and again."""
    iou_DN = average_precision.ious(found.box, objects.box, objects.crowd)
    met, free = np.full(len(found.score), -1), np.ones(len(objects.label), bool)
    for d in np.argsort(-found.score, kind="stable"):
        overlaps = np.where(free & (iou_DN[d] >= 0.5), iou_DN[d], -1.0)
        if len(overlaps) and overlaps.max() > 0:
            met[d] = overlaps.argmax()
            free[met[d]] = objects.crowd[met[d]]
    return met
