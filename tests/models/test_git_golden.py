"""GIT against the numbers of the official code and of transformers (golden/git/git.npz)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, under
from golden_git import Case

from capvl.convert import git
from capvl.nn.stack import layer_of
from capvl.objectives.git import Git

pytestmark = pytest.mark.golden
HIDDEN, LOGITS, LOSS, GRADIENT = 2e-5, 1e-4, 1e-5, 2e-4


@pytest.fixture(scope="module")
def case():
    return Case()


def test_towers(case):
    def run(model):
        encoder, decoder = model.encoder, model.decoder
        image = case.image("pixel_values")
        x = encoder.add_positions(encoder.embed(image, jnp.float32))
        cls = encoder.cls[...] + encoder.positions[...][:1]
        x = encoder.pre_norm(jnp.concatenate([jnp.broadcast_to(cls[None], (len(x), 1, x.shape[-1])), x], axis=1))
        out = {"vision_hidden_0": x}
        for i in range(case.config["vl"]):
            x = layer_of(encoder.blocks, i)(x)
            out[f"vision_hidden_{i + 1}"] = x
        out["vision_last_hidden_state"] = encoded = model.encode(image)
        out["visual_tokens_projected"] = visual = decoder.project_image(encoded)
        ids = jnp.asarray(case.golden["in/input_ids"], jnp.int32)
        text = decoder.embed(ids)
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))[None, None]
        everything = jnp.ones(visual.shape[:2], bool)[:, None, None]
        out["text_hidden_0"] = jnp.concatenate([visual, text], axis=1)
        for i in range(case.config["tl"]):
            block = layer_of(decoder.blocks, i)
            visual, kv = block.prefix(visual, None, None)
            text = block.text(text, (*kv, everything), causal, None)
            out[f"text_hidden_{i + 1}"] = jnp.concatenate([visual, text], axis=1)
        out["logits"] = model.logits(image, case.labels())
        return out

    out = case.compute(run)
    mask = case.golden["in/attention_mask"] > 0
    tokens = out["visual_tokens_projected"].shape[1]
    real = np.concatenate([np.ones((len(mask), tokens), bool), mask], axis=1)
    logits = out.pop("logits")
    for name, value in out.items():
        expected = case.golden[f"out/{name}"]
        if name.startswith("text_hidden"):  # Padding is hidden in one implementation and not in the other.
            value, expected = value[real], expected[real]
        assert_close(value, expected, HIDDEN, name)
    assert_close(logits[mask], case.text_logits("logits")[mask], LOGITS)


def test_the_mask_is_the_papers(case):
    """A change of one input token moves exactly the rows that may see it."""
    allowed = case.golden["out/attention_matrix"].astype(bool)
    tokens, length = len(allowed) - case.config["T"], case.config["T"]

    def text_rows(model, visual, text):
        blocks = model.decoder.blocks
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        everything = jnp.ones((1, tokens), bool)[:, None, None]
        for i in range(1):
            block = layer_of(blocks, i)
            visual, kv = block.prefix(visual, None, None)
            text = block.text(text, (*kv, everything), causal, None)
        return jnp.concatenate([visual, text], axis=1)[0].sum(axis=-1)

    rng = np.random.default_rng(0)
    width = case.config["tw"]
    x = [jnp.asarray(rng.normal(size=(1, n, width)), jnp.float32) for n in (tokens, length)]
    model = case.blueprint.bind(case.params)
    by_visual, by_text = jax.jit(jax.jacrev(lambda v, t: text_rows(model, v, t), argnums=(0, 1)))(*x)
    moved = np.concatenate([np.abs(by_visual[:, 0]).sum(-1), np.abs(by_text[:, 0]).sum(-1)], axis=1) > 1e-9
    np.testing.assert_array_equal(moved, allowed)


@pytest.mark.parametrize("smoothing, name", [(0.1, "smooth_official_kl"), (0.0, "lm")])
@pytest.mark.parametrize("task", ["caption", "vqa", "video"])
def test_losses(case, task, smoothing, name):
    objective = Git(smoothing=smoothing)
    video = task == "video"
    prefix = "video_" if video else ""
    need = case.golden[f"in/{prefix}need_predict" + ("_vqa" if task == "vqa" else "")]
    batch = {
        "image": case.image(f"{prefix}pixel_values"),
        "text": case.labels(prefix),
        "prompt": jnp.asarray((np.cumsum(need, axis=1) == 0).sum(axis=1) - 1, jnp.int32),
    }

    def run(model):
        return objective.loss(model, objective.prepare(batch, train=True), None)[0]

    expected = case.golden[f"out/video_loss_{name}" if video else f"out/loss_{task}_{name}"]
    assert_close(case.compute(run), expected, LOSS)


def test_gradients(case):
    objective = Git(smoothing=case.config["label_smoothing"])
    for prefix, names in (("", "grad"), ("video_", "grad_video")):
        batch = {
            "image": case.image(f"{prefix}pixel_values"),
            "text": case.labels(prefix),
            "prompt": jnp.zeros(len(case.labels(prefix)), jnp.int32),
        }

        def loss(params, batch=batch):
            ready = objective.prepare(batch, train=True)
            return objective.loss(case.blueprint.bind(params), ready, None)[0]

        gradient = jax.jit(jax.grad(loss))(case.params)
        gradient["encoder/stem/bias"] = jnp.zeros_like(gradient["encoder/stem/bias"])
        found, _ = git.write_hugging_face(dataclasses.replace(case.options, pixels="clip"), gradient)
        expected = under(case.golden, names)
        assert expected
        for name, value in expected.items():
            if name.endswith(("k_proj.bias", "key.bias")):  # Zero but for rounding.
                assert np.abs(found[name]).max() < 1e-6, name
            else:
                assert_close(found[name], value, GRADIENT, name)


def test_video(case):
    def run(model):
        image = case.image("video_pixel_values")
        return model.decoder.project_image(model.encode(image)), model.logits(image, case.labels("video_"))

    projected, logits = case.compute(run)
    assert_close(projected, case.golden["out/video_visual_tokens_projected"], HIDDEN)
    mask = case.golden["in/video_attention_mask"] > 0
    assert_close(logits[mask], case.text_logits("video_logits")[mask], LOGITS)


@pytest.mark.parametrize("name", ["up", "down"])
def test_other_image_sizes(case, name):
    image = case.image(f"pixel_values_var_{name}")
    labels = case.labels()[: len(image)]
    grid = tuple(n // case.config["patch"] for n in image.shape[1:3])

    def run(model):
        zeros = jnp.zeros((1, grid[0] * grid[1], case.config["vw"]))
        return model.encoder.add_positions(zeros, grid)[0], model.encode(image), model.logits(image, labels)

    positions, encoded, logits = case.compute(run)
    assert_close(positions, case.golden[f"out/var_{name}_position_embedding"][1:], HIDDEN)
    assert_close(encoded, case.golden[f"out/var_{name}_vision_last_hidden_state"], HIDDEN)
    mask = case.golden["in/attention_mask"][: len(image)] > 0
    assert_close(logits[mask], case.text_logits(f"var_{name}_logits")[mask], LOGITS)


def test_padded_images_are_as_unpadded_ones(case):
    """Images of three sizes in one batch, padded at the right and below, give each image's own logits."""
    patch, side = case.config["patch"], case.config["res"]
    shapes = [(side, side), (side - patch, side // 2), (side // 2, side + 0)]
    images = [case.image("pixel_values")[i, :h, :w] for i, (h, w) in enumerate(shapes)]
    canvas = np.full((len(images), side, side, 4), -1.0, np.float32)
    for row, image in zip(canvas, images, strict=True):
        row[: image.shape[0], : image.shape[1], :3] = image
        row[: image.shape[0], : image.shape[1], 3] = 1.0
    labels = case.labels()[: len(images)]
    together = case.compute(lambda m: m.logits(jnp.asarray(canvas), labels))
    for i, image in enumerate(images):
        alone = case.compute(lambda m, image=image, i=i: m.logits(image[None], labels[i : i + 1]))
        assert_close(together[i], alone[0], HIDDEN)


def test_round_trips_are_exact(case):
    back, config = git.write_hugging_face(dataclasses.replace(case.options, pixels="clip"), case.params)
    assert back.keys() == case.theirs.keys()
    for name, value in case.theirs.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    again, params = git.read_hugging_face(back, config)
    for name, value in case.params.items():
        np.testing.assert_array_equal(params[name], value, err_msg=name)
    old = {k.replace("temporal", "temperal"): v for k, v in back.items()}
    assert git.read_hugging_face(old, config)[0] == again
