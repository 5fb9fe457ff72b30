"""k-nearest-neighbour classification on frozen features, weighted as in DINO (arXiv 2104.14294, section 4.1)."""

import dataclasses

import numpy as np

from capvl.errors import UserError
from capvl.evals import Context, cached
from capvl.evals.labels import chance, open_labelled, untrained
from capvl.evals.sharded import ShardedRows, top
from capvl.inference.compiled import compiled
from capvl.inference.matching import features
from capvl.models.abilities import Ability


@dataclasses.dataclass(frozen=True)
class Knn:
    """Yields `accuracy` and `chance`: an image is of the class that has the most weight among its `k` nearest training
    images by cosine, each of which weighs exp(cosine / temperature). A tie between classes is wrong.

    Attributes:
      name: a data set with labels.
      train, test: its splits.
      k: neighbours; the paper takes 20.
      temperature: of the weights.
      cache: where features are kept for the next time (`capvl.evals.cached`): "" nowhere, "memory", or a folder.
    """

    name: str = "cifar10"
    train: str = "train"
    test: str = "test"
    k: int = 20
    temperature: float = 0.07
    cache: str = ""

    def __post_init__(self):
        if self.k < 1 or not self.temperature > 0:
            raise UserError("knn: k must be at least 1, and the temperature positive.")
        cached.check(self.cache, "knn")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.IMAGES, "knn")
        splits = [open_labelled(context, self.name, split)[0] for split in (self.train, self.test)]
        embed = compiled(context.blueprint, features)

        def evaluate(params):
            what = f"images of {self.name}"
            (x, y), (x_test, y_test) = (
                cached.image_features(context, source, embed, params, what, cache=self.cache) for source in splits
            )
            known, asked = (ShardedRows.of_host(context.mesh, normalized(rows), context.batch) for rows in (x, x_test))
            numbers, cosines = top(asked, known, self.k)
            yield "accuracy", accuracy(y[numbers], cosines, y_test, self.temperature)
            yield from untrained(y_test, y)
            yield "chance", chance(y_test)

        return evaluate


def normalized(rows: np.ndarray) -> np.ndarray:
    """Rows (N, D) of length 1."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def accuracy(neighbours: np.ndarray, cosines: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Share of rows whose label has more weight than any other.

    Args:
      neighbours, cosines: (N, K), labels and cosines of the nearest, best first.
      labels: (N,).
      temperature: of the weights.
    """
    weights = np.zeros((len(labels), int(max(neighbours.max(), labels.max())) + 1))
    # The largest weight is 1, so that none overflows.
    np.add.at(weights, (np.arange(len(labels))[:, None], neighbours), np.exp((cosines - cosines[:, :1]) / temperature))
    own = weights[np.arange(len(labels)), labels].copy()
    weights[np.arange(len(labels)), labels] = 0
    return float((own > weights.max(axis=1)).mean())
