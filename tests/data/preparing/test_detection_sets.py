"""What detection needs of region data sets: crowds, areas, what was looked for, images without boxes, classes' ids."""

import json
import pathlib

import numpy as np
import pytest
from region_files import make, picture, report

from capvl.data import tokenizer
from capvl.data.preparing import look, region_formats
from capvl.data.reading import sources
from capvl.data.reading.classes import Category, categories
from capvl.data.reading.regions import DETECTION, FEATURES, Region, crowds, looked_for, regions
from capvl.data.text.tokenizers import SubwordTokenizer
from capvl.errors import UserError

ASKED = ("image", "image_id", "classes?", *FEATURES, *DETECTION)
LVIS = {
    "images": [
        {"id": 1, "coco_url": "http://images.cocodataset.org/val2017/000000000001.jpg", "height": 30, "width": 40,
         "neg_category_ids": [7, 2], "not_exhaustive_category_ids": [4]},
        {"id": 2, "coco_url": "http://images.cocodataset.org/train2017/000000000002.jpg", "height": 30, "width": 40,
         "neg_category_ids": [4, 99], "not_exhaustive_category_ids": []},
    ],
    "categories": [
        {"id": 7, "name": "bow_(weapon)", "frequency": "r", "def": "for arrows", "synonyms": ["bow", "longbow"]},
        {"id": 2, "name": "aerosol_can", "frequency": "c"}, {"id": 4, "name": "cat", "frequency": "f"}],
    "annotations": [{"image_id": 1, "category_id": 4, "bbox": [4, 3, 20, 15], "area": 120.5}],
}  # fmt: skip


def images(tmp_path, *names):
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(picture())


def opened(tmp_path, name, split="val"):
    return sources.open_source(name, split, str(tmp_path / "out"), features=ASKED)


def written(tmp_path, value, name="a.json") -> list[str]:
    (tmp_path / name).write_text(json.dumps(value))
    return [str(tmp_path / name)]


def test_lvis(tmp_path):
    images(tmp_path, "val2017/000000000001.jpg", "train2017/000000000002.jpg")
    folder = make(tmp_path, "lvis", "lvis", {"val": written(tmp_path, LVIS)})
    assert report(folder, "val")["rejected"] == {"category id unknown": {"count": 1, "first": ["image 2"]}}
    source = opened(tmp_path, "lvis")
    first, second = source[0], source[1]
    (cat,) = regions(first)
    np.testing.assert_allclose(cat.box, (0.1, 0.1, 0.6, 0.6), rtol=1e-6)
    assert (cat.label, cat.category, cat.area) == (2, "cat", 120.5)
    assert looked_for(first) == (("bow_(weapon)", "aerosol_can"), ("cat",))
    # Nothing of what was looked for is in the second image: it is an example all the same.
    assert regions(second) == [] and looked_for(second) == (("cat",), ())
    assert first["classes"] == ("bow_(weapon)", "aerosol_can", "cat")
    assert categories(source) == [
        Category("bow_(weapon)", "7", "r", "for arrows", ("bow", "longbow")),
        Category("aerosol_can", "2", "c"),
        Category("cat", "4", "f"),
    ]


def test_lvis_without_what_was_looked_for(tmp_path):
    rows = [{k: v for k, v in row.items() if "category" not in k} for row in LVIS["images"]]
    with pytest.raises(UserError, match="no image has neg_category_ids"):
        region_formats.read("lvis", {"val": written(tmp_path, LVIS | {"images": rows})})


def coco(ids=(0, 5), **annotation):
    rows = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 30, "width": 40} for i in (1, 2, 3)]
    kinds = [{"id": i, "name": name} for i, name in zip(ids, ("dog", "cat"), strict=True)]
    boxes = [{"image_id": 1, "category_id": ids[1], "bbox": [4, 3, 20, 15], "area": 77, "iscrowd": 0},
             {"image_id": 1, "category_id": ids[0], "bbox": [0, 0, 40, 30], "area": 900, "iscrowd": 1},
             {"image_id": 2, "category_id": 66, "bbox": [4, 3, 20, 15]} | annotation]  # fmt: skip
    return {"images": rows, "annotations": boxes, "categories": kinds}


