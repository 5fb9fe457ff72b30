"""The schema of a sample's JSON: what is read, and for which reason a sample is left out."""

import json

import pytest

from capvl.data.reading import records
from capvl.data.reading.rejected import RejectedError


def read(meta, text="", **members):
    data = meta if isinstance(meta, bytes) else json.dumps(meta).encode()
    return records.read({"json": data, **members}, text)


@pytest.mark.parametrize(
    "meta, members, captions",
    [
        ({"captions": "a red square"}, {}, ["a red square"]),
        ({"captions": ["one", None, " ", "two "]}, {}, ["one", "two"]),
        ({"captions": None}, {"txt": b"from the text"}, ["from the text"]),
        ({"captions": ["", None]}, {"txt": b"from the text"}, ["from the text"]),
        ({"captions": {"en": "a dog", "de-DE": ["ein Hund", ""]}}, {}, ["a dog", "ein Hund"]),
        ({"caption": "in the JSON"}, {}, ["in the JSON"]),
        ({"caption": "in the JSON"}, {"txt": b""}, ["in the JSON"]),
        ({"caption": "in the JSON"}, {"txt": b"beside it"}, ["beside it"]),
        ({"TEXT": "upper case"}, {}, ["upper case"]),
        ({"caption": ["two", "of them"]}, {}, ["two", "of them"]),
        ({}, {"txt": b"\xef\xbb\xbfa mark is no text\r\n"}, ["a mark is no text"]),
        ({}, {"caption": b"by its suffix"}, ["by its suffix"]),
        ({"text": [{"ocr": "STOP"}]}, {"txt": b"not asked"}, ["not asked"]),
        ({}, {}, []),
    ],
)
def test_captions(meta, members, captions):
    assert read(meta, **members).captions == captions


def test_captions_by_the_name_that_was_given():
    meta = {"captions": ["generated"], "title": "by hand", "notes": None}
    assert read(meta, "title").captions == ["by hand"]
    assert read(meta, "notes", txt=b"not asked").captions == []
    assert read(meta, "alt", alt=b"a member").captions == ["a member"]


BOX = [1, 2, 3, 4]


@pytest.mark.parametrize(
    "meta, reason",
    [
        ({"captions": 5}, "captions are no texts"),
        ({"captions": [["nested"]]}, "captions are no texts"),
        ({"captions": {"raw": "a dog", "tokens": ["a", "dog"]}}, "captions are no texts"),
        ({"caption": {"value": "x"}}, "captions are no texts"),
        ({"label": "dog"}, "label is no whole number"),
        ({"label": "5"}, "label is no whole number"),
        ({"label": True}, "label is no whole number"),
        ({"label": 1.5}, "label is no whole number"),
        ({"label": 2**63}, "label is no whole number"),
        ({"label": -7}, "label is no whole number"),
        ({"label": [1, 2]}, "label is no whole number"),
        ({"label": float("nan")}, "label is no whole number"),
        ({"class_name": 5}, "class_name is no text"),
        ({"boxes": [[1, 2, 3, 4, 5]]}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": [[1, 2, 3]]}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": [[5, 2, 3, 4]]}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": [[1, 2, 1, 4]]}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": [[1, 2, float("nan"), 4]]}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": [[1, 2, float("inf"), 4]]}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": [["1", "2", "3", "4"]]}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": [[True, 2, 3, 4]]}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": [{"x": 1, "y": 2, "w": 3, "h": 4}]}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": BOX}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": {"7": BOX}}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": {"7": None}}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": "1 2 3 4"}, "boxes are not x0 < x1, y0 < y1"),
        ({"boxes": [BOX], "labels": [1, 2]}, "labels don't fit the boxes"),
        ({"boxes": [BOX], "labels": ["dog"]}, "labels don't fit the boxes"),
        ({"boxes": [BOX, BOX], "category_names": ["dog"]}, "category_names don't fit the boxes"),
        ({"boxes": [BOX], "category_names": "d"}, "category_names don't fit the boxes"),
        ({"captions": ["a"], "phrases": ["a red square"]}, "phrases are not rows of six"),
        ({"captions": ["a"], "phrases": [[0, 0, 1, "7", "x"]]}, "phrases are not rows of six"),
        ({"captions": ["a"], "phrases": [[0.5, 0, 1, "7", "x", "a"]]}, "phrases are not rows of six"),
        ({"captions": ["a"], "phrases": [[1, 0, 1, "7", "x", "a"]]}, "phrases don't fit the captions"),
        ({"captions": ["", "a"], "phrases": [[0, 0, 1, "7", "x", "a"]]}, "phrases don't fit the captions"),
        (b"{", "unreadable JSON"),
        (b"[1]", "unreadable JSON"),
        (b'{"caption": "\\ud83d"}', "unreadable JSON"),
        (b'{"caption": "\xff"}', "unreadable JSON"),
        (b"[" * 100_000, "unreadable JSON"),
        (b'{"a":' * 100_000, "unreadable JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "unreadable JSON"),
    ],
)
def test_reasons(meta, reason):
    with pytest.raises(RejectedError, match=f"^{reason}$"):
        read(meta)


def test_text_that_is_not_utf8():
    with pytest.raises(RejectedError, match="text is not UTF-8"):
        read({}, txt="café".encode("latin-1"))


def test_what_fits_is_kept():
    meta = {
        "captions": ["a dog", "one dog"],
        "label": 5.0,
        "class_name": None,
        "boxes": [BOX, [0.5, 0, 1e3, 1e3]],
        "labels": [3, None],
        "category_names": ["dog", None],
        "phrases": [[1, 0, 2, 7, ["animals"], "one dog"]],
        "similarity": float("nan"),
        "id": 2**70,
        "emoji": "\U0001f436",
    }
    record = read(meta)
    assert record.schema.label == 5
    assert record.schema.class_name == ""
    assert record.schema.boxes == [("0", (1, 2, 3, 4)), ("1", (0.5, 0, 1e3, 1e3))]
    assert record.schema.labels == [3, None]
    assert record.schema.phrases[0][3] == "7"
    assert (record.meta["id"], record.meta["emoji"]) == (2**70, "\U0001f436")
    assert read({"boxes": {"7": [BOX], "8": []}}).schema.boxes == [("7", (1, 2, 3, 4))]
    assert read({"label": None}).schema.label == read({}).schema.label == -1
    assert read(b"\xef\xbb\xbf{}").meta == read(b"").meta == {}
    # Without boxes these are tags of somebody else.
    assert read({"labels": ["cat"], "category_names": "x"}).schema.labels == []


def test_label_of_its_own_member():
    assert read({}, cls=b"5\n").schema.label == 5
    assert read({"label": 3}, cls=b"5").schema.label == 3
    assert read({}, cls=b"").schema.label == -1
    with pytest.raises(RejectedError, match="label is no whole number"):
        read({}, cls=b"dog")


def test_image_of_a_sample():
    assert records.image({"txt": b"", "png": b"x"}) == b"x"
    assert records.image({"jpg": b"x", "mask.png": b"y"}) == b"x"
    assert records.image({"jpg": b"x", "png": b"y"}, "PNG") == b"y"
    for members, name, reason in (({"txt": b""}, "", "no image"), ({"jpg": b"x"}, "png", "no image")):
        with pytest.raises(RejectedError, match=reason):
            records.image(members, name)
    with pytest.raises(RejectedError, match="several images"):
        records.image({"jpg": b"x", "png": b"y"})
