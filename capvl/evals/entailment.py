"""Visual entailment: does an image entail a sentence, contradict it, or neither (SNLI-VE, arXiv 1901.06706)?"""

import dataclasses
import json
import pathlib

import numpy as np

from capvl.data import lookup
from capvl.errors import UserError
from capvl.evals import Context
from capvl.evals.compositionality import GREY, PairScorer

LABELS = ("entailment", "neutral", "contradiction")


@dataclasses.dataclass(frozen=True)
class Entailment:
    """Yields `auc`: how often an entailed sentence scores above a contradicted one of any image (ties half),
    `auc_neutral` for entailed against neutral ones, `blind` and `blind_neutral` for the same with a grey image,
    and `count`.

    A captioner's score is log p(sentence | image) - log p(sentence | grey image), per token: sentences differ in
    length and in how likely they are by themselves. A two-tower model's is the cosine.

    Attributes:
      file: JSON lines with `hypothesis`, `label`, and the image as `image_id` or `key`; {data_dir} is where prepared
        data sets are.
      images: a folder of image files, or a prepared data set.
      limit: pairs; 0 for all.
    """

    file: str = ""
    images: str = ""
    limit: int = 0

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require("a text tower or a decoder", "entailment")
        rows = read_pairs(context.path(self.file))[: self.limit or None]
        found = lookup.open_images(context.path(self.images), context.recipe.data.directory())
        rows = [r for r in rows if r[0] in found]
        if not rows:
            raise UserError(f"None of the images of {self.file!r} is in {self.images!r}.")
        likelihood = getattr(context.recipe.model, "decoder_layers", 0) > 0
        scorer = PairScorer(context, mean=likelihood)

        def evaluate(params):
            pairs = [(name, text) for image, text, _ in rows for name in (image, GREY)]
            scores = scorer(params, list(dict.fromkeys(pairs)), found)
            blind = np.array([scores[GREY, text] for _, text, _ in rows])
            seen = np.array([scores[image, text] for image, text, _ in rows])
            labels = np.array([label for _, _, label in rows])
            for name, values in (("auc", seen - blind if likelihood else seen), ("blind", blind)):
                for suffix, other in (("", "contradiction"), ("_neutral", "neutral")):
                    if (labels == other).any() and (labels == "entailment").any():
                        yield f"{name}{suffix}", auc(values[labels == "entailment"], values[labels == other])
            yield "count", float(len(rows))

        return evaluate


def read_pairs(path: str) -> list[tuple[str, str, str]]:
    """(image name, sentence, label) rows.

    Raises:
      UserError: missing, or a row that isn't of this format.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise UserError(
            f"The file {path!r} of entailment pairs is missing; it should hold JSON lines with hypothesis, label "
            f"({', '.join(LABELS)}) and image_id."
        )
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            image, text, label = row.get("image_id") or row["key"], row["hypothesis"], row["label"]
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise UserError(f"Line {number} of {path!r} is no entailment pair: {e}") from e
        if label not in LABELS or not text.strip():
            raise UserError(f"Line {number} of {path!r} has the label {label!r} or an empty sentence.")
        rows.append((lookup.stem(str(image)), text, label))
    return rows


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """Share of the pairs (a, b) with a > b, ties half."""
    return float((above[:, None] > below[None]).mean() + 0.5 * (above[:, None] == below[None]).mean())
