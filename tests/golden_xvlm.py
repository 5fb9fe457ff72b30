"""The golden X-VLMs (golden/xvlm/*.npz) as models of ours."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from conftest import load_golden
from flax import nnx

from capvl.convert import rules, xvlm, xvlm_names, xvlm_official
from capvl.models.bert import BertOptions
from capvl.models.encoder import EncoderOptions
from capvl.models.fusion import FusionBert
from capvl.models.parameters import Blueprint
from capvl.models.xvlm import TextOptions

FEATURES, LOSS = 5e-5, 1e-5
"""Absolute tolerances, as its README suggests."""


@dataclasses.dataclass(frozen=True)
class FusionOptions:
    """A FusionBert alone: golden text_cross and text_roberta."""

    bert: BertOptions
    cross_layers: int
    image_width: int

    def make(self, rngs: nnx.Rngs) -> FusionBert:
        return FusionBert(self.bert, self.cross_layers, self.image_width, rngs=rngs)


class Case:
    """A golden file, and the model in it.

    Attributes:
      golden: its arrays by name.
      config: `cfg.*` by name.
      theirs, buffers: `param.*` and `buffer.*`, by official names.
      options, params: of ours; images are normalised already, and texts are read as they are.
    """

    def __init__(self, name: str):
        """name: of the file, such as "pretrain_swin"."""
        self.golden = load_golden("xvlm", f"xvlm_{name}.npz")
        self.config = {k: v.tolist() for k, v in self._under("cfg").items()}
        self.theirs, self.buffers = self._under("param"), self._under("buffer")
        whole = any(parameter.startswith(xvlm_names.IMAGE) for parameter in self.theirs)
        read = _model if whole else _text if name.startswith("text_") else _encoder
        self.options, params = read(self)
        self.params = jax.device_put(params)
        self.blueprint = Blueprint(self.options)

    def _under(self, kind: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(f"{kind}."): v for k, v in self.golden.items() if k.startswith(f"{kind}.")}

    def compute(self, function):
        """What a function of the model gives, as NumPy's."""
        return jax.device_get(jax.jit(lambda params: function(self.blueprint.bind(params)))(self.params))

    def image(self, name: str = "in.image"):
        """Images as ours are: channels last."""
        return jnp.moveaxis(jnp.asarray(self.golden[name]), 1, -1)

    def ids(self, name: str):
        """Token ids as ours are: 0 is padding, whichever id theirs is."""
        ids = jnp.asarray(self.golden[name], jnp.int32)
        pad = self.config.get("pad_token_id", 0)
        return jnp.where(ids == pad, 0, ids) if pad else ids

    def bools(self, name: str):
        """A mask."""
        return jnp.asarray(self.golden[name]) > 0

    def out(self, name: str) -> np.ndarray:
        """`out.NAME`."""
        return self.golden[f"out.{name}"]


def load(name: str) -> Case:
    """A golden file by its name, such as "pretrain_swin"; skips where it is absent."""
    return Case(name)


def close(actual, expected, tolerance: float, name: str = "") -> None:
    """Largest difference at most `tolerance`, absolute."""
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=tolerance, err_msg=name)


def _encoder(case: Case):
    arrays = case.theirs | case.buffers
    image = xvlm.image_options(arrays, case.config.get("heads", 0), prefix="") | dict(pixels="half")
    options = EncoderOptions(**image)
    table = xvlm_names.image(options, "")
    params = rules.read(case.theirs, table, xvlm_names.image_heads(options), "image encoder")
    return options, params | xvlm_names.fixed(options)


def _text(case: Case):
    config, theirs = case.config, case.theirs
    named = xvlm.text_options(theirs, config["num_attention_heads"], "")
    roberta = bool(named["text_pad"])
    bert = TextOptions(**named).bert_options("words")
    depth = config["num_hidden_layers"]
    assert named["cross_layers"] == depth - config["fusion_layer"]
    table = xvlm_names.text("", "roberta." if roberta else "bert.", config["fusion_layer"], named["cross_layers"])
    table += xvlm_names.words("", "", roberta)
    theirs = xvlm_names.untied(theirs, xvlm_names.ties("", roberta))
    params = rules.read(theirs, table, lambda _: config["num_attention_heads"], "BERT")
    return FusionOptions(bert, named["cross_layers"], case.golden["in.image_embeds"].shape[-1]), params


def _model(case: Case) -> tuple[Any, dict]:
    config = case.config
    heads = dict(image_heads=config.get("clip_num_attention_heads", 0), text_heads=config["num_attention_heads"])
    arrays = case.theirs | case.buffers
    options, params = xvlm_official.form_of(arrays).read(arrays, **heads)
    more = {"reads_end": True, "pixels": "half"}
    if "clip_local_attn_depth" in config:
        more["local_layers"] = config["clip_local_attn_depth"]
    return dataclasses.replace(options, **more), params
