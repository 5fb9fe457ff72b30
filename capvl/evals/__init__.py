"""Evaluators: given a model, they yield (name, value) pairs. `EVALUATORS` is the index.

An evaluator is a frozen dataclass of its options (`config.evals.NAME`) with one method,
`setup(context)`, which opens its data and compiles its functions and returns
`evaluate(params) -> iterator of (name, value)`. A value is a float, or `Samples` or `Confusion` for the report.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from capvl.errors import UserError

EVALUATORS = {
    "perplexity": "capvl.evals.perplexity:Perplexity",
    "image_gain": "capvl.evals.image_gain:ImageGain",
    "fewshot": "capvl.evals.fewshot:FewShot",
    "captions": "capvl.evals.captions:Captions",
    "caption_baselines": "capvl.evals.caption_baselines:CaptionBaselines",
    "zeroshot": "capvl.evals.zeroshot:ZeroShot",
    "scoring": "capvl.evals.scoring:Scoring",
    "retrieval": "capvl.evals.retrieval:Retrieval",
    "compositionality": "capvl.evals.compositionality:Compositionality",
    "entailment": "capvl.evals.entailment:Entailment",
    "probe": "capvl.evals.probe:ProbeAccuracy",
    "linear_probe": "capvl.evals.linear_probe:LinearProbe",
    "facts": "capvl.evals.facts:Facts",
    "answers": "capvl.evals.answers:Answers",
}


@dataclasses.dataclass(frozen=True)
class Context:
    """What an evaluator may know of a run: recipe, mesh, the model's blueprint, and the folder for files of results."""

    recipe: Any
    mesh: jax.sharding.Mesh
    blueprint: Any
    batch: int
    folder: Any

    @property
    def visual(self) -> str:
        """The feature that the model looks at."""
        return "frames" if getattr(self.recipe.model, "frames", 0) else "image"

    def path(self, text: str) -> str:
        """A file's path, with {data_dir} for where prepared data sets are."""
        return text.replace("{data_dir}", self.recipe.data.directory())

    def require(self, ability: str, evaluator: str) -> None:
        """Raises UserError where the model lacks an ability that an evaluator needs: a key of ABILITIES."""
        if not ABILITIES[ability](self.recipe.model):
            raise UserError(f"The evaluator {evaluator!r} needs a model with {ability}, which this one doesn't have.")


@dataclasses.dataclass(frozen=True)
class Samples:
    """Images with what the model wrote and what people wrote, for the report.

    Attributes:
      images: uint8 (R, R, 3) each.
      written: the model's text of each.
      references: texts that people gave, of each.
    """

    images: list[np.ndarray]
    written: list[str]
    references: list[str]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """What was written for what would have been right, for the report.

    Attributes:
      title: what it is about.
      names: right and written texts, "other" last.
      counts: (N, N) int64: rows are what is right, columns what was written.
    """

    title: str
    names: list[str]
    counts: np.ndarray


ABILITIES = {
    "an image tower": lambda options: hasattr(options, "encoder"),
    "a text tower": lambda options: hasattr(options, "text_pool"),
    "a decoder": lambda options: getattr(options, "decoder_layers", 0) > 0,
    # A decoder that has a start of its own reads words before it writes, so it can't write all at once.
    "parallel prediction (mode 'pa')": lambda options: (
        getattr(options, "decoder_layers", 0) > 0 and not hasattr(options, "start")
    ),
    "a text tower or a decoder": lambda options: (
        hasattr(options, "text_pool") or getattr(options, "decoder_layers", 0) > 0
    ),
}


def to_host(array: jax.Array) -> np.ndarray:
    """A device array, sharded over any hosts, as one NumPy array on every host."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def run(evaluators: dict, params: dict, workdir, step: int) -> dict[str, float]:
    """Numbers by name of evaluators that are set up; what is there to be looked at goes to workdir/samples."""
    from capvl import report

    rows, shown = {}, {}
    for name, evaluator in evaluators.items():
        for key, value in evaluator(params):
            if isinstance(value, Samples | Confusion):
                shown.setdefault(name, []).append(value)
            else:
                rows[f"{name}/{key}"] = value
    if shown:
        report.save_shown(workdir, step, shown)
    return rows
