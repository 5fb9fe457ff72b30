"""Exported functions give what the model gives, for any batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from test_convert import weights_of

from capvl.convert import stablehlo
from capvl.models.parameters import Blueprint


@pytest.mark.parametrize("name", ["lit", "captioner", "git"])
def test_stablehlo_takes_any_batch(name, tmp_path):
    weights = weights_of(name)
    model = Blueprint(weights.options).bind({k: jnp.asarray(v) for k, v in weights.params.items()})
    embed = jax.jit(model.embed_image if name == "lit" else model.features)
    written = stablehlo.export(str(tmp_path / "model.stablehlo"), weights)
    assert len(written) == (2 if name == "lit" else 1)
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        shape = weights.options.image_shape() if name == "git" else (24, 24, 3)
        image = rng.integers(0, 256, (batch, *shape), np.uint8)
        exported = jax.export.deserialize(bytearray((tmp_path / "model.stablehlo").read_bytes()))
        expected = embed(jnp.asarray(image.astype(np.float32) / 127.5 - 1))
        assert_close(exported.call(image), expected, 1e-5)
        if name == "lit":
            text = rng.integers(0, 30, (batch, 8)).astype(np.int32)
            exported = jax.export.deserialize(bytearray((tmp_path / "model.text.stablehlo").read_bytes()))
            assert_close(exported.call(text), jax.jit(model.embed_text)(jnp.asarray(text)), 1e-5)
