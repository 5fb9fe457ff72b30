"""Evaluators on hand-made models whose right answers are known exactly (tests/handmade.py)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from colors import NAMES, by_word, colors, context_of, mesh, run
from conftest import assert_close
from handmade import captioner, two_towers

from capvl.decoding import trie
from capvl.decoding.likelihood import log_likelihood
from capvl.errors import UserError
from capvl.evals import compositionality, entailment, foils, linear_probe, retrieval, vqa, zeroshot
from capvl.evals.captions import Captions
from capvl.evals.sharded import ShardedRows
from capvl.evals.zeroshot_likelihood import ZeroShotLikelihood
from capvl.inference.scoring import TextScorer
from capvl.models.parameters import Blueprint


def test_zero_shot(by_word, colors, mesh, tmp_path):
    (tmp_path / "templates.txt").write_text("{}\n{} thing\n")
    evaluator = zeroshot.ZeroShot(name="colors", templates=str(tmp_path / "templates.txt"))
    found = run(evaluator, two_towers, colors, mesh)
    assert found["accuracy"] == 1.0
    assert found["chance"] == pytest.approx(1 / 3)
    (tmp_path / "names.txt").write_text("red\nblue\ngreen\n")  # In a wrong order: only red is right.
    swapped = dataclasses.replace(evaluator, classes=str(tmp_path / "names.txt"))
    assert run(swapped, two_towers, colors, mesh)["accuracy"] == pytest.approx(1 / 3)


def test_retrieval_on_the_hand_made_model(by_word, colors, mesh):
    """Four images share each colour, so an own caption ties with those of the three others: pessimistic ranks."""
    found = run(retrieval.Retrieval(split="test", captions=1), two_towers, colors, mesh)
    assert found["image/R@1"] == 0.0
    assert found["image/R@5"] == 0.0  # The first caption begins with "the", which points nowhere.


def test_retrieval_of_three_colors(by_word, colors, mesh):
    """A red, a green and a blue image: each finds its word, and each word its image; "the … thing" points nowhere."""
    found = run(retrieval.Retrieval(split="test", limit=3), two_towers, colors, mesh)
    assert found["text/R@1"] == 1.0
    assert found["image/R@1"] == 0.5
    assert found["image/chance@1"] == pytest.approx(1 / 3)
    assert found["text/chance@1"] == pytest.approx(1 / 3)


def test_recalls_are_exact(mesh):
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(15, 5)).astype(np.float32)
    owners = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 4, 4, 5, 6, 6, 6])
    found = dict(retrieval.recalls(*(ShardedRows.of_host(mesh, x, 8) for x in (images, texts)), owners))
    similar = images @ texts.T
    for k in (1, 5):
        top_texts = np.argsort(-similar, axis=1)[:, :k]
        assert found[f"text/R@{k}"] == np.mean([(owners[row] == i).any() for i, row in enumerate(top_texts)])
        top_images = np.argsort(-similar, axis=0)[:k]
        assert found[f"image/R@{k}"] == np.mean([owners[j] in top_images[:, j] for j in range(len(texts))])
    assert found["image/chance@5"] == pytest.approx(5 / 7)
    first = [1 - (15 - c) / 15 for c in np.bincount(owners)]
    assert found["text/chance@1"] == pytest.approx(np.mean(first))


def test_equal_embeddings_find_nothing(mesh):
    same = ShardedRows.of_host(mesh, np.ones((4, 3), np.float32), 8)
    found = dict(retrieval.recalls(same, same, np.arange(4)))
    assert found["image/R@1"] == found["text/R@1"] == 0.0


def test_scoring(by_word, colors, mesh):
    found = run(ZeroShotLikelihood(name="colors"), captioner, colors, mesh)
    assert found["accuracy"] == 1.0
    assert found["blind"] == pytest.approx(1 / 3)
    prompted = run(ZeroShotLikelihood(name="colors", prompt="{}", mean=True, calibrated=True), captioner, colors, mesh)
    assert prompted["accuracy"] == 1.0


def test_names_that_do_not_fit_are_no_names(by_word, colors, mesh):
    """Cut, they would be other texts, or all the same."""
    context, _ = context_of(captioner, colors, mesh)
    with pytest.raises(UserError, match=r"3 of 3 texts have more than the \d+ tokens that the model writes"):
        ZeroShotLikelihood(name="colors", prompt="red " * 40 + "{}").setup(context)


def test_captions_of_the_hand_made_model(by_word, colors, mesh):
    for beams in (1, 3):
        context, params = context_of(captioner, colors, mesh)
        with jax.set_mesh(mesh):
            found = dict(Captions(split="test", beams=beams).setup(context)(params))
        assert found["samples"].written == [NAMES[i % 3] for i in range(12)], beams
        assert found["distinct"] == 3 / 12


def test_how_captions_are_written_is_said_in_the_config(by_word, colors, mesh):
    context, params = context_of(captioner, colors, mesh)
    words = [text.split() for text in NAMES]
    with jax.set_mesh(mesh):
        found = dict(Captions(split="test", max_tokens=1).setup(context)(params))
        assert found["samples"].written == [words[i % 3][0] for i in range(12)]
        for options in (dict(max_tokens=99), dict(max_tokens=99, beams=2)):
            with pytest.raises(UserError, match="max_tokens=99 behind a prompt of 0 tokens is more than the"):
                Captions(split="test", **options).setup(context)


def test_scores_by_the_tree_equal_those_one_by_one():
    """Random weights, names that share beginnings, several trees: the same log-likelihoods."""
    options, _ = captioner()
    options = dataclasses.replace(options, vocab=40, length=7, decoder_layers=2, encoder="w16d1h2m16/4")
    blueprint = Blueprint(options)
    rng = np.random.default_rng(0)
    params = jax.device_put(
        {n: (0.5 * rng.normal(size=s.shape)).astype(np.float32) for n, s in blueprint.shapes.items()}
    )
    tokens = np.zeros((30, 7), np.int32)
    for row in tokens:
        length = rng.integers(1, 7)
        row[:length], row[length] = rng.integers(2, 5, length), 1
    tokens[7] = tokens[3]
    image = jnp.asarray(rng.uniform(-1, 1, (3, 8, 8, 3)), jnp.float32)
    model = blueprint.bind(params)
    one_by_one = jax.jit(lambda i, t: log_likelihood(model, i, t))
    expected = np.stack([one_by_one(image, jnp.tile(jnp.asarray(t)[None], (3, 1))) for t in tokens], 1)
    for nodes in (8, 10_000):
        scorer = TextScorer(tokens, nodes=nodes)
        assert (len(scorer.trees) > 1) == (nodes == 8)
        assert_close(jax.jit(lambda i, s=scorer: s(model, i))(image), expected, 1e-5)
    shared = trie.build(tokens)
    assert shared.nodes < (tokens > 1).sum()


def test_similar_pairs_and_foils(by_word, colors, mesh, tmp_path):
    rows = {
        str(i): {"filename": f"img{i}.jpg", "caption": NAMES[i % 3], "negative_caption": NAMES[(i + 1) % 3]}
        for i in range(6)
    }
    rows["6"] = {"filename": "elsewhere.jpg", "caption": "red", "negative_caption": "blue"}
    (tmp_path / "swap.json").write_text(json.dumps(rows))
    evaluator = compositionality.Compositionality(file=str(tmp_path / "swap.json"), images="colors:test")
    for model in (two_towers, captioner):
        found = run(evaluator, model, colors, mesh)
        assert found["swap/accuracy"] == 1.0
        assert found["swap/count"] == 6
        assert found["swap/blind"] == 0.0  # Grey fits all three colours alike, and a tie is no answer.
        assert found["swap/chance"] == 0.5
    # The captioner likes red without an image: the words alone give the answer for those with a red caption.
    liking = jnp.zeros(8).at[3].set(0.1)
    found = run(evaluator, captioner, colors, mesh, **{"decoder/logits/bias": captioner_bias() + liking})
    assert found["swap/blind"] == pytest.approx(2 / 6)
    assert found["swap/blind_of_all"] == pytest.approx(3 / 7)


def captioner_bias():
    return jnp.asarray(captioner()[1]["decoder/logits/bias"])


def test_winoground_scores():
    question = foils.Foil("w", ("a.png", "b.png"), ("x", "y"))
    scores = {("a.png", "x"): 2.0, ("a.png", "y"): 1.0, ("b.png", "x"): 3.0, ("b.png", "y"): 4.0}
    assert compositionality.answers(question, scores) == (True, False, False)
    assert compositionality.answers(question, scores | {("b.png", "x"): 0.0}) == (True, True, True)
    single = foils.Foil("s", ("a.png",), ("x", "y"))
    assert compositionality.answers(single, scores) == (True,)
    assert compositionality.answers(single, scores | {("a.png", "y"): 2.0}) == (False,)  # A tie is no answer.


FORMATS = {
    "sugarcrepe": ({"0": {"filename": "f.jpg", "caption": "a", "negative_caption": "b"}}, ("f.jpg",), ("a", "b")),
    "aro": ([{"image_path": "f.jpg", "true_caption": "a", "false_caption": "b"}], ("f.jpg",), ("a", "b")),
    "negclip": (
        [{"filepath": "d/f.jpg", "caption": "a", "negative_captions": ["b", "c"]}],
        ("d/f.jpg",),
        ("a", "b", "c"),
    ),
    "winoground": (
        [{"image_0": "i", "image_1": "j", "caption_0": "a", "caption_1": "b"}],
        ("i.png", "j.png"),
        ("a", "b"),
    ),
    "valse": (
        {"k": {"image_file": "f.jpg", "caption": "a", "foil": "b", "mturk": {"caption": 3}}},
        ("f.jpg",),
        ("a", "b"),
    ),
}


@pytest.mark.parametrize("format", FORMATS)
def test_formats(format, tmp_path):
    rows, images, captions = FORMATS[format]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert foils.read(format, str(tmp_path / "t.json")) == [foils.Foil("t", images, captions)]
    values = list(rows.values()) if isinstance(rows, dict) else rows
    (tmp_path / "t.json").unlink()
    (tmp_path / "u.jsonl").write_text("\n".join(map(json.dumps, values)))
    assert foils.read(format, str(tmp_path))[0].captions == captions


def test_plain_captions_have_no_spacing_to_be_told_by():
    questions = [
        foils.Foil("g", ("i",), ("A yak's umbrella.", "A umbrella 's yak .", "a  YAK'S umbrella")),
        foils.Foil("g", ("i",), ("Yes.", "yes !")),
    ]
    assert foils.plain(questions) == [foils.Foil("g", ("i",), ("a yak's umbrella", "a umbrella s yak"))]


def test_order_of_words(by_word, colors, mesh):
    """Foils have the caption's words in another order; those of a caption of one word can't be made."""
    questions = foils.of_captions("colors:test", str(colors), 0)
    assert len(questions) == 24 and {q.group for q in questions} == {"shuffled", "swapped"}
    for question in questions:
        right, wrong = question.captions
        assert right != wrong and sorted(right.split()) == sorted(wrong.split())
    assert questions == foils.of_captions("colors:test", str(colors), 0)
    assert questions != foils.of_captions("colors:test", str(colors), 1)
    found = run(compositionality.Compositionality(format="order", images="colors:test"), captioner, colors, mesh)
    assert found["swapped/count"] == 12


def test_valse_leaves_out_what_people_did_not_agree_on(tmp_path):
    row = {"image_file": "f.jpg", "caption": "a", "foil": "b"}
    rows = {str(n): row | {"mturk": {"caption": n}} for n in range(4)}
    (tmp_path / "v.json").write_text(json.dumps(rows))
    assert len(foils.read("valse", str(tmp_path / "v.json"))) == 2


@pytest.mark.realdata
@pytest.mark.parametrize(
    "format, name", [("sugarcrepe", "sugarcrepe"), ("valse", "valse"), ("negclip", "negclip_valid.jsonl")]
)
def test_real_files_are_read(format, name):
    from conftest import real_data

    questions = foils.read(format, real_data("compositionality", name))
    assert len(questions) > 100
    assert all(len(set(q.captions)) > 1 for q in questions[:50])


def test_entailment(by_word, colors, mesh, tmp_path):
    rows = []
    for i in range(6):
        rows.append({"image_id": f"img{i}", "hypothesis": NAMES[i % 3], "label": "entailment"})
        rows.append({"image_id": f"img{i}", "hypothesis": NAMES[(i + 1) % 3], "label": "contradiction"})
        rows.append({"image_id": f"img{i}", "hypothesis": "thing", "label": "neutral"})
    (tmp_path / "ve.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluator = entailment.Entailment(file=str(tmp_path / "ve.jsonl"), images="colors:test")
    for model in (two_towers, captioner):
        found = run(evaluator, model, colors, mesh)
        assert found["auc"] == 1.0
        assert found["count"] == 18
    assert found["blind"] == 0.5


def test_auc():
    assert entailment.auc(np.array([1.0, 3.0]), np.array([2.0, 1.0])) == pytest.approx((0.5 + 2) / 4)


def test_logistic_regression_is_at_the_minimum():
    """The gradient by hand is zero there, and a stronger penalty gives smaller weights."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(0, 3, 60)
    weights = linear_probe.logistic_regression(x, y, 3, 0.05, 500)
    logits = x @ weights[:-1] + weights[-1]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p = p / p.sum(1, keepdims=True) - np.eye(3)[y]
    gradient = np.concatenate([x.T @ p / 60 + 0.05 * weights[:-1], p.mean(0)[None]])
    assert np.abs(gradient).max() < 1e-3
    assert np.abs(linear_probe.logistic_regression(x, y, 3, 5.0, 500)[:-1]).max() < np.abs(weights[:-1]).max()


