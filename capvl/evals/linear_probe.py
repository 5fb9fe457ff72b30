"""Linear probe on frozen features: logistic regression by L-BFGS, its strength chosen on held-out training images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from capvl.errors import UserError
from capvl.evals import Context, cached
from capvl.evals.cached import image_features
from capvl.evals.labels import chance, open_labelled, untrained
from capvl.inference.compiled import compiled
from capvl.inference.matching import features
from capvl.models.abilities import Ability


@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Yields `accuracy` on the test split, `l2`: the strength chosen, `val`: its accuracy on the held-out tenth of
    the training split, and `chance`.

    After the choice the classifier is fitted once more to the whole training split (CLIP, appendix A.3).

    Attributes:
      name: a data set with labels.
      train, test: its splits.
      l2: strengths to choose from, of the mean loss.
      pool: "encoder": the encoder's own pooled feature, or "mean" of its tokens.
      steps: at most so many of L-BFGS for each strength.
      cache: where features are kept for the next time (`capvl.evals.cached`): "" nowhere, "memory", or a folder.
    """

    name: str = "cifar10"
    train: str = "train"
    test: str = "test"
    l2: tuple[float, ...] = tuple(10.0**i for i in range(-6, 2))
    pool: str = "encoder"
    steps: int = 500
    cache: str = ""

    def __post_init__(self):
        if self.pool not in ("encoder", "mean"):
            raise UserError(f"linear_probe: pool={self.pool!r} should be 'encoder' or 'mean'.")
        cached.check(self.cache, "linear_probe")
        if not self.l2 or min(self.l2) < 0 or self.steps < 1:
            raise UserError("linear_probe: l2 should name strengths that are not negative, and steps be at least 1.")

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require(Ability.IMAGES, "linear_probe")
        train, test = (open_labelled(context, self.name, split)[0] for split in (self.train, self.test))

        function = features if self.pool == "encoder" else _mean_of_tokens
        embed = compiled(context.blueprint, function)

        def evaluate(params):
            (x, y), (x_test, y_test) = (
                image_features(context, source, embed, params, f"images of {self.name}", cache=self.cache)
                for source in (train, test)
            )
            yield from probe(x, y, x_test, y_test, self.l2, self.steps)

        return evaluate


def _mean_of_tokens(model, image) -> jax.Array:
    return model.encode(image).mean(axis=1).astype(jnp.float32)


def probe(x, y, x_test, y_test, l2s, steps: int):
    """(name, value) pairs of `LinearProbe` from features (N, D) and labels."""
    classes = int(max(y.max(), y_test.max())) + 1
    mean, std = x.mean(axis=0, keepdims=True), x.std(axis=0, keepdims=True) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    order = np.random.default_rng(0).permutation(len(x))
    held, kept = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    found, start = {}, None
    for l2 in sorted(l2s, reverse=True):  # From strong to weak: each begins where the last one ended.
        start = logistic_regression(x[kept], y[kept], classes, l2, steps, start)
        found[l2] = float((predict(start, x[held]) == y[held]).mean())
    best = max(found, key=lambda l2: (found[l2], l2))
    weights = logistic_regression(x, y, classes, best, steps)
    yield "accuracy", float((predict(weights, x_test) == y_test).mean())
    yield "l2", best
    yield "val", found[best]
    yield from untrained(y_test, y)
    yield "chance", chance(y_test)


def predict(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Classes (N,) by weights (D + 1, K), whose last row is the bias."""
    return (x @ weights[:-1] + weights[-1]).argmax(axis=1)


def logistic_regression(x, y, classes: int, l2: float, steps: int, start: np.ndarray | None = None) -> np.ndarray:
    """Weights (D + 1, K) that minimise mean cross-entropy + l2 / 2 * |weights|^2 (the bias is not penalised)."""
    shape = (x.shape[1] + 1, classes)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y)

    @jax.jit
    @jax.value_and_grad
    def loss(weights):
        logits = x @ weights[:-1] + weights[-1:]
        nll = jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, y[:, None], axis=1)[:, 0]
        return nll.mean() + 0.5 * l2 * jnp.square(weights[:-1]).sum()

    def flat(values):
        value, gradient = jax.device_get(loss(jnp.asarray(values.reshape(shape), jnp.float32)))
        return float(value), gradient.reshape(-1).astype(np.float64)

    begin = np.zeros(shape) if start is None else start
    result = scipy.optimize.minimize(flat, begin.reshape(-1), jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return result.x.reshape(shape)
