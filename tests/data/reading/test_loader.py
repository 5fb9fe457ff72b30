"""Order and augmentation are functions of (seed, index), whatever the hosts, batches and restarts."""

import io
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from capvl import recipes
from capvl.data.examples.image_text import ImageText
from capvl.data.examples.labels import ImageLabel
from capvl.data.images.crops import Crop
from capvl.data.images.decode import BadImageError
from capvl.data.options import DataOptions
from capvl.data.reading import loader, sources
from capvl.data.reading.evaluating import eval_batches
from capvl.data.reading.loader import Host, TrainLoader
from capvl.errors import UserError

FEATURES = ("image", "text")


@pytest.fixture(scope="module")
def options(data_dir):
    return DataOptions(name="scenes/tiny", data_dir=data_dir, flip=True, prefetch=2)


@pytest.fixture(scope="module")
def transform(options):
    return ImageText.from_options(options, res=32, length=12, train=True)


def take(options, transform, batches, *, batch=16, position=0, hosts=1, seed=3):
    """The global batches that so many hosts make together."""
    made = [
        TrainLoader(options, transform, FEATURES, batch=batch, seed=seed, position=position, host=Host(h, hosts))
        for h in range(hosts)
    ]
    out = []
    for _ in range(batches):
        rows = [next(m) for m in made]
        out.append({k: np.concatenate([r[k] for r in rows]) for k in rows[0]})
    assert {m.position for m in made} == {position + batches * batch}
    return out


