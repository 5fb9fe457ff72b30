"""Hugging Face's BERT, in and out; and as the text tower of a two-tower model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import rules, tokens
from capvl.convert.assembling import assemble
from capvl.convert.files import Source, Target
from capvl.convert.hugging_face import ACTIVATIONS, activation, size_name, write_files
from capvl.convert.rules import Rule
from capvl.errors import UserError
from capvl.models import sizes
from capvl.models.bert import BertOptions
from capvl.models.two_towers import TwoTowersOptions
from capvl.terminal import say
from capvl.weights import Weights


def embeddings(ours: str, theirs: str) -> list[Rule]:
    """What is read before the layers, whose names begin with a prefix each, ours and theirs."""
    table = [Rule(n, (f"{kind}_embeddings.weight",)) for n, kind in _TABLES.items()]
    return rules.under(ours, theirs, [*table, *rules.norm("norm", "LayerNorm")])


WITH_WORDS = ("pretraining", "words")
"""Heads with that for masked words."""
_TABLES = {"tokens": "word", "positions": "position", "types": "token_type"}


def layer(ours: str, theirs: str) -> list[Rule]:
    """A layer of theirs as a block of ours, without cross-attention."""
    return [
        *rules.attention(
            f"{ours}/attn",
            *(f"{theirs}.attention.self.{part}" for part in ("query", "key", "value")),
            f"{theirs}.attention.output.dense",
        ),
        *rules.norm(f"{ours}/norm1", f"{theirs}.attention.output.LayerNorm"),
        *rules.dense(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
        *rules.dense(f"{ours}/mlp/down", f"{theirs}.output.dense"),
        *rules.norm(f"{ours}/norm2", f"{theirs}.output.LayerNorm"),
    ]


def words(ours: str, theirs: str) -> list[Rule]:
    """The masked-language-model head, whose output layer is the token table."""
    return [
        *rules.dense(f"{ours}transform", f"{theirs}transform.dense"),
        *rules.norm(f"{ours}transform_norm", f"{theirs}transform.LayerNorm"),
        Rule(f"{ours}word_bias", (f"{theirs}bias",)),
    ]


def _table(heads: str) -> list[Rule]:
    """Rules of a BERT with these heads (`BertOptions.heads`); only one that tells words has the prefix."""
    prefix = "bert." if heads in WITH_WORDS else ""
    table = [*embeddings("", f"{prefix}embeddings."), *layer("blocks/{i}", f"{prefix}encoder.layer.{{i}}")]
    if heads in ("pretraining", "pooler"):
        table += rules.dense("pooler", f"{prefix}pooler.dense")
    if heads in WITH_WORDS:
        table += words("", "cls.predictions.")
    if heads == "pretraining":
        table += rules.dense("next_sentence", "cls.seq_relationship")
    return table


_TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# What transformers leaves out of config.json where it has its default, and what must have it.
_DEFAULTS = dict(
    hidden_act="gelu", layer_norm_eps=1e-12, max_position_embeddings=512, type_vocab_size=2, vocab_size=30522,
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
)  # fmt: skip
_FIXED = dict(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)


def read_bert(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    """(options, parameters) of a BertModel, BertForMaskedLM or BertForPreTraining, or of another task's encoder.

    The output layer of words is the token table in both, so its copy is not read.

    Raises:
      UserError: it is another model.
    """
    check_fixed(config)
    config = _DEFAULTS | dict(config)
    # Old checkpoints name a norm's weights gamma and beta.
    theirs = {
        k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v
        for k, v in theirs.items()
        if not k.endswith("position_ids")
    }
    heads, theirs = _heads(theirs)
    options = BertOptions(
        text=size_name(config),
        vocab=config["vocab_size"],
        length=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        heads=heads,
        activation=activation(config["hidden_act"]),
        eps=config["layer_norm_eps"],
    )
    what = {"pretraining": "BERT for pre-training", "words": "BERT for masked words"}.get(heads, "BERT")
    return options, rules.read(theirs, _table(heads), lambda _: config["num_attention_heads"], what)


def check_fixed(config: Mapping[str, Any]) -> None:
    """Raises UserError where a BERT has relative positions or is a decoder."""
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"config.json has {name}={config[name]!r}; of BERTs only those with {value!r} are read.")


def _heads(theirs: dict[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """What stands behind the states, and the arrays of it; what belongs to another task is left out and said.

    Raises:
      UserError: an output layer is a table of its own.
    """
    has_words = {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias"} <= theirs.keys()
    pretraining = has_words and {"bert.pooler.dense.weight", "cls.seq_relationship.weight"} <= theirs.keys()
    other = [name for name, original in _TIED.items() if name in theirs and not same(theirs, name, original)]
    if pretraining and other:
        raise UserError(f"{other[0]!r} differs from {_TIED[other[0]]!r}; a BERT for pre-training has one for both.")
    if has_words and not other:
        return "pretraining" if pretraining else "words", {k: v for k, v in theirs.items() if k not in _TIED}
    encoder = without_task(theirs, "bert.")
    return ("pooler" if "pooler.dense.weight" in encoder else "none"), encoder


def same(theirs: Mapping[str, np.ndarray], name: str, original: str) -> bool:
    """Whether two arrays of a state dict are equal."""
    return original in theirs and np.array_equal(theirs[name], theirs[original])


def without_task(theirs: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The encoder's arrays without its prefix; what belongs to a task is left out and said."""
    if not any(k.startswith(prefix) for k in theirs):
        return dict(theirs)
    left = sorted({k.split(".")[0] for k in theirs if not k.startswith(prefix)})
    if left:
        say(f"Left out: what stands behind the encoder for its task ({', '.join(left)}).")
    return {k.removeprefix(prefix): v for k, v in theirs.items() if k.startswith(prefix)}


