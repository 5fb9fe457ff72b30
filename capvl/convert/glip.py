"""GLIP by the names of its official repository (github.com/microsoft/GLIP), in and out.

Their images are BGR: the channels of the patch embedding are turned around. What the arrays don't tell (heads of
attention, groups of norms, sizes of images) is that of the released models, unless it is given.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from capvl.convert import bert, glip_names, rules, swin, xvlm_parts
from capvl.convert.hugging_face import check_form
from capvl.convert.rules import Rule
from capvl.convert.xvlm_names import depth
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.glip import GlipOptions
from capvl.models.swin import SwinKind
from capvl.nn.anchors import STRIDES
from capvl.weights import Weights

IMAGE, PYRAMID, TEXT, HEAD = "backbone.body.", "backbone.fpn.", "language_backbone.body.model.", "rpn.head."
WHAT = "model of GLIP"
FORM = dict(
    pool="mean", activation="gelu", eps=swin.EPS, pixels="imagenet", pad_windows=True, level_norms=True,
    text_pad=0, first_position=0, text_activation="gelu", text_eps=1e-12, text_types=2, contrast=0, classes=(),
)  # fmt: skip
"""What all models of the official code have."""
_PROMPT = "rpn.tunable_linear.weight"
"""Of models whose prompt was tuned."""
_CONSTANTS = ("relative_position_index", "position_ids", "num_batches_tracked")
_NOT_OF_OURS = ("rpn.anchor_generator.", *(f"{HEAD}{name}" for name in glip_names.NOT_OF_OURS))
_FIRST = "dyhead_tower.0."
_FUSIONS = {f"{_FIRST}b_attn.gamma_v": "both", f"{_FIRST}t2i_attn.gamma": "to_image"}


@dataclasses.dataclass(frozen=True)
class Told:
    """What the arrays don't tell; the released models' by default.

    Attributes:
      text_heads: of the BERT's attention; 0 for width / 64.
      fusion_heads: of the fusion's attention.
      groups: of the tower's group norms.
      res, max_side, length, offsets: see `capvl.models.glip.GlipOptions`.
    """

    text_heads: int = 0
    fusion_heads: int = 8
    groups: int = 16
    res: int = 800
    max_side: int = 1333
    length: int = 256
    offsets: str = "flat"


def options_of(theirs: Mapping[str, np.ndarray], told: Told) -> GlipOptions:
    """Options of an official model, from its shapes.

    Raises:
      UserError: it is none, or one of the official code's other models.
    """
    for name in (IMAGE + swin.ORIGINAL.stem, f"{TEXT}embeddings.word_embeddings.weight", f"{HEAD}log_scale"):
        if name not in theirs:
            raise UserError(
                f"The weights lack {name!r}, so they are not those of a GLIP with a Swin and a BERT, which are read."
            )
    vocab, text_width = theirs[f"{TEXT}embeddings.word_embeddings.weight"].shape
    layers = f"{TEXT}encoder.layer."
    hidden = len(theirs[f"{layers}0.intermediate.dense.bias"])
    heads = told.text_heads or max(1, text_width // 64)
    fusion = next((kind for name, kind in _FUSIONS.items() if HEAD + name in theirs), "none")
    if f"{HEAD}{_FIRST}b_attn.shrink_lang.fc.weight" in theirs:
        fusion = "separate"
    modules = depth(theirs, f"{HEAD}dyhead_tower.")
    more = {}
    if fusion != "none":
        query = "b_attn.attn.v_proj.bias" if fusion != "to_image" else "t2i_attn.attn.q_proj.bias"
        more = dict(fusion_width=len(theirs[f"{HEAD}{_FIRST}{query}"]), fusion_heads=told.fusion_heads)
    return GlipOptions(
        **_encoder(theirs),
        **{name: value for name, value in FORM.items() if name != "pool"},
        **more,
        res=told.res,
        max_side=told.max_side,
        width=len(theirs[f"{PYRAMID}top_blocks.p6.bias"]),
        blocks=modules if fusion == "none" else modules // 3,
        groups=told.groups,
        offsets=told.offsets,
        fusion=fusion,
        text=f"w{text_width}d{depth(theirs, layers)}h{heads}m{hidden}",
        vocab=vocab,
        length=told.length,
        text_positions=len(theirs[f"{TEXT}embeddings.position_embeddings.weight"]),
        prompt_table=_PROMPT in theirs,
        dtype="float32",
    )


def _encoder(theirs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Name and windows of the Swin."""
    width, _, patch, _ = theirs[IMAGE + swin.ORIGINAL.stem].shape
    stages = depth(theirs, f"{IMAGE}layers.")
    depths = [depth(theirs, f"{IMAGE}layers.{stage}.blocks.") for stage in range(stages)]
    tables = [theirs[IMAGE + swin.ORIGINAL.table.format(stage, 0)] for stage in range(stages)]
    window = (math.isqrt(len(tables[0])) + 1) // 2
    numbers = ("-".join(map(str, each)) for each in (depths, [table.shape[1] for table in tables]))
    return dict(encoder="swin-w{}d{}h{}/{}".format(width, *numbers, patch), window=window)


