"""The kinds of models that folders of ours hold: "kind" of model.json, and what follows from it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from capvl.convert import bert, git
from capvl.data.examples.tasks import TASKS
from capvl.models.bert import BertOptions
from capvl.models.captioner import CaptionerOptions
from capvl.models.encoder import EncoderOptions
from capvl.models.git import GitOptions
from capvl.models.two_towers import TwoTowersOptions
from capvl.models.xvlm import XVlmOptions
from capvl.weights import Weights

Adapter = Callable[[Weights, Any, str], dict[str, np.ndarray]]
"""(weights, options of the model that begins with them, where they are from, for messages) -> its parameters."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
      options: class of the model's options.
      objective: section of a recipe that evaluates it; {} where there is nothing to evaluate.
      model: options that this objective's model has besides.
      adapters: what a model of this kind begins with where it is given another kind's weights, by that kind, if they
        aren't its parameters as they are.
    """

    options: type
    objective: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapters: Mapping[str, Adapter] = dataclasses.field(default_factory=dict)


KINDS = {
    "captioner": Kind(CaptionerOptions, {"name": "cappa"}),
    "two_towers": Kind(TwoTowersOptions, {"name": "contrastive"}, adapters={"bert": bert.text_tower}),
    "git": Kind(
        GitOptions,
        {"name": "git", "tasks": list(TASKS)},
        adapters={"bert": git.decoder_of_bert, "git": git.with_output_layer},
    ),
    # Evaluated as a probe whose classifier nobody asks.
    "encoder": Kind(EncoderOptions, {"name": "probe"}, model={"probe_pool": "encoder"}),
    "xvlm": Kind(XVlmOptions),
    "bert": Kind(BertOptions),
}


def kind_of(options: Any) -> str:
    """The kind of a model; "" for none of these, as a probe and models of one's own are."""
    return next((name for name, kind in KINDS.items() if isinstance(options, kind.options)), "")


def adapted(weights: Weights, options: Any, path: str) -> dict[str, np.ndarray]:
    """The parameters that a model of some options begins with where it is given weights of another, by its own names.

    Args:
      weights: what there is.
      options: of the model.
      path: where the weights are from, for messages.

    Raises:
      UserError: they are of another form than the model's.
    """
    kind = KINDS.get(kind_of(options))
    adapter = kind.adapters.get(kind_of(weights.options)) if kind else None
    return adapter(weights, options, path) if adapter else weights.params
