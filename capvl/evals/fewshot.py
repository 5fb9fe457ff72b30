"""k-shot classification on frozen features by closed-form ridge regression (as in CapPa's reference)."""

import dataclasses

import jax
import numpy as np

from capvl.data.reading.sources import Subset
from capvl.errors import UserError
from capvl.evals import Context, cached
from capvl.evals.cached import image_features
from capvl.evals.labels import chance, open_labelled, untrained
from capvl.inference.compiled import compiled
from capvl.inference.matching import features
from capvl.models.abilities import Ability

BIAS = 100.0


@dataclasses.dataclass(frozen=True)
class FewShot:
    """Yields `SHOTSshot` accuracy for each number of shots, averaged over the seeds.

    The L2 strength is chosen on the shots themselves, by leave-one-out error; the test split
    is never used for a choice.

    Attributes:
      name: a data set with labels.
      train, test: its splits.
      shots: images a class.
      seeds: draws of the shots.
      l2: strengths to choose from.
      features: "encoder" (the pooled feature) or "pixels" (a baseline: the image itself, 16 x 16).
      cache: where features are kept for the next time (`capvl.evals.cached`): "" nowhere, "memory", or a folder.
    """

    name: str = "scenes/64"
    train: str = "train"
    test: str = "test"
    shots: tuple[int, ...] = (1, 5, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    l2: tuple[float, ...] = tuple(2.0**i for i in (-10, -5, 0, 5, 10))
    features: str = "encoder"
    cache: str = ""

    def __post_init__(self):
        if self.features not in ("encoder", "pixels"):
            raise UserError(f"fewshot features={self.features!r} should be 'encoder' or 'pixels'.")
        cached.check(self.cache, "fewshot")
        if (
            not self.shots
            or min(self.shots) < 1
            or not self.seeds
            or min(self.seeds) < 0
            or not self.l2
            or min(self.l2) < 0
        ):
            raise UserError("fewshot: shots, seeds and l2 must be named; shots at least 1, seeds and l2 not negative.")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        if self.features == "encoder":
            context.require(Ability.IMAGES, "fewshot")
        train, labels = open_labelled(context, self.name, self.train)
        test, _ = open_labelled(context, self.name, self.test)
        classes, labels = np.unique(labels, return_inverse=True)
        draws = {
            (shots, seed): select_shots(labels, len(classes), shots, seed)
            for shots in self.shots
            for seed in self.seeds
        }
        # Only the images that some draw uses are encoded.
        used = np.unique(np.concatenate(list(draws.values())))
        train = Subset(train, used)
        embed = compiled(context.blueprint, _pixels if self.features == "pixels" else features)

        def evaluate(params):
            (x, y), (x_test, y_test) = (
                image_features(context, source, embed, params, f"images of {self.name}", cache=self.cache)
                for source in (train, test)
            )
            yield from untrained(y_test, classes)
            yield "chance", chance(y_test)
            y = np.searchsorted(classes, y)
            # A class that training lacks is -1, which is never predicted.
            y_test = np.where(np.isin(y_test, classes), np.searchsorted(classes, y_test), -1)
            for shots in self.shots:
                scores = []
                for seed in self.seeds:
                    rows = np.searchsorted(used, draws[shots, seed])
                    scores.append(accuracy(x[rows], y[rows], x_test, y_test, len(classes), self.l2))
                yield f"{shots}shot", float(np.mean(scores))

        return evaluate


def _pixels(model, image):
    return jax.image.resize(image, (len(image), 16, 16, 3), "linear").reshape(len(image), -1)


def select_shots(labels: np.ndarray, num_classes: int, shots: int, seed: int) -> np.ndarray:
    """Indices of `shots` examples of each class, in class order, drawn by numpy's default_rng(seed)."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:shots] for c in range(num_classes)])


def standardize(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Centred and scaled features with a constant feature of 100 behind them: (N, F) -> (N, F + 1)."""
    return np.concatenate([(x - mean) / std, np.full((len(x), 1), BIAS)], axis=1)


def ridge(x: np.ndarray, y: np.ndarray, num_classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression to ±1 targets in float64.

    Args:
      x: (N, F) standardized features.
      y: (N,) labels.
      num_classes, l2: K classes, penalty.

    Returns:
      weights (F, K), and the leave-one-out predictions (N, K) of the training examples.
    """
    x = x.astype(np.float64)
    targets = 2.0 * np.eye(num_classes)[y] - 1.0
    if len(x) < x.shape[1]:
        dual = np.linalg.inv(x @ x.T + l2 * np.eye(len(x)))
        weights = x.T @ (dual @ targets)
        # Dual form of leave-one-out: residual_i = (dual @ targets)_i / dual_ii.
        residual = (dual @ targets) / np.diag(dual)[:, None]
        return weights, targets - residual
    inverse = np.linalg.inv(x.T @ x + l2 * np.eye(x.shape[1]))
    weights = inverse @ (x.T @ targets)
    leverage = np.einsum("nf,fg,ng->n", x, inverse, x)
    residual = (targets - x @ weights) / (1 - leverage)[:, None]
    return weights, targets - residual


def accuracy(x, y, x_test, y_test, num_classes: int, l2s) -> float:
    """Test accuracy of the strength whose leave-one-out accuracy on the shots is best (ties: least error)."""
    mean, std = x.mean(axis=0, keepdims=True), x.std(axis=0, keepdims=True) + 1e-5
    x, x_test = standardize(x, mean, std), standardize(x_test, mean, std)
    targets = 2.0 * np.eye(num_classes)[y] - 1.0

    def quality(l2):
        _, left_out = ridge(x, y, num_classes, l2)
        return (left_out.argmax(1) == y).mean(), -np.square(left_out - targets).mean()

    weights, _ = ridge(x, y, num_classes, max(l2s, key=quality))
    return float(((x_test @ weights).argmax(1) == y_test).mean())
