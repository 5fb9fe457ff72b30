"""Objectives: what a recipe optimises. One file a paper; `OBJECTIVES` is the index.

An objective is a frozen dataclass whose fields are its options (`config.objective`) and whose
methods are the interface below. The loop knows nothing else about it.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Batch = dict[str, jax.Array]

OBJECTIVES = {
    "cappa": "capvl.objectives.cappa:CapPa",
    "contrastive": "capvl.objectives.contrastive:Contrastive",
    "transfer": "capvl.objectives.transfer:Transfer",
    "git": "capvl.objectives.git:Git",
    "scst": "capvl.objectives.scst:Scst",
    "probe": "capvl.objectives.probe:Probe",
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


class Objective(Protocol):
    """The interface of an objective."""

    Model: ClassVar[type]
    """Dataclass of the options in `config.model`; its `make(rngs)` builds the model, its `abilities` say what that can
    (`capvl.models.abilities`)."""

    def check(self, model_options: Any, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where options contradict each other; `batch_per_device` is of one micro-batch."""

    def frozen(self, model_options: Any) -> tuple[str, ...]:
        """Regexes of parameters that don't train, beside `config.optimizer.frozen`."""

    def features(self) -> tuple[str, ...]:
        """Keys that an Example must have for this objective."""

    def transform(self, model_options: Any, data: Any, *, train: bool) -> Any:
        """A picklable `transform(example, uniforms) -> dict of arrays` that runs on the host.

        A training transform may have a method `for_batch(number)` that gives the transform of a batch, and one whose
        texts become tokens says by which `tokenizer`."""

    def batch_spec(self, model_options: Any, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The keys, shapes and dtypes of a batch."""

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
        """Matmul FLOPs of training on one example: forward and backward, no recomputation."""
