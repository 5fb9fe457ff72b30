"""Detection of a hand-made model whose boxes are exact: average precision, phrases, chunks, batches and devices."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pointing import NAMES, PointingOptions, scene, tokenizer

from capvl import recipes, reporting
from capvl.data.preparing import region_sets
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.evals import Confusion, Context, Curves, NotFiniteError, Pictures, detection, phrase_boxes
from capvl.evals.average_precision import Found
from capvl.evals.detection import Detection, confusion, uppermost
from capvl.evals.lvis import Lvis
from capvl.evals.phrase_boxes import PhraseBoxes, read
from capvl.inference.compiled import compiled
from capvl.models.parameters import Blueprint
from capvl.objectives.glip import Glip
from capvl.parallel.mesh import MeshOptions, make_mesh

COUNT = 11
IDS = {"red thing": 7, "green thing": 90, "blue thing": 0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Of wide images alone: another shape is another program."""
    return make_sets(tmp_path_factory.mktemp("detected"), tall=False)


def make_sets(folder, tall=True):
    """Data sets of the same images, every third of them tall: things, whose classes have ids with holes; some, each
    image of which was searched for the class of its first rectangle (LVIS); said, with captions and their phrases."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    images, rows, lines = [], [], []
    for i in range(COUNT):
        wide = not tall or i % 3 > 0
        data, boxes = scene(rng, wide)
        (folder / f"images/{i}.png").write_bytes(data)
        height, width = (64, 96) if wide else (96, 64)
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        rows += [
            {"image_id": i, "category_id": IDS[f"{c} thing"], "bbox": box, "area": 20.0} for c, box in boxes.items()
        ]
        first, second = boxes
        said = [f"a {first} thing and the {second}"]
        regions = [
            {"bbox": [x, y, x + w, y + h], "phrase": phrase}
            for (x, y, w, h), phrase in zip(boxes.values(), (f"a {first} thing", f"the {second}"), strict=True)
        ]
        lines += [
            {"filename": f"{i}.png", "height": height, "width": width, "grounding": {"caption": c, "regions": regions}}
            for c in said
        ]
    categories = [{"id": IDS[name], "name": name} for name in NAMES]
    truth = {"images": images, "annotations": rows, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(truth))
    letters = dict(zip(NAMES, "rcf", strict=True))
    for row in categories:
        row["frequency"] = letters[row["name"]]
    for image in images:
        own = [row["category_id"] for row in rows if row["image_id"] == image["id"]]
        image["neg_category_ids"] = sorted(set(IDS.values()) - set(own))
    truth["annotations"] = rows[::2]
    (folder / "some.json").write_text(json.dumps(truth))
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = str(folder / "out")
    for name, format, file in (
        ("things", "coco", "instances.json"),
        ("some", "lvis", "some.json"),
        ("said", "odvg", "lines.jsonl"),
    ):
        region_sets.prepare(name, format, {"val": [str(folder / file)]}, str(folder / "images"), out, workers=1)
    return out


@pytest.fixture(scope="module")
def programs():
    """What `shared` gave."""
    return {}


@pytest.fixture
def words(monkeypatch, tmp_path, programs):
    own = tokenizer(tmp_path)
    monkeypatch.setattr(tokenizers, "load", lambda path, start=True: own)

    def shared(blueprint, function):
        """As `compiled`, but the same program for the same function of the same model: many are asked the same."""
        given = tuple(cell.cell_contents for cell in function.__closure__ or ())
        key = blueprint.options, function.__code__, given
        return programs.setdefault(key, compiled(blueprint, function))

    for module in (detection, phrase_boxes):
        monkeypatch.setattr(module, "compiled", shared)


def evaluate(evaluator, folder, *, batch=8, devices=1, value=1.0, blind="", out=None, objective=None, **options):
    options = PointingOptions(**options)
    towers = dict(encoder="w8d1h1m8/8", res=8, dtype="float32", text="w8d1h1m8", vocab=8, length=4)
    values = {"steps": 1, "batch_size": 8, "objective": {"name": "contrastive"}, "model": towers, "evals": {}}
    values["data"] = {"name": "things", "data_dir": folder, "tokenizer": "words", "interpolation": "bilinear"}
    data = recipes.resolve(values).data
    mesh = make_mesh(MeshOptions(), jax.devices()[:devices])
    context = Context(options, data, objective, 0, batch, mesh, Blueprint(options), out)
    params = {k: jnp.full(s.shape, value, s.dtype) for k, s in context.blueprint.shapes.items()}
    params["seen"] = jnp.asarray([name != f"{blind} thing" for name in NAMES], jnp.float32)
    with jax.set_mesh(mesh):
        return dict(evaluator.setup(context)(params))


def numbers(found):
    return {name: value for name, value in found.items() if isinstance(value, float)}


def test_all_rectangles_are_found(words, tmp_path):
    """In images of both shapes."""
    found = evaluate(Detection(submission=True, each=True), make_sets(tmp_path), out=tmp_path)
    for name in ("AP", "AP50", "AP75", "AR10", "AR100", "agnostic/AP", *(f"AP/{name}" for name in NAMES)):
        assert found[name] == pytest.approx(1.0, abs=1e-6), name
    assert found["images"] == COUNT and found["objects"] == 2 * COUNT and "APl" not in found
    results = json.loads((tmp_path / "submissions/things_val.json").read_text())
    assert len(results) == 2 * COUNT and {row["category_id"] for row in results} == set(IDS.values())
    assert [row["image_id"] for row in results] == [i // 2 for i in range(2 * COUNT)]
    assert all(0 < row["score"] < 1 and len(row["bbox"]) == 4 for row in results)


def test_what_is_shown(words, prepared, tmp_path):
    found = evaluate(Detection(), prepared, blind="green")
    shown = {key: found[key] for key in ("pictures", "curves", "confusion")}
    kinds = [type(value) for value in shown.values()]
    assert kinds == [Pictures, Curves, Confusion] and len(shown["pictures"].images) == COUNT
    counts = dict(zip(shown["confusion"].names, shown["confusion"].counts.tolist(), strict=True))
    assert list(counts) == [*NAMES, "(nothing)"] and counts["red thing"][3] == counts["red thing"][1] == 0
    assert counts["green thing"][:3] == [0, 0, 0] and counts["green thing"][3] > 0 and counts["(nothing)"] == [0] * 4
    reporting.save_shown(tmp_path, 3, {"detection": list(shown.values())})
    (tmp_path / "metrics.jsonl").write_text("")
    page = reporting.write([tmp_path], tmp_path / "report.html").read_text()
    assert "precision" in page and "green is true" in page and "found" in page


def test_a_class_that_is_not_seen(words, prepared):
    found = evaluate(Detection(unseen=("green thing",)), prepared, blind="green")
    assert found["unseen/AP"] == 0 and found["seen/AP"] == pytest.approx(1.0, abs=1e-6)
    assert found["AP"] == pytest.approx(2 / 3, abs=1e-6)
    with pytest.raises(UserError, match="unseen names 'purple'"):
        evaluate(Detection(unseen=("purple",)), prepared)


@pytest.mark.parametrize("how", [dict(batch=3), dict(batch=16, devices=8)])
def test_batches_and_devices_make_no_difference(words, prepared, how):
    expected = numbers(evaluate(Detection(), prepared, blind="red"))
    assert numbers(evaluate(Detection(), prepared, blind="red", **how)) == expected and 0 < expected["AP"] < 1


def test_chunks_lose_no_class(words, prepared):
    found = evaluate(Detection(chunk=2), prepared)
    assert found["AP"] == pytest.approx(1.0, abs=1e-6)


def test_what_two_prompts_find_twice(words, prepared, tmp_path):
    """Two names of one thing, in two prompts: without suppression both are found."""
    said = tmp_path / "words.json"
    said.write_text(json.dumps({"green thing": {"said": "red", "suffix": "big"}}))
    rows = []
    for across in (0.0, 0.7):
        how = dict(chunk=1, words=str(said), across=across, submission=True)
        found = evaluate(Detection(**how), prepared, out=tmp_path)
        rows.append(len(json.loads((tmp_path / "submissions/things_val.json").read_text())))
        # What is shown is the best of both, in any case.
        assert dict(zip(found["confusion"].names, found["confusion"].counts, strict=True))["(nothing)"].sum() == 0
    assert rows[0] > rows[1] > COUNT / 2


def test_a_closed_list_goes_by_names(words, prepared, tmp_path):
    """In another data set's order of as many classes, too; and other classes are not measured as if they were these."""
    options = dict(length=len(NAMES), able_to_read=False)
    folder = pathlib.Path(prepared).parent
    given = json.loads((folder / "instances.json").read_text())
    for name, renamed in (("turned", {}), ("other", {"green thing": "teal thing"})):
        kinds = [row | {"name": renamed.get(row["name"], row["name"])} for row in reversed(given["categories"])]
        (tmp_path / f"{name}.json").write_text(json.dumps(given | {"categories": kinds}))
        files = {"val": [str(tmp_path / f"{name}.json")]}
        region_sets.prepare(name, "objects365", files, str(folder / "images"), prepared, workers=1)
    assert evaluate(Detection(name="turned"), prepared, **options)["AP"] == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(UserError, match="closed list of 3 classes, and 'teal thing' is none of them"):
        evaluate(Detection(name="other"), prepared, **options)
    found = evaluate(Detection(classes=("blue thing",)), prepared, **options)
    assert found["AP"] == pytest.approx(1.0, abs=1e-6) and found["confusion"].names == ["blue thing", "(nothing)"]
    with pytest.raises(UserError, match="needs a model that reads texts"):
        evaluate(PhraseBoxes(name="said"), prepared, **options)


