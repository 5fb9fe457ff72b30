"""Does the model look? NLL per token of a caption with another image, minus with its own."""

import dataclasses

import jax
import numpy as np

from capvl.data.reading import loader
from capvl.evals import Context, check_limits, finite, to_host
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
        _, batches = open_pairs(context, self.name, self.split, self.limit)
        take = jax.jit(lambda image, index: image[index], out_shardings=batch_sharding(context.mesh))
        score = {mode: compile_scores(context, parallel=mode == "pa") for mode in self.modes}

        def evaluate(params):
            gains = {mode: [] for mode in self.modes}
            for host_batch in batches():
                batch = loader.to_device(host_batch, batch_sharding(context.mesh))
                mask, text = to_host(batch["mask"]), to_host(batch["text"])
                count = int(mask.sum())
                if count < 2:
                    continue
                other = take(batch["image"], next_real(mask))
                tokens = lengths(text)[mask]
                for mode in self.modes:
                    own = to_host(score[mode](params, (batch["image"], batch["text"])))[mask]
                    swapped = to_host(score[mode](params, (other, batch["text"])))[mask]
                    gains[mode].append(finite((own - swapped) / tokens, "likelihoods"))
            for mode in self.modes:
                gain = np.concatenate(gains[mode])
                half = Z_95 * gain.std(ddof=1) / np.sqrt(len(gain))
                yield f"{mode}/gain", float(gain.mean())
                yield f"{mode}/low", float(gain.mean() - half)
                yield f"{mode}/high", float(gain.mean() + half)

        return evaluate


def next_real(mask: np.ndarray) -> np.ndarray:
    """For each real row the index of the next real one, around the end; padded rows keep their own."""
    index = np.arange(len(mask), dtype=np.int32)
    real = np.flatnonzero(mask)
    index[real] = np.roll(real, -1)
    return index
