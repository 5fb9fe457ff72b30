"""Hugging Face's ViT in."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from capvl.convert import rules
from capvl.convert.files import Source
from capvl.convert.hugging_face import assemble_folder, image_options
from capvl.convert.rules import CONV, ROW3, TABLE3, Rule
from capvl.models.vision import ImageOptions
from capvl.weights import Weights

_VIT_LAYER = "layers.{i}"
VIT = [
    Rule("encoder/stem/kernel", ("embeddings.patch_embeddings.projection.weight",), CONV),
    Rule("encoder/stem/bias", ("embeddings.patch_embeddings.projection.bias",)),
    Rule("encoder/cls", ("embeddings.cls_token",), ROW3),
    Rule("encoder/positions", ("embeddings.position_embeddings",), TABLE3),
    *rules.norm("encoder/blocks/{i}/norm1", f"{_VIT_LAYER}.layernorm_before"),
    *rules.attention("encoder/blocks/{i}/attn", *(f"{_VIT_LAYER}.attention.{p}_proj" for p in "qkvo")),
    *rules.norm("encoder/blocks/{i}/norm2", f"{_VIT_LAYER}.layernorm_after"),
    *rules.dense("encoder/blocks/{i}/mlp/up", f"{_VIT_LAYER}.mlp.fc1"),
    *rules.dense("encoder/blocks/{i}/mlp/down", f"{_VIT_LAYER}.mlp.fc2"),
    *rules.norm("encoder/norm", "layernorm"),
]
# Names of ViT checkpoints on the hub -> names since transformers 5.
_OLD_VIT = (
    (r"^vit\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.attention\.(query|key|value)\.", lambda m: f".attention.{m[1][0]}_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
_BUFFERS = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
_DEFAULTS = dict(
    hidden_act="gelu", layer_norm_eps=1e-12, image_size=224, hidden_size=768, intermediate_size=3072,
    num_hidden_layers=12, num_attention_heads=12, patch_size=16,
)  # fmt: skip


def read_vit(theirs: Mapping[str, np.ndarray], config: Mapping[str, Any]):
    """(options, parameters) of a ViTModel or ViTForImageClassification, without its pooler and classifier.

    Raises:
      UserError: it is another model.
    """
    renamed = {}
    for name, value in theirs.items():
        for pattern, new in _OLD_VIT:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    config = _DEFAULTS | dict(config)
    if not config.get("qkv_bias", True):  # Zeros are the same.
        zeros = np.zeros(config["hidden_size"], np.float32)
        renamed |= {
            f"layers.{i}.attention.{p}_proj.bias": zeros for i in range(config["num_hidden_layers"]) for p in "qkv"
        }
    options = ImageOptions(**image_options(config, pool="cls", class_position=True))
    return options, rules.read(renamed, VIT, lambda _: config["num_attention_heads"], "ViT", _BUFFERS)


def read(source: Source) -> Weights:
    """A ViT with the pixels of its processor."""
    options, params = read_vit(source.arrays, source.config)
    return assemble_folder(source, options, params, "ViT")
