"""Zero-shot classification with prompts by two towers (CLIP, section 3.1.4; LiT) or by a matching head."""

import dataclasses

import numpy as np

from capvl.errors import UserError, nearest
from capvl.evals import Context, finite
from capvl.evals.encode import over_images, over_texts, tokenize
from capvl.evals.labels import class_names, open_labelled
from capvl.inference.compiled import compiled
from capvl.inference.matching import TextMatcher, class_vectors, image_vectors, read_templates, text_vectors
from capvl.models.abilities import Ability


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Yields `accuracy`, `top5` (from 6 classes on) and `chance`, the share of the largest class.

    A class is the normalised mean of its prompts' embeddings; an image belongs to the nearest class.

    Attributes:
      name, split: a data set with labels.
      classes: file of class names in the labels' order; "" for the data set's own.
      templates: file of prompt templates; "" for the package's own.
      by: "similarity", or "match": the class whose prompts the matching head finds right, in the mean.
    """

    name: str = "cifar10"
    split: str = "test"
    classes: str = ""
    templates: str = ""
    by: str = "similarity"

    def __post_init__(self):
        if self.by not in ("similarity", "match"):
            raise UserError(f"zeroshot by={self.by!r} is unknown." + nearest(self.by, ("similarity", "match")))

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.MATCHES if self.by == "match" else Ability.TEXTS, "zeroshot")
        source, labels = open_labelled(context, self.name, self.split)
        names = class_names(context.path(self.classes), source, labels)
        templates = read_templates(context.path(self.templates))
        prompts = [template.format(name) for name in names for template in templates]
        if self.by == "match":
            match = compiled(context.blueprint, TextMatcher(tokenize(context, prompts)))

            def evaluate_matches(params):
                scores, rest = over_images(context, source, match, params, f"images of {self.name}")
                means = scores.reshape(len(scores), len(names), len(templates)).mean(axis=2)
                yield from accuracies(means, rest["label"])

            return evaluate_matches
        embed_image = compiled(context.blueprint, image_vectors)
        embed_text = compiled(context.blueprint, text_vectors)

        def evaluate(params):
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