def test_logistic_regression_over_all_devices(mesh, monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(43, 4)).astype(np.float32), rng.integers(3, size=43)
    alone = linear_probe.logistic_regression(x, y, 3, 0.01, 500, mesh=mesh)
    monkeypatch.setattr(linear_probe, "DIVIDED", 0)
    rows = linear_probe._divided(x, y, mesh)
    assert len(rows[0].sharding.device_set) == 8 and rows[0].addressable_shards[0].data.shape == (6, 4)
    assert_close(linear_probe.logistic_regression(x, y, 3, 0.01, 500, mesh=mesh), alone, 1e-3)


def test_linear_probe_on_the_hand_made_encoder(by_word, colors, mesh):
    found = run(linear_probe.LinearProbe(name="colors"), two_towers, colors, mesh)
    assert found["accuracy"] == 1.0


BAD = [
    (zeroshot.ZeroShot(name="colors"), captioner, "needs a model with a text tower"),
    (retrieval.Retrieval(), captioner, "needs a model with a text tower"),
    (ZeroShotLikelihood(name="colors"), two_towers, "needs a model with a decoder"),
    (Captions(), two_towers, "needs a model with a decoder"),
    (Captions(beams=9), captioner, "9 beams are more than the 7 words"),
    (vqa.Vqa(task="classify", split="test"), captioner, "doesn't know the task 'classify'"),
    (
        vqa.Vqa(task="caption", split="test", vocabulary="none.txt"),
        captioner,
        "'none.txt' of answers is missing",
    ),
    (zeroshot.ZeroShot(name="colors", classes="none.txt"), two_towers, "'none.txt' of class names is missing"),
    (zeroshot.ZeroShot(name="colors", templates="none.txt"), two_towers, "prompt templates is missing"),
    (compositionality.Compositionality(file="none.json"), captioner, "'none.json' is missing"),
    (
        compositionality.Compositionality(format="sugar", file="x"),
        captioner,
        "'sugar' of a compositionality test is unknown",
    ),
    (entailment.Entailment(file="none.jsonl"), captioner, "'none.jsonl' of entailment pairs is missing"),
]


