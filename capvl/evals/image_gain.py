"""Does the model look? NLL per token of a caption with another image, minus with its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from capvl.evals import Context, check_limits, finite
from capvl.evals.perplexity import compile_scores, open_pairs, require_modes
from capvl.nn.padding import lengths
from capvl.parallel.rules import batch_sharding

Z_95 = 1.959963984540054


@dataclasses.dataclass(frozen=True)
class ImageGain:
    """Yields, for each mode: `gain` in nats per token, and `low` and `high` of its 95 % interval.

    The other image is the next one of the same batch, in the data set's order (the last one's is
    the first), so that every image serves once. The interval is the normal one of the mean
    over captions, each caption's gain being that of its tokens' mean.

    Attributes:
      name, split: data set; "" for the training set's.
      limit: examples; 0 for all.
      modes: of "cap" and "pa".
    """

    name: str = ""
    split: str = "val"
    limit: int = 0
    modes: tuple[str, ...] = ("cap", "pa")

    def __post_init__(self):
        check_limits(self, "limit")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        require_modes(context, "image_gain", self.modes)
        _, over_pairs = open_pairs(context, self.name, self.split, self.limit)
        swap = jax.jit(lambda image, mask: image[next_real(mask)], out_shardings=batch_sharding(context.mesh))
        score = {mode: compile_scores(context, parallel=mode == "pa") for mode in self.modes}

        def evaluate(params):
            gains = {mode: [] for mode in self.modes}

            def scored(batch):
                other = swap(batch["image"], batch["mask"])
                pairs = {
                    mode: [score[mode](params, (image, batch["text"])) for image in (batch["image"], other)]
                    for mode in self.modes
                }
                return batch["mask"], batch["text"], pairs

            for mask, text, pairs in over_pairs(scored):
                if mask.sum() < 2:
                    continue
                for mode, (own, swapped) in pairs.items():
                    gain = (own[mask] - swapped[mask]) / lengths(text)[mask]
                    gains[mode].append(finite(gain, "likelihoods"))
            for mode in self.modes:
                gain = np.concatenate(gains[mode])
                half = Z_95 * gain.std(ddof=1) / np.sqrt(len(gain))
                yield f"{mode}/gain", float(gain.mean())
                yield f"{mode}/low", float(gain.mean() - half)
                yield f"{mode}/high", float(gain.mean() + half)

        return evaluate


def next_real(mask: jax.Array) -> jax.Array:
    """For each real row (B,) the index of the next real one, around the end; padded rows keep their own."""
    index = jnp.arange(len(mask))
    # Twice around: behind the last real row comes the first.
    real = jnp.where(jnp.tile(mask, 2), jnp.arange(2 * len(mask)), 2 * len(mask))
    following = jax.lax.cummin(real, reverse=True)[1 : len(mask) + 1]
    return jnp.where(mask, following % len(mask), index)
