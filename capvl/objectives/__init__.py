"""Objectives: what a recipe optimises. One file a paper; `OBJECTIVES` is the index.

An objective is a frozen dataclass whose fields are its options (`config.objective`) and whose
methods are the interface below. The loop knows nothing else about it.
"""

from typing import Any, ClassVar, Protocol

import jax
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


class Objective(Protocol):
    """The interface of an objective."""

    Model: ClassVar[type]
    """Dataclass of the options in `config.model`; its `make(rngs)` builds the model."""

    def check(self, model_options: Any, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where options contradict each other; `batch_per_device` is of one micro-batch."""

    def frozen(self, model_options: Any) -> tuple[str, ...]:
        """Regexes of parameters that don't train, beside `config.optimizer.frozen`."""

    def features(self) -> tuple[str, ...]:
        """Keys that an Example must have for this objective."""

    def transform(self, model_options: Any, data: Any, *, train: bool) -> Any:
        """A picklable `transform(example, uniforms) -> dict of arrays` that runs on the host.

        A training transform may have a method `for_batch(number)` that gives the transform of a batch."""

    def batch_spec(self, model_options: Any, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The keys, shapes and dtypes of a batch."""

    def prompt(self, model_options: Any, tokenizer: Any, task: str, text: str = "") -> np.ndarray:
        """Tokens (P,) that begin what a model with a decoder writes for a task ("caption", "answer", "classify").

        Raises UserError where the objective doesn't train it."""

    def prepare(self, batch: Batch, *, train: bool) -> Batch:
        """Device-side preparation of a whole batch: value range, flips, loss weights."""

    def loss(self, model: nnx.Module, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a prepared (micro-)batch and scalar metrics, each a mean over examples."""

    def flops(self, model_options: Any) -> float:
        """Matmul FLOPs of training on one example: forward and backward, no recomputation."""
