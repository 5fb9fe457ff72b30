"""Hugging Face's RoBERTa, in and out."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import bert, rules, tokens
from capvl.convert.assembling import assemble
from capvl.convert.files import Source, Target
from capvl.convert.hugging_face import activation, size_name, write_files
from capvl.convert.rules import Rule
from capvl.errors import UserError
from capvl.models.bert import BertOptions
from capvl.weights import Weights

TIED = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
"""What a RoBERTa that tells words has twice."""
# What transformers leaves out of config.json where it has its default, and what must have it.
_DEFAULTS = dict(
    hidden_act="gelu", layer_norm_eps=1e-12, max_position_embeddings=512, type_vocab_size=2, vocab_size=50265,
    hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, pad_token_id=1,
)  # fmt: skip
_BUFFERS = ("position_ids", "token_type_ids")


def words(ours: str, theirs: str) -> list[Rule]:
    """The head for masked words, whose output layer is the token table."""
    return [
        *rules.dense(f"{ours}transform", f"{theirs}dense"),
        *rules.norm(f"{ours}transform_norm", f"{theirs}layer_norm"),
        Rule(f"{ours}word_bias", (f"{theirs}bias",)),
    ]


def _table(heads: str) -> list[Rule]:
    """Rules of a RoBERTa with these heads; only one that tells words has the prefix."""
    prefix = "roberta." if heads == "words" else ""
    table = bert.embeddings("", f"{prefix}embeddings.")
    table += bert.layer("blocks/{i}", f"{prefix}encoder.layer.{{i}}")
    if heads == "pooler":
        table += rules.dense("pooler", f"{prefix}pooler.dense")
    return table + words("", "lm_head.") if heads == "words" else table


def read_roberta(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    """(options, parameters) of a RobertaModel or RobertaForMaskedLM, or of the encoder of a RoBERTa for another task.

    Raises:
      UserError: it is another model.
    """
    bert.check_fixed(config)
    config = _DEFAULTS | dict(config)
    pad = config["pad_token_id"]
    if not isinstance(pad, int) or not 0 < pad < config["vocab_size"]:
        raise UserError(f"config.json has pad_token_id={pad!r}; a RoBERTa's is an id above 0 and below vocab_size.")
    theirs = {k: v for k, v in theirs.items() if not k.endswith(_BUFFERS)}
    tied = all(k not in theirs or bert.same(theirs, k, original) for k, original in TIED.items())
    if "lm_head.dense.weight" in theirs and tied:
        heads, theirs = "words", {k: v for k, v in theirs.items() if k not in TIED}
    else:
        theirs = bert.without_task(theirs, "roberta.")
        heads = "pooler" if "pooler.dense.weight" in theirs else "none"
    options = BertOptions(
        text=size_name(config),
        vocab=config["vocab_size"],
        length=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        heads=heads,
        pad=pad,
        first_position=pad + 1,
        activation=activation(config["hidden_act"]),
        eps=config["layer_norm_eps"],
    )
    return options, rules.read(theirs, _table(heads), lambda _: config["num_attention_heads"], "RoBERTa")


def write_roberta(options: BertOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config) of a RobertaForMaskedLM, or of a RobertaModel where there is no head for words.

    Raises:
      UserError: the model is not of a RoBERTa's form.
    """
    if options.heads == "pretraining" or options.first_position != options.pad + 1:
        raise UserError(
            f"A RoBERTa has no next-sentence head, and its first position is behind its padding's, pad + 1; here are "
            f"heads={options.heads!r}, pad={options.pad}, first_position={options.first_position}."
        )
    state = rules.write(params, _table(options.heads), "RoBERTa")
    has_words = options.heads == "words"
    if has_words:
        state |= {copy: state[original] for copy, original in TIED.items()}
    config = {
        "architectures": ["RobertaForMaskedLM" if has_words else "RobertaModel"],
        "model_type": "roberta",
        "pad_token_id": options.pad,
    }
    return state, config | bert.sizes_of(options)


def fits(options: Any) -> bool:
    """Whether a model is a RoBERTa."""
    return isinstance(options, BertOptions) and options.first_position > 0


def read(source: Source) -> Weights:
    """A RoBERTa with its tokenizer."""
    options, params = read_roberta(source.arrays, source.config)
    return assemble(source, options, params, resize="hugging_face", tokenizer=tokens.find(source.path))


def write(weights: Weights, target: Target) -> None:
    """Writes a folder for RobertaForMaskedLM or RobertaModel."""
    write_files(weights, target, *write_roberta(weights.options, weights.params))
