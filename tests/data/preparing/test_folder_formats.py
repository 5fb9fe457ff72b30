"""YOLO's, Pascal VOC's and ODinW's folders, and GRIT's tars and tables, as they become records."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_tar
from region_files import picture, report

from capvl.data import prepare
from capvl.data.preparing import region_formats, region_sets
from capvl.data.preparing.regional import Annotated, Entity, Phrase, Rules
from capvl.data.reading import sources
from capvl.data.reading.classes import Category, categories
from capvl.data.reading.regions import DETECTION, FEATURES, crowds, regions
from capvl.errors import UserError


def read(format, *paths, split="all"):
    items, left, classes = region_formats.read(format, {split: list(map(str, paths))})
    reasons = {reason: n for rejected in left.values() for reason, (n, _) in rejected.items()}
    return items, reasons, classes


def make(tmp_path, name, format, splits, **options):
    return region_sets.prepare(name, format, splits, "", str(tmp_path / "out"), workers=1, **options)


def opened(tmp_path, name, split="train"):
    asked = ("image", "text", *FEATURES, *DETECTION)
    return sources.open_source(name, split, str(tmp_path / "out"), features=asked)


def write(root, files: dict):
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(value if isinstance(value, bytes) else value.encode())


YAML = "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: dog\n  2: 'no'\n  7: 5\n"
LABELS = ("2 0.5 0.5 0.5 0.5\n\n0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6\n7 1 1 .5 .5\n",
          "1 0.5 0.5 0.5 0.5\n0 20 15 8 6\n0 0.5 0.5 0.5\n0 nan 0 1 1\nx 0 0 1 1\n")  # fmt: skip


@pytest.fixture
def yolo(tmp_path):
    root = tmp_path / "set"
    images = {f"images/{place}.jpg": picture() for place in ("train/a", "train/b", "train/c", "train/sub/d", "val/a")}
    labels = {"labels/train/a.txt": LABELS[0], "labels/train/b.txt": LABELS[1], "labels/train/c.txt": " \n"}
    write(root, images | labels | {"labels/val/a.txt": "0 0.5 0.5 0.2 0.2\n", "data.yaml": YAML})
    return root


def test_yolo(tmp_path, yolo):
    folder = make(tmp_path, "y", "yolo", {"all": [str(yolo / "data.yaml")]})
    assert report(folder)["rejected"] == {"no region": {"count": 1, "first": ["b"]}}
    assert {k: v["count"] for k, v in report(folder, "all")["rejected"].items()} == {
        "category id unknown": 1, "box is in pixels, and YOLO has fractions": 1, "box is not of numbers": 1,
        "row should be a class with four numbers or a polygon": 2}  # fmt: skip
    assert report(folder)["changed"] == {"box cut at the image's edge": {"count": 1, "first": ["a, region 2"]}}
    source = opened(tmp_path, "y")
    assert categories(source) == [Category("dog", "0"), Category("no", "2"), Category("5", "7")]
    first, *empty = (regions(source[i]) for i in range(len(source)))
    boxes = [(0.25, 0.25, 0.75, 0.75), (0.1, 0.2, 0.3, 0.6), (0.75, 0.75, 1, 1)]
    np.testing.assert_allclose([r.box for r in first], boxes, rtol=1e-6)
    assert [(r.category, r.label) for r in first] == [("no", 1), ("dog", 0), ("5", 2)]
    # One has an empty file of labels, and one has none; of the one whose rows are all bad nothing is known.
    assert empty == [[], []]
    # Two images of one name in two folders are two images.
    assert len(opened(tmp_path, "y", "val")) == 1


def test_yolo_lists_and_names(tmp_path, yolo):
    write(
        yolo,
        {"data.yaml": "train: [list.txt]\nnames: [dog, cat, emu]\nnc: 3\n", "list.txt": "./images/train/a.jpg\n\n"},
    )
    items, reasons, classes = read("yolo", yolo, split="train")
    assert list(classes) == ["dog", "cat", "emu"] and reasons == {"category id unknown": 1}
    assert [e.category for e in items["train"][0].entities] == ["emu", "dog"]
    write(yolo, {"data.yaml": "train: ../images/train\nnames: [dog, dog, emu]\nkpt_shape: [2, 2]\n",
                 "labels/train/a.txt": "0 0.5 0.5 0.2 0.2 0 0 0 0\n"})  # fmt: skip
    items, reasons, classes = read("yolo", yolo / "data.yaml", split="train")
    assert reasons["category name is there twice"] == 1 and list(classes) == ["dog", "emu"]
    np.testing.assert_allclose(items["train"][0].entities[0].boxes, [(0.4, 0.4, 0.6, 0.6)])


YOLO_ERRORS = {
    "train: x\nnames: [a]\n": "names the images 'x', which are neither there",
    "train: images/train\n": "names should be a list of classes",
    "train: images/train\nnames: [yes, no]\n": "class 0 is called True, which should be a text; YAML needs quotes",
    "train: images/train\nnames: {a: 0}\n": "names has 'a' where a number of a class should be",
    "train: images/train\nnames: [a]\nnc: 2\n": "nc is 2, and there are 1 names",
    "train: images/bare\nnames: [a]\n": "none of the 1 images of train has labels, such as",
    "train: images/none\nnames: [a]\n": "train of .* has no images in 'images/none'",
    "train: {a: b}\nnames: [a]\n": "where a folder of images should be",
    "test: images/train\nnames: [a]\n": "says no train",
    "- a\n": "should say names, train and val",
    "a: [\n": "is not YAML",
}


@pytest.mark.parametrize("text", YOLO_ERRORS)
def test_yolo_errors(yolo, text):
    write(yolo, {"data.yaml": text, "images/bare/x.jpg": picture(), "images/none/x.txt": ""})
    with pytest.raises(UserError, match=YOLO_ERRORS[text]):
        read("yolo", yolo, split="train")


def xml(*things, size=(40, 30), more="") -> str:
    rows = "".join(
        f"<object><name>{name}</name><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        f"<difficult>{difficult}</difficult><bndbox>"
        + "".join(f"<{side}>{v}</{side}>" for side, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False))
        + "</bndbox></object>"
        for name, difficult, box in things
    )
    return (f"<annotation><!-- drawn --><filename>x.jpg</filename><size><width>{size[0]}</width>"
            f"<height>{size[1]}</height></size>{more}{rows}</annotation>")  # fmt: skip


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2007"
    drawn = {"Annotations/1.xml": xml(("dog", 0, (1, 1, 40, 30)), ("cat", 1, (5, 4, 20.5, 9))),
             "Annotations/2.xml": xml(),
             "Annotations/3.xml": xml(("cat", 0, (5, 4, 20)), size=(0, 0)),
             "Annotations/4.xml": xml(("ant", 0, (5, 4, 20, 9)))}  # fmt: skip
    images = {f"JPEGImages/{i}.jpg": picture() for i in (1, 2, 3)} | {"JPEGImages/4.png": picture(kind="PNG")}
    lists = {"train.txt": "1\n2\n3\n9\n", "val.txt": "4 \n", "dog_train.txt": "1 1\n2 -1\n"}
    write(root, drawn | images | {f"ImageSets/Main/{name}": text for name, text in lists.items()})
    return root


def test_voc(tmp_path, voc):
    folder = make(tmp_path, "v", "voc", {"all": [str(voc)]})
    assert report(folder)["rejected"] == {"no region": {"count": 1, "first": ["3"]}}
    told = {k: v["count"] for k, v in report(folder, "all")["rejected"].items()}
    assert told == {"object without a name or a bndbox of four numbers": 1, "image in no region file": 1}
    train = opened(tmp_path, "v")
    # By the alphabet, whatever file comes first and whatever split it is in.
    assert [row.name for row in categories(train)] == ["ant", "cat", "dog"]
    (dog,), (cat,) = regions(train[0]), crowds(train[0])
    assert (dog.box, dog.label) == ((0, 0, 1, 1), 2)  # Pixels 1 to 40 of 40.
    np.testing.assert_allclose(cat.box, (4 / 40, 3 / 30, 20.5 / 40, 9 / 30), rtol=1e-6)
    assert (len(train), regions(train[1]), crowds(train[1])) == (2, [], [])
    assert [r.category for r in regions(opened(tmp_path, "v", "val")[0])] == ["ant"]


def test_voc_lists_and_flat_folders(tmp_path, voc):
    items, _, _ = read("voc", voc, "train.txt", split="val")
    assert [item.id for item in items["val"]] == ["1", "2", "3"]
    for listed, words in (("none.txt", "has no none.txt, but dog_train.txt, train.txt, val.txt"),
                          ("dog_train.txt", "is a class's list")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read("voc", voc, listed, split="train")
    with pytest.raises(UserError, match="has no test.txt, but"):
        read("voc", voc, split="test")
    flat = tmp_path / "flat"
    write(flat, {"a.xml": xml(("dog", 0, (1, 1, 40, 30))), "a.jpeg": picture()})
    items, _, _ = read("voc", flat, split="train")
    whole = Entity(((0.0, 0.0, 40.0, 30.0),), category="dog")
    assert items["train"] == [Annotated(str(flat / "a.jpeg"), "a", "", (30, 40), (), (whole,), searched=True)]
    with pytest.raises(UserError, match="has no ImageSets/Main that says which split is whose"):
        read("voc", flat)
    for bad in ("<a>", xml(more='<!DOCTYPE a [<!ENTITY b "c">]>')):
        write(flat, {"a.xml": bad})
        with pytest.raises(UserError, match="is no annotation of Pascal VOC"):
            read("voc", flat, split="train")
    with pytest.raises(UserError, match="has no .xml"):
        read("voc", voc / "JPEGImages", split="train")
    with pytest.raises(UserError, match="does not exist"):
        read("voc", voc / "none", split="train")


def roboflow(names, category=1) -> str:
    kinds = [{"id": 0, "name": "fishes", "supercategory": "none"}]
    kinds += [{"id": i, "name": name, "supercategory": "fishes"} for i, name in enumerate(("shark", "ray"), 1)]
    images = [{"id": i, "file_name": name, "height": 30, "width": 40} for i, name in enumerate(names)]
    boxes = [{"image_id": 0, "category_id": category, "bbox": [4, 3, 20, 15]}]
    return json.dumps({"images": images, "annotations": boxes, "categories": kinds})


def test_odinw(tmp_path):
    root, file = tmp_path / "Aquarium", "_annotations.coco.json"
    write(root, {f"{split}/{name}.jpg": picture() for split in ("train", "valid") for name in "ab"})
    write(root, {f"train/{file}": roboflow(("a.jpg", "b.jpg")), f"valid/{file}": roboflow(("a.jpg", "b.jpg"), 2)})
    folder = make(tmp_path, "aquarium", "odinw", {"all": [str(root)]})
    train, val = opened(tmp_path, "aquarium"), opened(tmp_path, "aquarium", "val")
    # The set's own name is no class; images of one name in two folders are two images.
    assert categories(train) == categories(val) == [Category("shark", "1"), Category("ray", "2")]
    assert [len(regions(train[i])) for i in range(len(train))] == [1, 0]
    assert (regions(train[0])[0].category, regions(val[0])[0].category) == ("shark", "ray")
    assert report(folder)["rejected"] == {}
    other = roboflow(("b.jpg",)).replace("shark", "whale")
    write(root, {"valid/annotations_without_background.json": other})
    items, _, classes = read("odinw", root, split="val")
    assert [item.image for item in items["val"]] == [f"{root}/valid/b.jpg"] and list(classes) == ["whale", "ray"]
    write(tmp_path / "export", {"val_annotations_without_background.json": other})
    assert read("odinw", tmp_path / "export")[0]["val"][0].image == f"{tmp_path}/export/b.jpg"
    with pytest.raises(UserError, match="has no test with _annotations.coco.json"):
        read("odinw", root, split="test")


CAPTION = " a wet dog and a cat"
CHUNKS = [[1, 10, 0.1, 0.2, 0.5, 0.6, 0.9], [15, 20, 0.5, 0.5, 0.9, 0.9, 0.66], [3.0, 10, 0.1, 0.2, 0.5, 0.6, 0.7]]
REFS = [[1, 20, 0.1, 0.2, 0.5, 0.6, 0.9]]


def test_grit(tmp_path):
    row = {"caption": CAPTION, "noun_chunks": CHUNKS, "ref_exps": REFS, "width": 999, "height": 9, "key": "000010001"}
    other = {**row, "noun_chunks": [[0, 99, 0, 0, 1, 1, 0.9], [0, 5, 0, 0, 1, 1]], "key": "000010002"}
    samples = [
        (value["key"], {"jpg": picture(), "txt": b"x", "json": json.dumps(value).encode()}) for value in (row, other)
    ]
    samples += [("000010003", {"json": json.dumps(row).encode()}), ("000010004", {"jpg": picture()})]
    write_tar(tmp_path / "0.tar", samples)
    folder = make(tmp_path, "g", "grit", {"train": [str(tmp_path / "0.tar")]})
    told = {k: v["count"] for k, v in report(folder)["rejected"].items()}
    assert told == {"no JSON": 1, "no image": 1, "noun_chunks should be rows of seven numbers": 1}
    source = opened(tmp_path, "g")
    assert source[0]["text"] == [CAPTION.encode()] and source[0]["image"] == picture()
    dog, cat = regions(source[0])
    # What several phrases have is one box; characters are counted in the caption as it stands.
    assert dog.phrases == ("a wet dog", CAPTION[1:], "wet dog") and cat.spans == ((0, 15, 20),)
    assert dog.spans == ((0, 1, 10), (0, 1, 20), (0, 3, 10))
    np.testing.assert_allclose(dog.box, (0.1, 0.2, 0.5, 0.6), rtol=1e-6)
    surer = make(tmp_path, "h", "grit", {"train": [str(tmp_path / "0.tar")]}, rules=Rules(min_score=0.8))
    assert report(surer)["rejected"]["score below --min_score"]["count"] == 1 and report(surer)["boxes"] == 1
    with pytest.raises(UserError, match="--min_score must be between 0 and 1"):
        make(tmp_path, "i", "grit", {"train": [str(tmp_path / "0.tar")]}, rules=Rules(min_score=50))


def test_grit_tables(tmp_path):
    rows = {"caption": [CAPTION], "noun_chunks": [json.dumps(CHUNKS[1:2])], "ref_exps": [[]], "id": [17], "url": ["u"]}
    rows["noun_chunks"] = [CHUNKS[1:2]]
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    items, _, _ = read("grit", tmp_path / "a.parquet", split="train")
    cat = Entity(((0.5, 0.5, 0.9, 0.9),), (Phrase("a cat", 0, 15, 20),), scores=(0.66,))
    assert items["train"] == [Annotated("17", "17", "", None, (CAPTION,), (cat,), True)]
    pyarrow.parquet.write_table(pyarrow.table({"caption": ["x"]}), tmp_path / "b.parquet")
    (tmp_path / "c.tar").write_bytes(b"x" * 600)
    pyarrow.parquet.write_table(pyarrow.table({**rows, "caption": [" "]}), tmp_path / "d.parquet")
    for name, words in (("b.parquet", "has no column 'noun_chunks'"), ("c.tar", "as a tar without compression"),
                        ("d.parquet", "row 0 of d.parquet: caption should not be empty"),
                        ("none.parquet", "can't be read as parquet")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            read("grit", tmp_path / name, split="train")


def test_captions_with_a_blank_in_front_keep_their_characters(tmp_path):
    value = {"images": [{"id": 1, "file_name": "a.jpg", "caption": CAPTION, "height": 30, "width": 40}],
             "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4], "tokens_positive": [[1, 10]]}]}  # fmt: skip
    write(tmp_path, {"m.json": json.dumps(value)})
    items, _, _ = read("mdetr", tmp_path / "m.json", split="train")
    assert items["train"][0].entities[0].phrases == (Phrase("a wet dog", 0, 1, 10),)


def test_the_command(tmp_path, yolo, capsys):
    arguments = ["regions", "--name=y", "--format=yolo", f"--all={yolo}", f"--data_dir={tmp_path}/out", "--workers=1"]
    prepare.main([*arguments, "--min_score=0.5"])
    assert "rejected" in capsys.readouterr().out
    assert opened(tmp_path, "y")[0]["image"] == picture()
