"""Few-shot ridge regression against golden/cappa/lsr.npz, and the choice of its strength."""

import re

import numpy as np
import pytest
from conftest import assert_close, load_golden, under

from capvl.evals import fewshot
from capvl.evals.image_gain import next_real


@pytest.mark.golden
@pytest.mark.parametrize("case", ["n_ge_d", "n_lt_d"])
def test_solver(case):
    golden = under(load_golden("cappa", "lsr.npz"), case)
    x, y, classes = golden["x"], golden["y"], golden["num_classes"].item()
    mean, std = x.mean(0, keepdims=True), x.std(0, keepdims=True) + 1e-5
    assert_close(mean, golden["mean"], 1e-5, "mean")
    assert_close(std, golden["std"], 1e-5, "std")
    x = fewshot.standardize(x, golden["mean"], golden["std"])
    x_test = fewshot.standardize(golden["x_test"], golden["mean"], golden["std"])
    for i, l2 in enumerate(golden["l2"]):
        weights, _ = fewshot.ridge(x, y, classes, float(l2))
        assert_close(weights, golden["weights_f64"][i], 1e-4, f"weights at {l2}")
        predictions = (x_test @ weights).argmax(1)
        np.testing.assert_array_equal(predictions, golden["preds_f64"][i])
        accuracy = (predictions == golden["y_test"]).mean()
        assert accuracy == pytest.approx(golden["acc"][i], abs=1.5 / len(golden["y_test"]))


@pytest.mark.golden
def test_selection():
    golden = under(load_golden("cappa", "lsr.npz"), "select")
    checked = 0
    for name, expected in golden.items():
        if name.startswith("seed"):
            seed, shots = map(int, re.fullmatch(r"seed(\d+)_shots(\d+)", name).groups())
            found = fewshot.select_shots(golden["labels"], golden["num_classes"].item(), shots, seed)
            np.testing.assert_array_equal(found, expected, err_msg=name)
            checked += 1
    assert checked


@pytest.mark.parametrize("n, features", [(40, 6), (12, 30)])
def test_leave_one_out_is_exact(n, features):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, features)), rng.integers(0, 3, n)
    _, left_out = fewshot.ridge(x, y, 3, 0.5)
    for i in range(n):
        keep = np.arange(n) != i
        weights, _ = fewshot.ridge(x[keep], y[keep], 3, 0.5)
        np.testing.assert_allclose(x[i] @ weights, left_out[i], atol=1e-6)


def test_strength_is_chosen_without_the_test_split():
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 20))
    y, y_test = np.arange(40) % 4, np.arange(200) % 4
    x, x_test = (centers[labels] + 0.8 * rng.normal(size=(len(labels), 20)) for labels in (y, y_test))
    strengths = (1e-3, 1e-1, 10.0, 1e6)
    good = fewshot.accuracy(x, y, x_test, y_test, 4, strengths)
    assert good > 0.6
    picked = {fewshot.accuracy(x, y, x_test, t, 4, strengths) for t in (y_test, (y_test + 1) % 4)}
    assert len(picked) == 2, "other test labels change the accuracy, but not the classifier"


def test_every_image_gets_another():
    mask = np.array([True, True, False, True, False])
    np.testing.assert_array_equal(next_real(mask), [1, 3, 2, 0, 4])
