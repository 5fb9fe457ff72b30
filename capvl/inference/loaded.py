"""A model with its parameters, pixels and tokenizer: what every ability of the face stands on."""

import functools
import warnings
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capvl.data.images.crops import Crop
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.inference import inputs
from capvl.inference.compiled import Function, compiled, in_buckets
from capvl.inference.inputs import Images
from capvl.models.abilities import Ability, abilities
from capvl.models.parameters import Blueprint
from capvl.weights import Weights


class Loaded:
    """A model that is ready to be asked.

    Attributes:
      options: of the model.
      params: by path.
      blueprint: the model without them.
      name: for messages.
      objective: that it was trained with, for its prompts; None where that isn't known.
      crop: how images become what it sees; None where it sees none.
    """

    def __init__(self, weights: Weights, name: str):
        """name: for messages."""
        self.options, self.name, self.objective = weights.options, name, weights.objective
        self.blueprint = Blueprint(weights.options)
        self.params = {k: jnp.asarray(v) for k, v in weights.params.items()}
        self._tokenizer_path = weights.tokenizer
        sees = abilities(weights.options) & {Ability.IMAGES, Ability.DETECTS}
        self.crop = _crop(weights) if sees else None
        self._compiled: dict[Hashable, Any] = {}

    def __repr__(self) -> str:
        count = sum(v.size for v in self.params.values())
        able = [ability for ability in Ability if ability in abilities(self.options)]
        return f"{type(self).__name__}({self.name!r}: {', '.join(able)}, {count / 1e6:.1f} M parameters)"

    @functools.cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        if not self._tokenizer_path:
            raise UserError(f"The model {self.name!r} has no tokenizer; give one: capvl.load(…, tokenizer=PATH).")
        return tokenizers.load(self._tokenizer_path, self.options.reads_start)

    def need(self, *any_of: Ability) -> None:
        """Raises UserError where the model has none of some abilities."""
        if not abilities(self.options) & set(any_of):
            raise UserError(f"The model {self.name!r} does not have {' or '.join(any_of)}, which this needs.")

    def pixels(self, images: Images) -> np.ndarray:
        """Images as the model sees them: (N, R, R, 3) uint8.

        Raises:
          UserError: there is none, or one can't be read.
        """
        self.need(Ability.IMAGES)
        return inputs.pixels(self.crop, images)

    def clips(self, videos: Any) -> np.ndarray:
        """Videos as the model sees them: (N, F, R, R, 3) uint8.

        Raises:
          UserError: the model reads no clips, or a video can't be read or is too short.
        """
        if Ability.CLIPS not in abilities(self.options):
            raise UserError(f"The model {self.name!r} reads images, not clips.")
        return inputs.clips(self.crop, videos)

    def ids(self, texts: list[str], *, whole: bool = False) -> np.ndarray:
        """Tokens (N, L) of texts; see `capvl.inference.inputs.tokens`. Warns of those that are cut."""
        length = self.options.length
        if not whole and (cut := tokenizers.too_long(self.tokenizer, texts, length)):
            told = f"{len(cut)} of {len(texts)} texts have more than {length} tokens and are cut at their end"
            warnings.warn(f"{told}; the first is {cut[0][:60]!r}.", stacklevel=3)
        return inputs.tokens(self.tokenizer, texts, length, whole=whole)

    def compiled(self, key: Hashable, function: Function) -> Any:
        """(params, rows) -> function(model, rows), compiled once; see `capvl.inference.compiled.compiled`.

        Args:
          key: that no other function has.
          function: of (model, rows).
        """
        if key not in self._compiled:
            self._compiled[key] = compiled(self.blueprint, function)
        return self._compiled[key]

    def run(self, key: Hashable, function: Function, rows: Any) -> Any:
        """What a function of the model gives for rows, on the host; it is compiled once.

        Args:
          key: that no other function has.
          function: of (model, rows), images in [-1, 1].
          rows: one array or several; images are uint8.

        Raises:
          UserError: it gives values that are not finite.
        """
        found = in_buckets(self.compiled(key, function), self.params, rows)
        for leaf in jax.tree.leaves(found):
            bad = int((~np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1)).sum())
            if bad:
                raise UserError(
                    f"The model {self.name!r} gives values that are not finite for {bad} of {len(leaf)} rows."
                )
        return found


def _crop(weights: Weights) -> Crop:
    """How images are brought to what the model reads: a square, or the aspect kept in one with a fourth channel."""
    options, how = weights.options, dict(interpolation=weights.interpolation, fraction=weights.crop_fraction)
    *_, side, channels = options.image_shape()
    frames = options.frames if Ability.CLIPS in abilities(options) else 0
    if channels == 4:
        return Crop(options.res, "aspect", max_side=options.max_side or side, **how)
    return Crop(options.res, weights.crop, frames=frames, **how)
