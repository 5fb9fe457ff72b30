"""No number comes of NaN, and an example without a label is of no class."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import case

from capvl.data.preparing import corpus
from capvl.data.reading import loader, sources
from capvl.errors import UserError
from capvl.evals import NotFiniteError, labels, linear_probe, retrieval, run, zeroshot


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_of_features_that_are_not_finite(value):
    images = np.eye(4, dtype=np.float32)
    images[2, 1] = value
    with pytest.raises(NotFiniteError, match="1 of 4 rows"):
        dict(zeroshot.accuracies(images, np.arange(4)))


def test_an_evaluator_without_a_result_ends_nothing(capsys):
    def broken(params):
        yield "early", 0.5
        raise NotFiniteError(3, 10, "images")

    rows, _ = run({"broken": broken, "whole": lambda params: [("x", 1.0)]}, {"w": jnp.ones(3)})
    assert rows == {"broken/not_finite": 3.0, "whole/x": 1.0}
    assert "3 of 10 rows of the images are not finite" in capsys.readouterr().out
    rows, _ = run({"whole": lambda params: [("x", 1.0)]}, {"w": jnp.array([1.0, np.nan])})
    assert rows == {"whole/not_finite_parameters": 1.0}


def test_a_test_class_that_training_lacks_is_wrong_and_said():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 20)
    x = rng.normal(size=(40, 3)) + 8.0 * y[:, None]
    y_test = np.array([0, 0, 1, 1, 2])
    x_test = 8.0 * np.minimum(y_test, 1)[:, None] + np.zeros((5, 3))
    found = dict(linear_probe.probe(x, y, x_test, y_test, (1e-3,), 50))
    assert found["untrained"] == pytest.approx(0.2)
    assert found["accuracy"] == pytest.approx(0.8)
    assert "untrained" not in dict(linear_probe.probe(x, y, x_test[:4], y_test[:4], (1e-3,), 50))


@pytest.mark.cases
def test_examples_without_a_label_are_of_no_class(tmp_path, tiny_recipe):
    splits = {s: case(f"partly_labelled_{s}.tar") for s in ("train", "val")}
    corpus.prepare("partly", splits, str(tmp_path), workers=1)
    recipe = tiny_recipe(data__data_dir=str(tmp_path))
    context = recipe.context(None, None, tmp_path)
    stored = sources.labels("partly", "val", str(tmp_path))
    assert (stored < 0).any()
    source, kept = labels.open_labelled(context, "partly", "val")
    assert len(source) == len(kept) == (stored >= 0).sum()
    np.testing.assert_array_equal([source[i]["label"] for i in range(len(source))], kept)
    assert (kept >= 0).all()


def test_no_label_at_all(tmp_path, tiny_recipe, monkeypatch):
    recipe = tiny_recipe()
    monkeypatch.setattr(sources, "labels", lambda *_: np.full(4, -1))
    with pytest.raises(UserError, match="has a label"):
        labels.open_labelled(recipe.context(None, None, tmp_path), "scenes/tiny", "val")


@pytest.mark.cases
def test_a_probe_trains_on_what_is_labelled(tmp_path, tiny_recipe):
    splits = {s: case(f"partly_labelled_{s}.tar") for s in ("train", "val")}
    corpus.prepare("partly", splits, str(tmp_path), workers=1)
    stored = sources.labels("partly", "train", str(tmp_path))
    assert (stored < 0).any() and (stored >= 0).any()
    data = {"name": "partly", "data_dir": str(tmp_path), "crop": "center", "max_bad": 1.0}
    model = {"encoder": "w16d2h2m32/16", "res": 32, "classes": int(stored.max()) + 1, "dtype": "float32"}
    recipe = tiny_recipe(objective={"name": "probe"}, model=model, data=data)
    transform = recipe.objective.transform(recipe.model, recipe.data, train=True)
    batches = loader.TrainLoader(recipe.data, transform, recipe.objective.features(), batch=16, seed=0)
    found = np.concatenate([next(batches)["label"] for _ in range(4)])
    assert set(found) == set(stored[stored >= 0]) and batches.bad > 0
