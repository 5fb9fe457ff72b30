"""What X-VLM (arXiv 2111.08276) learns about texts with one image or two: visual entailment, NLVR2, text assignment.

`Judge` is classification. `TextAssignment` comes before NLVR2 and teaches two-image layers which of two images a text
belongs to, from image-text pairs alone; its task is ALBEF's (arXiv 2107.07651), its images are drawn by similarity.
Both are stages of one paper, with one model.

Letters: B examples, M images of an example, K texts, L tokens, c classes; Q groups of G examples, N image tokens.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from capvl.data.examples import statements
from capvl.data.examples.image_text import ImageText
from capvl.errors import UserError
from capvl.models.features import rows_of
from capvl.models.xvlm_judge import JudgeOptions, XVlmJudge
from capvl.objectives import Mean
from capvl.objectives.images import unit_range

ASSIGNED = ("first", "second", "neither")
"""Classes of text assignment: the image that a text belongs to."""
OWN = 2 / 3
"""How often a text's own image is one of its two (official code)."""
TEMPERATURE = 0.07
"""Of the similarity of images by which the others are drawn (official code)."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      texts: statements about an example's images that are learned at once, the images being encoded once.
    """

    texts: int = 1

    Model: ClassVar[type] = JudgeOptions

    def __post_init__(self):
        if self.texts < 1:
            raise UserError(f"objective.texts must be at least 1, not {self.texts}.")

    def check(self, model_options: JudgeOptions, batch_per_device: int, micro_batches: int) -> None:
        """Nothing contradicts."""

    def frozen(self, model_options: JudgeOptions) -> tuple[str, ...]:
        """The projection of images, which nothing here learns, and a MAP head."""
        return _frozen(model_options)

    def features(self) -> tuple[str, ...]:
        """One image or two, and statements about them."""
        return statements.FEATURES

    def transform(self, model_options: JudgeOptions, data, *, train: bool):
        """Crops and statements; see `capvl.data.examples.statements.Statements`."""
        return statements.Statements.from_options(data, model_options, texts=self.texts, train=train)

    def batch_spec(self, model_options: JudgeOptions, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, M, R, R, 3), flip bool (B, M), text int32 (B, K, L), label int32 and slots bool (B, K)."""
        images, texts, res = model_options.images, self.texts, model_options.res
        return {
            "image": jax.ShapeDtypeStruct((batch, images, res, res, 3), jnp.uint8),
            "flip": jax.ShapeDtypeStruct((batch, images), jnp.bool_),
            "text": jax.ShapeDtypeStruct((batch, texts, model_options.length), jnp.int32),
            "label": jax.ShapeDtypeStruct((batch, texts), jnp.int32),
            "slots": jax.ShapeDtypeStruct((batch, texts), jnp.bool_),
        }

    def prompt(self, model_options: JudgeOptions, tokenizer, task: str, text: str = ""):
        """A class head writes nothing."""
        raise _no_decoder(task)

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1] and flipped where asked; weights (B, K) of the statements, of mean 1 an example."""
        image, slots_BK = batch["image"], batch["slots"].astype(jnp.float32)
        flip = batch["flip"].reshape(-1) if train else None
        ready = unit_range(image.reshape(-1, *image.shape[2:]), flip).reshape(image.shape)
        weights_BK = slots_BK / jnp.maximum(slots_BK.sum(axis=1).mean(), 1e-6)
        return {"image": ready, "text": batch["text"], "label": batch["label"], "weights": weights_BK}

    def loss(self, model: XVlmJudge, batch, key):
        """Mean cross-entropy of the statements; metric `accuracy`."""
        logits_BKc = model.judge(batch["image"], batch["text"], key=key)
        nll_BK, right_BK = _scored(logits_BKc, batch["label"])
        weights_BK = batch["weights"]
        loss = (weights_BK * nll_BK).sum(axis=1).mean()
        there_BK = (weights_BK > 0).astype(jnp.float32)
        return loss, {"loss": loss, "accuracy": Mean((there_BK * right_BK).sum(), there_BK.sum())}

    def flops(self, model_options: JudgeOptions) -> float:
        """Matmul FLOPs of training on one example."""
        texts = self.texts * (model_options.text_flops() + model_options.judge_flops())
        return 3 * (model_options.images * model_options.encoder_flops() + texts)


