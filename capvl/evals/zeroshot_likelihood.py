"""Zero-shot classification by likelihood: the class whose name the captioner finds likeliest (CapPa, section 4.2)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from capvl.decoding import trie
from capvl.errors import UserError
from capvl.evals import Context, to_host
from capvl.evals.encode import compile_images, over_images, tokenize
from capvl.evals.labels import open_labelled
from capvl.evals.names import class_names
from capvl.evals.zeroshot import accuracies
from capvl.nn.padding import lengths

NODES = 256


@dataclasses.dataclass(frozen=True)
class ZeroShotLikelihood:
    """Yields `accuracy`, `top5`, `chance`, and `blind`: the accuracy of the same with the likelihoods under a grey
    image, which no image changes; with `calibrated` those are subtracted first.

    The image is encoded once, and the classes' common beginnings are read once (`capvl.decoding.trie`).

    Attributes:
      name, split: a data set with labels.
      classes: file of class names in the labels' order; "" for the data set's own.
      prompt: text with {} where the name goes.
      mean: divide by the number of tokens.
      calibrated: score log p(name | image) - log p(name | grey image).
    """

    name: str = "cifar10"
    split: str = "test"
    classes: str = ""
    prompt: str = "{}"
    mean: bool = False
    calibrated: bool = False

    def __post_init__(self):
        if self.prompt.count("{}") != 1:
            raise UserError(
                f"zeroshot_likelihood: the prompt {self.prompt!r} should have {{}} once, where the class name goes."
            )

    def setup(self, context: Context):
        """See `capvl.evals`."""
        context.require("a decoder", "zeroshot_likelihood")
        source, labels = open_labelled(context, self.name, self.split)
        names = class_names(context.path(self.classes), source, labels)
        tokens = tokenize(context, [self.prompt.format(name) for name in names], whole=True)
        scorer = Scorer(tokens, mean=self.mean)
        score = compile_images(context, scorer)
        grey = jax.jit(lambda params: scorer(context.blueprint.bind(params), grey_image(context.recipe.model)))

        def evaluate(params):
            scores, rest = over_images(context, source, score, params, f"images of {self.name}")
            blind = to_host(grey(params))
            if self.calibrated:
                scores = scores - blind
            yield from accuracies(scores, rest["label"])
            yield "blind", float((rest["label"] == blind.argmax()).mean())

        return evaluate


class Scorer:
    """(model, images in [-1, 1]) -> log-likelihoods (B, C) of fixed token sequences (C, L)."""

    def __init__(self, tokens: np.ndarray, *, mean: bool = False, nodes: int = NODES):
        """mean: divide by the number of tokens; nodes: see `capvl.decoding.trie.split`."""
        trees, order = trie.split(tokens, nodes)
        self.trees = trees
        self._stacked = {k: np.stack([trie.arrays(t)[k] for t in trees]) for k in trie.arrays(trees[0])}
        self._count = [int((t.paths[:, 0] < len(t.tokens)).sum()) for t in trees]
        self._back = np.argsort(order)
        self._lengths = lengths(tokens).astype(np.float32)
        self._mean = mean

    def __call__(self, model, image_BRRC) -> jax.Array:
        """The scores."""
        kv = model.decoder.image_kv(model.encode(image_BRRC))
        stacked = {k: jnp.asarray(v) for k, v in self._stacked.items()}
        if len(self.trees) == 1:
            scores = trie.log_likelihoods(model, kv, {k: v[0] for k, v in stacked.items()})[None]
        else:
            scores = jax.lax.map(lambda tree: trie.log_likelihoods(model, kv, tree), stacked)
        real = jnp.concatenate([scores[i, :, :n] for i, n in enumerate(self._count)], axis=1)
        real = real[:, jnp.asarray(self._back)]
        return real / jnp.asarray(self._lengths)[None] if self._mean else real


def grey_image(options) -> jax.Array:
    """One image (or clip) without content as a model with these options sees it, in [-1, 1]: the blind control's."""
    shape = options.image_shape() if hasattr(options, "image_shape") else (options.res, options.res, 3)
    grey = jnp.zeros((1, *shape), jnp.float32)
    return grey.at[..., 3:].set(1.0)
