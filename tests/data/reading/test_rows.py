"""Odd annotation files: each row is read as it says, or left out and counted; the others are kept."""

import csv
import glob
import json
import os
import pathlib
from collections import Counter

import pytest
from conftest import case
from handmade import picture

from capvl.data.preparing import annotated, annotations
from capvl.data.reading import sources
from capvl.data.reading.rejected import Rejected
from capvl.errors import UserError


def bytes_lines(path) -> list[str]:
    """Lines as the bytes have them: at \\n and nowhere else."""
    return [line.decode("utf-8-sig").removesuffix("\r") for line in contents(path).split(b"\n") if line.strip()]


def contents(path) -> bytes:
    return pathlib.Path(path).read_bytes()


def of_cases(*names):
    return [case("annotations", name) for name in names]


def read(format, *files):
    """(items, how many are left out by reason)."""
    left = Rejected()
    items = [item for _, item in annotations.read(format, files, "val", left)]
    return items, Counter({reason: n for reason, (n, _) in left.items()})


@pytest.mark.cases
@pytest.mark.parametrize("name", ["c1.json", "c2.json", "c3.json"])
def test_captions_find_their_image_and_the_others_are_counted(name):
    (path,) = of_cases(name)
    values = json.loads(contents(path))
    images = {str(image["id"]): [] for image in values["images"]}
    bad = 0
    for row in values["annotations"]:
        text, key = row["caption"], str(row["image_id"])
        usable = isinstance(text, str) and text.strip() and key in images
        bad += not usable
        if usable:
            images[key].append(text.strip())
    items, left = read("coco", path)
    assert {item.id: list(item.text) for item in items} == images
    assert left.total() == bad


@pytest.mark.cases
def test_a_results_file_is_no_annotation_file():
    (path,) = of_cases("c5.json")
    with pytest.raises(UserError, match="is not of the format 'coco': c5.json should be an object with images, and is"):
        read("coco", path)


@pytest.mark.cases
@pytest.mark.parametrize("name", ["q1.json", "q2.json"])
def test_answers_as_one_text_and_ids_as_text_or_number(name):
    questions, answers = of_cases(name, "a1.json")
    given = {str(r["question_id"]): r["answers"] for r in json.loads(contents(answers))["annotations"]}
    items, left = read("vqa", questions, answers)
    asked = [q for item in items for q in item.questions]
    assert {q.id: q.answers for q in asked} == {key: (text,) for key, text in given.items()}
    assert not left


@pytest.mark.cases
@pytest.mark.parametrize("name", ["l1.jsonl", "l3.jsonl", "l4.jsonl", "l6.jsonl", "v.jsonl"])
def test_json_lines(name):
    (path,) = of_cases(name)
    rows = [json.loads(line) for line in bytes_lines(path)]
    good = []
    for row in rows:
        texts = row.get("text", ["-"])
        texts = [texts] if isinstance(texts, str) else texts or []
        if any(isinstance(t, str) for t in texts) and row.get("class_name", "") is not None:
            good.append(row)
    if not good:
        with pytest.raises(UserError, match=rf"has nothing to use: .*is null \({len(rows)} x\)"):
            read("lines", path)
        return
    items, left = read("lines", path)
    assert [item.image for item in items] == [row.get("image") or row["video"] for row in good]
    assert left.total() == len(rows) - len(good)
    for item, row in zip(items, good, strict=True):
        texts = row.get("text", [])
        assert item.text == tuple([texts] if isinstance(texts, str) else texts)
        answers = [q["answers"] for q in row.get("questions", ())]
        assert [q.answers for q in item.questions] == [(a,) if isinstance(a, str) else tuple(a) for a in answers]


@pytest.mark.cases
def test_characters_that_end_no_line():
    (path,) = of_cases("m1.txt")
    items, left = read("msvd", path)
    assert [(i.image, *i.text) for i in items] == [tuple(line.split(" ", 1)) for line in bytes_lines(path)]
    assert not left


@pytest.mark.cases
def test_a_test_split_keeps_its_images():
    (path,) = of_cases("t1.json")
    items, left = read("textcaps", path)
    ids = dict.fromkeys(str(row["image_id"]) for row in json.loads(contents(path))["data"])
    assert [(item.image, item.text) for item in items] == [(key, ()) for key in ids] and not left


@pytest.mark.cases
def test_words_with_quotes_commas_and_hashes():
    (path,) = of_cases("w1.txt")
    expected = []
    for line in bytes_lines(path):
        name, tab, word = line.partition("\t")
        expected.append((name, word) if tab else tuple(next(csv.reader([line], skipinitialspace=True))))
    items, _ = read("words", path)
    assert [(item.image, *item.text) for item in items] == expected