def rows_of(batches):
    return {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        np.testing.assert_array_equal(value, b[key], err_msg=key)


@pytest.fixture(scope="module")
def uninterrupted(options, transform):
    return rows_of(take(options, transform, 20))


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_makes_the_same_batches(options, transform, uninterrupted, hosts):
    assert_same(rows_of(take(options, transform, 20, hosts=hosts)), uninterrupted)


@pytest.mark.parametrize("hosts, batch", [(1, 16), (2, 16), (4, 8), (1, 64)])
def test_resumed_anywhere_sees_the_same_examples(options, transform, uninterrupted, hosts, batch):
    position = 5 * 16
    rest = rows_of(take(options, transform, 128 // batch, batch=batch, position=position, hosts=hosts))
    assert_same(rest, {k: v[position : position + 128] for k, v in uninterrupted.items()})


def test_every_epoch_has_every_example_once_in_another_order(options, transform):
    size = len(sources.open_source("scenes/tiny", "train", options.data_dir))
    order = loader.Order([size], [1.0], 0)
    epochs = [[order[e * size + i][1] for i in range(size)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    assert all(a != b for a, b in itertools.combinations(epochs, 2))
    assert [loader.Order([size], [1.0], 1)[i][1] for i in range(size)] != epochs[0]


def test_worker_processes_make_the_same_batches(options, transform, uninterrupted):
    import dataclasses

    batches = rows_of(take(dataclasses.replace(options, workers=2), transform, 4))
    assert_same(batches, {k: v[:64] for k, v in uninterrupted.items()})


def test_captions_vary_between_visits(options):
    source = sources.open_source("scenes/tiny", "train", options.data_dir)
    transform = ImageText.from_options(options, res=32, length=12, train=True)
    texts = {tuple(transform(source[0], loader.Uniforms(0, n))["text"]) for n in range(30)}
    assert len(texts) == len({tuple(transform.tokenizer(t, 12)) for t in source[0]["text"]})


def test_mixture_has_its_weights(data_dir):
    order = loader.Order([100, 50], [0.75, 0.25], 0)
    which = [order[n][0] for n in range(400)]
    assert abs(np.mean(which) - 0.25) < 0.01
    options = DataOptions(name="scenes/tiny*3 + scenes/tiny", data_dir=data_dir)
    assert options.parts() == [("scenes/tiny", 3.0), ("scenes/tiny", 1.0)]
    transform = ImageText.from_options(options, res=32, length=12, train=True)
    assert take(options, transform, 1)[0]["image"].shape == (16, 32, 32, 3)


class Flaky:
    """A transform that finds every image bad whose example satisfies a condition."""

    def __init__(self, inner, bad):
        self.inner, self.bad = inner, bad

    def __call__(self, example, uniforms):
        if self.bad(example):
            raise BadImageError("made up")
        return self.inner(example, uniforms)


def test_bad_images_are_replaced_deterministically_and_counted(options, transform, uninterrupted):
    import dataclasses

    flaky = Flaky(transform, lambda e: len(e["image"]) % 5 == 0)
    lenient = dataclasses.replace(options, max_bad=1.0)
    first = rows_of(take(lenient, flaky, 4))
    assert_same(first, rows_of(take(lenient, flaky, 4, hosts=2)))
    same = (first["image"] == uninterrupted["image"][:64]).all(axis=(1, 2, 3))
    assert 0.5 < same.mean() < 1, "only bad images are replaced"
    made = TrainLoader(lenient, flaky, FEATURES, batch=64, seed=3)
    next(made)
    assert made.bad == pytest.approx((~same).sum(), abs=5)
    assert made.bad >= (~same).sum()


def test_too_many_bad_images_stop_the_run(options, transform):
    made = TrainLoader(options, Flaky(transform, lambda e: len(e["image"]) % 5 == 0), FEATURES, batch=64, seed=3)
    with pytest.raises(UserError, match="more than data.max_bad=0.05"):
        for _ in range(20):
            next(made)
    hopeless = TrainLoader(options, Flaky(transform, lambda e: True), FEATURES, batch=4, seed=3)
    with pytest.raises(UserError, match="10 examples in a row"):
        next(hopeless)


def write_texts(folder, name, texts):
    """A prepared data set of one picture with these captions."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from etils import epath

    from capvl.data.preparing import publish, shards

    schema = shards.features()
    empty = {"label": -1, "class_name": "", "boxes": [], "phrases": [], "json": "{}"}
    picture = jpeg(Image.new("RGB", (40, 30), (200, 10, 10)))
    part = epath.Path(folder) / f"{name}.part"
    writer = ArrayRecordWriter(str(part), "group_size:1")
    for i, captions in enumerate(texts):
        row = {"key": str(i), "image": picture, "text": captions, **empty}
        writer.write(schema.serialize_example(schema.encode_example(row)))
    writer.close()
    made = {"train": [publish.Shard(part, len(texts), part.stat().length)]}
    publish.publish(epath.Path(folder) / name / publish.VERSION, name, schema, made, "Texts.", {})


@pytest.fixture
def texts_of(options, tmp_path):
    """A function that writes a data set and gives the texts of so many batches of four, and the loader."""
    import dataclasses

    def read(texts, batches, features=FEATURES, **changes):
        write_texts(tmp_path, "texts", texts)
        tokenizer = options.tokenizer_path()
        chosen = dataclasses.replace(options, name="texts", data_dir=str(tmp_path), tokenizer=tokenizer, **changes)
        transform = ImageText.from_options(chosen, res=16, length=12, train=True)
        made = TrainLoader(chosen, transform, features, batch=4, seed=0, host=Host())
        known = {tuple(transform.tokenizer(t, 12)): t for row in texts for t in row}
        return [known[tuple(row)] for _ in range(batches) for row in next(made)["text"]], made

    return read


@pytest.mark.parametrize("texts", [[[]] * 8, [["", " \n"]] * 8])
@pytest.mark.parametrize("features", [FEATURES, ("image?", "text?", "class_name?"), ("image?", "text?", "questions?")])
def test_data_without_texts_ends_before_the_first_step(texts_of, texts, features):
    with pytest.raises(UserError, match="'texts' has no text in any of 8 records, and the objective learns from text"):
        texts_of(texts, 1, features)


def test_records_without_text_are_replaced_and_counted(texts_of):
    texts = [["a red circle"], [], ["a blue star"], [" "], ["", "a green ring"], ["a red star"]]
    read, made = texts_of(texts, 30, max_bad=1.0)
    assert set(read) == {"a red circle", "a blue star", "a green ring", "a red star"}
    assert made.bad >= 120 // 3


def test_too_many_records_without_text_stop_the_run(texts_of):
    with pytest.raises(UserError, match="bad, or without a text or label, more than data.max_bad=0.05"):
        texts_of([["a red circle"], [], ["a blue star"]], 100)


def test_a_task_that_reads_class_names_needs_no_captions(options, tmp_path):
    from capvl.data.reading.texts import without_text

    example = {"text": [], "class_name": b"dog"}
    assert without_text(example, ("image", "text"))
    assert without_text(example, ("image", "text?"))
    assert not without_text(example, ("image", "text?", "class_name?"))
    assert not without_text(example, ("image", "label"))
    assert without_text(example | {"questions": {"question": []}}, ("text?", "questions?"))
    assert not without_text(example | {"questions": {"question": [b"?"]}}, ("text?", "questions?"))


def test_names_of_regions_are_texts_where_they_are_asked_for():
    """Detection data has classes and no captions."""
    from capvl.data.reading import regions
    from capvl.data.reading.texts import without_text

    rows = {"bbox": [[0.0, 0.0, 1.0, 1.0]], "chain": ["0"], "category": ["dog"], "label": [0]}
    asked = ("image", *regions.FEATURES, "text?")
    assert not without_text({"text": [], "boxes": rows}, asked)
    assert without_text({"text": [], "boxes": rows | {"category": [""], "label": [-1]}}, asked)
    assert without_text({"text": [], "boxes": {k: [] for k in rows}}, asked)
    assert without_text({"text": [], "boxes": rows}, ("image", "text?"))
    assert without_text({"text": [], "boxes": rows}, ("image", *regions.FEATURES, "text"))


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("batch", [20, 64])
def test_evaluation_loses_and_repeats_nothing(data_dir, hosts, batch):
    source = sources.open_source("scenes/tiny", "val", data_dir, features=("image", "label"))
    transform = ImageLabel(Crop(16))
    made = [list(eval_batches(source, transform, batch, Host(h, hosts))) for h in range(hosts)]
    assert len({len(m) for m in made}) == 1, "every host has as many batches"
    assert {b["image"].shape[0] for m in made for b in m} == {batch // hosts}
    indices = [i for m in made for b in m for i in b["index"][b["mask"]]]
    assert sorted(indices) == list(range(len(source)))
    labels = {i: y for m in made for b in m for i, y, k in zip(b["index"], b["label"], b["mask"], strict=True) if k}
    assert all(labels[i] == source[i]["label"] for i in range(len(source)))


def test_bad_image_counts_nowhere_in_evaluation(data_dir):
    source = sources.open_source("scenes/tiny", "val", data_dir, features=("image", "label"))
    bad = {source[i]["image"] for i in (0, 7)}
    batches = list(eval_batches(source, Flaky(ImageLabel(Crop(16)), lambda e: e["image"] in bad), 16))
    indices = [i for b in batches for i in b["index"][b["mask"]]]
    assert sorted(indices) == [i for i in range(len(source)) if i not in (0, 7)]


def test_batch_that_does_not_divide_over_hosts():
    with pytest.raises(UserError, match="batch_size=10 doesn't divide over 4 hosts; the nearest that does is 8"):
        Host(0, 4).rows(10)


@pytest.mark.parametrize(
    "name, split, features, words",
    [
        ("scenes/tinny", "train", FEATURES, ["no configuration 'tinny'", "'tiny'"]),
        ("scenes/tiny", "trian", FEATURES, ["no split 'trian'", "'train'"]),
        ("scenes/tiny", "train[:0%]", FEATURES, ["is empty"]),
        ("scenes/tiny", "train", ("image", "audio"), ["no audio feature"]),
        ("coco_captions", "train", FEATURES, ["not prepared", "capvl.data.prepare tfds --name=coco_captions"]),
        ("fliker8k", "train", FEATURES, ["neither known nor prepared", "capvl.data.prepare tars"]),
    ],
)
def test_data_sets_that_can_not_be_used(data_dir, name, split, features, words):
    with pytest.raises(UserError) as error:
        sources.open_source(name, split, data_dir, features=features)
    for word in words:
        assert word in str(error.value)


def test_files_that_can_not_be_read_at_random(data_dir, tmp_path):
    """A data set that tfds wrote as TFRecord is refused with the command that mends it."""
    folder = shutil.copytree(sources.find("scenes/tiny", data_dir), tmp_path / "packed" / "1.0.0")
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"fileFormat": "tfrecord"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="not in ArrayRecord files; prepare it again with .*--name=packed"):
        sources.open_source("packed", "train", str(tmp_path), features=("image",))


def test_tokenizer_larger_than_the_model(tiny, tmp_path):
    from capvl import train

    recipe = recipes.resolve(tiny(model__vocab=50))
    with pytest.raises(UserError, match=r"has \d+ pieces, more than model.vocab=50"):
        train.run(recipe, str(tmp_path))


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG")
    return buffer.getvalue()


def test_image_that_is_smaller_than_the_crop():
    transform = ImageLabel(Crop(16))
    out = transform({"image": jpeg(Image.new("RGB", (1, 1), (200, 10, 10))), "label": 1}, loader.Uniforms(0, 0))
    assert out["image"].shape == (16, 16, 3)