@pytest.mark.parametrize("ids", [(0, 1), (5, 3), (90, 0)])
def test_ids_crowds_and_images_without_boxes(tmp_path, ids):
    images(tmp_path, *(f"{i:012d}.jpg" for i in (1, 2, 3)))
    folder = make(tmp_path, "set", "coco", {"val": written(tmp_path, coco(ids))})
    told = report(folder, "val")
    assert (told["examples"], told["boxes"], told["crowds"]) == (2, 1, 1)
    # The second image has something of a class that is unknown: it is none without anything.
    assert {reason: n["count"] for reason, n in told["rejected"].items()} == {"category id unknown": 1, "no region": 1}
    source = opened(tmp_path, "set")
    first, empty = source[0], source[1]
    assert [(r.category, r.label, r.area) for r in regions(first)] == [("cat", 1, 77.0)]
    assert crowds(first) == [Region((0.0, 0.0, 1.0, 1.0), (), 0, "dog", area=900.0)]
    assert (empty["image_id"], regions(empty), crowds(empty), looked_for(empty)) == (b"3", [], [], None)
    assert categories(source) == [Category("dog", str(ids[0])), Category("cat", str(ids[1]))]


def test_classes_of_two_files(tmp_path):
    images(tmp_path, *(f"{i:012d}.jpg" for i in (1, 2, 3)))
    files = {"val": written(tmp_path, coco((1, 2))), "test": written(tmp_path, coco((1, 3)), "b.json")}
    make(tmp_path, "set", "coco", files)
    # What two files tell differently is told by none.
    assert categories(opened(tmp_path, "set")) == [Category("dog", "1"), Category("cat")]


def test_names_that_head_a_set(tmp_path):
    kinds = [{"id": 0, "name": "creatures", "supercategory": "none"},
             {"id": 1, "name": "fish", "supercategory": "creatures"},
             {"id": 2, "name": "fish", "supercategory": "creatures"}, {"id": 2, "name": "fish"}]  # fmt: skip
    value = coco((1, 2)) | {"categories": kinds}
    _, left, classes = region_formats.read("objects365", {"val": written(tmp_path, value)})
    assert list(classes) == ["fish"]
    assert {k: n for k, (n, _) in left["val"].items()} == {
        "category is the name of the whole set": 1, "category name is there twice": 1, "category id is there twice": 1,
        "category id unknown": 1}  # fmt: skip
    other = value | {"categories": [*kinds, {"id": 1, "name": "x"}]}
    with pytest.raises(UserError, match="category id 1 is there twice, as 'fish' and 'x'"):
        region_formats.read("objects365", {"val": written(tmp_path, other, "other.json")})
    value["annotations"][0]["category_id"] = 0
    _, _, classes = region_formats.read("objects365", {"val": written(tmp_path, value)})
    assert list(classes) == ["creatures", "fish"]  # It has a box: it is a class.


def test_a_prepared_set_is_prepared_again(tmp_path):
    images(tmp_path, "val2017/000000000001.jpg", "train2017/000000000002.jpg")
    make(tmp_path, "lvis", "lvis", {"val": written(tmp_path, LVIS)})
    make(tmp_path, "again", "prepared", {"val": ["lvis"]})
    ours, theirs = opened(tmp_path, "again"), opened(tmp_path, "lvis")
    assert len(ours) == len(theirs) == 2 and categories(ours) == categories(theirs)
    for i in range(2):
        assert regions(ours[i]) == regions(theirs[i]) and looked_for(ours[i]) == looked_for(theirs[i])


def test_records_from_before_have_none_of_it():
    rows = {"bbox": [[0, 0, 1, 1]], "chain": [b"0"], "label": [0], "category": [b"dog"]}
    record = {"boxes": rows, "phrases": {"chain": [], "phrase": []}}
    assert regions(record) == [Region((0.0, 0.0, 1.0, 1.0), (), 0, "dog")] and regions(record)[0].area == -1
    assert crowds(record) == [] and looked_for(record) is None


