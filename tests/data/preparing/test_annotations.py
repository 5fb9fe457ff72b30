"""Annotation files, TSVs and videos -> data sets; each format from a file of its own form."""

import io
import json

import cv2
import numpy as np
import pytest
from conftest import real_data
from handmade import picture
from PIL import Image

from capvl.data.images import video
from capvl.data.images.decode import decode
from capvl.data.preparing import annotated, annotations, shards
from capvl.data.preparing.annotations import Asked, Item
from capvl.data.reading import sources, tsv
from capvl.data.reading.texts import questions
from capvl.errors import UserError
from capvl.evals.entailment import read_pairs


def film(path, frames=12, size=(32, 24)):
    """A video whose frames get brighter."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), 20 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


ANSWERS = [{"answer": "yes"}, {"answer": "no"}]
CASES = {
    "coco": (
        [{"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 8, "file_name": "b.jpg"}],
          "annotations": [{"image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "x", "is_rejected": True}]}],
        [("val", Item("a.jpg", "7", ("one",))), ("val", Item("b.jpg", "8"))],
    ),
    "karpathy": (
        [{"images": [{"filename": "a.jpg", "filepath": "v", "split": "restval", "cocoid": 7,
                      "sentences": [{"raw": "one "}, {"raw": "two"}]}]}],
        [("train", Item("v/a.jpg", "7", ("one", "two")))],
    ),
    "textcaps": (
        [{"data": [{"image_id": "a", "caption_str": "one"}, {"image_id": "a", "caption_str": "two"}]}],
        [("val", Item("a", "a", ("one", "two")))],
    ),
    "vqa": (
        [{"questions": [{"image_id": 7, "question": "so?", "question_id": 70}]},
         {"annotations": [{"question_id": 70, "answers": ANSWERS, "answer_type": "yes/no"}]}],
        [("val", Item("7", "7", questions=(Asked("70", "so?", ("yes", "no"), "yes/no"),)))],
    ),
    "textvqa": (
        [{"data": [{"image_id": "a", "question": "so?", "question_id": 70, "answers": ["yes", "no"]}]}],
        [("val", Item("a", "a", questions=(Asked("70", "so?", ("yes", "no")),)))],
    ),
    "vizwiz": (
        [[{"image": "a.jpg", "question": "so?", "answers": ANSWERS, "answer_type": "other"}]],
        [("val", Item("a.jpg", "a.jpg", questions=(Asked("a.jpg", "so?", ("yes", "no"), "other"),)))],
    ),
    "gqa": (
        [{"70": {"imageId": "a", "question": "so?", "answer": "yes", "types": {"structural": "verify"}}}],
        [("val", Item("a", "a", questions=(Asked("70", "so?", ("yes",), "verify"),)))],
    ),
    "snli_ve": (
        ['{"Flickr30K_ID": "12", "sentence2": "so", "gold_label": "neutral", "pairID": "12.jpg#0r1n"}\n'
         '{"captionID": "12.jpg#1", "sentence2": "x", "gold_label": "-"}\n'
         '{"image_id": 12, "hypothesis": "no", "label": "contradiction"}\n'],
        [("val", Item("12", "12", questions=(Asked("12.jpg#0r1n", "so", ("neutral",)),
                                             Asked("2", "no", ("contradiction",)))))],
    ),
    "nlvr2": (
        ['{"identifier": "dev-8-0-0", "sentence": "so", "label": "True", "left_url": "http://x/a.jpg"}\n'
         '{"identifier": "dev-8-0-1", "sentence": "no", "label": "False"}\n'],
        [("val", Item("dev-8-0-img0.png", "dev-8-0-0", second="dev-8-0-img1.png",
                      questions=(Asked("dev-8-0-0", "so", ("True",)), Asked("dev-8-0-1", "no", ("False",)))))],
    ),
    "msrvtt": (
        [{"videos": [{"video_id": "video0", "split": "validate"}],
          "sentences": [{"video_id": "video0", "caption": "one"}]},
         [{"video_id": 0, "question": "what is it", "answer": "it", "id": 3}]],
        [("val", Item("video0", "video0", ("one",), (Asked("3", "what is it", ("it",), "what"),)))],
    ),
    "msvd": (["c_1_2 one thing\nc_1_2 two\n"], [("val", Item("c_1_2", "c_1_2", ("one thing", "two")))]),
    "vatex": ([[{"videoID": "c", "enCap": ["one"]}, {"videoID": "d"}]],
              [("val", Item("c", "c", ("one",))), ("val", Item("d", "d"))]),
    "lines": (
        ['{"image": "a.jpg", "text": "one", "class_name": "k", "split": "test"}\n'
         '{"video": "c.mp4", "questions": [{"id": 1, "question": "so?", "answers": ["yes"], "kind": "k"}]}\n'],
        [("test", Item("a.jpg", "", ("one",), (), "k")),
         ("val", Item("c.mp4", "", (), (Asked("1", "so?", ("yes",), "k"),)))],
    ),
    "visual_genome": (
        [[{"id": 7, "regions": [{"region_id": 1, "x": 4, "y": 6, "width": 10, "height": 8, "phrase": "a sign "}]}]],
        [("val", Item("7", "1", ("a sign",), region=(4, 6, 14, 14)))],
    ),
    "words": (["a.png, \"WORD\"\nb.png\tother\n"],
              [("val", Item("a.png", text=("WORD",))), ("val", Item("b.png", text=("other",)))]),
}  # fmt: skip


@pytest.mark.parametrize("format", CASES)
def test_formats(format, tmp_path):
    contents, expected = CASES[format]
    files = []
    for i, content in enumerate(contents):
        files.append(str(tmp_path / f"{i}.json"))
        (tmp_path / f"{i}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert annotations.read(format, files, "val") == expected


def test_images_questions_and_classes(tmp_path):
    """From files to Examples: by COCO's number, in folders, by name; a missing file is counted."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    (tmp_path / "images" / "COCO_val2014_000000000007.png").write_bytes(picture())
    (tmp_path / "images" / "deep" / "b.png").write_bytes(picture((0, 255, 0)))
    (tmp_path / "images" / "bad.jpg").write_bytes(b"nothing")
    rows = [
        {"image": "7", "id": "7", "text": ["a", "b"], "class_name": "red"},
        {"image": "b.jpg", "class_name": "green", "questions": [{"question": "so?", "answers": ["yes", "no, it is"]}]},
        {"image": "bad.jpg", "text": "x"},
        {"image": "gone.jpg", "text": "x"},
    ]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = annotated.prepare(
        "mine", "lines", {"val": [str(tmp_path / "items.jsonl")]}, str(tmp_path / "images"), str(tmp_path), workers=1
    )
    report = json.loads((folder / "report.json").read_text())["val"]
    assert report["examples"] == 2
    assert {k: v["count"] for k, v in report["rejected"].items()} == {"undecodable": 1, "file missing": 1}
    source = sources.open_source("mine", "val", str(tmp_path), features=("image", "text", "questions", "class_name"))
    first, second = source[0], source[1]
    assert first["text"] == [b"a", b"b"] and first["class_name"] == "red" and not questions(first["questions"])
    assert second["image"] == picture((0, 255, 0))
    (asked,) = questions(second["questions"])
    assert asked.question == "so?" and asked.answers == ("yes", "no, it is")
    assert sources.name_of(source, 0) == "7" and sources.name_of(source, 1) == "b"
    assert not list(tmp_path.glob("mine/incomplete*"))
    with pytest.raises(UserError, match="already prepared"):
        annotated.prepare("mine", "lines", {"val": ["x"]}, "", str(tmp_path))


