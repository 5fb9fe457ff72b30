"""Region data sets: from annotations and images to records that `regions` reads."""

import base64
import json

import numpy as np
import pytest
from PIL import Image
from region_files import coco, make, picture, report

from capvl.data import prepare
from capvl.data.preparing import look, region_sets
from capvl.data.preparing.regional import Rules
from capvl.data.reading import sources
from capvl.data.reading.regions import FEATURES, Region, categories, regions
from capvl.errors import UserError


def test_a_set_from_files_to_regions(tmp_path):
    files = coco(tmp_path)
    (tmp_path / "images/000000000002.jpg").unlink()
    (tmp_path / "images/000000000003.jpg").write_bytes(b"rubbish")
    folder = make(tmp_path, "set", "coco", {"train": files}, exclude=("own",))
    told = report(folder)
    assert {k: told[k] for k in ("examples", "boxes", "captions", "phrases")} == {
        "examples": 4, "boxes": 4, "captions": 4, "phrases": 0}  # fmt: skip
    assert told["rejected"] == {
        "file missing": {"count": 1, "first": ["2"]},
        "undecodable image": {"count": 1, "first": ["3"]},
    }
    source = sources.open_source("set", "train", str(tmp_path / "out"), features=("image", "text", *FEATURES))
    assert regions(source[0]) == [Region(tuple(np.float32([1 / 40, 0.1, 17 / 40, 0.5]).tolist()), (), 0, "dog")]
    assert regions(source[0])[0].names == ("dog",)
    assert source[0]["text"] == [b"caption 1"] and categories(source) == ["dog"]
    row = source.read(0, ("image_id", "coco_id", "source", "height", "width", "file_name"))
    assert {k: sources.as_text(v) for k, v in row.items()} == {
        "image_id": "1", "coco_id": "1", "source": "coco", "height": "30", "width": "40",
        "file_name": "000000000001.jpg"}  # fmt: skip


def test_rows_of_one_image_are_put_together(tmp_path):
    coco(tmp_path, 2)

    def line(name, caption, phrase, box):
        regions = [{"bbox": box, "phrase": phrase}]
        return json.dumps(
            {"filename": name, "height": 30, "width": 40, "grounding": {"caption": caption, "regions": regions}}
        )

    lines = [line("000000000001.jpg", "a dog", "dog", [0, 0, 20, 15]), line("000000000002.jpg", "x", "x", [0, 0, 4, 3])]
    lines.append(line("000000000001.jpg", "the cat", "cat", [20, 15, 40, 30]))
    (tmp_path / "o.jsonl").write_text("\n".join(lines))
    make(tmp_path, "o", "odvg", {"val": [str(tmp_path / "o.jsonl")]})
    source = sources.open_source("o", "val", str(tmp_path / "out"), features=("image", "text", *FEATURES))
    dog, cat = regions(source[0])
    assert source[0]["text"] == [b"a dog", b"the cat"]
    assert (dog.spans, cat.spans) == (((0, 2, 5),), ((1, 4, 7),))
    assert cat.box == (0.5, 0.5, 1, 1) and len(source) == 2


def test_images_in_the_lines(tmp_path):
    (tmp_path / "images").mkdir()
    rows = [{"binary": b, "elems": [{"caption": "dog", "attributes": ["red"], "bb": [4, 3, 16, 12]}]}
            for b in (base64.b64encode(picture()).decode(), "%%%")]  # fmt: skip
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = make(tmp_path, "x", "xvlm", {"val": [str(tmp_path / "x.jsonl")]})
    assert report(folder, "val")["rejected"] == {"image is not base64": {"count": 1, "first": ["line 2 of x.jsonl"]}}
    source = sources.open_source("x", "val", str(tmp_path / "out"), features=("image", *FEATURES))
    (region,) = regions(source[0])
    assert region.phrases == ("dog",) and region.attributes == ("red",)
    np.testing.assert_allclose(region.box, (0.1, 0.1, 0.5, 0.5), rtol=1e-6)


def test_scenes_and_odvg_out_and_in(data_dir, tmp_path):
    out = str(tmp_path / "out")
    import shutil

    shutil.copytree(f"{data_dir}/scenes/tiny", f"{out}/scenes/tiny")
    made = region_sets.prepare("things", "prepared", {"val": ["scenes/tiny"]}, "", out, workers=1)
    source = sources.open_source("things", "val", out, features=("image", "text", *FEATURES))
    scenes = sources.open_source("scenes/tiny", "val", out, features=("image", "objects"))
    assert len(source) == len(scenes) == 64 and categories(source)[0] == "circle"
    named = 0
    for i in range(20):
        assert source[i]["image"] == scenes[i]["image"]
        for region, thing in zip(regions(source[i]), regions(scenes[i]), strict=True):
            np.testing.assert_allclose(region.box, thing.box)
            assert thing.phrases[0] in region.phrases and region.category in (*categories(source), "word")
            for number, start, end in region.spans:
                said = source[i]["text"][number].decode()[start:end]
                assert said in thing.phrases[0]
                named += 1
    assert named > 100 and report(made, "val")["rejected"] == {}
    counts = look.write_odvg("things", "val", str(tmp_path / "o.jsonl"), out, str(tmp_path / "files"))
    assert counts["detection"] == 64 and counts["grounding"] > 200
    files = {"val": [str(tmp_path / "o.jsonl"), str(tmp_path / "o.jsonl.labels.json")]}
    region_sets.prepare("back", "odvg", files, str(tmp_path / "files"), out, workers=1)
    back = sources.open_source("back", "val", out, features=("image", "text", *FEATURES))
    assert len(back) == 64 and categories(back) == categories(source)
    for i in range(0, 64, 9):
        assert back[i]["image"] == source[i]["image"]
        ours = [r for r in regions(source[i]) if r.category]
        there = [r for r in regions(back[i]) if r.category]
        assert [r.category for r in there] == [r.category for r in ours]
        np.testing.assert_allclose([r.box for r in there], [r.box for r in ours], atol=1e-4)
        spans = {(*span, r.category) for r in ours for span in r.spans}
        assert len({span for r in regions(back[i]) for span in r.spans}) == len(spans) > 0
    with pytest.raises(UserError, match="are no files of their own; write them with --images"):
        look.write_odvg("things", "val", str(tmp_path / "o.jsonl"), out)