def test_crowds_of_tfds():
    rows = {"bbox": [[0, 0, 1, 1], [0, 0, 0.5, 0.5]], "label": [3, 4], "is_crowd": [True, False], "area": [9, 4]}
    assert crowds({"objects": rows}) == [Region((0.0, 0.0, 1.0, 1.0), (), 3, area=9.0)]
    assert regions({"objects": rows}) == [Region((0.0, 0.0, 0.5, 0.5), (), 4, area=4.0)]
    assert crowds({"objects": {"bbox": [[0, 0, 1, 1]], "phrase": ["x"]}}) == []


def test_images_without_anything_as_odvg(tmp_path):
    images(tmp_path, *(f"{i:012d}.jpg" for i in (1, 2, 3)))
    value = coco()
    value["annotations"][1]["image_id"] = 2  # A crowd is neither a thing nor nothing.
    make(tmp_path, "set", "coco", {"val": written(tmp_path, value)})
    counts = look.write_odvg("set", "val", str(tmp_path / "o.jsonl"), str(tmp_path / "out"))
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert counts == {"detection": 2, "grounding": 0}
    assert [len(line["detection"]["instances"]) for line in found] == [1, 0]
    make(tmp_path, "back", "odvg", {"val": [str(tmp_path / "o.jsonl"), str(tmp_path / "o.jsonl.labels.json")]})
    back = opened(tmp_path, "back")
    assert [len(regions(back[i])) for i in range(len(back))] == [1, 0]


def test_a_page_shows_crowds(tmp_path):
    """In grey, with what they are of in brackets."""
    images(tmp_path, *(f"{i:012d}.jpg" for i in (1, 2, 3)))
    make(tmp_path, "set", "coco", {"val": written(tmp_path, coco((1, 2)))})
    page, sheet = look.look("set", "val", 2, str(tmp_path / "page.html"), str(tmp_path / "out"))
    text = pathlib.Path(page).read_text()
    assert "1 boxes and 1 crowds" in text and "0 boxes<" in text
    assert '<td style="background:rgb(128, 128, 128)">&nbsp;</td><td>–</td><td>dog (0)</td><td>crowd</td>' in text
    record = opened(tmp_path, "set")[0]
    with_, without = (look.picture_of(record, regions(record), own) for own in (crowds(record), []))
    grey = (np.abs(with_.astype(int) - 128) < 3).all(axis=2)
    assert grey[:, 0].mean() > 0.9 and (np.abs(without.astype(int) - 128) < 3).all(axis=2)[:, 0].mean() < 0.2


def test_a_tokenizer_of_names_of_boxes(tmp_path, capsys):
    """Where there are no captions. Every class is a word, with boxes in this split or not, and so is what stands
    between classes in a prompt."""
    images(tmp_path, *(f"{i:012d}.jpg" for i in (1, 2, 3)))
    values, out = coco((1, 2)), tmp_path / "words.txt"
    values["categories"].append({"id": 3, "name": "hair drier"})
    make(tmp_path, "set", "coco", {"val": written(tmp_path, values)})
    arguments = ["--data=set", f"--data_dir={tmp_path}/out", "--vocab=200", "--kind=wordpiece", f"--out={out}"]
    tokenizer.main([*arguments, "--split=val"])
    assert "pieces from 2 examples" in capsys.readouterr().out
    read = SubwordTokenizer(out)
    assert read.decode(read("cat. dog. hair drier", 32)) == "cat. dog. hair drier"
    assert 1 not in read("cat. dog. hair drier", 32)  # [UNK]
    # Images without a box say nothing of it.
    boxes = written(tmp_path, values, "boxes.json")
    make(tmp_path, "none", "coco", {"val": written(tmp_path, values | {"annotations": []}), "dev": boxes})
    with pytest.raises(UserError, match="'val' of 'none' has neither captions nor names of boxes to learn from"):
        tokenizer.main([*arguments, "--split=val", "--data=none"])
