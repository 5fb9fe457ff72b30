"""The golden GIT (golden/git/git.npz) as a model of ours."""

import dataclasses
import json

import jax
import jax.numpy as jnp
from conftest import load_golden, under

from capvl.convert import git
from capvl.models.parameters import Blueprint


def hugging_face_config(config):
    """config.json of the golden model."""
    vision = dict(
        hidden_size=config["vw"],
        num_hidden_layers=config["vl"],
        num_attention_heads=config["vh"],
        intermediate_size=config["vision_intermediate"],
        image_size=config["res"],
        patch_size=config["patch"],
        hidden_act=config["vision_hidden_act"],
        layer_norm_eps=config["vision_ln_eps"],
    )
    return dict(
        hidden_size=config["tw"],
        num_hidden_layers=config["tl"],
        num_attention_heads=config["th"],
        intermediate_size=config["tff"],
        vocab_size=config["vocab"],
        max_position_embeddings=config["maxpos"],
        layer_norm_eps=config["text_ln_eps"],
        bos_token_id=config["bos"],
        vision_config=vision,
    )


class Case:
    """The golden file and its model, whose images are normalised already."""

    def __init__(self):
        self.golden = load_golden("git", "git.npz")
        self.config = json.loads(str(self.golden["config"]))
        self.theirs = under(self.golden, "params")
        self.options, params = git.read_hugging_face(self.theirs, hugging_face_config(self.config))
        self.options = dataclasses.replace(self.options, pixels="half", length=self.config["T"])
        self.blueprint = Blueprint(self.options)
        self.params = jax.device_put(params)

    def image(self, name):
        return jnp.moveaxis(jnp.asarray(self.golden[f"in/{name}"]), -3, -1)

    def labels(self, prefix=""):
        """The ids behind [CLS], with padding at the end."""
        return jnp.pad(jnp.asarray(self.golden[f"in/{prefix}input_ids"], jnp.int32)[:, 1:], ((0, 0), (0, 1)))

    def compute(self, function):
        return jax.device_get(jax.jit(lambda params: function(self.blueprint.bind(params)))(self.params))

    def text_logits(self, name):
        """The golden logits of the text's positions, those of images cut off."""
        logits = self.golden[f"out/{name}"]
        return logits[:, -self.config["T"] :]
