"""What captions are worth that no decoder wrote: one for all images, and that of the nearest training image."""

import dataclasses

import numpy as np

from capvl.data.reading import sources
from capvl.evals import Context, caption_metrics
from capvl.evals.captions import captions_of, captions_of_all
from capvl.evals.encode import over_images
from capvl.evals.perplexity import opened_pairs
from capvl.inference.compiled import compiled
from capvl.inference.matching import features
from capvl.models.abilities import Ability

CANDIDATES = 200
JUDGES = 500


@dataclasses.dataclass(frozen=True)
class CaptionBaselines:
    """Yields each metric for `constant`, the training caption that suits training images best (by CIDEr, of
    CANDIDATES for JUDGES images), and for `nearest`, the first caption of the training image whose pooled feature
    has the largest cosine with the image's.

    Attributes:
      name, split: data set; "" for the training set's.
      train: its split that captions are taken from.
      metrics: of "bleu", "meteor", "rouge", "cider" and "spice".
    """

    name: str = ""
    split: str = "val"
    train: str = "train"
    metrics: tuple[str, ...] = ("cider",)

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.IMAGES, "caption_baselines")
        caption_metrics.check(self.metrics)
        test, train = (opened_pairs(context, self.name, s) for s in (self.split, self.train))
        embed = compiled(context.blueprint, features)

        def evaluate(params):
            references = {str(i): texts for i, texts in enumerate(captions_of_all(test))}
            constant = best_constant(train)
            theirs, _ = over_images(context, train, embed, params, f"images of {train.name}")
            mine, _ = over_images(context, test, embed, params, f"images of {test.name}")
            theirs, mine = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (theirs, mine))
            nearest = (mine @ theirs.T).argmax(axis=1)
            for name, written in (
                ("constant", dict.fromkeys(references, constant)),
                ("nearest", {key: captions_of(train, nearest[int(key)])[0] for key in references}),
            ):
                corpus, _ = caption_metrics.scores(references, written, self.metrics)
                yield from ((f"{name}/{metric}", value) for metric, value in corpus.items())

        return evaluate


def best_constant(train: sources.Source) -> str:
    """The caption of highest CIDEr for other training images, of candidates spread over the training set."""
    count = len(train)
    judges = np.unique(np.linspace(0, count - 1, min(JUDGES, count)).astype(int))
    candidates = np.unique(np.linspace(1, count - 1, min(CANDIDATES, count - 1)).astype(int))
    texts = [captions_of(train, i)[0] for i in candidates]
    tokens = caption_metrics.tokenize({str(i): [t] for i, t in enumerate(texts)})
    references = caption_metrics.tokenize({str(i): captions_of(train, i) for i in judges})
    values = [
        caption_metrics.scores_of_tokens(references, dict.fromkeys(references, tokens[str(i)]), ("cider",))[0]["CIDEr"]
        for i in range(len(texts))
    ]
    return texts[int(np.argmax(values))]
