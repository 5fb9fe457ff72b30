"""Metrics of short answers by hand-worked cases, and files for the evaluation servers."""

import json

import pytest

from capvl.errors import UserError
from capvl.evals import answer_metrics, submissions
from capvl.evals.submissions import Written


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The dog.", "dog"),
        ("two  dogs", "2 dogs"),
        ("dont know", "don't know"),
        ("A T-shirt", "t shirt"),
        ("1,000", "1000"),
        ("half-empty, yes", "half empty yes"),
        ("3.5", "3.5"),
        ("it is 3.", "it is 3"),
        ("none", "0"),
        ("Isnt it?", "isn't it"),
    ],
)
def test_vqa_normalisation(text, expected):
    assert answer_metrics.vqa_normalize(text) == expected


@pytest.mark.parametrize(
    "text, answers, expected",
    [
        # Three of ten say it: seven people see 3 others, three see 2.
        ("red", ["red"] * 3 + ["blue"] * 7, (7 * 1 + 3 * 2 / 3) / 10),
        ("red", ["red"] + ["blue"] * 9, (9 * 1 / 3) / 10),
        ("The red", ["red"] * 4 + ["blue"] * 6, 1.0),
        ("green", ["red"] * 10, 0.0),
        ("The red", ["red"] * 10, 0.0),  # Where all agree nothing is evened out.
        ("yes", ["yes"], 1.0),
    ],
)
def test_vqa_accuracy(text, answers, expected):
    assert answer_metrics.vqa(text, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    "metric, text, answers, expected",
    [
        ("anls", "Hello", ["hello"], 1.0),
        ("anls", "hellp", ["hello", "x"], 0.8),
        ("anls", "ab", ["xy"], 0.0),
        ("anls", "abcd", ["abxy"], 0.0),  # Half is too far.
        ("anls", "", ["a"], 0.0),
        ("exact", " The  RED, thing. ", ["the red thing"], 1.0),
        ("exact", "red", ["the red"], 0.0),
        ("contains", "a photo of a grey cat", ["Grey cat"], 1.0),
        ("contains", "a photo of cats", ["cat"], 0.0),
        ("word", "It's-5", ["ITS5"], 1.0),
        ("word", "its6", ["ITS5"], 0.0),
        ("word", "", ["—"], 0.0),
    ],
)
def test_metrics(metric, text, answers, expected):
    assert answer_metrics.METRICS[metric](text, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    "a, b, distance", [("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2)]
)
def test_edit_distance(a, b, distance):
    assert answer_metrics.edit_distance(a, b) == answer_metrics.edit_distance(b, a) == distance


ROWS = [Written("7", "70", "yes"), Written("img_8", "q8", "nö")]
FILES = {
    "coco": [{"image_id": "7", "caption": "yes"}, {"image_id": "img_8", "caption": "nö"}],
    "vqa": [{"question_id": "70", "answer": "yes"}, {"question_id": "q8", "answer": "nö"}],
    "vizwiz": [{"image": "7", "answer": "yes"}, {"image": "img_8", "answer": "nö"}],
    "gqa": [{"questionId": "70", "prediction": "yes"}, {"questionId": "q8", "prediction": "nö"}],
    "clips": {"7": "yes", "img_8": "nö"},
}


@pytest.mark.parametrize("format", FILES)
def test_submissions(format, tmp_path):
    submissions.write(tmp_path, "a/val", format, ROWS)
    assert json.loads((tmp_path / "submissions" / "val.json").read_text()) == FILES[format]


@pytest.mark.parametrize(
    "texts, ids",
    [
        (("7", "80"), [7, 80]),
        (("123", "00123"), ["123", "00123"]),
        (("1234567890123456", "0004c9478eeda995"), ["1234567890123456", "0004c9478eeda995"]),  # TextCaps
        (("²",), ["²"]),
        (("000000000139", "42"), [139, 42]),  # COCO's names of files
    ],
)
def test_ids_are_numbers_where_all_of_them_are(texts, ids, tmp_path):
    for format, key in (("coco", "image_id"), ("vqa", "question_id")):
        submissions.write(tmp_path, "val", format, [Written(text, text, "x") for text in texts])
        assert [row[key] for row in json.loads((tmp_path / "submissions" / "val.json").read_text())] == ids


def test_tsv_submission(tmp_path):
    submissions.write(tmp_path, "val", "tsv", [ROWS[0], Written("8", "", "a cat")])
    lines = (tmp_path / "submissions" / "val.tsv").read_text().splitlines()
    assert json.loads(lines[0].split("\t")[1]) == {"answer": "yes", "question_id": 70}
    assert lines[1].split("\t")[0] == "8" and json.loads(lines[1].split("\t")[1]) == [{"caption": "a cat"}]


def test_unknown_format():
    with pytest.raises(UserError, match="Did you mean 'coco'"):
        submissions.check("cocoa")


def test_hallucination_of_captions():
    from capvl.evals import hallucination

    objects = {"color": [b"red", b"blue", b"pink"], "shape": [b"star", b"ring", b"word"], "word": [b"", b"", b"sun"]}
    scene = hallucination.things(objects)
    assert scene == {("red", "star"), ("blue", "ring"), ("word", "sun")}
    texts = ["a large red star, a blue square and a pink word sun", "a picture of nothing"]
    assert hallucination.mentions(texts[0]) == [("red", "star"), ("blue", "square"), ("word", "sun")]
    found = dict(hallucination.shares(texts, [scene, scene]))
    assert found == {"right": pytest.approx(2 / 3), "found": pytest.approx(2 / 6), "all_right": 0.0, "words": 1.0}
    assert dict(hallucination.shares(["a red star"], [scene]))["all_right"] == 1.0
    taken = hallucination.taken_for(texts, [scene, scene])
    assert taken["shapes in captions"] == [("star", "star"), ("ring", "square")]
    assert taken["words in captions"] == [("sun", "sun")]


def test_nothing_written_is_never_right():
    assert answer_metrics.exact("", ["?"]) == answer_metrics.exact(" ", [""]) == answer_metrics.exact("!", ["?"]) == 0
    assert answer_metrics.exact("?", ["?"]) == answer_metrics.exact("Red.", ["red"]) == 1
    assert answer_metrics.contains("red", ["?"]) == 0


@pytest.mark.parametrize(
    "text, expected",
    [
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("somebodyd", "somebodyd"),
        ("lets", "lets"),
        ("shes", "shes"),
        ("twas", "'twas"),
    ],
)
def test_contractions_are_the_official_tables(text, expected):
    assert answer_metrics.vqa_normalize(text) == expected


@pytest.mark.parametrize(
    "format, rows, words",
    [
        ("coco", [("a", ""), ("a", "")], "can't tell two images 'a' apart"),
        ("clips", [("a", ""), ("a", "")], "can't tell two images 'a' apart"),
        ("vqa", [("a", "1"), ("b", "1")], "can't tell two questions '1' apart"),
        ("gqa", [("a", ""), ("b", "1")], "needs ids of questions"),
    ],
)
def test_results_that_a_server_could_not_tell_apart(format, rows, words):
    with pytest.raises(UserError, match=words):
        submissions.check_unique(format, [Written(image, question, "") for image, question in rows])
    submissions.check_unique(format, [Written(str(i), str(i), "") for i in range(3)])


def test_several_questions_of_an_image():
    submissions.check_unique("vqa", [Written("a", "1", ""), Written("a", "2", "")])
    submissions.check_unique("tsv", [Written("a", "1", ""), Written("a", "2", "")])