def test_the_page(tmp_path, capsys):
    make(tmp_path, "set", "coco", {"val": coco(tmp_path)})
    capsys.readouterr()
    page = tmp_path / "page.html"
    arguments = ["--data=set", "--split=val", f"--out={page}", "--count=4", f"--data_dir={tmp_path}/out"]
    prepare.main(["look", *arguments])
    assert capsys.readouterr().out.split() == [str(page), str(tmp_path / "page.png")]
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 4 and "http" not in text
    assert "caption 1" in text or "caption 2" in text
    assert "classes" in text and "dog 6" in text
    with Image.open(tmp_path / "page.png") as sheet:
        assert sheet.size[0] > 4 * 360
    with pytest.raises(UserError, match="--count must be at least 1"):
        prepare.main(["look", *arguments, "--count=0"])
    with pytest.raises(UserError, match="x.png names the page, such as page.html"):
        prepare.main(["look", *arguments, f"--out={tmp_path}/x.png"])


def test_captions_are_marked_and_escaped():
    found = [Region((0, 0, 1, 1), ("a<b",), spans=((0, 2, 5),)), Region((0, 0, 1, 1), ("x",), spans=((0, 3, 6),))]
    text = look._marked("> a<b &", 0, found, [(1, 2, 3), (4, 5, 6)])
    assert text == '&gt; <b style="color:rgb(1, 2, 3)">a&lt;b</b> &amp;'


def test_the_command_and_killed_preparations(tmp_path, monkeypatch):
    files = coco(tmp_path)
    arguments = ["regions", "--name=set", "--format=coco", f"--val={','.join(files)}", f"--files={tmp_path}/images"]
    arguments += [f"--data_dir={tmp_path}/out", "--workers=1"]
    monkeypatch.setattr(region_sets, "EACH", 2)
    monkeypatch.setattr(region_sets.leaks, "listing", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare.main(arguments)
    parts = tmp_path / "out/set/incomplete"
    first = (parts / "val-00000").stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.setattr(region_sets, "EACH", 2)
    with pytest.raises(UserError, match="unfinished preparation of other annotations, images or options"):
        prepare.main([*arguments, "--max_phrase=5"])
    seen = []
    publish = region_sets.publish
    stamp = lambda *a: seen.append((parts / "val-00000").stat().st_mtime_ns) or publish(*a)  # noqa: E731
    monkeypatch.setattr(region_sets, "publish", stamp)
    prepare.main(arguments)
    assert seen == [first] and not parts.exists()
    with pytest.raises(UserError, match="already prepared"):
        prepare.main(arguments)


def test_errors(tmp_path):
    files = coco(tmp_path)
    for changes, words in (
        ({"format": "cocoo"}, "The format 'cocoo' is unknown"),
        ({"splits": {}}, "Say which annotation files"),
        ({"splits": {"all": files}}, "does not say which split is whose"),
        ({"rules": Rules(turned="left")}, "--turned='left' is unknown"),
        ({"rules": Rules(max_phrase=0)}, "--max_phrase must be at least 1"),
        ({"exclude": (str(tmp_path / "none.json"),), "splits": {"train": files}}, "does not exist"),
    ):
        values = {"name": "set", "format": "coco", "splits": {"val": files}} | changes
        with pytest.raises(UserError, match=words):
            make(tmp_path, **values)
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(json.loads((tmp_path / "instances.json").read_text()) | {"annotations": []}))
    with pytest.raises(UserError, match="No image of 'set' has a box"):
        make(tmp_path, "set", "coco", {"val": [str(bare)]})
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="Split 'val' of 'set' has no example; left out: 6 x file missing.*--files"):
        make(tmp_path, "set", "coco", {"val": files})
    # Nothing is left that the next try would trip over.
    assert not (tmp_path / "out/set/incomplete").exists()


def test_beam_makes_the_same_files(tmp_path, monkeypatch):
    pytest.importorskip("apache_beam")
    monkeypatch.setattr(region_sets, "EACH", 2)
    files = coco(tmp_path)
    made = []
    for way, beam in (("here", None), ("beam", ["--runner=DirectRunner"])):
        out = str(tmp_path / way)
        folder = region_sets.prepare("set", "coco", {"val": files}, str(tmp_path / "images"), out, beam=beam)
        made.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert made[0] == made[1] and sum("array_record" in name for name in made[0]) == 3
    monkeypatch.setattr(region_sets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs it installed"):
        region_sets.prepare("other", "coco", {"val": files}, "", str(tmp_path / "out"), beam=[])
