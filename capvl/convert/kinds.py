"""The kinds of models that folders of ours hold: "kind" of model.json, and what follows from it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from capvl.convert import bert, git, glip, xvlm_judge, xvlm_parts, xvlm_writing
from capvl.data.examples.tasks import TASKS
from capvl.models.bert import BertOptions
from capvl.models.captioner import CaptionerOptions
from capvl.models.encoder import EncoderOptions
from capvl.models.git import GitOptions
from capvl.models.glip import GlipOptions
from capvl.models.two_towers import TwoTowersOptions
from capvl.models.xvlm import XVlmOptions
from capvl.models.xvlm_answers import XVlmAnswersOptions
from capvl.models.xvlm_captioner import XVlmCaptionerOptions
from capvl.models.xvlm_judge import JudgeOptions
from capvl.weights import Weights

Adapter = Callable[[Weights, Any, str], dict[str, np.ndarray]]
"""(weights, options of the model that begins with them, where they are from, for messages) -> its parameters."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
      options: class of the model's options.
      objective: section of a recipe that evaluates it, or a function that gives it for the model's options; {} where
        there is nothing to evaluate.
      model: options that this objective's model has besides.
      adapters: what a model of this kind begins with where it is given another kind's weights, by that kind, if they
        aren't its parameters as they are.
    """

    options: type
    objective: Mapping[str, Any] | Callable[[Any], Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapters: Mapping[str, Adapter] = dataclasses.field(default_factory=dict)

    def objective_for(self, options: Any) -> dict[str, Any]:
        """The section of a recipe that evaluates a model with these options; {} where there is nothing to evaluate."""
        return dict(self.objective(options) if callable(self.objective) else self.objective)


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
    "xvlm": Kind(
        XVlmOptions,
        xvlm_parts.objective_of,
        adapters={
            "bert": xvlm_parts.text_of_bert,
            "two_towers": xvlm_parts.image_encoder,
            "xvlm": xvlm_parts.with_fewer_heads,
        },
    ),
    "xvlm_captioner": Kind(
        XVlmCaptionerOptions, {"name": "xvlm_caption"}, adapters={"xvlm": xvlm_writing.captioner_of_xvlm}
    ),
    "xvlm_answers": Kind(XVlmAnswersOptions, {"name": "xvlm_answers"}, adapters={"xvlm": xvlm_writing.answers_of_xvlm}),
    "judge": Kind(JudgeOptions, {"name": "judge"}, adapters={"xvlm": xvlm_judge.of_xvlm, "judge": xvlm_judge.of_judge}),
    "glip": Kind(GlipOptions, glip.objective_of, adapters={"bert": glip.text_of_bert}),
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
