"""GLIP (arXiv 2112.03857): detection as grounding. Every place of an image is aligned with every token of a text.

An image encoder with a pyramid of five levels (P3 to P7, strides 8 to 128), a BERT, and a tower of blocks in which both
look at each other (deep fusion, section 3.2). What the text says is what is looked for: class names joined to a prompt,
or a caption.

Letters: B images and their texts, N places of all levels, level by level and row by row, L tokens, C and D widths of
places and tokens.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from capvl.errors import UserError
from capvl.models import flops, sizes
from capvl.models.abilities import Ability
from capvl.models.alignment import Aligned, AlignmentHead
from capvl.models.bert import Bert, BertOptions, split_key
from capvl.models.deep_fusion import KINDS as FUSIONS
from capvl.models.pyramid import make_pyramid
from capvl.models.tower import DetectionTower
from capvl.models.vision import ImageOptions
from capvl.nn import weights
from capvl.nn.anchors import STRIDES
from capvl.nn.padding import real
from capvl.nn.weights import weight

OFFSETS = ("flat", "clean", "none")
PROMPT_ROWS = 1000
COARSEST = 32
"""Sides of images are multiples of the stride of P5; P6 and P7 round up."""


@dataclasses.dataclass(frozen=True)
class GlipOptions(ImageOptions):
    """What a GLIP is made of; `config.model` of a recipe.

    Attributes:
      res, max_side: images keep their aspect: short side `res`, long side at most `max_side`.
      width: C, of the pyramid and the tower.
      blocks: of the tower.
      groups: of its group norms.
      offsets: how a block's convolutions at the next coarser level read offsets that belong to the finer one: "flat",
        as the kernel of the original does, and so as all published weights want it; "clean": those of the place that
        they stand at; "none": convolutions that aren't deformable.
      fusion: what looks at what before each block: "both" (section 3.2), "separate" (each level by itself),
        "to_image" (places at tokens only), "none" (GLIP-T (A): the text is encoded by itself).
      fusion_width, fusion_heads: of the attention between both.
      text, vocab, length, text_positions, text_types, text_pad, first_position: of the text encoder, as of X-VLM
        (`capvl.models.xvlm.TextOptions`); L is `length`.
      text_activation, text_eps: of the text encoder and of the BERT layers in the tower.
      dropout: of the text encoder, the tower's BERT layers and the fusion's attention, in training.
      drop_block: share of the pyramid's merged maps that is dropped in training (DropBlock, arXiv 1810.12890).
      prompt_table: learned vectors are added to the text's states, one for each place of the text, 0 at first: what
        prompt tuning trains (section 4.4).
      contrast: width of a space in which places and tokens are contrasted as well (MDETR, arXiv 2104.12763, which has
        64); 0 for none.
      classes: names, in the order of their vectors: an ordinary detector of these classes, for comparison (DyHead,
        arXiv 2106.08322): no text is read, each class has a learned vector, and `length` is their number.
    """

    encoder: str = "swin-T/4"
    res: int = 800
    max_side: int = 1333
    pixels: str = "imagenet"
    activation: str = "gelu"
    eps: float = 1e-5
    pad_windows: bool = True
    level_norms: bool = True
    width: int = 256
    blocks: int = 6
    groups: int = 16
    offsets: str = "flat"
    fusion: str = "both"
    fusion_width: int = 2048
    fusion_heads: int = 8
    text: str = "B"
    vocab: int = 30_522
    length: int = 256
    text_positions: int = 512
    text_types: int = 2
    text_pad: int = 0
    first_position: int = 0
    text_activation: str = "gelu"
    text_eps: float = 1e-12
    dropout: float = 0.1
    drop_block: float = 0.0
    prompt_table: bool = False
    contrast: int = 0
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        self.check_choices(fusion=FUSIONS, offsets=OFFSETS)
        sizes.parse_size(self.text)
        if self.max_side < self.res:
            raise UserError(f"model.max_side={self.max_side} should be at least model.res={self.res}.")
        if self.res < COARSEST:
            raise UserError(f"model.res={self.res} should be at least {COARSEST} pixels, a place of the level P5.")
        if min(self.width, self.blocks, self.groups) < 1 or self.width % self.groups or self.width % 4:
            raise UserError(
                f"model.blocks={self.blocks} must be at least 1, and model.width={self.width} a multiple of 4 and of "
                f"model.groups={self.groups}."
            )
        if self.fusion != "none" and (self.fusion_heads < 1 or self.fusion_width % self.fusion_heads):
            raise UserError(
                f"model.fusion_width={self.fusion_width} should be a multiple of "
                f"model.fusion_heads={self.fusion_heads}."
            )
        if self.contrast < 0:
            raise UserError(f"model.contrast must not be negative, not {self.contrast}.")
        if len(set(self.classes)) < len(self.classes) or not all(self.classes):
            raise UserError("model.classes, a closed list, should have the name of each class once.")
        if self.classes and (self.length != len(self.classes) or self.fusion != "none"):
            raise UserError(
                f"model.classes, a closed list of {len(self.classes)}, goes with model.length={len(self.classes)} and "
                "model.fusion='none'."
            )
        if self.length < 3 - bool(self.classes) * 2 or self.length + self.first_position > self.text_positions:
            raise UserError(
                f"model.length={self.length} should be at least 3 and fit model.text_positions={self.text_positions}."
            )
        if self.length > PROMPT_ROWS and self.prompt_table:
            raise UserError(f"model.prompt_table has {PROMPT_ROWS} rows, fewer than model.length={self.length}.")
        if not 0 <= self.dropout < 1 or not 0 <= self.drop_block < 1:
            raise UserError("model.dropout and model.drop_block must be in [0, 1).")
        if self.patch_dropout:
            raise UserError("model.patch_dropout would leave holes in the pyramid; it must be 0 here.")
        self.bert_options()

    @property
    def abilities(self) -> frozenset[Ability]:
        """What the model can do."""
        return frozenset({Ability.DETECTS})

    def bert_options(self, **how) -> BertOptions:
        """Options of the text encoder."""
        named = dict(pad=self.text_pad, first_position=self.first_position, dropout=self.dropout, heads="none")
        kind = dict(activation=self.text_activation, eps=self.text_eps)
        return BertOptions(self.text, self.vocab, self.text_positions, self.text_types, **named, **kind, **how)

    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image as a batch has it: a square that holds all, with a channel that says where the image is."""
        side = -(-self.max_side // COARSEST) * COARSEST
        return (side, side, 4)

    def flops(self, height: int, width: int) -> float:
        """Forward matmul FLOPs of one image of so many pixels with its text, but for the gathers."""
        counts = [rows * columns for rows, columns in grids_of((height, width))]
        size, places, conv = sizes.parse_size(self.text), sum(counts), 9 * self.width
        # Of one level the same, a finer and a coarser one: 3 convolutions, less at both ends; and the offsets.
        candidates = places + sum(counts[1:]) + sum(counts[1:])
        block = flops.dense(candidates, conv, self.width) + flops.dense(places, conv, 27) * (self.offsets != "none")
        block += self._fusion_flops(places, size.width) + (self.fusion != "none") * flops.layer(self.length, size)
        ends = flops.dense(places, self.width, self.length + 5) + flops.dense(self.length, size.width, self.width)
        text = 0 if self.classes else size.depth * flops.layer(self.length, size)
        encoder = self.encoder_flops() * height * width / math.prod(self.image_shape()[:2])
        return encoder + self._pyramid_flops(counts) + text + self.blocks * block + ends

    def _fusion_flops(self, places: int, text_width: int) -> float:
        if self.fusion == "none":
            return 0.0
        ways = 1 if self.fusion == "to_image" else 2
        projected = flops.dense(places, self.width, (ways + 1) * self.fusion_width)
        text = flops.dense(self.length, text_width, (2 + ways - 1) * self.fusion_width)
        mixed = (ways + 1) * flops.attention(places, self.length, self.fusion_width) / 2
        return projected + text + mixed

    def _pyramid_flops(self, counts: list[int]) -> float:
        inner = sum(flops.dense(n, self.encoder_width, self.width) for n in counts[:3])
        return inner + sum(flops.dense(n, 9 * self.width, self.width) for n in counts)

    def make(self, rngs: nnx.Rngs) -> "Glip":
        """Builds the model."""
        return Glip(self, rngs=rngs)


def grids_of(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of the levels of images of (height, width)."""
    return [tuple(-(-side // stride) for side in size) for stride in STRIDES]


class Glip(nnx.Module):
    """Every method is a pure function of the parameters; a `key` means training."""

    def __init__(self, options: GlipOptions, *, rngs: nnx.Rngs):
        text_width = sizes.parse_size(options.text).width
        self.dtype = jnp.dtype(options.dtype)
        self.encoder = options.make_encoder(rngs)
        how = dict(drop_block=options.drop_block, eps=options.eps, rngs=rngs)
        self.pyramid = make_pyramid(options.encoder_kind.levels, options.width, **how)
        how = dict(dtype=options.dtype, remat=options.remat, unroll=options.unroll)
        table = (len(options.classes), text_width)
        self.classes = weight(rngs, table, (None, "embed"), weights.normal(1.0)) if options.classes else None
        self.text = None if options.classes else Bert(options.bert_options(**how), rngs=rngs)
        rows = (PROMPT_ROWS, text_width)
        self.prompt = weight(rngs, rows, (None, "embed"), weights.zeros) if options.prompt_table else None
        self.tower = DetectionTower(
            options.width,
            sizes.parse_size(options.text),
            options.blocks,
            fusion=options.fusion,
            fusion_width=options.fusion_width,
            fusion_heads=options.fusion_heads,
            dropout=options.dropout,
            groups=options.groups,
            offsets="flat" if options.offsets == "none" else options.offsets,
            deform=options.offsets != "none",
            remat=options.remat,
            unroll=options.unroll,
            rngs=rngs,
        )
        self.head = AlignmentHead(options.width, text_width, len(STRIDES), contrast=options.contrast, rngs=rngs)

    def encode(self, image_BHWC, *, key=None) -> tuple[jax.Array, ...]:
        """The pyramid's maps (B, Y, X, C), strides 8 to 128, of images (B, H, W, 4) in [-1, 1] whose fourth channel is
        above 0 where they are, at the upper left; H and W are multiples of COARSEST."""
        keys = split_key(key, 2)
        pixels = self.encoder.normalize(image_BHWC)
        levels = self.encoder.levels(pixels, dtype=self.dtype, key=keys[0])
        return tuple(level.map() for level in self.pyramid(levels, key=keys[1]))

    def states(self, text_BL, *, key=None) -> jax.Array:
        """Texts by themselves, (B, L, D)."""
        if self.classes is not None:
            return self.classes[...][text_BL - 1].astype(self.dtype)
        states_BLD = self.text(text_BL, real(text_BL), key=key)
        if self.prompt is not None:
            states_BLD = states_BLD + self.prompt[...][None, : text_BL.shape[1]].astype(states_BLD.dtype)
        return states_BLD

    def align(self, maps, states_BLD, text_BL, *, key=None) -> Aligned:
        """What every place of encoded images says of every token of encoded texts, one text an image."""
        maps, states_BLD = self.tower(maps, states_BLD, real(text_BL), key=key)
        return self.head(maps, states_BLD)