@pytest.mark.cases
def test_cases_are_prepared(tmp_path):
    """From the files to Examples: by COCO's number, with the count of what is left out in the report."""
    path, images = of_cases("c2.json", "img")
    folder = annotated.prepare("a", "coco", {"val": [path]}, images, str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["val"]
    _, left = read("coco", path)
    assert Counter({k: v["count"] for k, v in report["rejected"].items()}) == left
    questions, answers = of_cases("q2.json", "a1.json")
    annotated.prepare("b", "vqa", {"val": [questions, answers]}, images, str(tmp_path), workers=1)
    source = sources.open_source("b", "val", str(tmp_path))
    (key,) = {str(row["image_id"]) for row in json.loads(contents(questions))["questions"]}
    (file,) = glob.glob(os.path.join(glob.escape(images), f"*_{int(key):012d}.jpg"))
    assert source[0]["image"] == contents(file)


def lines(*rows) -> str:
    return "\n".join(map(json.dumps, rows))


GOOD = {"image": "ok.jpg", "text": "ok"}
REGION = {"region_id": 1, "x": 1, "y": 1, "width": 5, "height": 5, "phrase": "ok"}
ODD = [  # format, contents, what is left out, and the texts that stay
    ("lines", lines(GOOD, {"image": "a", "text": {"en": "x", "de": "y"}}), ["text should be a list"], ["ok"]),
    ("lines", lines(GOOD, {"image": "a", "text": 7}), ["text should be a list"], ["ok"]),
    ("lines", lines(GOOD, {"image": "a", "text": "\ud83d"}), ["text: has half of a surrogate pair"], ["ok"]),
    ("lines", lines(GOOD) + '\n{"image": \n', ["is not JSON"], ["ok"]),
    ("lines", lines(GOOD) + "\n" + "[" * 100_000 + "]" * 100_000, ["is not JSON"], ["ok"]),
    ("lines", lines(GOOD, [1]), ["should be an object"], ["ok"]),
    ("lines", lines(GOOD, {"text": "x"}), ["image is missing"], ["ok"]),
    ("lines", lines(GOOD, GOOD | {"split": "../x"}), ["split should be letters, digits and _"], ["ok"]),
    ("lines", lines(GOOD | {"text": ["a", None, " "]}), ["text: is null", "text: should not be empty"], ["a"]),
    ("lines", lines(GOOD, {"image": "a", "questions": [{"question": "q", "answers": {"a": {}}}]}), None, ["ok"]),
    ("coco", {"images": [{"id": 1.0, "file_name": "a"}, {"id": "1"}], "annotations": [{"image_id": 1, "caption": "x"}]},
     ["image id is there twice"], ["x"]),
    ("coco", {"images": [{"id": True}, {"id": 1}], "annotations": [{"image_id": 1, "caption": 5}]}, None, []),
    ("coco", {"images": [{"id": 1}], "annotations": [
        {"image_id": 1, "caption": text, "is_rejected": value} for text, value in (("a", None), ("b", 1), ("c", "?"))]},
     None, ["a"]),
    ("karpathy", {"images": [{"filename": "a", "split": "val", "sentences": [{"raw": None}, {"raw": "x\r\n"}]},
                             {"filename": "b", "split": "val", "sentences": [{"raw": "y"}]}, {"filename": "c"}]},
     ["caption: is null", "sentences is missing"], ["x", "y"]),
    ("vatex", [{"videoID": "a", "enCap": "one text"}, {"videoID": 5}], ["videoID should be a text"], ["one text"]),
    ("visual_genome", [{"id": 1, "regions": [REGION, REGION | {"x": float("nan")}, REGION | {"width": -3},
                                             REGION | {"height": "5"}, REGION | {"phrase": None}]}],
     ["x should be a finite number", "width should be above 0", "height should be a number", "phrase is null"], ["ok"]),
    ("msrvtt", {"videos": [{"video_id": "v"}], "sentences": [{"video_id": "v", "caption": "x"},
                                                             {"video_id": "w", "caption": "x"}]},
     ["caption of an unknown video"], ["x"]),
    ("msvd", "a one\nb\nc two\n", ["should be a clip's name and a caption"], ["one", "two"]),
]  # fmt: skip


@pytest.mark.parametrize("format, written, reasons, texts", ODD)
def test_odd_rows_are_left_out_and_counted(tmp_path, format, written, reasons, texts):
    (tmp_path / "x").write_text(written if isinstance(written, str) else json.dumps(written))
    items, left = read(format, str(tmp_path / "x"))
    assert [text for item in items for text in item.text] == texts
    assert left if reasons is None else left == Counter(reasons)


def test_what_finds_no_partner_is_counted(tmp_path):
    asked = [{"question_id": i, "image_id": 7, "question": "so?"} for i in (1, 2, 2)]
    given = [{"question_id": str(i), "answers": [{"answer": 3}, "x"]} for i in (1, 1, 9)]
    (tmp_path / "q").write_text(json.dumps({"questions": asked}))
    (tmp_path / "a").write_text(json.dumps({"annotations": given}))
    (item,), left = read("vqa", str(tmp_path / "q"), str(tmp_path / "a"))
    assert [q.answers for q in item.questions] == [("3", "x")]
    expected = ["question without annotation", "question id is there twice", "answers to an unknown question"]
    assert left == Counter([*expected, "question is answered twice"])
    assert [q.answers for q in read("vqa", str(tmp_path / "q"))[0][0].questions] == [(), ()]


@pytest.mark.parametrize(
    "format, written, sentence",
    [
        ("coco", b"\xff\xfe{\x00}\x00", "is UTF-16; save it as UTF-8"),
        ("coco", b'{"images": "\xe9"}', r"is not UTF-8 \(byte 12\)"),
        ("coco", b"[" * 200_000, "nested too deeply"),
        ("coco", b'{"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4]}]}',
         "is not of the format 'coco': annotation 0 of x: caption is missing"),
        ("gqa", b"[]", "x should be an object of rows, and is a list"),
        ("vatex", b"{}", "x should be a list of rows, and is an object"),
        ("vizwiz", b"[null]", "row 0 of x: is null"),
    ],
)  # fmt: skip
def test_files_of_another_form(tmp_path, format, written, sentence):
    (tmp_path / "x").write_bytes(written)
    with pytest.raises(UserError, match=sentence) as error:
        read(format, str(tmp_path / "x"))
    assert "\n" not in str(error.value)


def test_marks_at_the_beginning_and_windows_ends(tmp_path):
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf{"image": "a", "text": "x"}\r\n{"image": "b", "text": "y"}\r\n')
    assert [i.image for i in read("lines", str(tmp_path / "x"))[0]] == ["a", "b"]
    (tmp_path / "y").write_bytes(b'\xef\xbb\xbf{"images": [{"id": 1}]}')
    assert [i.image for i in read("coco", str(tmp_path / "y"))[0]] == ["1"]


@pytest.mark.parametrize("name", ["answers", "answer"])
def test_answers_under_either_name(tmp_path, name):
    row = {"question_id": 5, "image_id": "i", "image": "i", "video_id": "i", "question": "q", "id": 5, name: "red"}
    files = {
        "vqa": ({"questions": [row]}, {"annotations": [row]}),
        "textvqa": ({"data": [row]},),
        "vizwiz": ([row],),
        "gqa": ({"5": row | {"imageId": "i"}},),
        "msrvtt": ({"videos": [{"video_id": "i"}]}, [row]),
        "lines": ({"image": "i", "questions": [row]},),
    }
    for format, values in files.items():
        paths = [str(tmp_path / str(i)) for i in range(len(values))]
        for path, value in zip(paths, values, strict=True):
            pathlib.Path(path).write_text(json.dumps(value))
        (item,), left = read(format, *paths)
        assert [q.answers for q in item.questions] == [("red",)] and not left, format


def test_some_rows_have_no_class(tmp_path):
    """A row without a class is none of the others; before, it ended everything."""
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(picture())
    rows = [{"image": "a", "class_name": "cat"}, {"image": "b"}, {"image": "c", "class_name": "7\r\n8"}]
    (tmp_path / "x.jsonl").write_text(lines(*rows))
    annotated.prepare("d", "lines", {"val": [str(tmp_path / "x.jsonl")]}, str(tmp_path), str(tmp_path), workers=1)
    source = sources.open_source("d", "val", str(tmp_path), features=("class_name", "label"))
    assert [(source[i]["class_name"], source[i]["label"]) for i in range(3)] == [("cat", 1), ("", -1), ("7 8", 0)]


def test_folders_of_classes(tmp_path):
    """What stands beside the folders has no class; names on the disk need not be UTF-8."""
    for name in ("cat/1.png", "big_dog/2.png", "stray.png", "cat/._1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    (pathlib.Path(os.fsdecode(os.fsencode(tmp_path / "cat") + b"/\xff.png"))).write_bytes(picture())
    items, left = read("folders", str(tmp_path))
    assert sorted(item.class_name for item in items) == ["big dog", "cat"]
    assert left == Counter(["beside the classes' folders", "name is not UTF-8"])


def test_reports_show_names_with_brackets(tmp_path, capsys):
    from capvl.data.prepare import print_report

    rejected = {"text: [/x] is null": {"count": 1, "first": ["[/zz].jpg", "[red]"]}}
    (tmp_path / "report.json").write_text(json.dumps({"val": {"examples": 1, "rejected": rejected}}))
    print_report(tmp_path)
    shown = capsys.readouterr().out
    assert "[/zz].jpg" in shown and "[red]" in shown


def test_the_same_name_in_two_folders(tmp_path):
    """Two images, each with its own id and pixels; a name without its folder stands for neither."""
    for place, color in (("a", 10), ("b", 90)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "1.png").write_bytes(picture((color, 0, 0)))
    rows = [{"image": name, "text": "x"} for name in ("a/1.png", "b/1.png", "1.png")]
    (tmp_path / "x.jsonl").write_text(lines(*rows))
    folder = annotated.prepare(
        "e", "lines", {"val": [str(tmp_path / "x.jsonl")]}, str(tmp_path), str(tmp_path), workers=1
    )
    source = sources.open_source("e", "val", str(tmp_path))
    assert [source[i]["image"] for i in range(len(source))] == [picture((10, 0, 0)), picture((90, 0, 0))]
    assert [sources.name_of(source, i) for i in range(2)] == ["a/1.png", "b/1.png"]
    report = json.loads((folder / "report.json").read_text())["val"]["rejected"]
    assert report == {"several files of that name": {"count": 1, "first": ["1.png"]}}
