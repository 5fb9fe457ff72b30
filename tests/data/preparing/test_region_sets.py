"""Region data sets: from annotations and images to records that `regions` reads; what is left out, and leaks."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from capvl.data import prepare
from capvl.data.preparing import look, region_sets, regional
from capvl.data.preparing.regional import Annotated, Entity, Phrase, Rules
from capvl.data.reading import sources
from capvl.data.reading.regions import FEATURES, Region, categories, regions
from capvl.data.reading.rejected import Rejected, RejectedError
from capvl.errors import UserError

SIZE = (30, 40)
LONG = "x" * 301


def picture(size=SIZE, orientation=1, kind="JPEG") -> bytes:
    tags, buffer = Image.Exif(), io.BytesIO()
    tags[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind, exif=tags)
    return buffer.getvalue()


def entity(*boxes, phrases=("dog",), category=""):
    return Entity(boxes, tuple(Phrase(p) if isinstance(p, str) else p for p in phrases), category)


def example(item, data=None, **rules):
    left, changed = Rejected(), Rejected()
    record = regional.to_example(item, data or picture(), "test", {"cat": 0}, Rules(**rules), left, changed)
    return record, {k: n for k, (n, _) in left.items()}, {k: n for k, (n, _) in changed.items()}


def boxes_of(record) -> list[tuple[float, ...]]:
    return [(b["bbox"].xmin, b["bbox"].ymin, b["bbox"].xmax, b["bbox"].ymax) for b in record["boxes"]]


WHOLE = (0, 0, 40, 30)
FAULTS = {
    "box of no area": [entity((5, 5, 5, 9)), entity((9, 9, 5, 12))],
    "box outside of the image": [entity((40, 0, 50, 10)), entity((-9, -9, 0, 5))],
    "box is not of numbers": [entity((0, 0, float("nan"), 3))],
    "box that is there twice": [entity((1, 1, 5, 5), (1, 1, 5, 5), phrases=("x",))],
    "region that is there twice": [entity(WHOLE), entity(WHOLE)],
    "region without a phrase left": [entity((1, 1, 9, 9), phrases=("...",))],
    "phrase says nothing": [entity(WHOLE, phrases=("a", " - !"))],
    "phrase too long": [entity(WHOLE, phrases=("a", LONG))],
    "phrase not in its caption": [
        entity(WHOLE, phrases=("a", Phrase("b", 0, 3, 99), Phrase("c", 4, 0, 1), Phrase("d", 0, 2, 2)))
    ],
}


@pytest.mark.parametrize("reason", FAULTS)
def test_what_is_left_out_of_an_image(reason):
    item = Annotated("a.jpg", "7", size=SIZE, text=("one thing",), entities=(entity(WHOLE), *FAULTS[reason]))
    record, left, changed = example(item)
    wanted = sum(len(e.boxes) for e in FAULTS[reason]) if reason.startswith("box of") else None
    assert reason in left and (wanted is None or left[reason] == wanted)
    assert boxes_of(record)[0] == (0, 0, 1, 1) and not changed
    said = {(p["phrase"], p["sentence"]) for p in record["phrases"]}
    assert said <= {("dog", -1), ("a", -1), ("x", -1)}


def test_boxes_that_touch_are_cut():
    inside, rounded, touching = (4, 3, 20, 15), (-0.5, 0, 40.5, 30.2), (-9, 15, 20, 90)
    record, left, changed = example(Annotated("a", "7", entities=(entity(inside, rounded, touching),)))
    np.testing.assert_allclose(boxes_of(record), [(0.1, 0.1, 0.5, 0.5), (0, 0, 1, 1), (0, 0.5, 0.5, 1)], rtol=1e-6)
    assert changed == {"box cut at the image's edge": 1} and not left  # Half a pixel is rounding.


def test_fractions_and_classes():
    item = Annotated("a", "7", entities=(Entity(((0.1, 0.2, 0.3, 0.4),), (), "cat", ("red", "red")),), fractions=True)
    record, _, _ = example(item)
    np.testing.assert_allclose(boxes_of(record), [(0.1, 0.2, 0.3, 0.4)], rtol=1e-6)
    assert (record["boxes"][0]["label"], record["boxes"][0]["category"]) == (0, "cat")
    assert record["attributes"] == [{"attribute": "red", "chain": "0"}]
    other, _, _ = example(Annotated("a", "7", entities=(Entity((WHOLE,), (), "unheard of"),)))
    assert other["boxes"][0]["label"] == -1


def test_captions_that_say_nothing_move_the_others():
    phrases = (Phrase("dog", 1, 2, 5), Phrase(".", 0, 0, 1))
    record, left, _ = example(Annotated("a", "7", text=("...", "a dog"), entities=(entity(WHOLE, phrases=phrases),)))
    assert record["text"] == ["a dog"] and left == {"caption says nothing": 1, "phrase says nothing": 1}
    assert record["phrases"] == [{"phrase": "dog", "chain": "0", "sentence": 0, "start": 2, "end": 5}]


IMAGES = {
    "undecodable image": (b"rubbish", SIZE),
    "truncated image": (picture((90, 90))[:-2000], (90, 90)),
    "image has another size than its annotation says": (picture((60, 80)), SIZE),
    "EXIF turns the image, and nothing says which way its boxes are": (picture(SIZE, 3), SIZE),
}


@pytest.mark.parametrize("reason", IMAGES)
def test_images_that_are_left_out(reason):
    data, size = IMAGES[reason]
    with pytest.raises(RejectedError, match=reason):
        example(Annotated("a", "7", size=size, entities=(entity(WHOLE),)), data)


def test_images_without_regions():
    for entities, reason in (((), "no region$"), ((entity((50, 0, 60, 9)),), "no region left")):
        with pytest.raises(RejectedError, match=reason):
            example(Annotated("a", "7", text=("one",), entities=entities))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_of_images_that_exif_turns(orientation):
    """A red rectangle in the stored image: where it is in the upright one, is its box."""
    from capvl.data.images.decode import decode

    pixels, buffer, tags = np.zeros((30, 40, 3), np.uint8), io.BytesIO(), Image.Exif()
    pixels[6:12, 4:24] = 255
    tags[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, "PNG", exif=tags)
    stored = Annotated("a", "7", size=None, entities=(entity((4, 6, 24, 12)),))
    record, _, _ = example(stored, buffer.getvalue(), turned="stored")
    rows, columns = np.nonzero(decode(buffer.getvalue())[..., 0])
    height, width = record["height"], record["width"]
    found = (columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)
    np.testing.assert_allclose(boxes_of(record)[0], found, rtol=1e-6)
    if orientation >= 5:  # The size says which one is meant.
        said, _, _ = example(stored._replace(size=(30, 40)), buffer.getvalue())
        assert boxes_of(said) == boxes_of(record)
        upright = Annotated("a", "7", size=(40, 30), entities=(entity((3, 4, 15, 20)),))
        said, _, _ = example(upright, buffer.getvalue())
        np.testing.assert_allclose(boxes_of(said), [(0.1, 0.1, 0.5, 0.5)], rtol=1e-6)
    elif orientation > 1:
        with pytest.raises(RejectedError, match="EXIF"):
            example(stored, buffer.getvalue())


def coco(tmp_path, count=6, name="instances.json"):
    """COCO's images 1 to `count`, one box and one caption each."""
    (tmp_path / "images").mkdir(exist_ok=True)
    for i in range(1, count + 1):
        (tmp_path / f"images/{i:012d}.jpg").write_bytes(picture())
    images = [{"id": i, "file_name": f"{i:012d}.jpg", "height": 30, "width": 40} for i in range(1, count + 1)]
    rows = [{"image_id": i, "category_id": 1, "bbox": [i, 3, 16, 12]} for i in range(1, count + 1)]
    said = [{"image_id": i, "caption": f"caption {i}"} for i in range(1, count + 1)]
    instances = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / name).write_text(json.dumps(instances))
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": said}))
    return [str(tmp_path / name), str(tmp_path / "captions.json")]


