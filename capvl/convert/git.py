"""Hugging Face's GIT, in and out; and what a GIT begins with from a BERT or another GIT."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capvl.convert import bert, rules
from capvl.convert.files import Source, Target
from capvl.convert.hugging_face import (
    ACTIVATIONS,
    CLIP_FORM,
    assemble_folder,
    check_form,
    clip_image,
    section,
    size_name,
    write_files,
)
from capvl.convert.rules import Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.git import GitOptions
from capvl.weights import Weights

CLS = 101
_DEFAULTS = dict(
    hidden_act="gelu", hidden_size=768, num_hidden_layers=6, num_attention_heads=12, intermediate_size=3072,
    vocab_size=30_522, max_position_embeddings=1024, layer_norm_eps=1e-12, bos_token_id=CLS,
)  # fmt: skip
_VISION = dict(
    hidden_act="quick_gelu", hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
    image_size=224, patch_size=16, layer_norm_eps=1e-5,
)  # fmt: skip


def decoder(words: str, positions: str, norm: str, projection: str, encoder: str) -> list[Rule]:
    """The decoder without its output layer: BERT's layers by BERT's names."""
    return [
        Rule("decoder/tokens", (f"{words}.weight",)),
        Rule("decoder/positions", (f"{positions}.weight",)),
        *rules.norm("decoder/embedding_norm", norm),
        *rules.dense("decoder/visual", f"{projection}.0"),
        *rules.norm("decoder/visual_norm", f"{projection}.1"),
        *bert.layer("decoder/blocks/{i}", f"{encoder}.layer.{{i}}"),
    ]


def output_layer(name: str, tied: bool) -> list[Rule]:
    """The output layer; where it is tied its kernel is the token table."""
    return [Rule("decoder/bias", (f"{name}.bias",))] if tied else rules.dense("decoder/logits", name)


HUGGING_FACE = [
    *clip_image("git.image_encoder.vision_model."),
    *decoder(
        "git.embeddings.word_embeddings",
        "git.embeddings.position_embeddings",
        "git.embeddings.LayerNorm",
        "git.visual_projection.visual_projection",
        "git.encoder",
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
    declared = config.get("tie_word_embeddings")
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
    return read_by(theirs, HUGGING_FACE, "output", options, declared)


def _is_tied(theirs: Mapping[str, np.ndarray], output: str, words: str, declared: bool | None) -> bool:
    """Whether a model's output layer is its token table.

    It is where the weights have one array for both, or two that are equal: released GITs hold two equal ones and a
    configuration that calls them untied, as transformers' own does unless it is told.

    Args:
      theirs: state dict.
      output, words: names of the output layer's and the table's arrays.
      declared: `tie_word_embeddings` of the configuration; None where it says nothing.

    Raises:
      UserError: the weights contradict the configuration.
    """
    if output not in theirs:
        if declared is False:
            raise UserError(f"config.json has tie_word_embeddings=false, and the weights lack {output!r}.")
        return True
    equal = words in theirs and np.array_equal(theirs[output], theirs[words])
    if declared and not equal:
        raise UserError(f"config.json has tie_word_embeddings=true, and {output!r} differs from {words!r}.")
    return equal


def read_by(
    theirs: Mapping[str, np.ndarray],
    table: Sequence[Rule],
    output: str,
    options: dict[str, Any],
    declared: bool | None = None,
) -> tuple[GitOptions, dict[str, np.ndarray]]:
    """(options, parameters) of a GIT by a table of names.

    Args:
      theirs: state dict.
      table: of all but the output layer.
      output: name of the output layer.
      options: what is known of the model's.
      declared: `tie_word_embeddings` of its configuration; None where it says nothing.

    Raises:
      UserError: the weights are of another model, or contradict the configuration.
    """
    theirs = {k: v for k, v in theirs.items() if not k.endswith(_BUFFERS)}
    frames = {int(m[1]): theirs.pop(k) for k in list(theirs) if (m := _FRAME.fullmatch(k))}
    words = next(rule.theirs[0] for rule in table if rule.ours == "decoder/tokens")
    tied = _is_tied(theirs, f"{output}.weight", words, declared)
    if tied:
        theirs.pop(f"{output}.weight", None)
    length = min(40, options["text_positions"])
    options = GitOptions(**options, frames=len(frames), dtype="float32", length=length, tied=tied)
    image, text = sizes.parse(options.encoder)[0], sizes.parse_size(options.text)
    table = [*table, *output_layer(output, tied)]
    params = rules.read(theirs, table, lambda n: (image if n.startswith("encoder/") else text).heads, "GIT")
    params["encoder/stem/bias"] = np.zeros(image.width, np.float32)  # CLIP's convolution has none.
    if frames:
        params["frames"] = np.stack([np.asarray(frames[i], np.float32).reshape(-1) for i in sorted(frames)])
    return options, params


def decoder_of_bert(weights: Weights, options: GitOptions, path: str) -> dict[str, np.ndarray]:
    """A GIT's decoder from a BERT of ours: its tables and first layers (GIT, section 4.6).

    BERT adds the embedding of segment 0 to every token; here it becomes part of the positions.

    Args:
      weights: the BERT.
      options: of the GIT.
      path: where the BERT is from, for messages.

    Raises:
      UserError: the BERT has fewer layers or positions.
    """
    bert.check_plain(weights, path)
    params = weights.params
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
    out = out if options.tied else _untied(out)
    return out | {f"decoder/{k}": v[:depth] for k, v in params.items() if k.startswith("blocks/")}


def with_output_layer(weights: Weights, options: GitOptions, path: str) -> dict[str, np.ndarray]:
    """The parameters of a GIT for one with these options: its output layer is a copy of its table where it has none."""
    del path
    return _untied(weights.params) if weights.options.tied and not options.tied else weights.params


def _untied(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
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
    state = rules.write(params, [*HUGGING_FACE, *output_layer("output", options.tied)], "GIT")
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


def fits(options: Any) -> bool:
    """Whether a model is a GIT."""
    return isinstance(options, GitOptions)


def read(source: Source) -> Weights:
    """A GIT with the pixels of its processor, by itself CLIP's, and its tokenizer."""
    options, params = read_hugging_face(source.arrays, source.config)
    return assemble_folder(source, options, params, "CLIP")


def write(weights: Weights, target: Target) -> None:
    """Writes a folder for GitForCausalLM."""
    write_files(weights, target, *write_hugging_face(weights.options, weights.params))
