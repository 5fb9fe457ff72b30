"""X-VLM with a class head: what a text says of one image or of two, judged (arXiv 2111.08276, official code).

Visual entailment has one image and three classes; NLVR2 has two images, each cross-modal layer twice, and two classes;
text assignment, before it, asks which of two images a text belongs to.

Letters beside those of `capvl.models.xvlm`: M images of an example, K texts of an example, c classes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.errors import UserError
from capvl.models import flops, fusion, sizes
from capvl.models.abilities import Ability
from capvl.models.features import with_summary
from capvl.models.fusion import FusionBert, FusionBlock, TwoImageBlock
from capvl.models.two_towers import normalize
from capvl.models.vision import ImageOptions
from capvl.models.xvlm import Head, TextOptions, without_end
from capvl.nn import weights
from capvl.nn.layers import Dense

BLOCKS = {1: FusionBlock, 2: TwoImageBlock}


@dataclasses.dataclass(frozen=True)
class JudgeOptions(TextOptions, ImageOptions):
    """What the model is made of; `config.model` of a recipe.

    Attributes:
      images: that a text is about, 1 or 2; with 2 each of `cross_layers` is doubled.
      classes: their names, in the order of the logits.
      head: "mlp" (NLVR2, entailment) or "linear" (text assignment).
      projection: width of the space in which images are similar to each other (text assignment); 0 for none.
    """

    images: int = 1
    classes: tuple[str, ...] = ("contradiction", "neutral", "entailment")
    head: str = "mlp"
    projection: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_text()
        self.check_choices(head=("mlp", "linear"))
        if self.images not in BLOCKS:
            raise UserError(f"model.images={self.images}: a text is about 1 image or 2.")
        if len(self.classes) < 2 or len({name.casefold() for name in self.classes}) < len(self.classes):
            raise UserError(f"model.classes should name two classes or more, each once, not {self.classes}.")
        if self.projection < 0:
            raise UserError(f"model.projection must not be negative, not {self.projection}.")

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        return frozenset({Ability.IMAGES, Ability.JUDGES})

    def judge_flops(self) -> float:
        """Forward matmul FLOPs of one text with its encoded images, the text encoder's left out."""
        size = sizes.parse_size(self.text)
        rows, columns = self.grid
        tokens = rows * columns + 1
        fused = fusion.fusion_flops(size, self.cross_layers, self.length, tokens, self.encoder_width)
        return self.images * fused + flops.dense(1, size.width, len(self.classes))

    def make(self, rngs: nnx.Rngs) -> "XVlmJudge":
        """Builds the model."""
        return XVlmJudge(self, rngs=rngs)


class XVlmJudge(nnx.Module):
    """Every method is a pure function of the parameters; a `key` means training."""

    def __init__(self, options: JudgeOptions, *, rngs: nnx.Rngs):
        width, classes, init = sizes.parse_size(options.text).width, len(options.classes), weights.normal(0.02)
        self.dtype, self.reads_end, self.images = jnp.dtype(options.dtype), options.reads_end, options.images
        self.encoder = options.make_encoder(rngs)
        lower = options.bert_options("none", dtype=options.dtype, remat=options.remat, unroll=options.unroll)
        block = BLOCKS[options.images]
        self.text = FusionBert(lower, options.cross_layers, options.encoder_width, block, rngs=rngs)
        if options.head == "mlp":
            self.head = Head(width, classes, rngs=rngs)
        else:
            self.head = Dense((width, classes), ("embed", None), init, bias=(classes,), rngs=rngs)
        if options.projection:
            joint = (options.projection,)
            self.image_head = Dense((options.encoder_width, *joint), ("embed", None), init, bias=joint, rngs=rngs)

    def encode(self, image_IHWC, *, key=None) -> jax.Array:
        """Image tokens (I, N, C), a summary first, of images (I, H, W, 3) in [-1, 1]."""
        level = self.encoder.levels(self.encoder.normalize(image_IHWC), dtype=self.dtype, key=key)[-1]
        return with_summary(level).tokens_BND

    def features(self, image_IHWC) -> jax.Array:
        """Summaries (I, C) float32 of images."""
        return self.encode(image_IHWC)[:, 0].astype(jnp.float32)

    def embed_tokens(self, tokens_INC) -> jax.Array:
        """Normalised embeddings (I, E) float32 of encoded images (`projection`)."""
        return normalize(self.image_head(tokens_INC[:, 0]))

    def judge(self, image_BMHWC, text_BKL, *, key=None) -> jax.Array:
        """Logits (B, K, c) float32 of the classes, for K texts about each example's images in [-1, 1]."""
        keys = (None, None) if key is None else jax.random.split(key)
        batch, images = image_BMHWC.shape[:2]
        tokens = self.encode(image_BMHWC.reshape(batch * images, *image_BMHWC.shape[2:]), key=keys[0])
        tokens = tokens.reshape(batch, images, *tokens.shape[1:])
        return self.logits([tokens[:, m] for m in range(images)], text_BKL, key=keys[1])

    def logits(self, tokens_BNC, text_BKL, *, key=None) -> jax.Array:
        """As `judge`, of encoded images: a list of M arrays (B, N, C)."""
        keys = (None, None) if key is None else jax.random.split(key)
        batch, count, length = text_BKL.shape
        text = text_BKL.reshape(batch * count, length)
        text = text if self.reads_end else without_end(text)
        images = tokens_BNC[0] if self.images == 1 else tuple(tokens_BNC)
        fused_BLD = self.text.fuse(self.text.states(text, key=keys[0]), text, images, key=keys[1])
        return self.head(fused_BLD[:, 0]).astype(jnp.float32).reshape(batch, count, -1)