def test_what_stood_before_classes_in_training_stands_there(words, prepared, monkeypatch):
    asked, own = [], detection.vocabulary
    monkeypatch.setattr(detection, "vocabulary", lambda *a, prefix: asked.append(prefix) or own(*a, prefix=prefix))
    for evaluator in (Detection(limit=1), Detection(limit=1, prefix="the"), Detection(limit=1, prefix=" ")):
        evaluate(evaluator, prepared, objective=Glip(prefix="a big"))
    assert asked == ["a big", "the", " "]


def test_an_image_that_was_not_searched_for_classes_is_none_without(words, prepared, tmp_path):
    folder = pathlib.Path(prepared).parent
    own = {"filename": "0.png", "height": 64, "width": 96}
    own["detection"] = {"instances": [{"bbox": [0, 0, 9, 9], "label": 0, "category": "red thing"}]}
    said = (folder / "lines.jsonl").read_text().splitlines()[1]
    (tmp_path / "lines.jsonl").write_text(f"{json.dumps(own)}\n{said}\n")
    (tmp_path / "labels.json").write_text(json.dumps({"0": "red thing"}))
    files = {"val": [str(tmp_path / "lines.jsonl"), str(tmp_path / "labels.json")]}
    region_sets.prepare("both", "odvg", files, str(folder / "images"), prepared, workers=1)
    with pytest.raises(UserError, match=r"has an image \(1\) whose boxes have no class: it wasn't searched"):
        evaluate(Detection(name="both"), prepared)