def write_bert(options: BertOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config) of a BertForPreTraining or BertForMaskedLM, or of a BertModel where it has no such heads."""
    state = rules.write(params, _table(options.heads), "BERT")
    if options.heads in WITH_WORDS:
        state |= {copy: state[original] for copy, original in _TIED.items()}
    architecture = {"pretraining": "BertForPreTraining", "words": "BertForMaskedLM"}.get(options.heads, "BertModel")
    return state, {"architectures": [architecture], "model_type": "bert"} | sizes_of(options)


def sizes_of(options: BertOptions) -> dict[str, Any]:
    """What config.json says of a BERT's or RoBERTa's sizes."""
    size = sizes.parse_size(options.text)
    return {
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp,
        "hidden_act": {v: k for k, v in ACTIVATIONS.items() if k != "gelu_new"}[options.activation],
        "layer_norm_eps": options.eps,
        "vocab_size": options.vocab,
        "max_position_embeddings": options.length,
        "type_vocab_size": options.types,
    }


def fits(options: Any) -> bool:
    """Whether a model is a BERT, and no RoBERTa."""
    return isinstance(options, BertOptions) and not options.first_position


def read(source: Source) -> Weights:
    """A BERT with its tokenizer."""
    options, params = read_bert(source.arrays, source.config)
    return assemble(source, options, params, resize="hugging_face", tokenizer=tokens.find(source.path))


def write(weights: Weights, target: Target) -> None:
    """Writes a folder for BertForPreTraining, BertForMaskedLM or BertModel."""
    write_files(weights, target, *write_bert(weights.options, weights.params))


def check_plain(weights: Weights, path: str) -> None:
    """Raises UserError where a BERT of ours is a RoBERTa, whose padding has a position of its own."""
    if weights.options.first_position:
        raise UserError(f"init_from: {path!r} is a RoBERTa, and this model begins with BERTs only.")


def text_tower(weights: Weights, options: TwoTowersOptions, path: str) -> dict[str, np.ndarray]:
    """The text tower of two towers from a BERT of ours, without its heads and with its first positions.

    BERT adds the embedding of segment 0 to every token; here it becomes part of the positions.

    Args:
      weights: the BERT.
      options: of the two towers.
      path: where the BERT is from, for messages.

    Raises:
      UserError: the tower is of another form than the BERT.
    """
    bert, params = weights.options, weights.params
    check_plain(weights, path)
    equal = sizes.parse_size(options.text) == sizes.parse_size(bert.text)
    wanted = {
        "text_norm": (options.text_norm, "post"),
        "text": (options.text, options.text if equal else bert.text),
        "vocab": (options.vocab, bert.vocab),
        "length": (options.length, min(options.length, bert.length)),
        "text_activation": (options.text_activation or options.activation, bert.activation),
        "text_eps": (options.text_eps or options.eps, bert.eps),
    }
    different = [f"model.{name}={there!r} (here {here!r})" for name, (here, there) in wanted.items() if here != there]
    if different:
        raise UserError(f"init_from: the BERT in {path!r} makes a text tower of {', '.join(different)}.")
    out = {
        "text/tokens": params["tokens"],
        "text/positions": params["positions"][: options.length] + params["types"][:1],
    }
    return out | {f"text/{k}": v for k, v in params.items() if k.startswith(("blocks/", "norm/"))}
