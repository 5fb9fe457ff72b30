"""Accuracy of the heads of a probe (`capvl.objectives.probe`), the best chosen without the test split."""

import dataclasses

import numpy as np

from capvl.evals import Context
from capvl.evals.encode import over_images
from capvl.evals.labels import chance, open_labelled, untrained
from capvl.inference.compiled import compiled
from capvl.models.abilities import Ability


@dataclasses.dataclass(frozen=True)
class ProbeAccuracy:
    """Yields `accuracy` on the test split of the head that is best on the validation split, `head`: its number,
    `val`: its accuracy there, `HEAD/val` of every head where there are several, and `chance`.

    Attributes:
      name: a data set with labels; "" for the training set's.
      val: split that chooses the head, such as "train[90%:]" with training on "train[:90%]".
      test: split that is reported.
    """

    name: str = ""
    val: str = "train[90%:]"
    test: str = "test"

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.CLASSIFIERS, "probe")
        data = context.data
        name = self.name or data.parts()[0][0]
        val, test = (open_labelled(context, name, split)[0] for split in (self.val, self.test))
        logits = compiled(context.blueprint, lambda model, image: model.logits(model.encode(image)).swapaxes(0, 1))

        def accuracies(params, source):
            found, rest = over_images(context, source, logits, params, f"images of {source.name}")
            return (found.argmax(axis=-1) == rest["label"][:, None]).mean(axis=0), rest["label"]

        def evaluate(params):
            on_val, _ = accuracies(params, val)
            on_test, labels = accuracies(params, test)
            best = int(np.argmax(on_val))
            yield "accuracy", float(on_test[best])
            yield "head", float(best)
            yield "val", float(on_val[best])
            if len(on_val) > 1:
                for i, value in enumerate(on_val):
                    yield f"{i}/val", float(value)
            yield from untrained(labels, np.arange(context.model.classes))
            yield "chance", chance(labels)

        return evaluate
