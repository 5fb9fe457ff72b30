"""How likely texts are to a model that writes, given images: one by one, or many that share beginnings as a tree.

Letters: B images, C or K texts, L tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np

from capvl.decoding import trie
from capvl.decoding.likelihood import log_likelihood, log_likelihood_of_kv
from capvl.inference.inputs import Images, Texts, as_list
from capvl.inference.loaded import Loaded
from capvl.models.abilities import Ability
from capvl.nn.padding import lengths

NODES = 256


def pair_likelihoods(model, rows) -> jax.Array:
    """log p(text | image) in nats, (B,) float32, of (images (B, R, R, 3), tokens (B, L))."""
    return log_likelihood(model, *rows)


def parallel_likelihoods(model, rows) -> jax.Array:
    """As `pair_likelihoods`, every token predicted from the image alone (Pa)."""
    return log_likelihood(model, *rows, parallel=True)


def likelihoods(model, image_BRRC, text_BKL) -> jax.Array:
    """log p(text | image) in nats, (B, K) float32, of each image with K texts of its own, the image encoded once.

    A text of padding only has 0.
    """
    kv = model.decoder.image_kv(model.encode(image_BRRC))
    texts = jnp.swapaxes(text_BKL, 0, 1)
    return jax.lax.map(lambda text_BL: log_likelihood_of_kv(model, kv, text_BL), texts).T


class TextScorer:
    """(model, images in [-1, 1]) -> log-likelihoods (B, C) of fixed token sequences (C, L).

    The image is encoded once, and the texts' common beginnings are read once (`capvl.decoding.trie`).
    """

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


# What follows are methods of `capvl.inference.face.LoadedModel`.


def score(self: Loaded, images: Images, texts: Texts) -> np.ndarray:
    """log p(text | image) in nats, (N,): text i for image i; or (N, M) of every image with every text where there
    are not as many texts as images. Longer texts than the model writes are cut, as in training."""
    self.need(Ability.DECODER)
    pixels, tokens = self.pixels(images), self.ids(as_list(texts))
    if len(pixels) == len(tokens):
        return self.run("score", pair_likelihoods, (pixels, tokens))
    return every(self, pixels, tokens)


def every(self: Loaded, pixels: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """log p(text | image) in nats, (N, M), of every image with every text."""
    return self.run(("score", tokens.tobytes()), TextScorer(tokens), pixels)
