"""Tests of compositional understanding from files as they are published, and files that can't be used."""

import csv
import io
import json

import pytest
from conftest import case

from capvl.data.reading.rejected import Rejected
from capvl.errors import UserError
from capvl.evals import entailment, foils
from capvl.evals.foils import Foil


@pytest.mark.cases
def test_aro_boxes_are_different_images():
    path = case("aro", "visual_genome_relation.json")
    with open(path, encoding="utf-8") as file:
        rows = json.load(file)
    found = foils.read("aro", path)
    for question, row in zip(found, rows, strict=True):
        x, y, width, height = (row[f"bbox_{key}"] for key in "xywh")
        assert question.box == (x, y, x + width, y + height)
        assert question.captions == (row["true_caption"], row["false_caption"])
    boxes = {(row["image_path"], *(row[f"bbox_{key}"] for key in "xywh")) for row in rows}
    assert len({key for question in found for key in question.keys}) == len(boxes)


def test_negclip_tables(tmp_path):
    """Columns title, filepath, neg_caption, neg_image, as pandas writes them: Python's lists, quoted where need be."""
    rows = [
        ("a dog, on a \"mat\"", "val/1.jpg", ["a mat on a dog", "it's a cat"], [3, 4]),
        ("two\tcats\u2028here", "val/2.jpg", [], []),
        ("no foils", "val/3.jpg", ["  "], []),
    ]  # fmt: skip
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerow(("", "title", "filepath", "neg_caption", "neg_image"))
    writer.writerows([i, *map(str, row)] for i, row in enumerate(rows))
    (tmp_path / "valid.tsv").write_bytes(b"\xef\xbb\xbf" + buffer.getvalue().encode())
    left = Rejected()
    found = foils.read("negclip", str(tmp_path / "valid.tsv"), left)
    assert found == [Foil("valid", ("val/1.jpg",), (rows[0][0], *rows[0][2]))]
    assert {reason: n for reason, (n, _) in left.items()} == {"no foil": 2}


@pytest.mark.cases
def test_a_separator_inside_a_caption_ends_no_line():
    path = case("annotations", "n.jsonl")
    with open(path, "rb") as file:
        rows = [json.loads(line) for line in file.read().split(b"\n") if line.strip()]
    found = foils.read("negclip", path)
    assert [q.captions for q in found] == [(row["caption"], *row["neg_caption"]) for row in rows]


VALSE = {"image_file": "a.jpg", "caption": "x", "foil": "y"}


@pytest.mark.parametrize(
    "format, rows, sentence",
    [
        ("aro", [{"image": "a.jpg", "caption": ["x", "y"]}], "ARO's order tests have no foils in the file"),
        ("aro", [{"image_path": "a", "true_caption": "x", "false_caption": "y", "bbox_x": 1}], "it lacks 'bbox_y'"),
        ("aro", [{"image_path": "a", "true_caption": "x", "false_caption": "y", "bbox_x": 1, "bbox_y": 1,
                  "bbox_w": 0, "bbox_h": 4}], "a box of numbers of pixels with a width"),
        ("aro", [{"image_path": "a", "caption_options": ["x"]}], "a caption without a foil"),
        ("aro", [{"image_path": "a", "caption_options": "xy"}], "it lacks several captions"),
        ("negclip", [{"filepath": "a", "caption": "x", "neg_caption": "['y', "}], "is not of the format negclip"),
        ("negclip", [{"filepath": None, "caption": "x", "neg_caption": ["y"]}], "names no image"),
        ("sugarcrepe", [{"filename": "a", "caption": "x", "negative_caption": "\ud83d"}], "half of a surrogate"),
        ("valse", {"0": VALSE | {"mturk": []}, "1": VALSE | {"mturk": 5}}, "Row 1 of .* is not of the format valse"),
        ("winoground", [{"image_0": "a", "image_1": None, "caption_0": "x", "caption_1": "y"}], "of the format win"),
        ("valse", 5, "should be a list or an object of rows"),
    ],
)  # fmt: skip
def test_rows_that_can_not_be_used(tmp_path, format, rows, sentence):
    (tmp_path / "t.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match=sentence) as error:
        foils.read(format, str(tmp_path / "t.json"))
    assert "\n" not in str(error.value)


def test_snli_ve_as_published(tmp_path):
    row = {"Flickr30K_ID": "470", "captionID": "470.jpg#2", "sentence2": "A dog.", "gold_label": "neutral"}
    rows = [row, {k: v for k, v in row.items() if k != "Flickr30K_ID"}, row | {"gold_label": "-"}]
    (tmp_path / "v.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    assert entailment.read_pairs(str(tmp_path / "v.jsonl")) == [
        ("470", "A dog.", "neutral"),
        ("470.jpg", "A dog.", "neutral"),
    ]
    (tmp_path / "v.jsonl").write_text(json.dumps(row | {"gold_label": "yes"}))
    with pytest.raises(UserError, match="Line 1 of .* is no entailment pair: Input should be 'entailment'"):
        entailment.read_pairs(str(tmp_path / "v.jsonl"))
