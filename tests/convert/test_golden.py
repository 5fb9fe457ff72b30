"""Converted CLIP, SigLIP and BERT against the numbers of transformers (golden/git)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden, under

from capvl.convert import bert, hugging_face, siglip
from capvl.models.parameters import Blueprint
from capvl.objectives.contrastive import Contrastive

pytestmark = pytest.mark.golden
HIDDEN, LOGITS, LOSS, GRADIENT = 2e-5, 1e-4, 1e-5, 2e-4


def section(values, **names):
    out = {
        "hidden_size": values["width"],
        "num_hidden_layers": values["layers"],
        "num_attention_heads": values["heads"],
        "intermediate_size": values["mlp"],
        "layer_norm_eps": values["ln_eps"],
    }
    return out | {theirs: values[ours] for ours, theirs in names.items()}


class Case:
    """One golden file, its converted model, and everything of it from one compilation."""

    def __init__(self, name):
        self.golden = load_golden("git", f"{name}.npz")
        self.theirs = under(self.golden, "params")
        config = json.loads(str(self.golden["config"]))
        act = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config["vision"]["act"], config["vision"]["act"])
        vision = section(config["vision"], res="image_size", patch="patch_size") | {"hidden_act": act}
        text = section(config["text"], vocab="vocab_size", maxpos="max_position_embeddings")
        hf = {"vision_config": vision, "text_config": text} | (
            {"projection_dim": config["proj"]} if "proj" in config else {}
        )
        read = hugging_face.read_clip if name == "clip" else siglip.read_siglip
        # The golden texts hold the id 0 as a word.
        pad = {} if name == "clip" else {"pad": 0}
        self.options, params = read(self.theirs, hf, **pad)
        self.blueprint = Blueprint(self.options)
        self.params = jax.device_put(params)
        self.image = jnp.asarray(self.golden["in/pixel_values"]).transpose(0, 2, 3, 1)
        self.text = jnp.asarray(self.golden["in/input_ids"], jnp.int32)
        self.out = jax.device_get(jax.jit(self.compute)(self.params))

    def hidden_states(self, encoder, image):
        """States before the first block, and after each."""
        grid = tuple(side // encoder.patch for side in image.shape[1:3])
        x = encoder.add_positions(encoder.embed(image, jnp.float32), grid)
        if encoder.cls is not None:
            cls = encoder.cls[...] + encoder.positions[...][:1]
            x = jnp.concatenate([jnp.broadcast_to(cls[None], (len(x), 1, x.shape[-1])), x], axis=1)
        x = encoder.pre_norm(x) if encoder.pre_norm is not None else x
        states = [x]
        for i in range(len(jax.tree.leaves(encoder.blocks)[0])):
            states.append(jax.tree.map(lambda p, i=i: p[i], encoder.blocks)(states[-1]))
        return states

    def compute(self, params):
        model = self.blueprint.bind(params)
        states = self.hidden_states(model.encoder, self.image)
        encoded = model.encoder(self.image)  # The pixels of the file are normalised already.
        hidden = model.text.hidden(self.text)
        text = model.text.pooled(hidden, self.text)
        image_embeds, text_embeds = model.embed_tokens(encoded), model.embed_text(self.text)
        logits = model.scale() * image_embeds @ text_embeds.T
        out = {f"vision_hidden_{i}": state for i, state in enumerate(states)}
        out |= {
            "encoded": encoded,
            "vision_pooler_output": model.encoder.pool(encoded),
            "text_last_hidden_state": hidden,
            "text_pooler_output": text,
            "image_embeds_normalized": image_embeds,
            "text_embeds_normalized": text_embeds,
            "logits_per_image": logits,
        }
        if model.image_head is not None:
            out |= {
                "image_features": model.image_head(model.encoder.pool(encoded)),
                "text_features": model.text.head(text),
            }
        return out

    def at_another_resolution(self):
        """Last states before the last LN, encoded tokens and pooled features of images of another size."""
        image = jnp.asarray(self.golden["in/pixel_values_var"]).transpose(0, 2, 3, 1)

        def run(params):
            encoder = self.blueprint.bind(params).encoder
            return self.hidden_states(encoder, image)[-1], encoder(image), encoder.pool(encoder(image))

        return jax.jit(run)(self.params)


@pytest.fixture(scope="module", params=["clip", "siglip"])
def case(request):
    case = Case(request.param)
    case.name = request.param
    return case


def test_forward_pass(case):
    out = dict(case.out)
    encoded = out.pop("encoded")
    if case.name == "siglip":
        out["vision_last_hidden_state"] = encoded
        kernel, bias = (np.asarray(case.params[f"text/head/{leaf}"]) for leaf in ("kernel", "bias"))
        out["text_pooler_output"] = out["text_pooler_output"] @ kernel + bias
        out["logits_per_image"] = out["logits_per_image"] + np.asarray(case.params["bias"])
    if case.name == "clip":  # Padding is hidden there, here the causal mask suffices: states of words are compared.
        words = case.golden["in/attention_mask"] > 0
        hidden = out.pop("text_last_hidden_state")
        assert_close(hidden[words], case.golden["out/text_last_hidden_state"][words], HIDDEN)
    for name, value in out.items():
        assert_close(value, case.golden[f"out/{name}"], LOGITS if "logits" in name else HIDDEN, name)


def test_another_resolution(case):
    last, encoded, pooled = case.at_another_resolution()
    if case.name == "clip":
        assert_close(last, case.golden["out/var_vision_last_hidden_state"], HIDDEN)
    else:
        assert_close(encoded, case.golden["out/var_vision_last_hidden_state"], HIDDEN)
        assert_close(pooled, case.golden["out/var_vision_pooler_output"], HIDDEN)


def test_loss_and_gradients(case):
    objective = Contrastive(loss_kind="softmax" if case.name == "clip" else "sigmoid")
    options = dataclasses.replace(case.options, text_pad=0, pixels="half")
    blueprint = Blueprint(options)
    batch = objective.prepare({"image": case.image, "text": case.text}, train=True)

    @jax.jit
    @jax.value_and_grad
    def step(params):
        return objective.loss(blueprint.bind(params), batch, jax.random.key(0))[0]

    loss, gradient = step(case.params)
    assert_close(loss, case.golden["out/loss"], LOSS)
    expected = under(case.golden, "grad")
    for name in ("encoder/stem/bias", "bias") if case.name == "clip" else ():
        gradient = gradient | {name: jnp.zeros_like(gradient[name])}
    write = hugging_face.write_clip if case.name == "clip" else siglip.write_siglip
    found, _ = write(case.options, gradient)
    assert expected
    for name, value in expected.items():
        if name.endswith("k_proj.bias"):  # Zero but for rounding.
            assert np.abs(found[name]).max() < 1e-6, name
        else:
            assert_close(found[name], value, GRADIENT, name)


def test_round_trip_is_exact(case):
    write = hugging_face.write_clip if case.name == "clip" else siglip.write_siglip
    back, _ = write(case.options, case.params)
    assert back.keys() == case.theirs.keys()
    for name, value in case.theirs.items():
        assert back[name].shape == value.shape, name
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.fixture(scope="module")
def bert_case():
    golden = load_golden("git", "bert.npz")
    config = json.loads(str(golden["config"]))
    hf = section(config, vocab="vocab_size", maxpos="max_position_embeddings", types="type_vocab_size")
    options, params = bert.read_bert(under(golden, "params"), hf | {"hidden_act": "gelu"})
    return golden, options, jax.device_put(params)


def masked_cross_entropy(logits, labels):
    kept = labels != -100
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.where(kept, picked, 0.0).sum() / kept.sum().astype(jnp.float32)


def test_bert(bert_case):
    golden, options, params = bert_case
    blueprint = Blueprint(options)
    text, mask, types, words, next_sentence = (
        jnp.asarray(golden[f"in/{n}"], jnp.int32)
        for n in ("input_ids", "attention_mask", "token_type_ids", "mlm_labels", "nsp_labels")
    )

    def compute(params):
        model = blueprint.bind(params)
        hidden = model(text, mask > 0, types)
        out = {
            "hidden_0": model.embed(text, types),
            "last_hidden_state": hidden,
            "pooler_output": model.pool(hidden),
            "mlm_logits": model.word_logits(hidden),
            "nsp_logits": model.next_sentence_logits(hidden),
        }
        out["mlm_loss"] = masked_cross_entropy(out["mlm_logits"], words)
        out["nsp_loss"] = masked_cross_entropy(out["nsp_logits"], next_sentence)
        out["pretraining_loss"] = out["mlm_loss"] + out["nsp_loss"]
        return out["pretraining_loss"], out

    (_, out), gradient = jax.jit(jax.value_and_grad(compute, has_aux=True))(params)
    for name, value in jax.device_get(out).items():
        tolerance = LOGITS if "logits" in name else LOSS if "loss" in name else HIDDEN
        assert_close(value, golden[f"out/{name}"], tolerance, name)
    found, _ = bert.write_bert(options, gradient)
    expected = under(golden, "grad")
    assert expected
    for name, value in expected.items():
        if name.endswith("self.key.bias"):
            assert np.abs(found[name]).max() < 1e-6, name
        else:
            assert_close(found[name], value, GRADIENT, name)


def test_bert_round_trip_is_exact(bert_case):
    golden, options, params = bert_case
    back, config = bert.write_bert(options, params)
    theirs = under(golden, "params")
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        if name != "cls.predictions.decoder.bias":
            np.testing.assert_array_equal(back[name], value, err_msg=name)
    again, same = bert.read_bert(back, config)
    assert again == options
    for name, value in params.items():
        np.testing.assert_array_equal(same[name], value, err_msg=name)
