"""Images and texts as vectors, and how near they are: an image tower's features, two towers' joint space; and how well
they belong together by a matching head, which looks at both at once (ALBEF, arXiv 2107.07651; X-VLM, 2111.08276)."""

import importlib.resources

import jax
import jax.numpy as jnp
import numpy as np

from capvl.errors import UserError
from capvl.inference.compiled import Function
from capvl.inference.inputs import Images, Texts, as_list
from capvl.inference.loaded import Loaded
from capvl.lines import read_lines
from capvl.models.abilities import Ability, abilities

PAIRS = 512
"""How many pairs are put together at a time on the host."""


def features(model, image_BRRC) -> jax.Array:
    """Pooled features (B, D) float32 of the image tower."""
    return model.features(image_BRRC).astype(jnp.float32)


def image_tokens(model, image_BRRC) -> jax.Array:
    """Encoded tokens (B, T, D) float32 of the image tower."""
    return model.encode(image_BRRC).astype(jnp.float32)


def image_vectors(model, image_BRRC) -> jax.Array:
    """Normalised embeddings (B, E) float32 of images in the joint space."""
    return model.embed_image(image_BRRC)


def text_vectors(model, text_BL) -> jax.Array:
    """Normalised embeddings (B, E) float32 of texts' tokens in the joint space."""
    return model.embed_text(text_BL)


def cosines(model, image_BRRC, text_BKL) -> jax.Array:
    """Cosines (B, K) float32 of each image with K texts of its own."""
    batch, count, length = text_BKL.shape
    text_BKE = text_vectors(model, text_BKL.reshape(batch * count, length)).reshape(batch, count, -1)
    return jnp.einsum("be,bke->bk", image_vectors(model, image_BRRC), text_BKE)


def matches(model, image_BRRC, text_BKL) -> jax.Array:
    """Matching scores (B, K) float32 of each image with K texts of its own, the image encoded once."""
    batch, count, length = text_BKL.shape
    return model.match(model.encode(image_BRRC), text_BKL.reshape(batch * count, length)).reshape(batch, count)


class TextMatcher:
    """(model, images in [-1, 1]) -> matching scores (B, C) of fixed token sequences (C, L)."""

    def __init__(self, tokens: np.ndarray):
        self._tokens = tokens

    def __call__(self, model, image_BRRC) -> jax.Array:
        """The scores. Images and texts are encoded once; what looks at both runs for a text at a time."""
        image_BNC, text_CL = model.encode(image_BRRC), jnp.asarray(self._tokens)

        def score(one):
            text, states = (jnp.repeat(x[None], len(image_BNC), axis=0) for x in one)
            return model.match(image_BNC, text, states_BLD=states)

        return jax.lax.map(score, (text_CL, model.states(text_CL))).T


def embedding(options) -> Function:
    """The function that embeds images: into the joint space where the model has one, else its pooled features."""
    return image_vectors if Ability.TEXTS in abilities(options) else features


def read_templates(path: str) -> list[str]:
    """Prompt templates; each has {} where the class name goes. "" is the package's own list.

    Raises:
      UserError: see `read_lines`; or a template has no {}.
    """
    if not path:
        file = importlib.resources.files("capvl.inference").joinpath("prompts.txt")
        with importlib.resources.as_file(file) as local:
            return read_templates(str(local))
    return check_templates(read_lines(path, "prompt templates"))


def check_templates(templates: list[str]) -> list[str]:
    """The templates.

    Raises:
      UserError: one has not {} once, or another field.
    """
    for template in templates:
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            raise UserError(
                f"Template {template!r} should have {{}} once, where the class name goes, and no other brace."
            )
    return templates


def class_vectors(prompts: np.ndarray, templates: int) -> np.ndarray:
    """Normalised means (K, E) of the embeddings (K * templates, E) of each class's prompts."""
    mean = prompts.reshape(-1, templates, prompts.shape[1]).mean(axis=1)
    return mean / (np.linalg.norm(mean, axis=1, keepdims=True) + 1e-8)


# What follows are methods of `capvl.inference.face.LoadedModel`.


def embed(self: Loaded, images: Images) -> np.ndarray:
    """Features (N, D) float32: a two-tower model's normalised embeddings, else the encoder's pooled features."""
    return self.run("embed", embedding(self.options), self.pixels(images))


def tokens(self: Loaded, images: Images) -> np.ndarray:
    """Encoded image tokens (N, T, D) float32."""
    return self.run("tokens", image_tokens, self.pixels(images))


def embed_text(self: Loaded, texts: Texts) -> np.ndarray:
    """Normalised embeddings (N, E) float32 of texts."""
    self.need(Ability.TEXTS)
    return self.run("embed_text", text_vectors, self.ids(as_list(texts)))


def similarity(self: Loaded, images: Images, texts: Texts) -> np.ndarray:
    """Cosines (N, M) of every image with every text."""
    return embed(self, images) @ embed_text(self, texts).T


def match(self: Loaded, images: Images, texts: Texts) -> np.ndarray:
    """Scores of the matching head, its logit of "yes": (N,) of text i with image i; or (N, M) of every image with every
    text where there are not as many texts as images. Longer texts than the model reads are cut, as in training."""
    self.need(Ability.MATCHES)
    pixels, ids = self.pixels(images), self.ids(as_list(texts))
    if len(pixels) == len(ids):
        return match_pairs(self, pixels, ids, np.arange(len(ids)), np.arange(len(ids)))
    pairs = np.indices((len(pixels), len(ids))).reshape(2, -1)
    return match_pairs(self, pixels, ids, *pairs).reshape(len(pixels), len(ids))


def match_pairs(model: Loaded, pixels: np.ndarray, ids: np.ndarray, image_P: np.ndarray, text_P: np.ndarray):
    """Matching scores (P,) float32 of pairs of an image (N, R, R, 3) and a text (M, L), by their numbers (P,); each
    image and each text is encoded once."""
    encoded_NTC, states_MLD = model.run("tokens", image_tokens, pixels), model.run("states", _states, ids)
    parts = np.array_split(np.arange(len(image_P)), -(-len(image_P) // PAIRS))
    rows = ((encoded_NTC[image_P[p]], ids[text_P[p]], states_MLD[text_P[p]]) for p in parts)
    return np.concatenate([model.run("match", _match_encoded, part) for part in rows])


def _states(model, text_BL) -> jax.Array:
    return model.states(text_BL).astype(jnp.float32)


def _match_encoded(model, rows) -> jax.Array:
    image_BTC, text_BL, states_BLD = rows
    states_BLD = states_BLD.astype(model.dtype)
    return model.match(image_BTC.astype(model.dtype), text_BL, states_BLD=states_BLD)
