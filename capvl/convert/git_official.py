"""GIT by the names of the official repository, in."""

from collections.abc import Mapping

import numpy as np

from capvl.convert import git, rules, tokens
from capvl.convert.assembling import assemble
from capvl.convert.files import Source
from capvl.convert.pixels import Pixels
from capvl.convert.rules import CONV, ROW, Rule
from capvl.errors import UserError
from capvl.weights import Weights


def _image() -> list[Rule]:
    """CLIP's image tower by OpenAI's names."""
    block, layer = "encoder/blocks/{i}", "image_encoder.transformer.resblocks.{i}"
    return [
        Rule("encoder/stem/kernel", ("image_encoder.conv1.weight",), CONV),
        Rule("encoder/cls", ("image_encoder.class_embedding",), ROW),
        Rule("encoder/positions", ("image_encoder.positional_embedding",)),
        *rules.norm("encoder/pre_norm", "image_encoder.ln_pre"),
        *rules.norm(f"{block}/norm1", f"{layer}.ln_1"),
        *rules.packed_attention(
            f"{block}/attn", f"{layer}.attn.in_proj_weight", f"{layer}.attn.in_proj_bias", f"{layer}.attn.out_proj"
        ),
        *rules.norm(f"{block}/norm2", f"{layer}.ln_2"),
        *rules.dense(f"{block}/mlp/up", f"{layer}.mlp.c_fc"),
        *rules.dense(f"{block}/mlp/down", f"{layer}.mlp.c_proj"),
        *rules.norm("encoder/norm", "image_encoder.ln_post"),
    ]


OFFICIAL = [
    *_image(),
    *git.decoder(
        "textual.embedding.words",
        "textual.embedding.positions",
        "textual.embedding.layer_norm",
        "textual.visual_projection",
        "textual.transformer.encoder",
    ),
]


def read_official(theirs: Mapping[str, np.ndarray], heads: int = 0):
    """(options, parameters) of the official repository's checkpoint; sizes come from the shapes.

    Args:
      theirs: its state dict.
      heads: of the attention; 0 for width / 64, which the released models have.

    Raises:
      UserError: it is another model.
    """
    for name in ("image_encoder.conv1.weight", "textual.embedding.words.weight"):
        if name not in theirs:
            raise UserError(f"The weights lack {name!r}, so they are not GIT's official ones.")
    width, _, patch, _ = theirs["image_encoder.conv1.weight"].shape
    grid = round((len(theirs["image_encoder.positional_embedding"]) - 1) ** 0.5)
    vocab, text_width = theirs["textual.embedding.words.weight"].shape
    options = dict(
        encoder=f"{_size(theirs, 'image_encoder.transformer.resblocks.{}.mlp.c_fc.weight', width, heads)}/{patch}",
        res=grid * patch,
        text=_size(theirs, "textual.transformer.encoder.layer.{}.intermediate.dense.weight", text_width, heads),
        vocab=vocab,
        text_positions=len(theirs["textual.embedding.positions.weight"]),
    )
    return git.read_by(theirs, OFFICIAL, "textual.output", options | {"start": min(git.CLS, vocab - 1)})


def _size(theirs: Mapping[str, np.ndarray], mlp: str, width: int, heads: int) -> str:
    depth = next(i for i in range(len(theirs)) if mlp.format(i) not in theirs)
    hidden = len(theirs[mlp.format(0)]) if depth else 0
    return f"w{width}d{depth}h{heads or max(1, width // 64)}m{hidden}"


def read(source: Source) -> Weights:
    """A GIT with the pixels that it was released with, and a tokenizer where there is one beside it."""
    options, params = read_official(source.arrays, source.heads)
    return assemble(
        source,
        options,
        params,
        resize="hugging_face",
        pixels=Pixels(options.pixels, interpolation="bicubic"),
        tokenizer=tokens.find(source.path),
    )
