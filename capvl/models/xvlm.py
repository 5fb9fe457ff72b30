"""X-VLM (arXiv 2111.08276): images, regions of them, and texts, aligned at every grain.

An image encoder, a text encoder, and a cross-modal encoder that is the upper half of the same BERT. A region is encoded
from its image's tokens (`capvl.models.features.Regions`), never from pixels of its own.

Letters: B texts, I images, N image tokens (a summary, then a token a place), L text positions, C and D widths of image
and text tokens, E width of the joint space, S regions of each of Q groups of images.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.errors import UserError
from capvl.models import flops, fusion, sizes
from capvl.models.abilities import Ability
from capvl.models.bert import BertOptions
from capvl.models.features import Level, Regions, with_summary
from capvl.models.fusion import FusionBert
from capvl.models.two_towers import normalize
from capvl.models.vision import ImageOptions
from capvl.nn import weights
from capvl.nn.boxes import corners
from capvl.nn.layers import ACTIVATIONS, Dense, LayerNorm
from capvl.nn.padding import lengths
from capvl.nn.weights import weight
from capvl.parallel.rows import interleave, part

HEADS = ("itc", "itm", "mlm", "box")
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.001, 0.5


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """What the text and cross-modal encoders of X-VLM and of its tasks are made of; options of models with them begin
    with these.

    Attributes:
      text: size of the BERT (`capvl.models.sizes`), both encoders together.
      cross_layers: its upper layers, which look at the image.
      vocab, length, text_positions, text_types: number of token ids, tokens of a text, rows of the position table, and
        segments.
      text_pad, first_position: of RoBERTa; see `capvl.models.bert.BertOptions`.
      reads_end: texts are read with their end ([SEP]); X-VLM is pre-trained without and fine-tuned with it.
      text_activation, text_eps, dropout: of the text and cross-modal encoders.
    """

    text: str = "B"
    cross_layers: int = 6
    vocab: int = 30_522
    length: int = 40
    text_positions: int = 512
    text_types: int = 2
    text_pad: int = 0
    first_position: int = 0
    reads_end: bool = True
    text_activation: str = "gelu"
    text_eps: float = 1e-12
    dropout: float = 0.1

    def check_text(self) -> None:
        """Raises UserError where the text's options contradict each other."""
        size = sizes.parse_size(self.text)
        if not 1 <= self.cross_layers < size.depth:
            raise UserError(
                f"model.cross_layers={self.cross_layers} should be at least 1 and less than the {size.depth} layers "
                f"of model.text={self.text!r}."
            )
        if self.length < 3 or self.length + self.first_position > self.text_positions:
            raise UserError(
                f"model.length={self.length} should be at least 3 and fit model.text_positions={self.text_positions}."
            )
        self.bert_options()

    def bert_options(self, heads: str = "words", **how) -> BertOptions:
        """Options of the lower layers: a BERT with these heads (`BertOptions`)."""
        size = sizes.parse_size(self.text)
        depth = size.depth - self.cross_layers
        text = f"w{size.width}d{depth}h{size.heads}m{size.mlp}"
        named = dict(pad=self.text_pad, first_position=self.first_position, dropout=self.dropout)
        kind = dict(activation=self.text_activation, eps=self.text_eps, heads=heads)
        return BertOptions(text, self.vocab, self.text_positions, self.text_types, **named, **kind, **how)

    def text_flops(self) -> float:
        """Forward matmul FLOPs of one text through the text encoder."""
        size = sizes.parse_size(self.text)
        return (size.depth - self.cross_layers) * flops.layer(self.length, size)

    def words_flops(self, count: int) -> float:
        """Forward matmul FLOPs of predicting so many words of a text."""
        width = sizes.parse_size(self.text).width
        return flops.dense(count, width, width) + flops.dense(count, width, self.vocab)


