"""Zero-shot classification by likelihood: the class whose name the captioner finds likeliest (CapPa, section 4.2)."""

import dataclasses

from capvl.errors import UserError
from capvl.evals import Context, to_host
from capvl.evals.encode import grey_image, over_images, tokenize
from capvl.evals.labels import class_names, open_labelled
from capvl.evals.zeroshot import accuracies
from capvl.inference.compiled import compiled
from capvl.inference.scoring import TextScorer
from capvl.models.abilities import Ability


@dataclasses.dataclass(frozen=True)
class ZeroShotLikelihood:
    """Yields `accuracy`, `top5`, `chance`, and `blind`: the accuracy of the same with the likelihoods under a grey
    image, which no image changes; with `calibrated` those are subtracted first.

    The classes' common beginnings are read once (`capvl.inference.scoring.TextScorer`).

    Attributes:
      name, split: a data set with labels.
      classes: file of class names in the labels' order; "" for the data set's own.
      prompt: text with {} where the name goes.
      mean: divide by the number of tokens.
      calibrated: score log p(name | image) - log p(name | grey image).
    """

    name: str = "cifar10"
    split: str = "test"
    classes: str = ""
    prompt: str = "{}"
    mean: bool = False
    calibrated: bool = False

    def __post_init__(self):
        if self.prompt.count("{}") != 1:
            raise UserError(
                f"zeroshot_likelihood: the prompt {self.prompt!r} should have {{}} once, where the class name goes."
            )

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.DECODER, "zeroshot_likelihood")
        source, labels = open_labelled(context, self.name, self.split)
        names = class_names(context.path(self.classes), source, labels)
        tokens = tokenize(context, [self.prompt.format(name) for name in names], whole=True)
        score = compiled(context.blueprint, TextScorer(tokens, mean=self.mean))

        def evaluate(params):
            scores, rest = over_images(context, source, score, params, f"images of {self.name}")
            blind = to_host(score(params, grey_image(context.model)))
            if self.calibrated:
                scores = scores - blind
            yield from accuracies(scores, rest["label"])
            yield "blind", float((rest["label"] == blind.argmax()).mean())

        return evaluate
