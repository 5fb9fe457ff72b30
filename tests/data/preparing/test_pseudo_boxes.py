"""Boxes by a teacher: lines of ODVG in parts, and a data set of regions of them."""

import json
import pathlib
import types

import numpy as np
import pytest
from conftest import write_tar
from region_files import picture

from capvl import loading
from capvl.data import teacher
from capvl.data.images.crops import Crop
from capvl.data.preparing import corpus, pseudo_boxes, region_sets
from capvl.data.preparing.pseudo_boxes import Found
from capvl.data.preparing.regional import Rules
from capvl.data.reading import sources
from capvl.data.reading.regions import FEATURES, regions
from capvl.data.text.noun_phrases import noun_phrases
from capvl.errors import UserError
from capvl.inference import finding

CALLS = []
COUNT = 7


def load(model):
    """A teacher that finds every "dog" of a caption, ever less surely."""

    def teach(images, captions):
        CALLS.append(len(captions))
        starts = [[i for i in range(len(c)) if c.startswith("dog", i)] for c in captions]
        return [[Found((0.1, 0.2, 0.5, 0.6), s, s + 3, 0.9 - s / 10) for s in own] for own in starts]

    CALLS.append(model)
    return teach


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_boxes, "EACH", 3)
    pseudo_boxes._teacher.cache_clear()
    pseudo_boxes._source.cache_clear()
    CALLS.clear()
    samples = [
        (str(i), {"jpg": picture((30, 40 + i)), "txt": f"{'a ' * (i % 3)}dog {i}".encode()}) for i in range(COUNT - 1)
    ]
    samples.append(("x", {"jpg": picture((31, 40)), "txt": b"a cat"}))
    write_tar(tmp_path / "0.tar", samples)
    corpus.prepare("web", {"train": str(tmp_path / "0.tar")}, str(tmp_path / "out"), workers=1)
    return str(tmp_path / "out")


def test_from_captions_to_regions(out, tmp_path):
    lines = str(tmp_path / "web.jsonl")
    counts = pseudo_boxes.write("web", "train", lines, out, load, "teacher", batch=2)
    assert (counts["captions"], counts["boxes"]) == (COUNT - 1, COUNT - 1)
    assert {reason: n for reason, (n, _) in counts["rejected"].items()} == {"caption without a box": 1}
    # The teacher is loaded once, and asked for `batch` captions at most.
    assert CALLS.count("teacher") == 1 and sorted(CALLS[1:]) == [1, 1, 1, 2, 2]
    assert not (tmp_path / "web.jsonl.parts").exists()
    first = json.loads(pathlib.Path(lines).read_text().partition("\n")[0])
    assert first["grounding"]["regions"][0].keys() == {"bbox", "phrase", "tokens_positive", "score"}
    rules = Rules(min_score=0.65)
    region_sets.prepare("boxes", "odvg", {"train": [lines]}, "", out, workers=1, rules=rules, allow_leaks=True)
    made = sources.open_source("boxes", "train", out, features=("image", "text", *FEATURES))
    web = sources.open_source("web", "train", out)
    images = {web[i]["image"]: web[i]["text"][0].decode() for i in range(len(web))}
    sure = [text for text in images.values() if text.find("dog") in (0, 2)]
    assert len(made) == len(sure) < COUNT - 1
    for i in range(len(made)):
        (region,) = regions(made[i])
        text = images[made[i]["image"]]
        assert made[i]["text"] == [text.encode()] and region.spans == ((0, text.find("dog"), text.find("dog") + 3),)
        np.testing.assert_allclose(region.box, (0.1, 0.2, 0.5, 0.6), atol=1e-3)


def test_a_killed_job_goes_on(out, tmp_path, monkeypatch):
    lines, part = str(tmp_path / "web.jsonl"), pseudo_boxes._write_part
    monkeypatch.setattr(pseudo_boxes, "_write_part", lambda job: 1 / 0 if job.first == 3 else part(job))
    with pytest.raises(ZeroDivisionError):
        pseudo_boxes.write("web", "train", lines, out, load, "teacher")
    monkeypatch.setattr(pseudo_boxes, "_write_part", part)
    with pytest.raises(UserError, match="unfinished preparation of other"):
        pseudo_boxes.write("web", "train", lines, out, load, "another")
    CALLS.clear()
    counts = pseudo_boxes.write("web", "train", lines, out, load, "teacher")
    assert counts["captions"] == COUNT - 1 and sum(CALLS) == COUNT - 3
    killed = pathlib.Path(lines).read_text()
    with pytest.raises(UserError, match="is already there"):
        pseudo_boxes.write("web", "train", lines, out, load, "teacher")
    pseudo_boxes.write("web", "train", lines + "2", out, load, "teacher", batch=5)
    assert pathlib.Path(lines + "2").read_text() == killed
    with pytest.raises(UserError, match="should be the name of a whole split"):
        pseudo_boxes.write("web", "train[:3]", lines, out, load, "teacher")
    with pytest.raises(UserError, match="min_score=2 between 0 and 1"):
        pseudo_boxes.write("web", "train", lines, out, load, "teacher", min_score=2)


def test_on_beam(out, tmp_path):
    pytest.importorskip("apache_beam")
    made = []
    for name, beam in (("here", None), ("beam", ["--runner=DirectRunner"])):
        pseudo_boxes.write("web", "train", str(tmp_path / name), out, load, "teacher", beam=beam)
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]


class Reader:
    """Stands for a loaded model: finds the last noun phrase of each caption."""

    options = types.SimpleNamespace(length=9, res=64, max_side=96, image_shape=lambda: (96, 96, 4))
    crop = Crop(64, "aspect", max_side=96)

    def tokenizer(self, text, length):
        return np.pad(np.ones(len(text.split()) + 1, np.int32), (0, 3))

    def ground(self, images, captions, *, threshold):
        assert threshold == 0 and all(noun_phrases(text) for text in captions)
        rows = [noun_phrases(text)[-1] for text in captions]
        box = np.array([[0.1, 0.2, 0.5, 0.6]], np.float32)
        return [
            finding.Found(box, np.array([len(text) / 10], np.float32), [text[s:e]], image, [(s, e)])
            for image, text, (s, e) in zip(images, captions, rows, strict=True)
        ]


def test_a_model_as_a_teacher(monkeypatch):
    monkeypatch.setattr(loading, "load", lambda path: Reader())
    # The second names nothing, the third is too long, the last ones' images are too small for the model.
    captions = ["a cat sees a red cat", "running", "a dog " * 5, "a cat", "a cat"]
    images = [*[picture()] * 3, picture((1, 1)), picture((10, 2000))]
    first, *others = teacher.load("runs/x")(images, captions)
    assert others == [[]] * 4
    (found,) = first
    assert captions[0][found.start : found.end] == "a red cat" and found.score == 2
    np.testing.assert_allclose(found.box, (0.1, 0.2, 0.5, 0.6), rtol=1e-6)


def test_the_command(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loading, "load", lambda path: Reader())
    arguments = ["--data=web", f"--data_dir={out}", "--model=runs/x", f"--out={tmp_path}/web.jsonl"]
    teacher.main([*arguments, "--min_score=0.6"])
    assert "web.jsonl: 4 boxes of 4 captions; left out: 3 x caption without a box (" in capsys.readouterr().out
