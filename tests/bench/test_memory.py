"""Memory of a training whose images change their size."""

import pytest

from capvl import recipes
from capvl.bench import memory
from capvl.errors import UserError

GIT = {
    "encoder": "w16d1h2m32/16",
    "res": 32,
    "text": "w16d1h2m32",
    "vocab": 128,
    "start": 0,
    "length": 12,
    "text_positions": 12,
    "dtype": "float32",
}


def test_growth():
    assert memory.growth([90, 100, 100, 100, 100, 101, 100, 100]) == 0
    assert memory.growth([10, 20, 30, 40, 50, 60, 70, 80]) == 30


def test_too_few_looks(tiny_recipe):
    with pytest.raises(UserError, match="at least eight times --every=25"):
        memory.measure(tiny_recipe(), 100, 25)


@pytest.mark.long
def test_memory_stays_flat_over_1000_steps_of_changing_sizes(tiny):
    values = tiny(steps=1000, batch_size=8, model=GIT, schedule={"warmup": 0})
    values["objective"] = {"name": "git", "sides": [32, 48, 64]}
    found = memory.measure(recipes.resolve(values), 1000, 25)
    assert found["buckets"] == found["compilations"] > 2
    assert max(found["arrays"]) == min(found["arrays"])
    assert found["growth"] < 16, found["resident"]
