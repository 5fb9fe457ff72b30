"""Images of evaluations among those to train on: refused, told, or asked for."""

import json

import pytest
from region_files import coco, make, picture, refs, report

from capvl.data import prepare
from capvl.data.preparing import region_sets
from capvl.errors import UserError


def test_leaks_must_be_named(tmp_path):
    files = coco(tmp_path)
    with pytest.raises(UserError, match="may be among those that RefCOCO.*--exclude=FILES.*--allow_leaks.*coco_style"):
        make(tmp_path, "set", "coco", {"train": files})
    with pytest.raises(UserError, match="contradict"):
        make(tmp_path, "set", "coco", {"train": files}, exclude=("own",), allow_leaks=True)
    assert not (tmp_path / "out/set").exists()
    # Evaluations themselves, and images that are not COCO's, need no word.
    assert report(make(tmp_path, "eval", "coco", {"val": files}), "val")["examples"] == 6
    assert report(make(tmp_path, "other", "objects365", {"train": files[:1]}))["examples"] == 6


def test_images_of_refcocos_validation_are_refused(tmp_path):
    files = coco(tmp_path)
    pair = refs(tmp_path, ["train", "val", "testA", "train", "test", "train"])
    folder = make(tmp_path, "named", "coco", {"train": files}, exclude=(pair[0],))
    told = report(folder)
    assert told["rejected"] == {"image of the evaluation refs.json": {"count": 3, "first": ["2", "3", "5"]}}
    assert told["examples"] == 3 and told["evaluations"] == ["refs.json"]
    assert report(make(tmp_path, "leaky", "coco", {"train": files}, allow_leaks=True))["examples"] == 6


def test_images_of_prepared_evaluations_are_refused(tmp_path):
    files = coco(tmp_path)
    pair = refs(tmp_path, ["train", "val", "testA", "train", "test", "train"])
    ref = make(tmp_path, "ref", "refcoco", {"all": pair}, exclude=("own",))
    assert [report(ref, s)["examples"] for s in ("train", "val", "testA", "test")] == [3, 1, 1, 1]
    for exclude in (("prepared",), ("own",)):
        told = report(make(tmp_path, f"c{exclude[0]}", "coco", {"train": files}, exclude=exclude))
        assert {k: v["count"] for k, v in told["rejected"].items()} == {
            f"image of the evaluation ref:{own}": 1 for own in ("val", "testA", "test")
        }


def test_an_image_in_two_splits(tmp_path):
    """RefCOCOg of Google's split has images in training and in validation, by other objects."""
    coco(tmp_path)
    pair = refs(tmp_path, ["train", "val", "train"])
    rows = json.loads((tmp_path / "refs.json").read_text())
    rows.append(rows[1] | {"ref_id": 9, "split": "train"})
    (tmp_path / "refs.json").write_text(json.dumps(rows))
    told = report(make(tmp_path, "g", "refcoco", {"all": pair}, exclude=("own",)))
    assert told["rejected"] == {"image of the evaluation val": {"count": 1, "first": ["2"]}}
    assert report(make(tmp_path, "all", "refcoco", {"all": pair}, allow_leaks=True))["examples"] == 3


def of_own(folder, *names):
    """Annotations in COCO's form of one's own pictures in a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture())
    images = [{"id": i, "file_name": name, "height": 30, "width": 40} for i, name in enumerate(names, 1)]
    boxes = [{"image_id": row["id"], "category_id": 1, "bbox": [1, 3, 16, 12]} for row in images]
    file = folder / f"{names[0].replace('/', '_')}.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "dog"}]}))
    return [str(file)]


def test_own_images_go_by_their_paths(tmp_path):
    """Frames of two films have the same names; the same file is the same image, whatever set it is in."""
    out, (a, b) = str(tmp_path / "out"), (tmp_path / "a", tmp_path / "b")

    def prepared(name, folder, **splits):
        return region_sets.prepare(name, "coco_style", splits, str(folder), out, workers=1)

    names = ["train/1.jpg", "train/2.jpg"]
    first = prepared("a", a, train=of_own(a, *names), val=of_own(a, "val/1.jpg", "val/2.jpg"))
    assert report(first)["examples"] == 2 and report(first)["rejected"] == {}
    assert report(prepared("b", b, train=of_own(b, "val/1.jpg", "train/2.jpg")))["examples"] == 2
    again = report(prepared("c", a, train=of_own(a, "val/1.jpg", "train/2.jpg")))
    assert again["rejected"] == {"image of the evaluation a:val": {"count": 1, "first": ["1"]}}


def test_visual_genomes_images_by_their_numbers_in_coco(tmp_path):
    coco(tmp_path)
    (tmp_path / "vg.json").write_text(
        json.dumps([{"image_id": i, "coco_id": c, "height": 30, "width": 40} for i, c in ((11, 2), (12, None))])
    )
    thing = {"object_id": 1, "x": 1, "y": 2, "w": 3, "h": 4, "names": ["dog"]}
    (tmp_path / "objects.json").write_text(json.dumps([{"image_id": i, "objects": [thing]} for i in (11, 12)]))
    for i in (11, 12):
        (tmp_path / f"images/{i}.jpg").write_bytes(picture())
    (tmp_path / "list.txt").write_text("COCO_val2014_000000000002.jpg\n")
    files = [str(tmp_path / "vg.json"), str(tmp_path / "objects.json")]
    told = report(make(tmp_path, "vg", "visual_genome", {"train": files}, exclude=(str(tmp_path / "list.txt"),)))
    assert told["rejected"] == {"image of the evaluation list.txt": {"count": 1, "first": ["11"]}}
    assert told["images whose number in COCO is unknown"] == 1
    line = {"image_rpath": "vg/11.jpg", "elems": [{"caption": "dog", "bb": [1, 2, 3, 4]}]}
    lines = [json.dumps(line), json.dumps(line | {"image_rpath": "vg/12.jpg"})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    options = {"exclude": (str(tmp_path / "list.txt"),)}
    for image_data, count in (("", 2), (files[0], 1)):
        lines_of = {"train": [str(tmp_path / "x.jsonl")]}
        told = report(make(tmp_path, f"x{count}", "xvlm", lines_of, image_data=image_data, **options))
        assert told["examples"] == count
    for bad in (str(tmp_path / "objects.json"), str(tmp_path / "x.jsonl")):
        with pytest.raises(UserError, match="is not"):
            make(tmp_path, "bad", "xvlm", lines_of, image_data=bad, **options)


def test_an_evaluation_that_was_trained_on_before_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    make(tmp_path, "before", "coco", {"train": coco(tmp_path)}, allow_leaks=True)
    pair = refs(tmp_path, ["val", "val"])
    folder = make(tmp_path, "ref", "refcoco", {"all": pair})
    assert report(folder, "val")["images that are trained on in"] == {"before": 2}
    prepare.print_report(folder)
    assert "IMAGES THAT before TRAINS ON" in capsys.readouterr().out