@dataclasses.dataclass(frozen=True)
class XVlmOptions(TextOptions, ImageOptions):
    """What an X-VLM is made of; `config.model` of a recipe.

    Attributes:
      heads: what it has of "itc" (projections to a joint space, with the temperature), "itm" (does a text belong to an
        image), "mlm" (hidden words) and "box" (where a text is in an image).
      projection: width of the joint space.
      temperature: initial value of the learned temperature.
      local_layers: last layers of a ViT in which a region's copies of the tokens see only the region; 0: a region's
        tokens are its image's, and their mean is its summary (Swin).
    """

    heads: tuple[str, ...] = HEADS
    projection: int = 256
    temperature: float = 0.07
    local_layers: int = 0

    def __post_init__(self):
        super().__post_init__()
        self.check_text()
        unknown = [head for head in self.heads if head not in HEADS]
        if unknown or len(set(self.heads)) < len(self.heads) or not self.heads:
            raise UserError(f"model.heads should name some of {', '.join(HEADS)}, each once, not {self.heads}.")
        if self.projection < 1 or not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            raise UserError(
                f"model.projection must be at least 1, and model.temperature from {LEAST_TEMPERATURE} to "
                f"{MOST_TEMPERATURE}."
            )
        if self.patch_dropout:
            raise UserError("model.patch_dropout would drop patches that regions are made of; it must be 0 here.")
        if not 0 <= self.local_layers < self.encoder_size.depth or (self.local_layers and self.pool != "cls"):
            raise UserError(
                f"model.local_layers={self.local_layers} should be fewer than the encoder's {self.encoder_size.depth} "
                "layers, and needs a ViT with model.pool='cls'."
            )

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        of_heads = {"itc": Ability.TEXTS, "itm": Ability.MATCHES, "box": Ability.BOXES}
        return frozenset({Ability.IMAGES, Ability.REGIONS, *(a for h, a in of_heads.items() if h in self.heads)})

    def image_tokens(self) -> int:
        """Tokens of an image that texts look at: a summary, and one a place."""
        rows, columns = self.grid
        return rows * columns + 1

    def fusion_flops(self) -> float:
        """Forward matmul FLOPs of one text with one image through the cross-modal encoder."""
        size = sizes.parse_size(self.text)
        return fusion.fusion_flops(size, self.cross_layers, self.length, self.image_tokens(), self.encoder_width)

    def region_flops(self) -> float:
        """Forward matmul FLOPs of one region beside its image: the layers that run anew for it."""
        if not self.local_layers:
            return 0.0
        return self.local_layers * flops.layer(self.image_tokens(), self.encoder_size)

    def make(self, rngs: nnx.Rngs) -> "XVlm":
        """Builds the model."""
        return XVlm(self, rngs=rngs)


class Head(nnx.Module):
    """Dense to twice the width, layer norm, GELU, Dense: (…, D) -> (…, out) float32."""

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs):
        init = weights.normal(0.02)
        self.up = Dense((width, 2 * width), ("embed", "mlp"), init, bias=(2 * width,), rngs=rngs)
        self.norm = LayerNorm(2 * width, eps=1e-5, rngs=rngs)
        self.down = Dense((2 * width, out), ("mlp", None), init, bias=(out,), rngs=rngs)

    def __call__(self, x) -> jax.Array:
        return self.down(ACTIVATIONS["gelu"](self.norm(self.up(x)))).astype(jnp.float32)


