"""Hugging Face's BERT, in and out."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import rules
from capvl.convert.hugging_face import ACTIVATIONS, size_name
from capvl.convert.rules import Rule
from capvl.models import sizes
from capvl.models.bert import BertOptions

_LAYER = "bert.encoder.layer.{i}"
BERT = [
    Rule("tokens", ("bert.embeddings.word_embeddings.weight",)),
    Rule("positions", ("bert.embeddings.position_embeddings.weight",)),
    Rule("types", ("bert.embeddings.token_type_embeddings.weight",)),
    *rules.norm("norm", "bert.embeddings.LayerNorm"),
    *rules.attention(
        "blocks/{i}/attn",
        *(f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")),
        f"{_LAYER}.attention.output.dense",
    ),
    *rules.norm("blocks/{i}/norm1", f"{_LAYER}.attention.output.LayerNorm"),
    *rules.dense("blocks/{i}/mlp/up", f"{_LAYER}.intermediate.dense"),
    *rules.dense("blocks/{i}/mlp/down", f"{_LAYER}.output.dense"),
    *rules.norm("blocks/{i}/norm2", f"{_LAYER}.output.LayerNorm"),
    *rules.dense("pooler", "bert.pooler.dense"),
    *rules.dense("transform", "cls.predictions.transform.dense"),
    *rules.norm("transform_norm", "cls.predictions.transform.LayerNorm"),
    Rule("word_bias", ("cls.predictions.bias",)),
    *rules.dense("next_sentence", "cls.seq_relationship"),
]
_TIED = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
_DEFAULTS = dict(hidden_act="gelu", layer_norm_eps=1e-12, max_position_embeddings=512, type_vocab_size=2)


def read_bert(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    """(options, parameters) of a BertForPreTraining.

    The output layer is the token table in both, so its copy is not read.

    Raises:
      UserError: it is another model.
    """
    config = _DEFAULTS | dict(config)
    # Old checkpoints name a norm's weights gamma and beta.
    theirs = {
        k.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): v
        for k, v in theirs.items()
    }
    theirs = {k: v for k, v in theirs.items() if k not in _TIED and not k.endswith("position_ids")}
    options = BertOptions(
        text=size_name(config),
        vocab=config["vocab_size"],
        length=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        activation=ACTIVATIONS[config["hidden_act"]],
        eps=config["layer_norm_eps"],
    )
    return options, rules.read(theirs, BERT, lambda _: config["num_attention_heads"], "BERT for pre-training")


def write_bert(options: BertOptions, params: Mapping[str, np.ndarray]):
    """(state dict, config) of a BertForPreTraining."""
    size = sizes.parse_size(options.text)
    state = rules.write(params, BERT, "BERT")
    state |= {_TIED[0]: state["bert.embeddings.word_embeddings.weight"], _TIED[1]: state["cls.predictions.bias"]}
    config = {
        "architectures": ["BertForPreTraining"],
        "model_type": "bert",
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
    return state, config
