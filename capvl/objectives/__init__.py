"""Objectives: what a recipe optimises. One file a paper; `OBJECTIVES` is the index.

An objective is a frozen dataclass whose fields are its options (`config.objective`) and whose
methods are the interface below. The loop knows nothing else about it.
"""

import dataclasses
import fractions
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capvl.data.images.buckets import Bucket
from capvl.errors import UserError

Batch = dict[str, jax.Array]

OBJECTIVES = {
    "cappa": "capvl.objectives.cappa:CapPa",
    "contrastive": "capvl.objectives.contrastive:Contrastive",
    "transfer": "capvl.objectives.transfer:Transfer",
    "git": "capvl.objectives.git:Git",
    "scst": "capvl.objectives.scst:Scst",
    "xvlm": "capvl.objectives.xvlm:XVlm",
    "glip": "capvl.objectives.glip:Glip",
    "xvlm_caption": "capvl.objectives.xvlm_caption:XVlmCaption",
    "xvlm_scst": "capvl.objectives.xvlm_caption:XVlmScst",
    "xvlm_answers": "capvl.objectives.xvlm_answers:XVlmAnswering",
    "probe": "capvl.objectives.probe:Probe",
    "judge": "capvl.objectives.judge:Judge",
    "text_assignment": "capvl.objectives.judge:TextAssignment",
}


class Mean(NamedTuple):
    """A metric that is a mean over something of which batches have more or less, such as tokens of one kind.

    Attributes:
      total: the sum over this (micro-)batch.
      weight: how many; a metric without any is 0.
    """

    total: jax.Array
    weight: jax.Array

    def value(self) -> jax.Array:
        """The mean."""
        return self.total / jnp.maximum(self.weight, 1.0)

    def __float__(self) -> float:
        return float(self.value())


@dataclasses.dataclass(frozen=True)
class Kind:
    """One of several kinds of batch that a step takes, such as image-text pairs and regions (arXiv 2111.08276).

    Attributes:
      features: keys that an Example of it must have.
      share: its examples for each of `config.batch_size`; of 0.5 a step takes half as many.
    """

    features: tuple[str, ...]
    share: float = 1.0

    def count(self, examples: int, name: str) -> int:
        """Its examples among so many of `config.batch_size`, or of all steps so far.

        Raises:
          UserError: that is no whole number.
        """
        share = fractions.Fraction(self.share).limit_denominator(10_000)
        exact = share * examples
        if exact.denominator != 1 or exact < 1:
            raise UserError(
                f"batch_size={examples} times the share {self.share:g} of {name!r} is no whole batch; take a multiple "
                f"of {share.denominator}."
            )
        return int(exact)


def kinds(objective: "Objective") -> dict[str, Kind]:
    """The kinds of batch that an objective's step takes, by name; of a single one the name is ""."""
    features = objective.features()
    return dict(features) if isinstance(features, dict) else {"": Kind(tuple(features))}


def buckets(objective: "Objective", model_options: Any) -> tuple[Bucket | None, ...]:
    """The buckets that a step's batches come in, a compilation each: (None,) for the model's own size alone."""
    found = getattr(objective, "buckets", None)
    return tuple(found(model_options)) if found else (None,)


def updates(objective: "Objective") -> tuple[tuple[str, ...], ...]:
    """The kinds of batch that each of a step's updates of the optimizer is made from; ((),): one from all."""
    found = getattr(objective, "updates", None)
    parts = tuple(found()) if found else ((),)
    return parts if len(parts) > 1 else ((),)


class Objective(Protocol):
    """The interface of an objective.

    One whose step takes several kinds of batch gives a dict by kind from `features`, `transform` and `batch_spec`; its
    `prepare` and `loss` get such a dict. `config.data.name` says what each kind is made of.

    With `updates()`, which gives tuples of kinds, a step makes an update of the optimizer from each in turn, at the
    same learning rate; `loss` then gets a dict of those kinds only, and metrics of two updates need names of their own.

    One whose images have other sizes than the model's own also has `buckets(model_options)`, which gives them
    (`capvl.data.images.buckets`). Batches go through them in turn: its training transform is a `Bucketed` one, and its
    `batch_spec` takes a bucket as third argument, by default None, which stands for the model's size. A step is
    compiled once for each.
    """

    Model: ClassVar[type]
    """Dataclass of the options in `config.model`; its `make(rngs)` builds the model, its `abilities` say what that can
    (`capvl.models.abilities`)."""

    def check(self, model_options: Any, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where options contradict each other; `batch_per_device` is of one micro-batch."""

    def frozen(self, model_options: Any) -> tuple[str, ...]:
        """Regexes of parameters that don't train, beside `config.optimizer.frozen`."""

    def features(self) -> tuple[str, ...] | dict[str, Kind]:
        """Keys that an Example must have for this objective, or the kinds of its batches."""

    def transform(self, model_options: Any, data: Any, *, train: bool) -> Any:
        """A picklable `transform(example, uniforms) -> dict of arrays` that runs on the host.

        A training transform may have a method `for_batch(number)` that gives the transform of a batch, and one whose
        texts become tokens says by which `tokenizer`. One that also learns from images of which nothing is said, such
        as those without any box, has `empty_images = True`."""

    def batch_spec(self, model_options: Any, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The keys, shapes and dtypes of a batch of so many examples; with several kinds those of each."""

    def prompt(self, model_options: Any, tokenizer: Any, task: str, text: str = "") -> np.ndarray:
        """Tokens (P,) that begin what a model with a decoder writes for a task: the model's own
        (`capvl.models.prompts`), narrowed to the tasks that the objective trains, or in words of its own.

        Raises UserError where the objective doesn't train the task."""

    def prepare(self, batch: Batch, *, train: bool) -> Batch:
        """Device-side preparation of a whole batch: value range, flips, loss weights.

        It sees the batch before it is split into micro-batches, so whatever a loss is divided by is found here."""

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Loss of a prepared (micro-)batch and metrics, scalars or `Mean`s.

        Loss and scalar metrics are means over examples: the mean of those of equal micro-batches has to be that of the
        whole batch. A mean over tokens is one when `prepare` divides the tokens' weights by their mean number an
        example in the whole batch."""

    def flops(self, model_options: Any) -> float:
        """Matmul FLOPs of training on one example: forward and backward, no recomputation; of several kinds, of what
        a step takes for each of `config.batch_size`."""
