"""Detection of a large vocabulary: LVIS' average precision of rare, common and frequent classes (arXiv 1908.03195).

GLIP (2112.03857, section 4.2) is measured by fixed AP (2102.01066): the best 10,000 detections of each class in the
whole set count, however many an image has.
"""

import dataclasses

from capvl.errors import UserError
from capvl.evals import Context, average_precision
from capvl.evals.average_precision import FREQUENCIES, NONE
from capvl.evals.detection import Asking, dump, shown


@dataclasses.dataclass(frozen=True)
class Lvis(Asking):
    """Yields the fixed AP, AP50, AP75, APs, APm, APl (small, medium, large objects), APr, APc, APf (rare, common and
    frequent classes), AR, ARs, ARm, ARl; those that no object stands for are left out. Besides `standard/AP`,
    `standard/APr`, `standard/APc` and `standard/APf`, of the best `most` detections of each image; `images`, `objects`.

    Detections count in images that were searched for their class. All images count, whatever the batch size.

    Attributes:
      most: detections of each prompt in an image; and of an image, where AP is not the fixed one.
    """

    most: int = 300

    def setup(self, context: Context):
        """See `capvl.evals`."""
        truth = self.truth(context)
        if truth.federated is None or not set(truth.federated.frequency) <= set(FREQUENCIES):
            raise UserError(
                f"Data set {truth.source.name!r} doesn't say what was looked for in each image, or how frequent its "
                "classes are; prepare it from LVIS' annotations, or evaluate it by `detection`."
            )
        find = self.finder(context, truth, self.how(self.most, 0))

        def evaluate(params):
            found = find(params)
            fixed = average_precision.best_of_classes(found)
            if self.submission:
                dump(context, truth, fixed, self.split)
            values, precision = average_precision.lvis(truth.objects, fixed, truth.federated)
            few = average_precision.best_of_images(found, self.most)
            standard, _ = average_precision.lvis(truth.objects, few, truth.federated)
            values |= {f"standard/{key}": standard[key] for key in ("AP", *(f"AP{letter}" for letter in FREQUENCIES))}
            yield from ((name, value) for name, value in values.items() if value > NONE)
            yield "images", float(len(truth.sizes))
            yield "objects", float((~truth.objects.ignored).sum())
            yield from shown(truth, fixed, precision)

        return evaluate