@pytest.mark.parametrize("evaluator, model, message", BAD)
def test_bad_input(by_word, colors, mesh, evaluator, model, message):
    with pytest.raises(UserError, match=message):
        run(evaluator, model, colors, mesh)


@pytest.mark.parametrize(
    "text, message",
    [
        ("red\nRed\ngreen\n", "'Red' is there twice"),
        ("red\n", "labels 0 to 2, but there are 1"),
        ("", "has nothing in it"),
    ],
)
def test_bad_class_names(by_word, colors, mesh, tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        run(zeroshot.ZeroShot(name="colors", classes=str(tmp_path / "names.txt")), two_towers, colors, mesh)


def test_images_that_are_not_there(by_word, colors, mesh, tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(FORMATS["sugarcrepe"][0]))
    evaluator = compositionality.Compositionality(file=str(tmp_path / "s.json"), images="colors:test")
    with pytest.raises(UserError, match="None of the images"):
        run(evaluator, captioner, colors, mesh)
    with pytest.raises(UserError, match="neither a folder nor a prepared data set"):
        run(dataclasses.replace(evaluator, images="nowhere"), captioner, colors, mesh)
    (tmp_path / "bad.json").write_text(json.dumps([{"filename": "x"}]))
    with pytest.raises(UserError, match="Row 0 of .* is not of the format sugarcrepe: it lacks 'caption'"):
        foils.read("sugarcrepe", str(tmp_path / "bad.json"))


def test_two_parts_of_one_image_are_two_images(by_word, colors, mesh, tmp_path):
    """ARO's rows are about a box: of a picture that is red on the left and blue on the right, each half is its own."""
    from PIL import Image

    picture = Image.new("RGB", (64, 32), (255, 0, 0))
    picture.paste((0, 0, 255), (32, 0, 64, 32))
    (tmp_path / "images").mkdir()
    picture.save(tmp_path / "images" / "two.png")
    row = {"image_path": "two.png", "bbox_y": 0, "bbox_w": 32, "bbox_h": 32}
    rows = [
        row | {"bbox_x": 0, "true_caption": "red", "false_caption": "blue"},
        row | {"bbox_x": 32, "true_caption": "blue", "false_caption": "red"},
    ]
    (tmp_path / "vg.json").write_text(json.dumps(rows))
    evaluator = compositionality.Compositionality(
        format="aro", file=str(tmp_path / "vg.json"), images=str(tmp_path / "images")
    )
    found = run(evaluator, two_towers, colors, mesh)
    assert found["vg/count"] == 2 and found["vg/accuracy"] == 1.0


def test_images_that_can_not_be_decoded_are_left_out(by_word, colors, mesh, tmp_path, capsys):
    """One bad file ends no evaluation; a box outside of its image is no image either."""
    from PIL import Image

    (tmp_path / "images").mkdir()
    for name, color in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (32, 32), color).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"nothing")
    rows = [{"image_path": f"{n}.png", "true_caption": "red", "false_caption": "blue"} for n in ("red", "blue", "bad")]
    rows.append(rows[0] | {"bbox_x": 40, "bbox_y": 0, "bbox_w": 5, "bbox_h": 5})
    (tmp_path / "vg.json").write_text(json.dumps(rows))
    evaluator = compositionality.Compositionality(
        format="aro", file=str(tmp_path / "vg.json"), images=str(tmp_path / "images")
    )
    found = run(evaluator, two_towers, colors, mesh)
    assert (found["vg/count"], found["vg/accuracy"]) == (2, 0.5)
    assert "2 images can't be used and are left out; the first is 'bad.png'" in capsys.readouterr().out
    pairs = [{"image_id": n, "hypothesis": "red", "label": "entailment"} for n in ("red", "bad")]
    pairs.append({"image_id": "blue", "hypothesis": "red", "label": "contradiction"})
    (tmp_path / "ve.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    evaluator = entailment.Entailment(file=str(tmp_path / "ve.jsonl"), images=str(tmp_path / "images"))
    found = run(evaluator, two_towers, colors, mesh)
    assert (found["auc"], found["count"]) == (1.0, 2)
