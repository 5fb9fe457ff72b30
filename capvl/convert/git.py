"""GIT's weights: the official names and Hugging Face's in, Hugging Face's out."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capvl.convert import rules
from capvl.convert.hugging_face import ACTIVATIONS, CLIP_FORM, check_form, clip_image, section, size_name
from capvl.convert.rules import CONV, ROW, Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.git import GitOptions

_CLS = 101
_DEFAULTS = dict(
    hidden_act="gelu", hidden_size=768, num_hidden_layers=6, num_attention_heads=12, intermediate_size=3072,
    vocab_size=30_522, max_position_embeddings=1024, layer_norm_eps=1e-12, bos_token_id=_CLS,
)  # fmt: skip
_VISION = dict(
    hidden_act="quick_gelu", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    image_size=224, patch_size=16, layer_norm_eps=1e-5,
)  # fmt: skip


def _official_image() -> list[Rule]:
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


def _text(words: str, positions: str, norm: str, projection: str, encoder: str) -> list[Rule]:
    """The decoder without its output layer: BERT's layers by BERT's names."""
    layer = f"{encoder}.layer.{{i}}"
    return [
        Rule("decoder/tokens", (f"{words}.weight",)),
        Rule("decoder/positions", (f"{positions}.weight",)),
        *rules.norm("decoder/embedding_norm", norm),
        *rules.dense("decoder/visual", f"{projection}.0"),
        *rules.norm("decoder/visual_norm", f"{projection}.1"),
        *rules.attention(
            "decoder/blocks/{i}/attn",
            *(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")),
            f"{layer}.attention.output.dense",
        ),
        *rules.norm("decoder/blocks/{i}/norm1", f"{layer}.attention.output.LayerNorm"),
        *rules.dense("decoder/blocks/{i}/mlp/up", f"{layer}.intermediate.dense"),
        *rules.dense("decoder/blocks/{i}/mlp/down", f"{layer}.output.dense"),
        *rules.norm("decoder/blocks/{i}/norm2", f"{layer}.output.LayerNorm"),
    ]


def _output(name: str, tied: bool) -> list[Rule]:
    """The output layer; where it is tied its kernel is the token table."""
    return [Rule("decoder/bias", (f"{name}.bias",))] if tied else rules.dense("decoder/logits", name)


HUGGING_FACE = [
    *clip_image("git.image_encoder.vision_model."),
    *_text(
        "git.embeddings.word_embeddings",
        "git.embeddings.position_embeddings",
        "git.embeddings.LayerNorm",
        "git.visual_projection.visual_projection",
        "git.encoder",
    ),
]
OFFICIAL = [
    *_official_image(),
    *_text(
        "textual.embedding.words",
        "textual.embedding.positions",
        "textual.embedding.layer_norm",
        "textual.visual_projection",
        "textual.transformer.encoder",
    ),
]
# Both spellings are about.
_FRAME = re.compile(r"(?:git\.)?img_temp[oe]ral_embedding\.(\d+)")
_BUFFERS = ("position_ids", "image_encoder.proj", "image_encoder.visual_projection.weight")


def read_hugging_face(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    """(options, parameters) of a GitForCausalLM.

    Raises:
      UserError: it is another model, or its output layer is not what tie_word_embeddings says.
    """
    says = config.get("tie_word_embeddings")
    config = _DEFAULTS | dict(config)
    vision = _VISION | dict(config.get("vision_config") or {})
    theirs = {
        re.sub(r"image_encoder\.(?!vision_model)", "image_encoder.vision_model.", k): v for k, v in theirs.items()
    }
    for part in (config, vision):
        if part["hidden_act"] not in ACTIVATIONS:
            raise UserError(f"config.json has the activation {part['hidden_act']!r}.")
    options = dict(
        encoder=f"{size_name(vision)}/{vision['patch_size']}",
        res=vision["image_size"],
        activation=ACTIVATIONS[vision["hidden_act"]],
        eps=vision["layer_norm_eps"],
        text=size_name(config),
        vocab=config["vocab_size"],
        start=config["bos_token_id"],
        text_positions=config["max_position_embeddings"],
        text_activation=ACTIVATIONS[config["hidden_act"]],
        text_eps=config["layer_norm_eps"],
        embedding_eps=config["layer_norm_eps"],
    )
    return _read(theirs, HUGGING_FACE, "output", options, says)


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
    return _read(theirs, OFFICIAL, "textual.output", options | {"start": min(_CLS, vocab - 1)}, None)


def _size(theirs: Mapping[str, np.ndarray], mlp: str, width: int, heads: int) -> str:
    depth = next(i for i in range(len(theirs)) if mlp.format(i) not in theirs)
    hidden = len(theirs[mlp.format(0)]) if depth else 0
    return f"w{width}d{depth}h{heads or max(1, width // 64)}m{hidden}"


def _is_tied(theirs: Mapping[str, np.ndarray], output: str, words: str, says: bool | None) -> bool:
    """Whether a model's output layer is its token table.

    It is where the weights have one array for both, or two that are equal: released GITs hold two equal ones and a
    configuration that calls them untied, as transformers' own does unless it is told.

    Args:
      theirs: state dict.
      output, words: names of the output layer's and the table's arrays.
      says: `tie_word_embeddings` of the configuration; None where it says nothing.

    Raises:
      UserError: the weights contradict the configuration.
    """
    if output not in theirs:
        if says is False:
            raise UserError(f"config.json has tie_word_embeddings=false, and the weights lack {output!r}.")
        return True
    equal = words in theirs and np.array_equal(theirs[output], theirs[words])
    if says and not equal:
        raise UserError(f"config.json has tie_word_embeddings=true, and {output!r} differs from {words!r}.")
    return equal


def _read(
    theirs: Mapping[str, np.ndarray], table: Sequence[Rule], output: str, options: dict[str, Any], says: bool | None
):
    theirs = {k: v for k, v in theirs.items() if not k.endswith(_BUFFERS)}
    frames = {int(m[1]): theirs.pop(k) for k in list(theirs) if (m := _FRAME.fullmatch(k))}
    words = next(rule.theirs[0] for rule in table if rule.ours == "decoder/tokens")
    tied = _is_tied(theirs, f"{output}.weight", words, says)
    if tied:
        theirs.pop(f"{output}.weight", None)
    length = min(40, options["text_positions"])
    options = GitOptions(**options, frames=len(frames), dtype="float32", length=length, tied=tied)
    image, text = sizes.parse(options.encoder)[0], sizes.parse_size(options.text)
    table = [*table, *_output(output, tied)]
    params = rules.read(theirs, table, lambda n: (image if n.startswith("encoder/") else text).heads, "GIT")
    params["encoder/stem/bias"] = np.zeros(image.width, np.float32)  # CLIP's convolution has none.
    if frames:
        params["frames"] = np.stack([np.asarray(frames[i], np.float32).reshape(-1) for i in sorted(frames)])
    return options, params


def decoder_of_bert(params: Mapping[str, np.ndarray], options: GitOptions, path: str) -> dict[str, np.ndarray]:
    """A GIT's decoder from a BERT of ours: its tables and first layers (GIT, section 4.6).

    BERT adds the embedding of segment 0 to every token; here it becomes part of the positions.

    Args:
      params: of the BERT.
      options: of the GIT.
      path: where the BERT is from, for messages.

    Raises:
      UserError: the BERT has fewer layers or positions.
    """
    depth, rows = options.decoder_layers, options.text_positions
    have, known = len(params["blocks/norm1/scale"]), len(params["positions"])
    if have < depth or known < rows:
        raise UserError(
            f"init_from: the BERT in {path!r} has {have} layers and {known} positions, and the decoder {depth} layers "
            f"and model.text_positions={rows}."
        )
    out = {
        "decoder/tokens": params["tokens"],
        "decoder/positions": params["positions"][:rows] + params["types"][:1],
        # A BERT without heads for pre-training has none.
        "decoder/bias": params.get("word_bias", np.zeros(len(params["tokens"]), np.float32)),
    }
    out |= {f"decoder/embedding_norm/{leaf}": params[f"norm/{leaf}"] for leaf in ("scale", "bias")}
    out = out if options.tied else untied(out)
    return out | {f"decoder/{k}": v[:depth] for k, v in params.items() if k.startswith("blocks/")}


def untied(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters with an output layer of its own, a copy of the token table."""
    params = dict(params)
    bias = params.pop("decoder/bias")
    return params | {"decoder/logits/kernel": params["decoder/tokens"].T, "decoder/logits/bias": bias}


