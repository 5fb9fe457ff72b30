"""Grounding of a hand-made model whose boxes are exact, and of a worse one; its baselines, detections and errors."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, load_golden, write_tar
from handmade import ByWord
from PIL import Image
from seeing import SeeingOptions, random_boxes, scene

from capvl import recipes, reporting
from capvl.data.images.decode import BadImageError
from capvl.data.preparing import corpus
from capvl.data.preparing.filters import Filters
from capvl.data.text import tokenizers
from capvl.errors import UserError
from capvl.evals import Context, Pictures, boxes, grounding
from capvl.models.parameters import Blueprint
from capvl.nn.positions import bicubic
from capvl.parallel.mesh import MeshOptions, make_mesh

SIZE = (64, 96)


@pytest.fixture(scope="module")
def rectangles(tmp_path_factory):
    """A prepared set: 20 images of three coloured rectangles to train on, 11 to be evaluated on; and their boxes."""
    folder, rng, truth = tmp_path_factory.mktemp("rectangles"), np.random.default_rng(0), {}
    for split, count in (("train", 20), ("val", 11)):
        samples = []
        for i in range(count):
            own = truth[f"{split}{i}"] = random_boxes(rng)
            buffer = io.BytesIO()
            Image.fromarray(scene(own, SIZE)).save(buffer, "PNG")
            pixels = {c: [[b[0] * SIZE[1], b[1] * SIZE[0], b[2] * SIZE[1], b[3] * SIZE[0]]] for c, b in own.items()}
            phrases = [[0, 0, 2, color, "", f"the {color}"] for color in own]
            meta = {"image_id": f"{split}{i}", "captions": ["a thing"], "boxes": pixels, "phrases": phrases}
            samples.append((f"{i:09d}", {"png": buffer.getvalue(), "json": json.dumps(meta).encode()}))
        write_tar(folder / f"{split}.tar", samples)
    tars = {split: str(folder / f"{split}.tar") for split in ("train", "val")}
    corpus.prepare("rectangles", tars, str(folder), workers=1, filters=Filters(min_side=1))
    return str(folder), truth


@pytest.fixture
def by_word(monkeypatch):
    monkeypatch.setattr(tokenizers, "load", lambda path, start=True: ByWord())


def context_of(folder, options=None, devices=None):
    options = options or SeeingOptions()
    mesh = make_mesh(MeshOptions(), devices)
    towers = dict(encoder="w8d1h1m8/8", res=8, dtype="float32", text="w8d1h1m8", vocab=8, length=4)
    values = {"steps": 1, "batch_size": 8, "objective": {"name": "contrastive"}, "model": towers, "evals": {}}
    values["data"] = {"name": "rectangles", "data_dir": folder, "tokenizer": "by word"}
    data = recipes.resolve(values).data
    return Context(options, data, None, 0, 8, mesh, Blueprint(options), None)


def evaluate(evaluator, folder, options=None, devices=None):
    context = context_of(folder, options, devices)
    params = {k: jnp.ones(s.shape, s.dtype) for k, s in context.blueprint.shapes.items()}
    with jax.set_mesh(context.mesh):
        return dict(evaluator.setup(context)(params))


def detected(truth, path, rng, split="val"):
    """A file of detections: the true boxes and others, in another order each."""
    height, width = SIZE
    found = {}
    for name, own in truth.items():
        if name.startswith(split):
            rows = [*own.values(), (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.125, 1.0)]
            rows = [rows[i] for i in rng.permutation(len(rows))[: 5 - (name == "val3")]]
            rows += [] if name != "val3" else list(own.values())
            rows = [(x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height) for x0, y0, x1, y1 in rows]
            found[name] = [[*row, 0.9] for row in rows]
    path.write_text(json.dumps(found))
    return str(path)


@pytest.mark.parametrize("method", ["", "box", "gradcam"])
def test_the_rectangles_are_found(by_word, rectangles, method):
    folder, _ = rectangles
    found = evaluate(grounding.Grounding(method=method, cells=8 if method == "gradcam" else 0), folder)
    assert found["count"] == 33
    assert found["accuracy"] == found["accuracy/pixel"] == found["accuracy/high"] == 1.0
    assert found["iou"] > 0.99
    assert found["chance"] < 0.3 and found["centre"] < 0.2 and found["mean_box"] < 0.3
    shown = found["pictures"]
    assert isinstance(shown, Pictures) and len(shown.images) == len(shown.captions) == grounding.SHOWN
    assert shown.images[0].shape == (4 * SIZE[0], 4 * SIZE[1], 3) and "IoU 1.00" in shown.captions[0]


@pytest.mark.parametrize("method", ["gradcam", "itc", "itm"])
def test_the_best_of_detections(by_word, rectangles, tmp_path, method):
    folder, truth = rectangles
    file = detected(truth, tmp_path / "dets.json", np.random.default_rng(1))
    found = evaluate(grounding.Grounding(method=method, detections=file), folder)
    assert found["accuracy"] == 1.0 and found["iou"] > 0.99


def test_eight_devices_equal_one(by_word, rectangles):
    folder, _ = rectangles
    evaluator = grounding.Grounding(method="itm", cells=3)
    one, eight = (evaluate(evaluator, folder, devices=jax.devices()[:n]) for n in (1, 8))
    one.pop("pictures"), eight.pop("pictures")
    assert one == eight and 0 < one["iou"] < 0.9


def test_splits_limits_and_baselines(by_word, rectangles):
    folder, truth = rectangles
    found = evaluate(grounding.Grounding(split="train,val", limit=30, train=""), folder)
    assert found["train/count"] == found["val/count"] == 30
    assert "val/centre" in found and "val/mean_box" not in found and "val/chance" not in found
    found = evaluate(grounding.Grounding(), folder)
    known = np.array([box for name, own in truth.items() if "train" in name for box in own.values()])
    asked = np.array([box for name, own in truth.items() if "val" in name for box in own.values()])
    mean = known.mean(axis=0)
    assert_close(found["mean_box"], np.mean(boxes.ious(mean[None], asked) >= 0.5), 1e-6)
    assert_close(found["chance"], np.mean(boxes.ious(known[:, None], asked[None]) >= 0.5), 1e-6)


def test_phrases_of_several_boxes():
    class Source:
        name = "several"

        def __len__(self):
            return 1

        def annotations(self, features, indices, likely):
            bbox = np.array([[0, 0, 0.2, 0.2], [0.5, 0.5, 1, 1], [0.3, 0.3, 0.3, 0.4], [0.1, 0.1, 0.2, 0.2]])
            chain = [b"1", b"1", b"2", b"3"]
            phrases = {"chain": [b"1", b"1", b"2", b"3", b"3", b"3"], "sentence": [0, 0, 0, 0, -1, -1]}
            phrases["phrase"] = [b"two dogs", b"dogs", b"cat", b"dogs", b"small dogs", b"small dogs"]
            yield {"boxes": {"bbox": bbox, "chain": chain}, "phrases": phrases}

    rows = grounding.read_rows(Source())
    # The cat has no area, other dogs go by "dogs" too, and two people said "small dogs".
    expected = [("two dogs", 2), ("dogs", 2), ("dogs", 1), ("small dogs", 1), ("small dogs", 1)]
    assert [(row.phrase, len(row.boxes)) for row in rows] == expected
    found = np.array([[0.5, 0.5, 1, 1], [0, 0, 0.2, 0.2], [0.5, 0.5, 1, 1], *[[0.1, 0.1, 0.2, 0.2]] * 2])
    assert grounding.best_ious(rows, found).tolist() == [1, 1, 0, 1, 1]
    row, *_ = grounding.read_rows(Source(), merged=True)
    np.testing.assert_array_equal(row.boxes, [[0, 0, 1, 1]])


def test_intervals_hold_what_they_should():
    """Of many samples of phrases of images that agree, about 95 % of the intervals hold the true mean; treating phrases
    as independent would hold it far less often."""
    rng, held, narrow = np.random.default_rng(0), 0, 0
    groups = np.repeat(np.arange(60), 5)
    for seed in range(100):
        values = np.repeat(rng.uniform(size=60) < 0.4, 5).astype(float)
        low, high = boxes.interval(values, groups, seed)
        held += low <= 0.4 <= high
        low, high = boxes.interval(values, np.arange(300), seed)
        narrow += low <= 0.4 <= high
    assert 88 <= held <= 100 and narrow < 75


def test_the_report_draws_pictures(by_word, rectangles, tmp_path):
    from etils import epath

    folder, _ = rectangles
    shown = evaluate(grounding.Grounding(limit=2), folder)["pictures"]
    reporting.save_shown(epath.Path(tmp_path), 7, {"grounding": [shown]})
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 7, "loss": 1.0}) + "\n")
    page = reporting.write([epath.Path(tmp_path)], epath.Path(tmp_path / "report.html")).read_text()
    assert page.count("<figure>") == 2 and "green is right, red was found" in page and "IoU 1.00" in page


@pytest.mark.golden
def test_golden_evaluation_iou():
    golden = load_golden("xvlm", "xvlm_boxes.npz")
    a, b = (golden[f"in.eval_xywh{i}"].astype(np.float64) for i in (1, 2))
    size = 1 + max(x[:, i].max() + x[:, i + 2].max() for x in (a, b) for i in (0, 1))
    corners = [np.concatenate([x[:, :2], x[:, :2] + x[:, 2:]], axis=1) / size for x in (a, b)]
    assert_close(boxes.pixel_ious(*corners, (size, size)), golden["out.eval_iou"], 1e-6)


def test_an_overlap_of_a_pixel_is_none_in_refcocos_code():
    a, b = np.array([0.0, 0.0, 0.01, 0.5]), np.array([0.0, 0.0, 0.01, 0.4])
    assert boxes.ious(a, b) == pytest.approx(0.8) and boxes.pixel_ious(a, b, (50, 200)) == pytest.approx(0.8)
    assert boxes.pixel_ious(a, b, (50, 100)) == 0.0  # A pixel wide.
    assert boxes.ious(np.zeros(4), np.zeros(4)) == 0.0


def test_an_image_that_can_not_be_decoded(by_word, rectangles, monkeypatch):
    transform = grounding.Asked.transform

    def broken(self, example, uniforms):
        if example["rows"][0] == 3:
            raise BadImageError("broken")
        return transform(self, example, uniforms)

    monkeypatch.setattr(grounding.Asked, "transform", broken)
    with pytest.raises(UserError, match="has images that can't be decoded; prepare it again"):
        evaluate(grounding.Grounding(), rectangles[0])


@pytest.mark.golden
def test_golden_choice_of_detections():
    """Sums of the enlarged map in whole pixels over the root of the area, the best box, and accuracies by split."""
    from capvl.evals import detections
    from capvl.inference.grounding import candidates

    golden = load_golden("xvlm", "xvlm_task_gradcam.npz")
    maps, sizes = golden["out.gradcam"], golden["eval.sizes_hw"].tolist()
    grid, right = maps.shape[1:], []
    up = [bicubic(g, n) for g, n in zip(grid, sizes[0], strict=True)]
    assert_close(up[0] @ maps[0] @ up[1].T, golden["eval.mask0_upsampled"], 1e-5)
    for i, (height, width) in enumerate(sizes):
        found = detections.in_fractions(golden["eval.dets_xywh"][i].astype(np.float64), (height, width), "x")
        rows = candidates(found, (height, width), grid, slots=len(found) + 2)
        scores = np.einsum("yx,dy,dx,d->d", maps[i], rows["rows"], rows["columns"], rows["inverse_root"])
        assert_close(scores[: len(found)], golden["eval.det_scores"][i], 1e-5)
        assert rows["there"].sum() == len(found)
        x, y, w, h = golden["eval.ref_xywh"][i].astype(np.float64) / np.array([width, height, width, height])
        iou = boxes.pixel_ious(found[scores[: len(found)].argmax()], np.array([x, y, x + w, y + h]), (height, width))
        right.append(iou >= 0.5)
    # Splits in the file's order: val, testA, testB, val.
    found = [np.mean([right[0], right[3]]), right[1], right[2]]
    assert_close(found, golden["eval.acc_val_A_B"], 1e-6)


BAD = [
    (dict(method="boxes"), "Grounding has no method 'boxes'"),
    (dict(method="gradcam", layer=1), "cross-modal layers are 0 to 0"),
    (dict(split="test"), "test"),
    (dict(method="box", detections="{data_dir}/val.json"), "A box head finds boxes of its own"),
    (dict(method="itm", detections="{data_dir}/none.json"), "does not exist"),
    (dict(method="itm", detections="{data_dir}/train.json"), "lack 11 of 11 images of 'rectangles', split 'val'"),
    (dict(method="itm", detections="{data_dir}/flat.json"), "of image 'val0' should be one or more"),
    (dict(method="itm", detections="{data_dir}/list.json"), "should be a JSON object"),
    (dict(method="itm", detections="{data_dir}/large.json"), r"of image 'val0' lies outside of its 96x64 pixels"),
    (dict(method="itm", detections="{data_dir}/beyond.json"), r"of image 'val0' reaches far out of its 96x64 pixels"),
    (dict(limit=-1), "limit must not be negative"),
]


@pytest.mark.parametrize("options, sentence", BAD)
def test_what_can_not_be_grounded(by_word, rectangles, tmp_path, options, sentence):
    import pathlib

    folder, truth = rectangles
    rng, place = np.random.default_rng(1), pathlib.Path(folder)
    detected(truth, place / "val.json", rng)
    detected(truth, place / "train.json", rng, "train")
    (place / "flat.json").write_text(json.dumps({"val0": [1, 2, 3, 4]}))
    (place / "list.json").write_text("[[1, 2, 3, 4]]")
    (place / "beyond.json").write_text(json.dumps({f"val{i}": [[0, 0, 200, 200]] for i in range(11)}))
    (place / "large.json").write_text(json.dumps({f"val{i}": [[200, 2, 30, 4]] for i in range(11)}))
    with pytest.raises(UserError, match=sentence) as error:
        evaluate(grounding.Grounding(**options), folder)
    assert "\n" not in str(error.value)


def test_models_and_data_that_can_not(by_word, rectangles, tmp_path):
    folder, _ = rectangles
    for able, method, sentence in (
        (("TEXTS",), "", "needs a model with a matching head or boxes|needs a model with boxes or a matching head"),
        (("TEXTS", "MATCHES"), "box", "method='box' needs a model with boxes"),
        (("BOXES",), "gradcam", "method='gradcam' needs a model with a matching head"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate(grounding.Grounding(method=method), folder, SeeingOptions(able=able))
    weak = dataclasses.replace(SeeingOptions(), able=("TEXTS", "MATCHES"))
    assert (
        evaluate(grounding.Grounding(cells=8), folder, weak)["accuracy"] > 0.5
    )  # Grad-CAM where there is no box head.
    write_tar(tmp_path / "a.tar", [("0", {"png": _png(), "txt": b"no regions"})])
    corpus.prepare("plain", {"val": str(tmp_path / "a.tar")}, str(tmp_path), workers=1, filters=Filters(min_side=1))
    with pytest.raises(UserError, match="'plain' has no regions with phrases in its split 'val'"):
        evaluate(grounding.Grounding(name="plain"), str(tmp_path))


def _png():
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    return buffer.getvalue()