def refs(tmp_path, splits):
    """RefCOCO of images 1 …: split of each."""
    rows = [
        {"ref_id": i, "ann_id": i, "image_id": i, "split": own, "sentences": [{"sent": f"dog {i}"}]}
        for i, own in enumerate(splits, 1)
    ]
    (tmp_path / "refs.json").write_text(json.dumps(rows))
    values = json.loads((tmp_path / "instances.json").read_text())
    for i, row in enumerate(values["annotations"], 1):
        row["id"] = i
    (tmp_path / "refs_instances.json").write_text(json.dumps(values))
    return [str(tmp_path / "refs.json"), str(tmp_path / "refs_instances.json")]


def make(tmp_path, name, format, splits, **options):
    options = {"workers": 1} | options
    return region_sets.prepare(name, format, splits, str(tmp_path / "images"), str(tmp_path / "out"), **options)


def report(folder, split="train"):
    return json.loads((folder / "report.json").read_text())[split]


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


def test_leaks_must_be_named(tmp_path):
    files = coco(tmp_path)
    with pytest.raises(UserError, match="may be among those that RefCOCO.*--exclude=FILES.*--allow_leaks"):
        make(tmp_path, "set", "coco", {"train": files})
    with pytest.raises(UserError, match="contradict"):
        make(tmp_path, "set", "coco", {"train": files}, exclude=("own",), allow_leaks=True)
    assert not (tmp_path / "out/set").exists()
    # Evaluations themselves, and images that are not COCO's, need no word.
    assert report(make(tmp_path, "eval", "coco", {"val": files}), "val")["examples"] == 6
    assert report(make(tmp_path, "other", "objects365", {"train": files[:1]}))["examples"] == 6


def test_images_of_refcocos_validation_are_refused(tmp_path):
    files = coco(tmp_path)
    pair = refs(tmp_path, ["train", "val", "testA", "train", "test", "train"])
    folder = make(tmp_path, "named", "coco", {"train": files}, exclude=(pair[0],))
    told = report(folder)
    assert told["rejected"] == {"image of the evaluation refs.json": {"count": 3, "first": ["2", "3", "5"]}}
    assert told["examples"] == 3 and told["evaluations"] == ["refs.json"]
    assert report(make(tmp_path, "leaky", "coco", {"train": files}, allow_leaks=True))["examples"] == 6