def test_pairs_of_images(tmp_path):
    """X-VLM's list of NLVR2: both images, as they are; a hidden label; rows and pairs that lack something."""
    (tmp_path / "a.png").write_bytes(picture((255, 0, 0)))
    (tmp_path / "b.png").write_bytes(picture((0, 255, 0)))
    rows = [
        {"images": ["dev/a.png", "dev/b.png"], "sentence": "so", "label": True},
        {"images": ["b.png", "a.png"], "sentence": "so", "label": None},
        {"images": ["a.png", "gone.png"], "sentence": "so", "label": "True"},
        {"images": ["a.png", "b.png"], "sentence": "so", "label": "maybe"},
        {"identifier": "dev-1", "sentence": "so", "label": "True"},
    ]
    (tmp_path / "nlvr.json").write_text(json.dumps(rows))
    files = {"val": [str(tmp_path / "nlvr.json")]}
    folder = annotated.prepare("pairs", "nlvr2", files, str(tmp_path), str(tmp_path), workers=1)
    report = json.loads((folder / "report.json").read_text())["val"]
    assert report["examples"] == 2 and sum(v["count"] for v in report["rejected"].values()) == 3
    assert any("identifier should read SPLIT-SET-PAIR-SENTENCE" in reason for reason in report["rejected"])
    source = sources.open_source("pairs", "val", str(tmp_path), features=("images", "questions"))
    red, green = picture((255, 0, 0)), picture((0, 255, 0))
    assert [list(source[i]["images"]) for i in range(2)] == [[red, green], [green, red]]
    assert [questions(source[i]["questions"])[0].answers for i in range(2)] == [("True",), ()]
    (tmp_path / "mixed.jsonl").write_text('{"image": "a.png"}\n{"images": ["a.png", "b.png"]}\n')
    with pytest.raises(UserError, match="Some rows have two images and others one"):
        annotated.prepare("mixed", "lines", {"val": [str(tmp_path / "mixed.jsonl")]}, str(tmp_path), str(tmp_path))
    with pytest.raises(UserError, match="two images each, and --frames=2 is of clips"):
        annotated.prepare("clips", "nlvr2", files, str(tmp_path), str(tmp_path), frames=2)
    (tmp_path / "others.jsonl").write_text('{"caption": "x"}\n')
    with pytest.raises(UserError, match="is not of the format 'nlvr2', or has nothing to use"):
        annotated.prepare("others", "nlvr2", {"val": [str(tmp_path / "others.jsonl")]}, "", str(tmp_path))