def write_hugging_face(options: GitOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config) of a GitForCausalLM.

    Raises:
      UserError: the model is not of the form that transformers has.
    """
    decoder = dict(fusion="prefix", norm="post", projection_norm=True, frame_pool="concat")
    check_form(options, CLIP_FORM | decoder | dict(pixels="clip"), "GIT")
    params = dict(params)
    if np.any(params.pop("encoder/stem/bias")):
        raise UserError(
            "Hugging Face's GIT has no place for a bias of its patch convolution, and this one's is not zero."
        )
    frames = params.pop("frames", ())
    state = rules.write(params, [*HUGGING_FACE, *_output("output", options.tied)], "GIT")
    state.setdefault("output.weight", state["git.embeddings.word_embeddings.weight"])
    state |= {f"git.img_temporal_embedding.{i}": np.asarray(v)[None, None] for i, v in enumerate(frames)}
    (size, patch), text = sizes.parse(options.encoder), sizes.parse_size(options.text)
    names = {v: k for k, v in ACTIVATIONS.items() if k != "gelu_new"}
    config = {
        "architectures": ["GitForCausalLM"],
        "model_type": "git",
        **section(text, names[options.text_activation], options.text_eps),
        "vocab_size": options.vocab,
        "max_position_embeddings": options.text_positions,
        "num_image_with_embedding": options.frames or None,
        "tie_word_embeddings": options.tied,
        "pad_token_id": 0,
        # [SEP] stands behind [CLS] in BERT's vocabulary and in those that are trained here.
        "bos_token_id": options.start,
        "eos_token_id": options.start + 1,
        "vision_config": section(size, names[options.activation], options.eps)
        | {"image_size": options.res, "patch_size": patch, "model_type": "git_vision_model"},
    }
    return state, config
