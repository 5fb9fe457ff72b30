"""Annotation files of regions: each format from a file of its own form, and what of it is left out."""

import json

import pytest

from capvl.data.preparing import leaks, region_formats
from capvl.data.preparing.groundings import unmarked
from capvl.data.preparing.regional import Annotated, Entity, Phrase
from capvl.errors import UserError

XML = """<annotation><filename>11.jpg</filename><size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>7</name><name>8</name><bndbox><xmin>3</xmin><ymin>2</ymin><xmax>20</xmax><ymax>11</ymax></bndbox></object>
<object><name>7</name><bndbox><xmin>21</xmin><ymin>2</ymin><xmax>30</xmax><ymax>11</ymax></bndbox></object>
<object><name>9</name><scene>1</scene><nobndbox>1</nobndbox></object></annotation>"""
DOG = "a man and a dog"
CASES = {
    "coco": (
        [{"images": [{"id": 7, "file_name": "a.jpg", "height": 30, "width": 40}, {"id": 8, "file_name": "b.jpg"},
                     {"id": 10, "file_name": "c.jpg"}],
          "categories": [{"id": 90, "name": "dog"}, {"id": 3, "name": "cat"}],
          "annotations": [{"image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 20], "iscrowd": 0},
                          {"image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 20], "iscrowd": 1},
                          {"image_id": 7, "category_id": 4, "bbox": [1, 2, 10, 20]},
                          {"image_id": 9, "category_id": 3, "bbox": [1, 2, 10, 20]},
                          {"image_id": 7, "category_id": 3, "bbox": [1, 2, 10]},
                          {"image_id": 10, "category_id": 4, "bbox": [1, 2, 10, 20]}]},
         {"images": [], "annotations": [{"image_id": 7, "caption": "one "}, {"image_id": 9, "caption": "x"}]}],
        [("val", Annotated("a.jpg", "7", "7", (30, 40), ("one",), (Entity(((1, 2, 11, 22),), category="cat"),),
                           crowds=(Entity(((1, 2, 11, 22),), category="cat"),))),
         ("val", Annotated("b.jpg", "8", "8", searched=True)), ("val", Annotated("c.jpg", "10", "10"))],
        {"category id unknown": 2, "annotation of an unknown image": 1,
         "caption of an unknown image": 1, "bbox should be four numbers": 1},
    ),
    "objects365": (
        [{"images": [{"id": 7, "file_name": "p/a.jpg", "height": 30, "width": 40}],
          "categories": [{"id": 1, "name": "dog"}],
          "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1.5, 2, 10, 20]}]}],
        [("val", Annotated("p/a.jpg", "7", "", (30, 40), (), (Entity(((1.5, 2, 11.5, 22),), category="dog"),),
                           searched=True))],
        {},
    ),
    "openimages": (
        ["/m/1,Dog\n/m/2,Cat\n",
         "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf\n"
         "ab,x,/m/1,1,0.1,0.5,0.2,0.9,0\nab,x,/m/2,1,0.1,0.5,0.2,0.9,1\nab,x,/m/3,1,0,1,0,1,0\n"
         "ab,x,/m/1,1,1,300,2,200,0\nab,x,/m/1,1,a,1,0,1,0\n",
         "XMin,YMin,XMax,YMax,LabelName,ImageID\n0,0,1,1,/m/2,ab\n0,0,1,1,/m/2,cd\n0,0,1\n",
         "ImageID,Source,LabelName,Confidence\ncd,verification,/m/1,0\ncd,x,/m/2,1\nef,x,/m/1,0\ncd,x,/m/9,0\n"],
        [("val", Annotated("ab", "ab", "", None, (), (Entity(((0.1, 0.2, 0.5, 0.9),), category="Dog"),
                                                      Entity(((0, 0, 1, 1),), category="Cat")), True,
                           searched=True, crowds=(Entity(((0.1, 0.2, 0.5, 0.9),), category="Cat"),))),
         ("val", Annotated("cd", "cd", "", None, (), (Entity(((0, 0, 1, 1),), category="Cat"),), True,
                           negative=("Dog",)))],
        {"category id unknown": 2, "box is in pixels, and OpenImages has fractions": 1,
         "box is not of numbers": 1, "row has more or fewer columns than the heading": 1},
    ),
    "visual_genome": (
        [[{"image_id": 5, "coco_id": 42, "height": 30, "width": 40},
          {"image_id": 6, "coco_id": None, "height": 30, "width": 40}],
         [{"image_id": 5, "objects": [{"object_id": 1, "x": 1, "y": 2, "w": 3, "h": 4, "names": ["dog", "hound"]}]}],
         [{"id": 5, "regions": [{"region_id": 1, "x": 0, "y": 0, "width": 9, "height": 9, "phrase": "a wet dog"}]},
          {"id": 77, "regions": []}],
         [{"image_id": 5, "attributes": [{"object_id": 1, "x": 1, "y": 2, "w": 3, "h": 4, "names": ["dog"],
                                          "attributes": ["Wet ", "brown", "wet"]},
                                         {"object_id": 2, "x": 5, "y": 5, "w": 1, "h": 1, "names": ["sky"]}]}]],
        [("val", Annotated("5.jpg", "5", "42", (30, 40), (), (
            Entity(((1, 2, 4, 6),), (Phrase("dog"), Phrase("hound")), "dog", ("wet", "brown")),
            Entity(((5, 5, 6, 6),), (Phrase("sky"),), "sky"),
            Entity(((0, 0, 9, 9),), (Phrase("a wet dog"),))))),
         ("val", Annotated("6.jpg", "6", "", (30, 40)))],
        {"annotation of an unknown image": 1},
    ),
    "refcoco": (
        [[{"ref_id": 1, "ann_id": 10, "image_id": 7, "split": "train", "category_id": 1, "sentences": [
              {"raw": "The Dog", "sent": "the dog"}, {"raw": "it"}]},
          {"ref_id": 2, "ann_id": 11, "image_id": 8, "split": "testA", "sentences": [{"sent": "cat"}]},
          {"ref_id": 3, "ann_id": 10, "image_id": 8, "split": "val", "sentences": [{"sent": "cat"}]},
          {"ref_id": 4, "ann_id": 10, "image_id": 7, "split": "train", "sentences": []}],
         {"images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "height": 30, "width": 40},
                     {"id": 8, "file_name": "COCO_train2014_000000000008.jpg", "height": 30, "width": 40}],
          "annotations": [{"id": 10, "image_id": 7, "bbox": [1, 2, 3, 4]},
                          {"id": 11, "image_id": 8, "bbox": [1, 2, 3, 4]}]}],
        [("train", Annotated("COCO_train2014_000000000007.jpg", "7", "7", (30, 40), (),
                             (Entity(((1, 2, 4, 6),), (Phrase("the dog"), Phrase("it"))),))),
         ("testA", Annotated("COCO_train2014_000000000008.jpg", "8", "8", (30, 40), (),
                             (Entity(((1, 2, 4, 6),), (Phrase("cat"),)),)))],
        {"ref of an unknown annotation": 1, "ref without a sentence": 1},
    ),
    "mdetr": (
        [{"images": [{"id": 1, "file_name": "11.jpg", "caption": DOG, "height": 30, "width": 40},
                     {"id": 2, "file_name": "11.jpg", "caption": "two dogs", "height": 30, "width": 40},
                     {"id": 3, "file_name": "COCO_train2014_000000000042.jpg", "caption": "left cat",
                      "dataset_name": "refcoco+"}],
          "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4], "tokens_positive": [[0, 5]]},
                          {"image_id": 1, "bbox": [5, 6, 3, 4], "tokens_positive": [[0, 5]]},
                          {"image_id": 2, "bbox": [1, 1, 1, 1], "tokens_positive": [[0, 3], [4, 8]]},
                          {"image_id": 3, "bbox": [0, 0, 2, 2], "tokens_positive": [[0, 8]]},
                          {"image_id": 9, "bbox": [0, 0, 2, 2], "tokens_positive": [[0, 8]]}]}],
        [("val", Annotated("11.jpg", "11", "", (30, 40), (DOG, "two dogs"), (
            Entity(((1, 2, 4, 6), (5, 6, 8, 10)), (Phrase("a man", 0, 0, 5),)),
            Entity(((1, 1, 2, 2),), (Phrase("two", 1, 0, 3), Phrase("dogs", 1, 4, 8)))))),
         ("val", Annotated("COCO_train2014_000000000042.jpg", "COCO_train2014_000000000042", "42", None, (),
                           (Entity(((0, 0, 2, 2),), (Phrase("left cat"),)),)))],
        {"annotation of an unknown image": 1},
    ),
    "xvlm_refcoco": (
        [[{"image": "train2014/COCO_train2014_000000000042.jpg", "text": "left cat", "bbox": [0, 0, 2, 2]},
          {"image": "train2014/COCO_train2014_000000000042.jpg", "text": "it"}]],
        [("val", Annotated("train2014/COCO_train2014_000000000042.jpg", "COCO_train2014_000000000042", "42", None, (),
                           (Entity(((0, 0, 2, 2),), (Phrase("left cat"),)),)))],
        {"bbox is missing": 1},
    ),
    "odvg": (
        ['{"filename": "a.jpg", "height": 30, "width": 40, "detection": {"instances": ['
         '{"bbox": [1, 2, 4, 6], "label": 1, "category": "cat"}, {"bbox": [1, 2, 4, 6], "label": 1, "category": "d"},'
         '{"bbox": [0.1, 0.2, 0.4, 0.6], "label": 0, "category": "dog"}, '
         '{"bbox": [0, 0, 1, 1], "label": 0, "category": "dog"}]}}\n'
         '{"filename": "a.jpg", "height": 30, "width": 40, "grounding": {"caption": "A man and a dog and a dog", '
         '"regions": [{"bbox": [1, 2, 4, 6], "phrase": "a man"}, {"bbox": [[0, 0, 4, 6], [9, 9, 12, 12]], '
         '"phrase": ["a dog", "cat"]}, {"bbox": [2, 2, 3, 3], "phrase": "dog", "tokens_positive": [[[12, 15]]]}, '
         '{"bbox": [1, 2], "phrase": "a man"}]}}\n'
         'rubbish\n{"filename": "a.jpg", "height": 31, "width": 40, "grounding": {"caption": "x", "regions": []}}\n'
         '{"filename": "b.jpg", "height": 31, "width": 40}\n'],
        [("val", Annotated("a.jpg", "a", "", (30, 40), ("A man and a dog and a dog",), (
            Entity(((1, 2, 4, 6),), category="cat"), Entity(((0.1, 0.2, 0.4, 0.6),), category="dog"),
            Entity(((0, 0, 1, 1),), category="dog"), Entity(((1, 2, 4, 6),), (Phrase("A man", 0, 0, 5),)),
            Entity(((0, 0, 4, 6), (9, 9, 12, 12)), (Phrase("a dog"),)),
            Entity(((2, 2, 3, 3),), (Phrase("dog", 0, 12, 15),)))))],
        {"label with the name of another class": 1, "is not JSON": 1,
         "phrase not in its caption": 1, "image has several sizes": 1, "should have either detection or grounding": 1,
         "bbox should be four numbers, or a list of such": 1},
    ),
    "xvlm": (
        ['{"image_rpath": "vg/5.jpg", "caption": "all", "elems": [{"caption": ["a", " b"], "attributes": "red", '
         '"bb": [1, 2, 3, 4]}, {"caption": "", "bb": [1, 2, 3, 4]}]}\n',
         '{"binary": "aGk=", "elems": [{"caption": "c", "bb": [1, 2, 3, 4]}]}\n{"elems": []}\n'],
        [("val", Annotated("vg/5.jpg", "5", "", None, ("all",),
                           (Entity(((1, 2, 4, 6),), (Phrase("a"), Phrase("b")), "", ("red",)),))),
         ("val", Annotated("", "line 1 of 1.json", "", None, (), (Entity(((1, 2, 4, 6),), (Phrase("c"),)),), False,
                           "aGk="))],
        {"phrase: should not be empty": 1, "image_rpath or binary is missing": 1},
    ),
}  # fmt: skip


def written(tmp_path, contents) -> list[str]:
    files = []
    for i, content in enumerate(contents):
        files.append(str(tmp_path / f"{i}.json"))
        (tmp_path / f"{i}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return files


def read(format, files, split="val"):
    items, left, classes = region_formats.read(format, {split: files})
    found = [(own, item) for own, rows in items.items() for item in rows]
    return found, {reason: n for reason, (n, _) in left[split].items()}, list(classes)


@pytest.mark.parametrize("format", CASES)
def test_formats(format, tmp_path):
    contents, expected, rejected = CASES[format]
    found, left, classes = read(format, written(tmp_path, contents))
    assert found == expected
    assert left == rejected
    assert classes == {
        "coco": ["dog", "cat"],
        "objects365": ["dog"],
        "openimages": ["Dog", "Cat"],
        "odvg": ["dog", "cat"],
    }.get(format, [])


def entities(tmp_path, sentences, xml=XML):
    for name, suffix, text in (("s", "txt", sentences), ("a", "xml", xml)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"11.{suffix}").write_text(text)
    return [str(tmp_path / name) for name in ("s", "a")]


def test_flickr30k_entities(tmp_path):
    folders = entities(tmp_path, "[/EN#7/people Two men] near [/EN#0/notvisual a wall] .\n[/EN#8/clothing Hats] .\n")
    (tmp_path / "list.txt").write_text("11\n12\n")
    found, left, _ = read("flickr30k_entities", [*folders, str(tmp_path / "list.txt")])
    first, second = (2, 1, 19, 10), (20, 1, 29, 10)  # These files count pixels from 1 on.
    expected = (
        Entity((first, second), (Phrase("Two men", 0, 0, 7, ("people",)),)),
        Entity((first,), (Phrase("Hats", 1, 0, 4, ("clothing",)),)),
    )
    assert found == [("val", Annotated("11.jpg", "11", "", (30, 40), ("Two men near a wall .", "Hats ."), expected))]
    assert left == {"image in no region file": 1}
    assert unmarked("no marks [here]") == ("no marks [here]", [])
    for bad in ("<a>", "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "<annotation/>"):
        with pytest.raises(UserError, match="is no annotation of Flickr30k Entities"):
            read("flickr30k_entities", entities(tmp_path, "one\n", bad))
    with pytest.raises(UserError, match="does not exist"):
        read("flickr30k_entities", [str(tmp_path / "none"), folders[1]])


ODVG = {"filename": "a.jpg", "height": 3, "width": 4}


def test_label_maps(tmp_path):
    rows = [{"bbox": [0, 0, 2, 2], "label": n, "category": c} for n, c in ((0, "a"), (2, "c"), (1, "c"))]
    lines = json.dumps(ODVG | {"detection": {"instances": rows}})
    found, left, classes = read("odvg", written(tmp_path, [lines, {"0": "a", "1": "b"}]))
    assert classes == ["a", "b"]
    assert left == {"category id unknown": 1, "label with the name of another class": 1}
    assert [e.category for e in found[0][1].entities] == ["a"]


COCO = CASES["coco"][0][0]
BAD = {
    "captions only": ("coco", [{"images": [], "annotations": []}], "should be an object with images, annotations, cat"),
    "a list": ("coco", [[1, 2]], "and is a list"),
    "other ids": ("coco", [COCO | {"annotations": [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}]}],
                  "they are of another split"),
    "other captions": ("coco", [COCO, {"annotations": [{"image_id": 1, "caption": "x"}]}], "of another split"),
    "other instances": ("refcoco", [CASES["refcoco"][0][0], {"images": [], "annotations": []}],
                        "it is of another split"),
    "no json": ("odvg", ["x\ny\n"], "has no line of it: line 1 of 0.json is not JSON"),
    "empty": ("xvlm", ["\n"], "it is empty"),
    "label map": ("odvg", [json.dumps(ODVG), ["a"]], "an object of numbers and names"),
    "no columns": ("openimages", ["/m/1,Dog\n", "ImageID,XMin\na,1\n"], "has no column 'LabelName'"),
    "no classes": ("openimages", ["/m/1\n", "ImageID\n"], "a class's code and its name"),
    "vg of what": ("visual_genome", [[{"image_id": 5, "coco_id": 4, "height": 3, "width": 4}],
                                     [{"image_id": 5, "qas": []}]], "without regions, objects or attributes"),
    "vg without coco": ("visual_genome", [[{"image_id": 5}], []], "coco_id is missing"),
    "too few": ("refcoco", [[]], "has the files refs.json,instances.json"),
    "too many": ("objects365", [{}, {}], "has the files instances.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_of_another_form(name, tmp_path):
    format, contents, words = BAD[name]
    with pytest.raises(UserError, match=words):
        read(format, written(tmp_path, contents))


def test_pickles_are_never_read(tmp_path):
    import pickle

    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps([{"ref_id": 1}]))
    (tmp_path / "hidden.json").write_bytes(pickle.dumps([{"ref_id": 1}]))
    for name in ("refs(unc).p", "hidden.json"):
        path = str(tmp_path / name)
        with pytest.raises(UserError, match="is a pickle, which can run code.*json.dump"):
            read("refcoco", [path, path])
        with pytest.raises(UserError, match="is a pickle"):
            leaks.read(path)


KARPATHY = {"images": [{"filename": "COCO_val2014_000000000042.jpg", "cocoid": 42, "split": "test"},
                       {"filename": "COCO_val2014_000000000043.jpg", "cocoid": 43, "split": "restval"},
                       {"filename": "1000092795.jpg", "split": "val"}]}  # fmt: skip
LISTS = {
    "refs": (CASES["refcoco"][0][0], {"8"}, set()),
    "karpathy": (KARPATHY, {"42"}, {"COCO_val2014_000000000042", "1000092795"}),
    "coco": ({"images": [{"id": 9, "file_name": "000000000042.jpg"}], "annotations": []}, {"42"}, {"000000000042"}),
    "mdetr": ({"images": [{"id": 9, "file_name": "COCO_train2014_000000000042_3.jpg"}]}, {"42"}, None),
    "xvlm": ([{"image": "x/COCO_train2014_000000000042.jpg", "ref_id": 3, "image_id": 3}], {"42"}, None),
    "list": (
        "1007129816\n\nx/COCO_val2014_000000000007.jpg\n",
        {"1007129816", "7"},
        {"1007129816", "COCO_val2014_000000000007"},
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_evaluation_images(name, tmp_path):
    contents, coco, files = LISTS[name]
    (path,) = written(tmp_path, [contents])
    found = leaks.read(path)
    assert found.coco == coco
    if files is not None:
        assert found.files == files
    assert found.has(Annotated("z.jpg", coco_id=min(coco)))
    assert not found.has(Annotated("z.jpg", coco_id="123"))


def test_lists_that_name_nothing(tmp_path):
    for contents, words in (
        ("\n", "names no image"),
        ("{", "is not JSON"),
        ({"data": []}, "should be refs"),
        ([{"x": 1}], "no image in its row 0"),
        ([{"ref_id": 1, "image_id": 7, "split": "train"}], "names no image that is evaluated on"),
    ):
        with pytest.raises(UserError, match=words):
            leaks.read(written(tmp_path, [contents])[0])


def test_numbers_of_coco():
    for name, number in (
        ("a/COCO_train2014_000000000042.jpg", "42"),
        ("COCO_val2014_000000581857_16.jpg", "581857"),
        ("000000000042.jpg", "42"),
        ("42.jpg", ""),
        ("2343729.jpg", ""),
        ("x\\000000000007.png", "7"),
    ):
        assert leaks.coco_id_of(name) == number