@pytest.mark.realdata
def test_real_entailment():
    """Every pair of the file once, those of an image together, as the evaluator reads them."""
    path = real_data("flickr8k", "visual_entailment.jsonl")
    items = [item for _, item in annotations.read("snli_ve", [path], "val")]
    found = sorted((item.image, q.question, *q.answers) for item in items for q in item.questions)
    assert found == sorted(read_pairs(path)) and len({item.image for item in items}) == len(items) < len(found)


def test_regions_are_cut_out_with_what_is_around_them(tmp_path):
    """Twice as wide and high about the same centre, within the image; one outside of it is counted."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[20:40, 50:60] = 255
    (tmp_path / "7.png").write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    boxes = [(50, 20, 10, 20), (0, 0, 20, 10), (75, 0, 200, 60), (80, 0, 9, 9)]
    regions = [dict(region_id=i, x=x, y=y, width=w, height=h, phrase="x") for i, (x, y, w, h) in enumerate(boxes)]
    (tmp_path / "regions.json").write_text(json.dumps([{"id": 7, "regions": regions}]))
    files = {"train": [str(tmp_path / "regions.json")]}
    folder = annotated.prepare("mine", "visual_genome", files, str(tmp_path), str(tmp_path), workers=1)
    rejected = json.loads((folder / "report.json").read_text())["train"]["rejected"]
    assert {k: v["count"] for k, v in rejected.items()} == {"region outside": 1}
    source = sources.open_source("mine", "train", str(tmp_path))
    found = [decode(source[i]["image"]) for i in range(len(source))]
    assert [x.shape[:2] for x in found] == [(40, 20), (15, 30), (60, 80)]
    bright = found[0][..., 0] > 128
    assert bright[10:30, 5:15].all() and bright.sum() == 20 * 10


def test_clips(tmp_path):
    film(tmp_path / "long.avi", 12)
    film(tmp_path / "short.avi", 3)
    (tmp_path / "c.txt").write_text("long it gets brighter\nshort no\nbad x\n")
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    folder = annotated.prepare(
        "films", "msvd", {"test": [str(tmp_path / "c.txt")]}, str(tmp_path), str(tmp_path), frames=4, workers=1
    )
    report = json.loads((folder / "report.json").read_text())["test"]
    assert {k: v["count"] for k, v in report["rejected"].items()} == {"too few frames": 1, "undecodable": 1}
    source = sources.open_source("films", "test", str(tmp_path), features=("frames", "text"))
    frames = source[0]["frames"]
    assert len(source) == 1 and len(frames) == 4
    levels = [np.asarray(Image.open(io.BytesIO(f))).mean() for f in frames]
    # Of 12 frames of 0, 20, 40 … the middles of four parts are number 1, 4, 7 and 10.
    np.testing.assert_allclose(levels, [20, 80, 140, 200], atol=6)


def test_videos_in_tars(tmp_path):
    from conftest import write_tar

    from capvl.data.preparing import corpus

    film(tmp_path / "v.avi", 8)
    frames = {f"f{i:02d}.jpg": shards.encode_jpeg(np.full((20, 24, 3), 25 * i, np.uint8)) for i in range(8)}
    samples = [
        ("000", {"avi": (tmp_path / "v.avi").read_bytes(), "txt": b"a film"}),
        ("001", {**frames, "txt": b"pictures"}),
        ("002", {"avi": b"nothing", "txt": b"bad"}),
        ("003", {"txt": b"none"}),
    ]
    write_tar(tmp_path / "0.tar", samples)
    folder = corpus.prepare("tarfilms", {"train": str(tmp_path / "0.tar")}, str(tmp_path), frames=4, workers=1)
    report = json.loads((folder / "report.json").read_text())["train"]
    assert {k: v["count"] for k, v in report["rejected"].items()} == {"undecodable video": 1, "no video": 1}
    source = sources.open_source("tarfilms", "train", str(tmp_path), features=("frames", "text"))
    assert [len(source[i]["frames"]) for i in range(2)] == [4, 4]
    assert [source[1]["frames"][i] for i in range(4)] == [frames[f"f{i:02d}.jpg"] for i in (1, 3, 5, 7)]


@pytest.mark.realdata
def test_real_clips(tmp_path):
    """Frames from the original file are those that were stored beside it, but for coding."""
    from capvl.data.reading.samples import samples

    compared = 0
    for _, members in samples(real_data("video", "clips", "00000.tar"), 1 << 30, lambda *_: None):
        film_bytes = next((members[s] for s in video.SUFFIXES if s in members), None)
        if film_bytes is None:
            continue
        frames = video.read_frames(film_bytes, 4)
        assert len(frames) == 4 and all(f.ndim == 3 and f.dtype == np.uint8 for f in frames)
        stored = np.asarray(Image.open(io.BytesIO(members["f00.jpg"])).convert("RGB"))
        first = np.asarray(Image.fromarray(frames[0]).resize(stored.shape[1::-1]))
        assert first.shape == stored.shape
        compared += 1
    assert compared


def tsv_file(path, rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows))
    tsv.write_index(str(path))
    return str(path)


def test_tsv(tmp_path):
    import base64

    pictures = [picture((i * 90, 0, 0)) for i in range(3)]
    images = tsv_file(tmp_path / "i.tsv", [(f"k{i}", base64.b64encode(p).decode()) for i, p in enumerate(pictures)])
    captions = tsv_file(tmp_path / "c.tsv", [(f"k{i}", json.dumps([{"caption": f"c{i}"}])) for i in range(3)])
    asked = [{"question_id": 1, "question": "so?", "answer": "yes"}]
    queries = tsv_file(tmp_path / "q.tsv", [(f"k{i}", json.dumps(asked if i else [])) for i in range(3)])
    found = annotations.read("tsv", [images, captions, queries], "train")
    assert found[2] == ("train", Item(f"{images}#2", "k2", ("c2",), (Asked("1", "so?", ("yes",)),)))
    for index in ("i.lineidx", "i.lineidx.8b"):  # Either will do.
        kept = (tmp_path / index).read_bytes()
        (tmp_path / index).unlink()
        assert tsv.Tsv(images).image(1) == pictures[1]
        (tmp_path / index).write_bytes(kept)
    annotated.prepare("rows", "tsv", {"train": [images, captions, queries]}, "", str(tmp_path), workers=1)
    source = sources.open_source("rows", "train", str(tmp_path))
    assert source[1]["image"] == pictures[1] and source[1]["text"] == [b"c1"]


def bad_tsv(tmp_path, what):
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\n")
    if what == "stale":
        tsv.write_index(str(path))
        path.write_text("")
    elif what == "index":
        (tmp_path / "x.lineidx").write_text("zero")
    elif what == "columns":
        tsv.write_index(str(path))
        return tsv.Tsv(str(path)).json(0)
    return tsv.Tsv(str(path))


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", r"has no index .*x.lineidx.*python -m capvl.data.tsv index"),
        ("stale", "as it is now"),
        ("index", "not an index"),
        ("columns", "Row 0 of .* has no JSON"),
    ],
)
def test_bad_tsv(tmp_path, what, message):
    with pytest.raises(UserError, match=message):
        bad_tsv(tmp_path, what)


def write(path, text):
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "format, text, message",
    [
        ("coco", "{", "is not JSON"),
        ("coco", "{}", "is not of the format 'coco'"),
        ("msvd", "name\n", "Line 1 of .* a clip's name and a caption"),
        ("words", "a.png,\n", "Line 1 of .* an image's name and a word"),
        ("lines", "{}\n", "is not of the format 'lines'"),
        ("words", "name\n", "an image's name and a word"),
    ],
)
def test_bad_annotations(tmp_path, format, text, message):
    with pytest.raises(UserError, match=message):
        annotations.read(format, [write(tmp_path / "a", text)], "val")


def test_other_bad_input(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"nothing")
    film(tmp_path / "y.mp4", 3)
    cases = [
        (lambda: video.read_frames(str(tmp_path / "none.mp4"), 2), "does not exist"),
        (lambda: video.read_frames(str(tmp_path / "x.mp4"), 2), "can't be read as a video"),
        (lambda: video.read_frames(str(tmp_path / "y.mp4"), 6), "has 3 frames, and 6 are needed"),
        (lambda: annotations.read("vqa", ["a", "b", "c"], "val"), "has the files questions.json,annotations.json"),
        (lambda: annotations.read("folders", [str(tmp_path / "none")], "val"), "does not exist"),
        (lambda: annotated.prepare("a", "cocoa", {"val": ["x"]}, "", str(tmp_path)), "Did you mean 'coco'"),
        (lambda: annotated.prepare("a", "coco", {}, "", str(tmp_path)), "--train=…"),
        (lambda: annotated.prepare("a", "coco", {"val": ["none.json"]}, "", str(tmp_path)), "does not exist"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match="(?i)" + message):
            call()