def table(options: GlipOptions) -> list[Rule]:
    """Rules of a GLIP."""
    kind = options.encoder_kind
    found = rules.under("", IMAGE, swin.original(len(kind.sizes), level_norms=True))
    for i in range(3):
        # Numbered as the Swin's stages are, of which the first isn't read.
        found += glip_names.convolution(f"pyramid/lateral/{i}", f"{PYRAMID}fpn_inner{i + 2}")
        found += glip_names.convolution(f"pyramid/out/{i}", f"{PYRAMID}fpn_layer{i + 2}")
    for name in ("p6", "p7"):
        found += glip_names.convolution(f"pyramid/coarser/{name}", f"{PYRAMID}top_blocks.{name}")
    found += bert.embeddings("text/", f"{TEXT}embeddings.")
    found += bert.layer("text/blocks/{i}", f"{TEXT}encoder.layer.{{i}}")
    found += glip_names.tower("tower", f"{HEAD}dyhead_tower", options.blocks, options.fusion)
    if options.prompt_table:
        found.append(Rule("prompt", (_PROMPT,)))
    return found + glip_names.alignment("head", HEAD.removesuffix("."), len(STRIDES))


def heads_of(options: GlipOptions) -> Callable[[str], int]:
    """Number of heads of attention by our parameter's name."""
    image = swin.heads_by_stage([size.heads for size in options.encoder_kind.sizes])
    text = sizes.parse_size(options.text).heads

    def of(name: str) -> int:
        if name.startswith("encoder/"):
            return image(name)
        return options.fusion_heads if re.search("/fusion/", name) else text

    return of


def read_official(theirs: Mapping[str, np.ndarray], told: Told = Told()) -> tuple[GlipOptions, dict[str, np.ndarray]]:
    """(options, parameters) of an official state dict.

    Raises:
      UserError: it is another model.
    """
    options = options_of(theirs, told)
    kept = {
        name: value
        for name, value in swin.without_buffers(theirs).items()
        if not name.startswith(_NOT_OF_OURS) and not name.endswith(_CONSTANTS) and ".pooler." not in name
    }
    return options, _turned(rules.read(kept, table(options), heads_of(options), WHAT))


def write_official(options: GlipOptions, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The official state dict, without constants that follow from the sizes and the head that nothing reads.

    Raises:
      UserError: the model is not of a form that the official code has.
    """
    if not isinstance(options.encoder_kind, SwinKind):
        raise UserError(f"A {WHAT} has a Swin; the official code has no {options.encoder_kind.called}.")
    check_form(options, FORM, WHAT, kind=options.encoder_kind.called)
    if options.offsets != "flat":
        raise UserError(
            f"The official code reads the offsets of coarser levels by model.offsets='flat', and this {WHAT} was made "
            f"with {options.offsets!r}; there it would find other boxes."
        )
    return rules.write(_turned(params), table(options), WHAT)


def _turned(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the channels of the patch embedding the other way round: RGB and BGR."""
    name = "encoder/stem/kernel"  # (H, W, C, D).
    return dict(params) | {name: np.ascontiguousarray(np.flip(params[name], 2))}


def objective_of(options: GlipOptions) -> dict[str, Any]:
    """The section of a recipe that evaluates a GLIP, or a detector with a closed list of classes."""
    return {"name": "glip"} | ({"texts": ["classes"], "order": "fixed"} if options.classes else {})


def image_encoder(weights: Weights, options: Any, path: str) -> dict[str, np.ndarray]:
    """The image encoder of another kind of model, without its head; norms of a Swin's levels that it hadn't are fresh.

    Args:
      weights: of that model.
      options: of the GLIP.
      path: where the weights are from, for messages.
    """
    found = xvlm_parts.image_encoder(weights, options, path)
    found = {name: value for name, value in found.items() if not name.startswith("encoder/map/")}
    if not options.level_norms or weights.options.level_norms:
        return found
    for stage, size in enumerate(options.encoder_kind.sizes[1:-1], 1):
        norm = f"encoder/stages/{stage}/norm"
        found |= {f"{norm}/scale": np.ones(size.width, np.float32), f"{norm}/bias": np.zeros(size.width, np.float32)}
    return found


def text_of_bert(weights: Weights, options: GlipOptions, path: str) -> dict[str, np.ndarray]:
    """The text encoder from a BERT or RoBERTa of ours, without its heads and with its first positions.

    Args:
      weights: the BERT.
      options: of the model.
      path: where the BERT is from, for messages.

    Raises:
      UserError: it is of another form than the text encoder.
    """
    xvlm_parts.check_bert(options, weights.options, path)
    heads = ("pooler/", "next_sentence/", "transform", "word_bias")
    taken = {f"text/{name}": value for name, value in weights.params.items() if not name.startswith(heads)}
    return taken | {"text/positions": taken["text/positions"][: options.text_positions]}
