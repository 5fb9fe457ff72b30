"""Average precision against golden/glip (pycocotools' and lvis' numbers), pycocotools itself, and known cases."""

import contextlib
import io
import json
import os

import numpy as np
import pytest
from coco_json import federated, read
from conftest import GOLDEN, assert_close

from capvl.evals import average_precision as ap

EXACT = 1e-12


def golden(name):
    path = os.path.join(GOLDEN, "glip", name)
    if not os.path.exists(path):
        pytest.skip(f"golden file {path} is absent (set CAPVL_GOLDEN)")
    with open(path) as file:
        return json.load(file)


def same(values, expected):
    assert set(values) == set(expected)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=EXACT), name


@pytest.mark.golden
def test_coco_is_golden():
    case = golden("glip_coco_eval.json")
    objects, found, classes = read(case["gt"], case["detections"])
    values, result = ap.coco(objects, found, classes)
    same(values, case["metrics"])
    assert_close(result.per_class(), case["per_category_AP"], EXACT)
    first = [key for key in case if key.startswith("precision_cat1")]
    for key in first:
        assert_close(result.precision[:, :, 0, 0, -1], case[key], 1e-6)  # The file has six digits.
    assert first
    same(ap.class_agnostic(objects, found)[0], case["metrics_class_agnostic"])


@pytest.mark.golden
def test_lvis_is_golden():
    case = golden("glip_lvis_eval.json")
    objects, found, _ = read(case["gt"], case["detections"])
    compared = 0
    for name, expected in case["metrics"].items():
        kind, _, number = name.partition("_")
        if isinstance(expected, dict):
            limit = {"standard": ap.best_of_images, "fixed": ap.best_of_classes}[kind]
            values, _ = ap.lvis(objects, limit(found, int(number)), federated(case["gt"]))
            same(values, {key.partition("@")[0]: value for key, value in expected.items()})
            compared += 1
    assert compared


def drawn(rng, images=12, classes=4, crowds=True):
    """A truth and detections of COCO's form; scores of few values, so that many are equal."""
    annotations, detections = [], []
    for image in range(1, images + 1):
        for _ in range(rng.integers(0, 9)):
            box = [*rng.uniform(0, 200, 2), *rng.choice([12, 50, 150], 2) * rng.uniform(0.8, 1.2, 2)]
            own = {"image_id": image, "category_id": int(rng.integers(1, classes + 1)), "bbox": list(map(float, box))}
            crowd = int(crowds and rng.random() < 0.15)
            area = float(box[2] * box[3] * rng.uniform(0.5, 1))
            annotations.append(own | {"id": len(annotations) + 1, "area": area, "iscrowd": crowd})
            for _ in range(rng.integers(0, 4)):
                near = np.array(box) + rng.normal(0, 0.08, 4) * np.array([box[2], box[3]] * 2)
                score = float(np.round(rng.random(), 1))
                detections.append(own | {"bbox": np.maximum(near, 1).tolist(), "score": score})
        label = int(rng.integers(1, classes + 1))
        wrong = [[*rng.uniform(0, 200, 2).tolist(), 20.0, 30.0] for _ in range(4)]
        detections += [{"image_id": image, "category_id": label, "bbox": box, "score": 0.5} for box in wrong]
    names = [{"id": i, "name": f"c{i}"} for i in range(1, classes + 2)]  # The last has no object.
    sizes = [{"id": i, "width": 400, "height": 400} for i in range(1, images + 1)]
    return {"info": {}, "images": sizes, "annotations": annotations, "categories": names}, detections


@pytest.mark.parametrize("seed", range(6))
def test_random_sets_as_pycocotools_has_them(seed):
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO  # Optional.
    from pycocotools.cocoeval import COCOeval

    truth, detections = drawn(np.random.default_rng(seed), crowds=seed % 2 == 0)
    objects, found, classes = read(truth, detections)
    values, result = ap.coco(objects, found, classes)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = json.loads(json.dumps(truth))
        theirs.createIndex()
        judge = COCOeval(theirs, theirs.loadRes(json.loads(json.dumps(detections))), "bbox")
        judge.evaluate(), judge.accumulate(), judge.summarize()
    assert_close(result.precision, judge.eval["precision"], EXACT)
    assert_close(result.recall, judge.eval["recall"], EXACT)
    assert_close(np.array(list(values.values())), judge.stats, EXACT)