def test_chosen_classes_and_limits(words, prepared):
    found = evaluate(Detection(classes=("blue thing",), limit=6), prepared)
    assert found["AP"] == pytest.approx(1.0, abs=1e-6) and found["images"] == 6 and found["objects"] <= 6
    for evaluator, message in (
        (Detection(classes=("blue think",)), "has no class 'blue think'. Did you mean 'blue thing'"),
        (Detection(name="said"), "has no closed list of classes"),
        (Detection(words="none.json"), "none.json"),
        (Lvis(), "doesn't say what was looked for in each image"),
        (PhraseBoxes(), "has no phrases with boxes"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(evaluator, prepared)
    with pytest.raises(UserError, match="threshold, overlap and across should be between 0 and 1"):
        Detection(threshold=2.0)
    with pytest.raises(UserError, match="'man' is unknown"):
        Lvis(kind="man")


def test_lvis_counts_what_images_were_searched_for(words, prepared, tmp_path):
    found = evaluate(Lvis(name="some", submission=True), prepared, out=tmp_path)
    letters = [key for key in ("APr", "APc", "APf") if key in found]
    assert len(letters) > 1 and all(found[key] == pytest.approx(1.0, abs=1e-6) for key in ("AP", "AR", *letters))
    assert found["standard/AP"] == found["AP"] and found["objects"] == COUNT
    assert len(json.loads((tmp_path / "submissions/some_val.json").read_text())) == 2 * COUNT
    assert numbers(evaluate(Lvis(name="some"), prepared, batch=3)) == numbers(found)
    # Where all else is wrong, the second rectangles are.
    assert evaluate(Detection(name="some"), prepared)["AP"] < 0.9


def test_nan_is_no_empty_image(words, prepared):
    with pytest.raises(NotFiniteError):
        evaluate(Detection(), prepared, value=np.nan)


def test_phrases_are_found(words, prepared):
    found = evaluate(PhraseBoxes(name="said"), prepared)
    assert found["R@1"] == found["R@all"] == found["merged/R@1"] == 1.0
    assert found["phrases"] == 2 * COUNT and found["cut"] == 0 and len(found["pictures"].images) == 16
    worse = [numbers(evaluate(PhraseBoxes(name="said"), prepared, blind="blue", **how)) for how in ({}, dict(batch=2))]
    assert worse[0] == worse[1] and 0.2 < worse[0]["R@10"] < 1
    short = evaluate(PhraseBoxes(name="said"), prepared, length=6)
    assert short["cut"] > 0 and short["R@1"] < 1


class Drawn:
    """An image whose boxes have phrases of their own, one without boxes, and one whose caption names its box."""

    name = "drawn"
    objects = ({"bbox": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0, 0, 1]], "phrase": ["red", "red", "blue"]}, {})
    boxes = {"chain": ["0"], "bbox": [[0.0, 0.0, 1.0, 0.5]]}
    phrases = {"chain": ["0"] * 2, "phrase": ["green", "lone"], "sentence": [0, -1], "start": [2, -1], "end": [7, -1]}

    def __len__(self):
        return 3

    def annotations(self, features, indices):
        named = {"text": ["a green thing"], "boxes": self.boxes, "phrases": self.phrases}
        for i in indices:
            yield {"height": 8, "width": 8} | (named if i == 2 else {"objects": self.objects[i]} if i == 0 else {})


def test_phrases_of_boxes_alone_are_asked_by_themselves(tmp_path):
    asked = read(Drawn(), "val", tokenizer(tmp_path), 8)
    assert [(phrase.image, phrase.text, len(phrase.boxes)) for phrase in asked.phrases] == [
        (0, "red", 2),
        (2, "green", 1),
    ]
    assert [len(rows) for rows in asked.captions] == [1, 0, 1] and asked.cut == 0
    positive = asked.captions[0][0][1]
    assert positive.shape == (1, 8) and positive.any()


def test_of_boxes_upon_one_another_the_best_is_shown():
    box = np.array([[0, 0, 10, 10], [0, 1, 10, 10], [5, 0, 10, 10], [0, 0, 10, 10]], float)
    image, score = np.array([0, 0, 0, 1]), np.array([0.4, 0.9, 0.5, 0.35])
    found = Found(image, np.arange(4), box, score, np.zeros(4, bool))
    assert uppermost(found).label.tolist() == [1, 2, 3]
    assert len(uppermost(found.take(np.zeros(4, bool))).label) == 0
