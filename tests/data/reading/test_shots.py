"""Few-shot training sets."""

import json
import os

import numpy as np
import pytest
from conftest import GOLDEN

from capvl.data.options import DataOptions
from capvl.data.reading import shots, sources
from capvl.data.reading.loader import Host, TrainLoader
from capvl.errors import UserError


@pytest.mark.golden
def test_images_of_the_golden_file():
    path = os.path.join(GOLDEN, "glip", "glip_misc.json")
    if not os.path.exists(path):
        pytest.skip(f"golden file {path} is absent (set CAPVL_GOLDEN)")
    with open(path) as file:
        golden = json.load(file)["fewshot"]
    images = sorted({image for image, _ in golden["annotations"]})
    classes = [[c for image, c in golden["annotations"] if image == own] for own in images]
    for count, selected in golden["selected"].items():
        assert [images[i] for i in shots.choose(classes, int(count))] == selected, count


def test_a_seed_shuffles_the_images_that_have_a_class():
    classes = [{i % 3} if i % 5 else set() for i in range(60)]
    by_seed = [shots.choose(classes, 2, seed) for seed in (0, 3, 30, 300)]
    assert by_seed[0] == [1, 2, 3, 4, 6, 8]
    for chosen in by_seed:
        assert sorted(next(iter(classes[i])) for i in chosen) == [0, 0, 1, 1, 2, 2]
    assert len({tuple(sorted(chosen)) for chosen in by_seed}) == 4
    assert by_seed[1] == shots.choose(classes, 2, 3)
    # `random.Random(3).shuffle` of 0 to 9 is the same in every version of Python.
    assert shots.choose([{i} for i in range(10)], 1, 3) == [1, 5, 6, 0, 9, 4, 7, 2, 8, 3]


class Records:
    """A source whose records are given."""

    name = "made"

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def annotations(self, features):
        return iter(self.rows)


def boxed(image_id, *labels, **more):
    count = len(labels)
    boxes = {
        "bbox": np.tile([0.0, 0.0, 0.5, 0.5], (count, 1)),
        "label": labels,
        "chain": [str(i) for i in range(count)],
    }
    return {"image_id": image_id, "boxes": boxes | more}


def test_images_are_walked_by_their_ids():
    rows = [boxed(b"10", 0), boxed(b"9", 0, 1), boxed(b"100"), boxed(b"2", 1, 1)]
    chosen = shots.few_shot(Records(rows), 1, 0)
    assert [chosen[i]["image_id"] for i in range(len(chosen))] == [b"2", b"9"]
    as_text = shots.few_shot(Records([row | {"image_id": b"x" + row["image_id"]} for row in rows]), 1, 0)
    assert [as_text[i]["image_id"] for i in range(len(as_text))] == [b"x10", b"x2"]
    named = shots.few_shot(Records([boxed(b"1", -1, category=["cat"]), boxed(b"2", -1, category=["cat"])]), 1, 0)
    assert len(named) == 1
    with pytest.raises(UserError, match="'made' has neither boxes with classes nor labels"):
        shots.few_shot(Records([boxed(b"1", -1, category=[""])]), 1, 0)


def test_the_loader_gives_the_chosen_images_alone(data_dir):
    options = DataOptions(name="scenes/tiny", data_dir=data_dir, shots=2, shots_seed=3, threads=1)

    def transform(example, uniforms):
        return {"label": np.int32(example["label"]), "first": np.frombuffer(example["image"], np.uint8)[-64:]}

    def seen(position):
        loader = TrainLoader(options, transform, ("image", "label"), batch=8, seed=0, position=position, host=Host())
        return [next(loader) for _ in range(6)]

    batches = seen(0)
    whole = sources.open_source("scenes/tiny", "train", data_dir, features=("label",))
    labels = {int(whole[i]["label"]) for i in range(len(whole))}
    images = {
        bytes(row): int(label) for batch in batches for row, label in zip(batch["first"], batch["label"], strict=True)
    }
    assert sorted(images.values()) == sorted(2 * list(labels))
    np.testing.assert_array_equal(seen(8)[0]["first"], batches[1]["first"])


def test_a_stream_has_no_shots():
    with pytest.raises(UserError, match="data.shots=1 needs a prepared data set"):
        DataOptions(name="stream:*.tar", shots=1)
    with pytest.raises(UserError, match="must not be negative"):
        DataOptions(shots=-1)