def objects_of(rows):
    """From (image, label, box) each, of their boxes' areas."""
    image, label, box = (np.array(column) for column in zip(*rows, strict=True))
    box, no = box.astype(float), np.zeros(len(rows), bool)
    return ap.Objects(image, label, box, box[:, 2] * box[:, 3], no, no)


def found_of(rows):
    """From (image, label, box, score) each."""
    image, label, box, score = (np.array(column) for column in zip(*rows, strict=True))
    return ap.Found(image, label, box.astype(float), score.astype(float), np.zeros(len(rows), bool))


BOX, OTHER = (10, 10, 50, 50), (200, 200, 40, 40)


def test_all_right_is_one_and_nothing_found_is_zero():
    objects = objects_of([(0, 0, BOX), (1, 0, OTHER), (1, 1, BOX)])
    values, result = ap.coco(objects, found_of([(0, 0, BOX, 0.9), (1, 0, OTHER, 0.8), (1, 1, BOX, 0.7)]), 3)
    assert all(values[key] == pytest.approx(1, abs=1e-9) for key in ("AP", "AP50", "APm", "AR1", "AR100"))
    assert values["APs"] == values["APl"] == ap.NONE
    assert result.per_class()[2] == ap.NONE and result.curve(0.5).min() == pytest.approx(1, abs=1e-9)
    nothing = found_of([(0, 0, BOX, 0.9)]).take(np.zeros(0, int))
    values, result = ap.coco(objects, nothing, 3)
    assert values["AP"] == values["AR100"] == 0 and result.curve().max() == 0
    assert ap.coco(objects_of([(0, 0, BOX)])._replace(ignored=np.array([True])), nothing, 1)[0]["AP"] == ap.NONE


def test_every_image_counts_in_lvis():
    """The official code keeps the first image of each batch alone."""
    rows = [(i, i % 3, BOX) for i in range(9)]
    whole = found_of([(*row, 0.5) for row in rows])
    told = ap.Federated("rcf", np.zeros((0, 2), int), np.zeros((0, 2), int))
    values, _ = ap.lvis(objects_of(rows), ap.best_of_classes(whole), told)
    assert values["AP"] == pytest.approx(1, abs=1e-9)
    for lost in range(9):
        values, _ = ap.lvis(objects_of(rows), ap.best_of_classes(whole.take(np.arange(9) != lost)), told)
        assert values["AP"] < 0.95 and values[f"AP{'rcf'[lost % 3]}"] < 0.7


def test_lvis_counts_what_was_searched_for():
    objects = objects_of([(0, 0, BOX), (1, 1, BOX)])
    wrong = [(0, 1, OTHER, 0.9), (1, 0, OTHER, 0.9)]  # Classes that nobody searched these images for.
    found = found_of([(0, 0, BOX, 0.5), (1, 1, BOX, 0.5), *wrong])

    def measured(negative=(), not_exhaustive=()):
        pairs = (np.array(rows, int).reshape(-1, 2) for rows in (negative, not_exhaustive))
        return ap.lvis(objects, found, ap.Federated("rf", *pairs))[0]

    values = measured()
    assert values["AP"] == pytest.approx(1, abs=1e-9) and values["APc"] == ap.NONE
    assert measured(negative=[(0, 1), (1, 0)])["AP"] == pytest.approx(0.5, abs=1e-9)
    assert measured(negative=[(0, 1), (1, 0)], not_exhaustive=[(0, 1), (1, 0)])["AP"] == pytest.approx(1, abs=1e-9)


def test_the_best_of_images_and_of_classes():
    rows = [(0, 0, BOX, 0.2), (0, 1, BOX, 0.9), (0, 0, BOX, 0.2), (1, 1, BOX, 0.8), (1, 0, BOX, 0.3)]
    found = found_of(rows)
    assert ap.best_of_images(found, 2).score.tolist() == [0.2, 0.9, 0.8, 0.3]
    assert ap.best_of_classes(found, 1).score.tolist() == [0.9, 0.3]
    assert len(ap.best_of_classes(found.take(np.zeros(0, int)), 1).score) == 0


def test_the_order_of_images_and_detections_makes_no_difference():
    truth, detections = drawn(np.random.default_rng(9))
    objects, found, classes = read(truth, detections)
    found = found._replace(score=np.random.default_rng(0).permutation(len(found.score)) / len(found.score))
    order = np.random.default_rng(1).permutation(len(found.score))
    assert ap.coco(objects, found, classes)[0] == ap.coco(objects, found.take(order), classes)[0]