@dataclasses.dataclass(frozen=True)
class TextAssignment:
    """Options and methods of the objective (`capvl.objectives.Objective`).

    Attributes:
      among: consecutive examples of a batch whose images are drawn for each other; the official code takes a GPU's
        128. They stay on one device, so what is drawn doesn't hang on how many there are.
    """

    among: int = 16

    Model: ClassVar[type] = JudgeOptions

    def __post_init__(self):
        if self.among < 3:
            raise UserError(f"objective.among={self.among}: two others are drawn for a text, so it is at least 3.")

    def check(self, model_options: JudgeOptions, batch_per_device: int, micro_batches: int) -> None:
        """Raises UserError where the model is not one for text assignment, or groups would lie on two devices."""
        asked = dict(images=2, classes=ASSIGNED)
        wrong = [f"model.{name}={value!r}" for name, value in asked.items() if getattr(model_options, name) != value]
        if wrong or not model_options.projection:
            wrong += [] if model_options.projection else ["model.projection of at least 1"]
            raise UserError(f"Text assignment needs {', '.join(wrong)}.")
        if batch_per_device % self.among:
            raise UserError(
                f"objective.among={self.among} does not divide the {batch_per_device} examples of a device, whose "
                "images are drawn for each other."
            )

    def frozen(self, model_options: JudgeOptions) -> tuple[str, ...]:
        """The projection of images: what is drawn by it teaches it nothing. And a MAP head."""
        return _frozen(model_options)

    def features(self) -> tuple[str, ...]:
        """An image and its captions."""
        return ("image", "text")

    def transform(self, model_options: JudgeOptions, data, *, train: bool):
        """Crop and caption; see `capvl.data.examples.image_text.ImageText`."""
        how = dict(res=model_options.res, length=model_options.length, train=train)
        return ImageText.from_options(data, start=model_options.reads_start, **how)

    def batch_spec(self, model_options: JudgeOptions, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """image uint8 (B, R, R, 3), text int32 (B, L), flip bool (B,)."""
        res = model_options.res
        return {
            "image": jax.ShapeDtypeStruct((batch, res, res, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((batch, model_options.length), jnp.int32),
            "flip": jax.ShapeDtypeStruct((batch,), jnp.bool_),
        }

    def prompt(self, model_options: JudgeOptions, tokenizer, task: str, text: str = ""):
        """A class head writes nothing."""
        raise _no_decoder(task)

    def prepare(self, batch, *, train: bool):
        """Images to [-1, 1] and flipped where asked."""
        return {"image": unit_range(batch["image"], batch.get("flip") if train else None), "text": batch["text"]}

    def loss(self, model: XVlmJudge, batch, key):
        """Mean cross-entropy; metrics `accuracy`, and `accuracy_own` where the own image is one of the two."""
        image_key, draw_key, key = jax.random.split(key, 3)
        tokens_BNC = model.encode(batch["image"], key=image_key)
        features_BE = jax.lax.stop_gradient(model.embed_tokens(tokens_BNC))
        features_QGE = features_BE.reshape(-1, self.among, features_BE.shape[-1])
        pairs_QG2, label_QG = draw_pairs(similarities(features_QGE), draw_key)
        return assignment_loss(model, tokens_BNC, batch["text"], pairs_QG2, label_QG.reshape(-1), key)

    def flops(self, model_options: JudgeOptions) -> float:
        """Matmul FLOPs of training on one example."""
        return 3 * (model_options.encoder_flops() + model_options.text_flops() + model_options.judge_flops())


def similarities(features_QGE) -> jax.Array:
    """Log-weights (Q, G, G) float32 by which images are drawn for each other: similarity / 0.07, never themselves."""
    features_QGE = features_QGE.astype(jnp.float32)
    similarity_QGG = jnp.einsum("qge,qhe->qgh", features_QGE, features_QGE) / TEMPERATURE
    return jnp.where(jnp.eye(similarity_QGG.shape[-1], dtype=bool)[None], -jnp.inf, similarity_QGG)


def draw_pairs(logits_QGG, key) -> tuple[jax.Array, jax.Array]:
    """Two images for each text: OWN of the time its own with another one, in random order, else two others.

    Others are drawn without replacement by softmax(logits): the largest of logits with Gumbel noise are such draws.

    Args:
      logits_QGG: of `similarities`.
      key: of the draws.

    Returns:
      int32 numbers of the images in their group (Q, G, 2), and labels (Q, G): of ASSIGNED.
    """
    own_key, side_key, noise_key = jax.random.split(key, 3)
    shape = logits_QGG.shape[:2]
    noise_QGG = jax.random.gumbel(noise_key, logits_QGG.shape, jnp.float32)
    _, others_QG2 = jax.lax.top_k(logits_QGG + noise_QGG, 2)
    own_QG = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    with_own_QG2 = jnp.stack([own_QG, others_QG2[..., 0]], axis=-1)
    second_QG = jax.random.bernoulli(side_key, 0.5, shape)
    with_own_QG2 = jnp.where(second_QG[..., None], with_own_QG2[..., ::-1], with_own_QG2)
    is_own_QG = jax.random.bernoulli(own_key, OWN, shape)
    pairs_QG2 = jnp.where(is_own_QG[..., None], with_own_QG2, others_QG2)
    return pairs_QG2, jnp.where(is_own_QG, second_QG.astype(jnp.int32), 2)


def assignment_loss(model: XVlmJudge, tokens_BNC, text_BL, pairs_QG2, label_B, key=None):
    """Loss and metrics of texts with pairs of encoded images that were drawn (`draw_pairs`)."""
    images = [rows_of(tokens_BNC, pairs_QG2[..., i]) for i in range(2)]
    logits_B1c = model.logits(images, text_BL[:, None], key=key)
    nll_B1, right_B1 = _scored(logits_B1c, label_B[:, None])
    own_B1 = (label_B < 2).astype(jnp.float32)[:, None]
    loss = nll_B1.mean()
    with_own = Mean((own_B1 * right_B1).sum(), own_B1.sum())
    return loss, {"loss": loss, "accuracy": right_B1.mean(), "accuracy_own": with_own}


def _scored(logits, label) -> tuple[jax.Array, jax.Array]:
    """Cross-entropies and float32 0 or 1: whether the largest logit is the label's."""
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), label[..., None], axis=-1)[..., 0]
    return nll, (logits.argmax(axis=-1) == label).astype(jnp.float32)


def _frozen(model_options: JudgeOptions) -> tuple[str, ...]:
    return model_options.unread + (("image_head/.*",) if model_options.projection else ())


def _no_decoder(task: str) -> UserError:
    return UserError(f"A model with a class head has no decoder for the task {task!r}.")
