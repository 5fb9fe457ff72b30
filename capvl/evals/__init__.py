"""Evaluators: given a model, they yield (name, value) pairs. `EVALUATORS` is the index.

An evaluator is a frozen dataclass of its options (`config.evals.NAME`) with one method,
`setup(context)`, which opens its data and compiles its functions and returns
`evaluate(params) -> iterator of (name, value)`. A value is a float, or `Samples` or `Confusion` for the report.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capvl.errors import UserError

EVALUATORS = {
    "perplexity": "capvl.evals.perplexity:Perplexity",
    "image_gain": "capvl.evals.image_gain:ImageGain",
    "fewshot": "capvl.evals.fewshot:FewShot",
    "captions": "capvl.evals.captions:Captions",
    "caption_baselines": "capvl.evals.caption_baselines:CaptionBaselines",
    "zeroshot": "capvl.evals.zeroshot:ZeroShot",
    "zeroshot_likelihood": "capvl.evals.zeroshot_likelihood:ZeroShotLikelihood",
    "retrieval": "capvl.evals.retrieval:Retrieval",
    "compositionality": "capvl.evals.compositionality:Compositionality",
    "entailment": "capvl.evals.entailment:Entailment",
    "probe": "capvl.evals.probe:ProbeAccuracy",
    "linear_probe": "capvl.evals.linear_probe:LinearProbe",
    "hallucination": "capvl.evals.hallucination:Hallucination",
    "vqa": "capvl.evals.vqa:Vqa",
}
RENAMED = {"answers": "vqa", "facts": "hallucination", "scoring": "zeroshot_likelihood"}
"""Names of before, which configs and workdirs may still have."""


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


def check_limits(evaluator: Any, *names: str) -> None:
    """Raises UserError where a number of examples is negative; 0 is for all."""
    for name in names:
        if getattr(evaluator, name) < 0:
            kind = type(evaluator).__name__
            raise UserError(f"{kind}: {name} must not be negative, not {getattr(evaluator, name)}; 0 is for all.")


def to_host(array: jax.Array) -> np.ndarray:
    """A device array, sharded over any hosts, as one NumPy array on every host."""
    if array.is_fully_addressable:
        return np.asarray(jax.device_get(array))
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


class NotFiniteError(Exception):
    """Rows of what a model gave that hold NaN or infinity, so that no number may come of them."""

    def __init__(self, bad: int, total: int, what: str):
        super().__init__(f"{bad} of {total} rows of the {what} are not finite")
        self.bad = bad


def finite(rows: np.ndarray, what: str) -> np.ndarray:
    """The rows (N, …) as they are.

    Raises:
      NotFiniteError: some hold NaN or infinity.
    """
    bad = int((~np.isfinite(rows).reshape(len(rows), -1).all(axis=1)).sum())
    if bad:
        raise NotFiniteError(bad, len(rows), what)
    return rows


def _count_not_finite(params: dict) -> jax.Array:
    return sum((~jnp.isfinite(p)).sum() for p in params.values())


def run(evaluators: dict, params: dict, workdir, step: int) -> dict[str, float]:
    """Numbers by name of evaluators that are set up; what is there to be looked at goes to workdir/samples.

    An evaluator that meets rows that aren't finite has one number, `not_finite`: how many they are; where parameters
    aren't, each has `not_finite_parameters`.
    """
    from capvl import report, terminal

    rows, shown = {}, {}
    bad = int(jax.jit(_count_not_finite)(params)) if evaluators else 0
    if bad:
        terminal.say(f"{bad} parameters are not finite; nothing is evaluated.")
        return {f"{name}/not_finite_parameters": float(bad) for name in evaluators}
    for name, evaluator in evaluators.items():
        try:
            found = list(evaluator(params))
        except NotFiniteError as e:
            terminal.say(f"{name}: {e}; it has no result.")
            found = [("not_finite", float(e.bad))]
        for key, value in found:
            if isinstance(value, Samples | Confusion):
                shown.setdefault(name, []).append(value)
            else:
                rows[f"{name}/{key}"] = value
    if shown:
        report.save_shown(workdir, step, shown)
    return rows
