"""Captioning with X-VLM (arXiv 2111.08276, section 4.2): next-token cross-entropy of captions behind their prompt, then
self-critical training. Both are GIT's objectives of another model; the smoothed loss is X-VLM's own.
"""

import dataclasses
from typing import ClassVar

from capvl.errors import UserError
from capvl.models.xvlm_captioner import XVlmCaptionerOptions
from capvl.objectives.git import Git
from capvl.objectives.scst import Scst


@dataclasses.dataclass(frozen=True)
class XVlmCaption(Git):
    """As `capvl.objectives.git.Git`: captions, without what they all begin with (`model.words`), are learned.

    The target of label smoothing s is 1 - s on the token and s / V on each other, as in the official code.
    """

    Model: ClassVar[type] = XVlmCaptionerOptions

    def __post_init__(self):
        super().__post_init__()
        if set(self.tasks) != {"caption"}:
            raise UserError(f"objective.tasks: X-VLM's captioner learns ('caption',) alone, not {self.tasks}.")

    def features(self) -> tuple[str, ...]:
        """An image and captions."""
        return ("image", "text")

    def smoothed(self, vocab: int) -> tuple[float, float, float]:
        """See `Git.smoothed`: the target, whose sum is 1 - s / V, is that multiple of one whose sum is 1."""
        total = 1 - self.smoothing / vocab
        return 1 - (1 - self.smoothing) / total, total, 0.0


@dataclasses.dataclass(frozen=True)
class XVlmScst(Scst):
    """As `capvl.objectives.scst.Scst`: what is sampled stands behind `model.words`, which is given."""

    Model: ClassVar[type] = XVlmCaptionerOptions
    room: ClassVar[int] = 8
