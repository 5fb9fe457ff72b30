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
from capvl.parallel.rules import batch_sharding, replicated

DIVIDED = 2**28
"""Logits (1 GiB) above which all devices divide the rows: ImageNet's need 15 GB, with features and gradient."""


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
            yield from probe(x, y, x_test, y_test, self.l2, self.steps, context.mesh)

        return evaluate


def _mean_of_tokens(model, image) -> jax.Array:
    return model.encode(image).mean(axis=1).astype(jnp.float32)


def probe(x, y, x_test, y_test, l2s, steps: int, mesh=None):
    """(name, value) pairs of `LinearProbe` from features (N, D) and labels; `mesh` as for `logistic_regression`."""
    classes = int(max(y.max(), y_test.max())) + 1
    mean, std = x.mean(axis=0, keepdims=True), x.std(axis=0, keepdims=True) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    order = np.random.default_rng(0).permutation(len(x))
    held, kept = order[: max(1, len(x) // 10)], order[max(1, len(x) // 10) :]
    found, start = {}, None
    for l2 in sorted(l2s, reverse=True):  # From strong to weak: each begins where the last one ended.
        start = logistic_regression(x[kept], y[kept], classes, l2, steps, start, mesh)
        found[l2] = float((predict(start, x[held]) == y[held]).mean())
    best = max(found, key=lambda l2: (found[l2], l2))
    weights = logistic_regression(x, y, classes, best, steps, mesh=mesh)
    yield "accuracy", float((predict(weights, x_test) == y_test).mean())
    yield "l2", best
    yield "val", found[best]
    yield from untrained(y_test, y)
    yield "chance", chance(y_test)


def _divided(x: np.ndarray, y: np.ndarray, mesh) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows over all devices, with padding at the end; and which are none."""
    sharding, count = batch_sharding(mesh), len(x)
    padding = -count % (mesh.shape["replica"] * mesh.shape["fsdp"])

    def place(rows: np.ndarray) -> jax.Array:
        padded = np.concatenate([rows, np.zeros((padding, *rows.shape[1:]), rows.dtype)]) if padding else rows
        return jax.make_array_from_callback(padded.shape, sharding, lambda index: padded[index])

    return place(x.astype(np.float32, copy=False)), place(y.astype(np.int32)), place(np.ones(count, np.float32))


@jax.jit
@jax.value_and_grad
def _loss(weights, x_ND, y_N, real_N, l2) -> jax.Array:
    logits_NK = x_ND @ weights[:-1] + weights[-1:]
    nll_N = jax.nn.logsumexp(logits_NK, axis=1) - jnp.take_along_axis(logits_NK, y_N[:, None], axis=1)[:, 0]
    mean = nll_N.mean() if real_N is None else (nll_N * real_N).sum() / real_N.sum()
    return mean + 0.5 * l2 * jnp.square(weights[:-1]).sum()


def predict(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Classes (N,) by weights (D + 1, K), whose last row is the bias."""
    return (x @ weights[:-1] + weights[-1]).argmax(axis=1)


def logistic_regression(
    x, y, classes: int, l2: float, steps: int, start: np.ndarray | None = None, mesh: jax.sharding.Mesh | None = None
) -> np.ndarray:
    """Weights (D + 1, K) that minimise mean cross-entropy + l2 / 2 * |weights|^2 (the bias is not penalised).

    Args:
      x, y: features (N, D) and labels (N,).
      classes, l2: K, strength.
      steps: at most so many of L-BFGS.
      start: weights to begin with.
      mesh: of the devices that divide the rows where there are more than DIVIDED logits.
    """
    shape = (x.shape[1] + 1, classes)
    if mesh is not None and len(x) * classes > DIVIDED:
        rows, whole = _divided(x, y, mesh), replicated(mesh)
    else:
        rows, whole = (jnp.asarray(x, jnp.float32), jnp.asarray(y), None), None

    def flat(values):
        weights = jax.device_put(values.reshape(shape).astype(np.float32), whole)
        value, gradient = jax.device_get(_loss(weights, *rows, np.float32(l2)))
        return float(value), gradient.reshape(-1).astype(np.float64)

    begin = np.zeros(shape) if start is None else start
    result = scipy.optimize.minimize(flat, begin.reshape(-1), jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return result.x.reshape(shape)
