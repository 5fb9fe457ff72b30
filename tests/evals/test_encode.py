"""Evaluators' way over images: a batch late, closed whatever happens, and the same on any batch size."""

import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from colors import by_word, colors, context_of, mesh
from handmade import two_towers

from capvl.data.images.decode import BadImageError
from capvl.data.reading.evaluating import Numbers
from capvl.evals import NotFiniteError
from capvl.evals.encode import over_batches, over_made


@pytest.fixture
def context(by_word, colors, mesh):
    return context_of(two_towers, colors, mesh)[0]


def row(n, uniforms=None):
    return {"x": np.float32(n), "image": np.full((2, 2, 3), n, np.uint8)}


def test_the_next_batch_is_begun_before_one_is_fetched(context):
    events = []

    def function(batch):
        events.append(("begun", int(batch["index"][0])))
        return batch["x"] * 2, batch["mask"]

    def after(found):
        doubled, mask = found
        events.append(("fetched", int(doubled[0]) // 2))
        return doubled[mask]

    kept = over_batches(context, Numbers("rows", 20), row, function, "rows", after=after)
    np.testing.assert_array_equal(np.concatenate(kept), 2 * np.arange(20))
    begun, fetched = "begun", "fetched"
    assert events == [(begun, 0), (begun, 8), (fetched, 0), (begun, 16), (fetched, 8), (fetched, 16)]


def test_who_stops_reading_stops_the_threads(context):
    def after(found):
        raise NotFiniteError(1, 8, "rows")

    # The error, which is still here, holds the frames of the evaluation.
    with pytest.raises(NotFiniteError) as error:
        over_batches(context, Numbers("rows", 2000), row, lambda batch: batch["x"], "rows", after=after)
    end = time.monotonic() + 30
    while (left := [t for t in threading.enumerate() if t.name.startswith("grain")]) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left and error.value.bad == 1


def test_rows_whose_images_can_not_be_used(context):
    def make(n):
        if n % 5 == 3:
            raise BadImageError(f"row {n} is bad")
        return row(n)

    out, bad = over_made(context, make, 20, lambda batch: batch["x"] + batch["image"].mean(axis=(1, 2, 3)), "rows")
    assert list(bad) == [3, 8, 13, 18] and bad[3] == "row 3 is bad"
    np.testing.assert_array_equal(out, [2 * n for n in range(20) if n % 5 != 3])
    blind, _ = over_made(context, make, 20, lambda batch: batch["image"].max(axis=(1, 2, 3)), "rows", blind=True)
    assert set(blind.tolist()) == {127}
    with pytest.raises(NotFiniteError, match="1 of 16 rows of the rows"):
        over_made(context, make, 20, lambda batch: jnp.where(batch["x"] == 4, jnp.nan, batch["x"]), "rows")
    nothing, bad = over_made(context, lambda n: make(3), 2, lambda batch: batch["x"], "rows")
    assert nothing is None and len(bad) == 2
