"""Evaluators by a matching head, on a hand-made one: retrieval in two passes, foils, the blind control, classes."""

import dataclasses
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_tar
from handmade import COLORS, WORDS, ByWord
from PIL import Image
from seeing import SeeingOptions, scene

from capvl import recipes
from capvl.data.preparing import corpus
from capvl.data.preparing.filters import Filters
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.evals import Context, compositionality, entailment, foils, retrieval, zeroshot
from capvl.models.abilities import Ability
from capvl.models.parameters import Blueprint
from capvl.parallel.mesh import MeshOptions, make_mesh

NAMES = list(WORDS)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """12 images, mostly of one colour, with a stripe of another: the mean is of neither. Captions name the first."""
    folder, samples = tmp_path_factory.mktemp("stripes"), []
    for i in range(12):
        main, other = NAMES[i % 3], NAMES[(i + 1) % 3]
        pixels = scene({main: (0, 0, 1, 1)}, (32, 32))
        pixels[: 4 * (1 + i // 4)] = COLORS[other]
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        meta = {"label": i % 3, "class_name": main, "captions": [f"the {main} thing", main], "image_id": f"img{i}"}
        samples.append((f"{i:09d}", {"png": buffer.getvalue(), "json": json.dumps(meta).encode()}))
    write_tar(folder / "a.tar", samples)
    corpus.prepare("stripes", {"val": str(folder / "a.tar")}, str(folder), workers=1, filters=Filters(min_side=1))
    return str(folder)


@pytest.fixture(autouse=True)
def by_word(monkeypatch):
    monkeypatch.setattr(tokenizers, "load", lambda path, start=True: ByWord())


def evaluate(evaluator, folder, options=None, devices=None, name="stripes"):
    options, mesh = options or SeeingOptions(), make_mesh(MeshOptions(), devices)
    towers = dict(encoder="w8d1h1m8/8", res=8, dtype="float32", text="w8d1h1m8", vocab=8, length=4)
    values = {"steps": 1, "batch_size": 8, "objective": {"name": "contrastive"}, "model": towers, "evals": {}}
    values["data"] = {"name": name, "data_dir": folder, "tokenizer": "by word", "crop": "squash"}
    data, blueprint = recipes.resolve(values).data, Blueprint(options)
    context = Context(options, data, None, 0, 8, mesh, blueprint, None)
    params = {k: jnp.ones(s.shape, s.dtype) for k, s in blueprint.shapes.items()}
    with jax.set_mesh(mesh):
        return dict(evaluator.setup(context)(params))


def test_retrieval_in_two_passes(stripes):
    """The second pass is that of all pairs where all are candidates, whatever the devices; of one candidate it can't
    change a thing."""
    found = evaluate(retrieval.Retrieval(limit=3, rerank=99), stripes)
    assert found["text/rerank/R@1"] == found["image/rerank/R@1"] == found["rerank/mean"] == 1.0
    one = evaluate(retrieval.Retrieval(limit=3, rerank=1), stripes)
    assert one["text/rerank/R@1"] == one["text/R@1"] and one["image/rerank/R@1"] == one["image/R@1"]
    # Four images share a colour and its words, and no image is asked for by more: ties count against the model.
    all_of_them = evaluate(retrieval.Retrieval(rerank=6), stripes)
    assert all_of_them["text/rerank/R@1"] == 0.0
    alone = evaluate(retrieval.Retrieval(rerank=6), stripes, devices=jax.devices()[:1])
    assert all_of_them == alone
    assert all_of_them["mean"] == pytest.approx(np.mean([v for k, v in alone.items() if "/R@" in k and "rer" not in k]))


def test_retrieval_without_a_matching_head(stripes):
    with pytest.raises(UserError, match="'retrieval with rerank' needs a model with a matching head"):
        evaluate(retrieval.Retrieval(rerank=2), stripes, SeeingOptions(able=("TEXTS",)))
    with pytest.raises(UserError, match="rerank must not be negative"):
        retrieval.Retrieval(rerank=-1)


def test_classes(stripes, tmp_path):
    (tmp_path / "t.txt").write_text("{}\nthe {}\n")
    how = dict(name="stripes", split="val", templates=str(tmp_path / "t.txt"))
    assert evaluate(zeroshot.ZeroShot(by="match", **how), stripes)["accuracy"] == 1.0
    with pytest.raises(UserError, match="by='matches' is unknown"):
        zeroshot.ZeroShot(by="matches")
    with pytest.raises(UserError, match="'zeroshot' needs a model with a matching head"):
        evaluate(zeroshot.ZeroShot(by="match", **how), stripes, SeeingOptions(able=("TEXTS",)))


@pytest.mark.parametrize("by", ["", "match", "similarity"])
def test_foils(stripes, tmp_path, by):
    rows = {
        str(i): {"filename": f"img{i}", "caption": NAMES[i % 3], "negative_caption": NAMES[(i + 1 + i % 2) % 3]}
        for i in range(12)
    }
    (tmp_path / "swap.json").write_text(json.dumps(rows))
    evaluator = compositionality.Compositionality(file=str(tmp_path / "swap.json"), images="stripes:val", by=by)
    found = evaluate(evaluator, stripes)
    assert found["swap/count"] == 12 and found["swap/blind"] == 0.0  # To grey all colours are equal.
    assert found["swap/accuracy"] == 1.0
    with pytest.raises(UserError, match="'compositionality' needs a model with a decoder"):
        evaluate(dataclasses.replace(evaluator, by="likelihood"), stripes)
    with pytest.raises(UserError, match="by='itm' is unknown"):
        dataclasses.replace(evaluator, by="itm")


def test_the_matching_head_is_asked_first(stripes):
    scorers = {}
    for able in (("TEXTS", "MATCHES"), ("TEXTS",)):
        options = SeeingOptions(able=able)
        context = Context(options, None, None, 0, 8, None, Blueprint(options), None)
        scorers[able] = compositionality.PairScorer(context).by
    assert list(scorers.values()) == ["match", "similarity"]
    assert compositionality.needed("match") == (Ability.MATCHES,)
    assert set(compositionality.needed("")) == {Ability.DECODER, Ability.MATCHES, Ability.TEXTS}


def test_entailment(stripes, tmp_path):
    labels = ("entailment", "contradiction")
    rows = [{"hypothesis": NAMES[(i % 3 + k) % 3], "label": labels[k], "image_id": f"img{i}"} for i in range(12)
            for k in range(2)]  # fmt: skip
    (tmp_path / "e.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluator = entailment.Entailment(file=str(tmp_path / "e.jsonl"), images="stripes:val", by="match")
    found = evaluate(evaluator, stripes)
    assert found["auc"] > 0.9 and found["blind"] == 0.5 and found["count"] == 24


def test_foils_of_scenes(data_dir, stripes):
    questions = foils.of_scenes("scenes/tiny:val", data_dir, 0)
    assert (
        questions == foils.of_scenes("scenes/tiny:val", data_dir, 0) != foils.of_scenes("scenes/tiny:val", data_dir, 1)
    )
    groups = {group: [q for q in questions if q.group == group] for group in ("attribute", "relation")}
    assert len(groups["relation"]) > 50 and len(groups["attribute"]) > 40
    for question in questions:
        right, wrong = question.captions
        assert right != wrong and sorted(_plain(right).split()) == sorted(_plain(wrong).split())
    check_against_the_scenes(questions, data_dir)
    found = evaluate(compositionality.Compositionality(format="scenes", images="scenes/tiny"), data_dir)
    assert {"attribute/accuracy", "relation/accuracy", "relation/blind", "all/count"} <= set(found)
    assert found["relation/count"] == len(groups["relation"])
    with pytest.raises(UserError, match="'scenes' needs an embedded data set"):
        foils.of_scenes("stripes:val", stripes, 0)
    with pytest.raises(UserError, match="the format 'scenes' needs a prepared data set as images"):
        compositionality.Compositionality(format="scenes")


def check_against_the_scenes(questions, data_dir):
    """What is right is there, and what is wrong is not."""
    from capvl.data.reading import sources

    source = sources.open_source("scenes/tiny", "val", data_dir, features=("objects",))
    for question in questions:
        rows = source[int(question.images[0])]["objects"]
        things = {}
        for (y0, x0, y1, x1), color, shape in zip(rows["bbox"], rows["color"], rows["shape"], strict=True):
            things[f"{color.decode()} {shape.decode()}"] = (x0 + x1) / 2, (y0 + y1) / 2
        for caption, right in zip(question.captions, (True, False), strict=True):
            words = _plain(caption).removeprefix("a ")
            if question.group == "attribute":
                assert all(thing in things for thing in words.split(" and a ")) is right
                continue
            where = next(w for w in (" left of ", " right of ", " above ", " below ") if w in words)
            (x0, y0), (x1, y1) = (things[thing] for thing in words.split(f"{where}a "))
            holds = {" left of ": x0 < x1, " right of ": x0 > x1, " above ": y0 < y1, " below ": y0 > y1}[where]
            assert bool(holds) is right


def _plain(text):
    return re.sub(r"\ban ", "a ", text)