def test_images_of_prepared_evaluations_are_refused(tmp_path):
    files = coco(tmp_path)
    pair = refs(tmp_path, ["train", "val", "testA", "train", "test", "train"])
    ref = make(tmp_path, "ref", "refcoco", {"all": pair}, exclude=("own",))
    assert [report(ref, s)["examples"] for s in ("train", "val", "testA", "test")] == [3, 1, 1, 1]
    for exclude in (("prepared",), ("own",)):
        told = report(make(tmp_path, f"c{exclude[0]}", "coco", {"train": files}, exclude=exclude))
        assert {k: v["count"] for k, v in told["rejected"].items()} == {
            f"image of the evaluation ref:{own}": 1 for own in ("val", "testA", "test")
        }


def test_an_image_in_two_splits(tmp_path):
    """RefCOCOg of Google's split has images in training and in validation, by other objects."""
    coco(tmp_path)
    pair = refs(tmp_path, ["train", "val", "train"])
    rows = json.loads((tmp_path / "refs.json").read_text())
    rows.append(rows[1] | {"ref_id": 9, "split": "train"})
    (tmp_path / "refs.json").write_text(json.dumps(rows))
    told = report(make(tmp_path, "g", "refcoco", {"all": pair}, exclude=("own",)))
    assert told["rejected"] == {"image of the evaluation val": {"count": 1, "first": ["2"]}}
    assert report(make(tmp_path, "all", "refcoco", {"all": pair}, allow_leaks=True))["examples"] == 3


def test_visual_genomes_images_by_their_numbers_in_coco(tmp_path):
    coco(tmp_path)
    (tmp_path / "vg.json").write_text(
        json.dumps([{"image_id": i, "coco_id": c, "height": 30, "width": 40} for i, c in ((11, 2), (12, None))])
    )
    thing = {"object_id": 1, "x": 1, "y": 2, "w": 3, "h": 4, "names": ["dog"]}
    (tmp_path / "objects.json").write_text(json.dumps([{"image_id": i, "objects": [thing]} for i in (11, 12)]))
    for i in (11, 12):
        (tmp_path / f"images/{i}.jpg").write_bytes(picture())
    (tmp_path / "list.txt").write_text("COCO_val2014_000000000002.jpg\n")
    files = [str(tmp_path / "vg.json"), str(tmp_path / "objects.json")]
    told = report(make(tmp_path, "vg", "visual_genome", {"train": files}, exclude=(str(tmp_path / "list.txt"),)))
    assert told["rejected"] == {"image of the evaluation list.txt": {"count": 1, "first": ["11"]}}
    assert told["images whose number in COCO is unknown"] == 1
    line = {"image_rpath": "vg/11.jpg", "elems": [{"caption": "dog", "bb": [1, 2, 3, 4]}]}
    lines = [json.dumps(line), json.dumps(line | {"image_rpath": "vg/12.jpg"})]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    options = {"exclude": (str(tmp_path / "list.txt"),)}
    for image_data, count in (("", 2), (files[0], 1)):
        lines_of = {"train": [str(tmp_path / "x.jsonl")]}
        told = report(make(tmp_path, f"x{count}", "xvlm", lines_of, image_data=image_data, **options))
        assert told["examples"] == count
    for bad in (str(tmp_path / "objects.json"), str(tmp_path / "x.jsonl")):
        with pytest.raises(UserError, match="is not"):
            make(tmp_path, "bad", "xvlm", lines_of, image_data=bad, **options)


def test_an_evaluation_that_was_trained_on_before_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    make(tmp_path, "before", "coco", {"train": coco(tmp_path)}, allow_leaks=True)
    pair = refs(tmp_path, ["val", "val"])
    folder = make(tmp_path, "ref", "refcoco", {"all": pair})
    assert report(folder, "val")["images that are trained on in"] == {"before": 2}
    prepare.print_report(folder)
    assert "IMAGES THAT before TRAINS ON" in capsys.readouterr().out


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


def test_captions_are_marked_and_escaped():
    found = [Region((0, 0, 1, 1), ("a<b",), spans=((0, 2, 5),)), Region((0, 0, 1, 1), ("x",), spans=((0, 3, 6),))]
    text = look._marked("> a<b &", 0, found, [(1, 2, 3), (4, 5, 6)])
    assert text == '&gt; <b style="color:rgb(1, 2, 3)">a&lt;b</b> &amp;'


def test_the_command_and_killed_preparations(tmp_path, monkeypatch):
    files = coco(tmp_path)
    arguments = ["regions", "--name=set", "--format=coco", f"--val={','.join(files)}", f"--files={tmp_path}/images"]
    arguments += [f"--data_dir={tmp_path}/out", "--workers=1"]
    monkeypatch.setattr(region_sets, "EACH", 2)
    monkeypatch.setattr(region_sets.leaks, "listing", lambda items: 1 / 0)
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
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="Split 'val' of 'set' has no example; left out: 6 x file missing"):
        make(tmp_path, "set", "coco", {"val": files})


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
