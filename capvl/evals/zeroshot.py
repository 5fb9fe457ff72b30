"""Zero-shot classification by a two-tower model with prompt ensembles (CLIP, section 3.1.4; LiT)."""

import dataclasses

import numpy as np

from capvl.evals import Context, finite
from capvl.evals.encode import over_images, over_texts
from capvl.evals.labels import class_names, open_labelled
from capvl.inference.compiled import compiled
from capvl.inference.matching import class_vectors, image_vectors, read_templates, text_vectors
from capvl.models.abilities import Ability


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Yields `accuracy`, `top5` (from 6 classes on) and `chance`, the share of the largest class.

    A class is the normalised mean of its prompts' embeddings; an image belongs to the nearest class.

    Attributes:
      name, split: a data set with labels.
      classes: file of class names in the labels' order; "" for the data set's own.
      templates: file of prompt templates; "" for the package's own.
    """

    name: str = "cifar10"
    split: str = "test"
    classes: str = ""
    templates: str = ""

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.TEXTS, "zeroshot")
        source, labels = open_labelled(context, self.name, self.split)
        names = class_names(context.path(self.classes), source, labels)
        templates = read_templates(context.path(self.templates))
        embed_image = compiled(context.blueprint, image_vectors)
        embed_text = compiled(context.blueprint, text_vectors)

        def evaluate(params):
            prompts = [template.format(name) for name in names for template in templates]
            texts = over_texts(context, prompts, embed_text, params, f"prompts of {self.name}")
            classes = class_vectors(texts, len(templates))
            images, rest = over_images(context, source, embed_image, params, f"images of {self.name}")
            yield from accuracies(images @ classes.T, rest["label"])

        return evaluate


def accuracies(scores: np.ndarray, labels: np.ndarray):
    """(name, value) of `accuracy`, `top5` and `chance` from scores (N, K); a tie with another class is an error."""
    own = np.take_along_axis(finite(scores, "scores"), labels[:, None], axis=1)
    better = (scores >= own).sum(axis=1) - 1
    yield "accuracy", float((better < 1).mean())
    if scores.shape[1] > 5:
        yield "top5", float((better < 5).mean())
    yield "chance", float(np.bincount(labels).max() / len(labels))
