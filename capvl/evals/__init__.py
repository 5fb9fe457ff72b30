"""Evaluators: given a model, they yield (name, value) pairs. `EVALUATORS` is the index.

An evaluator is a frozen dataclass of its options (`config.evals.NAME`) with one method,
`setup(context)`, which opens its data and compiles its functions and returns
`evaluate(params) -> iterator of (name, value)`. A value is a float, or one of SHOWN for the report.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.models.abilities import Ability, abilities, require
from capvl.terminal import say

EVALUATORS = {
    "perplexity": "capvl.evals.perplexity:Perplexity",
    "image_gain": "capvl.evals.image_gain:ImageGain",
    "fewshot": "capvl.evals.fewshot:FewShot",
    "captions": "capvl.evals.captions:Captions",
    "caption_baselines": "capvl.evals.caption_baselines:CaptionBaselines",
    "zeroshot": "capvl.evals.zeroshot:ZeroShot",
    "zeroshot_likelihood": "capvl.evals.zeroshot_likelihood:ZeroShotLikelihood",
    "retrieval": "capvl.evals.retrieval:Retrieval",
    "grounding": "capvl.evals.grounding:Grounding",
    "detection": "capvl.evals.detection:Detection",
    "lvis": "capvl.evals.lvis:Lvis",
    "phrase_boxes": "capvl.evals.phrase_boxes:PhraseBoxes",
    "compositionality": "capvl.evals.compositionality:Compositionality",
    "entailment": "capvl.evals.entailment:Entailment",
    "judge": "capvl.evals.judge:Judged",
    "probe": "capvl.evals.probe:ProbeAccuracy",
    "knn": "capvl.evals.knn:Knn",
    "linear_probe": "capvl.evals.linear_probe:LinearProbe",
    "hallucination": "capvl.evals.hallucination:Hallucination",
    "vqa": "capvl.evals.vqa:Vqa",
}
RENAMED = {"answers": "vqa", "facts": "hallucination", "scoring": "zeroshot_likelihood"}
"""Names of before, which configs and workdirs may still have."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What an evaluator may know of a run.

    Attributes:
      model: options of the model.
      data: options of the data (`config.data`).
      objective: that the model was trained with, for its prompts.
      seed: of whatever is drawn.
      batch: examples at a time, over all devices.
      mesh: of devices.
      blueprint: the model without its parameters.
      folder: for files of results.
      recipe: the whole recipe, for evaluators of one's own that want more; none of the package asks for it.
    """

    model: Any
    data: Any
    objective: Any
    seed: int
    batch: int
    mesh: jax.sharding.Mesh
    blueprint: Any
    folder: Any
    recipe: Any = None

    @property
    def visual(self) -> str:
        """The feature that the model looks at."""
        return "frames" if Ability.CLIPS in abilities(self.model) else "image"

    def path(self, text: str) -> str:
        """A file's path, with {data_dir} for where prepared data sets are."""
        return text.replace("{data_dir}", self.data.directory())

    def tokenizer(self) -> Any:
        """The tokenizer of the data, for the model.

        Raises:
          UserError: there is none.
        """
        return tokenizers.load(self.data.tokenizer_path(), self.model.reads_start)

    def require(self, ability: Ability | tuple[Ability, ...], evaluator: str) -> None:
        """Raises UserError where the model lacks an ability that an evaluator needs; of several one suffices."""
        any_of = ability if isinstance(ability, tuple) else (ability,)
        require(self.model, f"The evaluator {evaluator!r}", *any_of)


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
      columns: what they say: "written", "found".
    """

    title: str
    names: list[str]
    counts: np.ndarray
    columns: str = "written"


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images with something drawn into them, for the report.

    Attributes:
      title: what they show.
      images: uint8 (H, W, 3) each.
      captions: a line below each.
    """

    title: str
    images: list[np.ndarray]
    captions: list[str]


@dataclasses.dataclass(frozen=True)
class Curves:
    """Lines in one diagram, for the report.

    Attributes:
      title: what it is about.
      x, y: what the axes say.
      lines: name -> (x, y), each (N,).
    """

    title: str
    x: str
    y: str
    lines: dict[str, tuple[np.ndarray, np.ndarray]]


SHOWN = Samples | Confusion | Pictures | Curves
"""What evaluators have to show."""


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


def run(evaluators: dict, params: dict) -> tuple[dict[str, float], dict[str, list[SHOWN]]]:
    """Numbers by name of evaluators that are set up, and what they have to show by the evaluator's name.

    An evaluator that meets rows that aren't finite has one number, `not_finite`: how many they are; where parameters
    aren't, each has `not_finite_parameters`.
    """
    rows: dict[str, float] = {}
    shown: dict[str, list[SHOWN]] = {}
    bad = int(jax.jit(_count_not_finite)(params)) if evaluators else 0
    if bad:
        say(f"{bad} parameters are not finite; nothing is evaluated.")
        return {f"{name}/not_finite_parameters": float(bad) for name in evaluators}, shown
    for name, evaluator in evaluators.items():
        try:
            found = list(evaluator(params))
        except NotFiniteError as e:
            say(f"{name}: {e}; it has no result.")
            found = [("not_finite", float(e.bad))]
        for key, value in found:
            if isinstance(value, SHOWN):
                shown.setdefault(name, []).append(value)
            else:
                rows[f"{name}/{key}"] = value
    return rows, shown