class XVlm(nnx.Module):
    """Every method is a pure function of the parameters; a `key` means training."""

    def __init__(self, options: XVlmOptions, *, rngs: nnx.Rngs):
        text_width, init = sizes.parse_size(options.text).width, weights.normal(0.02)
        self.dtype, self.reads_end = jnp.dtype(options.dtype), options.reads_end
        self.local_layers = options.local_layers
        self.encoder = options.make_encoder(rngs)
        how = dict(dtype=options.dtype, remat=options.remat, unroll=options.unroll)
        joint, heads = (options.projection,), options.heads
        bert = options.bert_options("words" if "mlm" in heads else "none", **how)
        self.text = FusionBert(bert, options.cross_layers, options.encoder_width, rngs=rngs)
        if "itc" in heads:
            self.image_head = Dense((options.encoder_width, *joint), ("embed", None), init, bias=joint, rngs=rngs)
            self.text_head = Dense((text_width, *joint), ("embed", None), init, bias=joint, rngs=rngs)
            self.temp = weight(rngs, (1,), (None,), weights.constant(options.temperature))
        self.itm = Head(text_width, 2, rngs=rngs) if "itm" in heads else None
        self.box = Head(text_width, 4, rngs=rngs) if "box" in heads else None

    def levels(self, image_IHWC, *, key=None) -> Level:
        """The image encoder's last level, with a summary, of images in [-1, 1]."""
        return with_summary(self.encoder.levels(self.encoder.normalize(image_IHWC), dtype=self.dtype, key=key)[-1])

    def encode(self, image_IHWC, *, key=None) -> jax.Array:
        """Image tokens (I, N, C), a summary first, of images (I, H, W, 3) in [-1, 1]."""
        return self.levels(image_IHWC, key=key).tokens_BND

    def regions(self, image_IHWC, box_QS4, owner_QS, *, key=None) -> Regions:
        """Images and regions of them; see `capvl.models.features`."""
        image_IHWC = self.encoder.normalize(image_IHWC)
        return self.encoder.regions(image_IHWC, box_QS4, owner_QS, dtype=self.dtype, key=key, local=self.local_layers)

    def features(self, image_IHWC) -> jax.Array:
        """Summaries (I, C) float32 of images."""
        return self.encode(image_IHWC)[:, 0].astype(jnp.float32)

    def embed_tokens(self, tokens_BNC) -> jax.Array:
        """Normalised embeddings (B, E) float32 of encoded images or regions."""
        return normalize(self.image_head(tokens_BNC[:, 0]))

    def embed_states(self, states_BLD) -> jax.Array:
        """Normalised embeddings (B, E) float32 of encoded texts."""
        return normalize(self.text_head(states_BLD[:, 0]))

    def embed_image(self, image_IHWC) -> jax.Array:
        """Normalised embeddings (I, E) float32 of images."""
        return self.embed_tokens(self.encode(image_IHWC))

    def embed_text(self, text_BL) -> jax.Array:
        """Normalised embeddings (B, E) float32 of texts."""
        return self.embed_states(self.states(text_BL))

    def read(self, text_BL) -> jax.Array:
        """The tokens that the model reads of texts, which end with their end: without it, if `reads_end` is False."""
        return text_BL if self.reads_end else without_end(text_BL)

    def states(self, text_BL, *, key=None) -> jax.Array:
        """Texts by themselves, (B, L, D)."""
        return self.text.states(self.read(text_BL), key=key)

    def fuse(self, states_BLD, text_BL, image_BNC, image_mask_BN=None, *, key=None) -> jax.Array:
        """Encoded texts that look at encoded images or regions, (B, L, D); see `FusionBert.fuse`."""
        return self.text.fuse(states_BLD, self.read(text_BL), image_BNC, image_mask_BN, key=key)

    def fuse_together(self, batches: list[tuple], key=None) -> list[jax.Array]:
        """What becomes of the texts of several batches that look at images, in one pass: states shaped as they came.

        Args:
          batches: of each, texts' states (R, …, L, D) and tokens (R, …, L), image tokens (R, N, C) and which are seen
            (R, N), or None for all; as many texts of a row look at its image in each batch.
          key: means training.
        """
        if not batches:
            return []
        states, tokens, images = (interleave([batch[i] for batch in batches]) for i in range(3))
        mask = None
        if any(batch[3] is not None for batch in batches):
            mask = interleave([jnp.ones(b[2].shape[:2], bool) if b[3] is None else b[3] for b in batches])
        rows = states.reshape(-1, *states.shape[-2:]), tokens.reshape(-1, tokens.shape[-1])
        fused = self.fuse(*rows, images, mask, key=key)
        return part(fused.reshape(states.shape), [len(batch[0]) for batch in batches])

    def match(self, image_BNC, text_BL, image_mask_BN=None, *, states_BLD=None) -> jax.Array:
        """How well texts belong to encoded images or regions, (B,) float32: the matching head's logit of "yes" ("itm").

        Args:
          image_BNC: images, or regions; fewer rows than texts where several texts in a row have one.
          text_BL: tokens.
          image_mask_BN: which tokens a region has; None for all.
          states_BLD: the texts' `states`, where they are known.
        """
        states_BLD = self.states(text_BL) if states_BLD is None else states_BLD
        return self._yes(self.fuse(states_BLD, text_BL, image_BNC, image_mask_BN))

    def opened_match(self, image_BNC, text_BL, layer: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """Weights (B, H, L, N) float32 of the cross-attention of an upper layer, from 0, and the function from such
        weights to what `match` gives ("itm")."""
        weights, fused = self.text.opened(self.states(text_BL), self.read(text_BL), image_BNC, layer)
        return weights, lambda weights_BHLN: self._yes(fused(weights_BHLN))

    def _yes(self, fused_BLD) -> jax.Array:
        return self.itm(fused_BLD[:, 0])[:, 1]

    def locate(self, image_BNC, text_BL) -> jax.Array:
        """Boxes (x0, y0, x1, y1) float32 (B, 4), in fractions, of what texts name in encoded images ("box")."""
        return corners(self.box_of(self.fuse(self.states(text_BL), text_BL, image_BNC)))

    def box_of(self, fused_BLD) -> jax.Array:
        """Boxes (x, y of the centre, width, height) float32 (B, 4), in fractions."""
        return jax.nn.sigmoid(self.box(fused_BLD[:, 0]))

    def temperature(self) -> jax.Array:
        """The learned temperature, a float32 scalar; its gradient ends where it would leave its range."""
        return _clamp(self.temp[...].astype(jnp.float32)[0])


def without_end(text_BL) -> jax.Array:
    """Texts, which end with their end, without it."""
    place_1L = jnp.arange(text_BL.shape[1], dtype=jnp.int32)[None]
    return jnp.where(place_1L < lengths(text_BL)[:, None] - 1, text_BL, 0)


@jax.custom_vjp
def _clamp(value):
    """Clipped to the temperature's range; at an end the gradient that would lead out of it is 0.

    The original clips the parameter itself before each step.
    """
    return jnp.clip(value, LEAST_TEMPERATURE, MOST_TEMPERATURE)


def _clamp_backward(value, gradient):
    # Descent moves against the gradient.
    leaves = ((value <= LEAST_TEMPERATURE) & (gradient > 0)) | ((value >= MOST_TEMPERATURE) & (gradient < 0))
    return (jnp.where(leaves, 0.0, gradient),)


_clamp.defvjp(lambda value: (_clamp(value), value), _clamp_backward)
