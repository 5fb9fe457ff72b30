"""Features are kept as long as nothing that they hang on changes, and no longer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from colors import by_word, colors, context_of, mesh
from handmade import captioner, two_towers

from capvl.data.reading import annotations, sources
from capvl.errors import UserError
from capvl.evals import cached, fewshot, knn, linear_probe
from capvl.evals.labels import open_labelled
from capvl.inference.compiled import compiled
from capvl.inference.matching import features, image_vectors, text_vectors


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(cached, "_KEPT", {})
    monkeypatch.setattr(cached, "_TRAINS", set())


@pytest.fixture
def encoded(monkeypatch):
    """How many images were encoded each time that any were."""
    counts, over_images = [], cached.over_images

    def counted(context, source, *rest):
        counts.append(len(source))
        return over_images(context, source, *rest)

    monkeypatch.setattr(cached, "over_images", counted)
    return counts


def changed(params, pattern):
    """Parameters of which the last bit of one number is another."""
    name = next(name for name in sorted(params) if pattern in name)
    flat = np.array(params[name]).reshape(-1)
    flat[-1] = np.nextafter(flat[-1], np.float32(9), dtype=np.float32)
    return params | {name: jnp.asarray(flat.reshape(params[name].shape))}


@pytest.mark.parametrize("model", [two_towers, captioner])
def test_the_parameters_that_features_hang_on(model, colors, mesh, by_word):
    context, params = context_of(model, colors, mesh)
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, *context.model.image_shape())), jnp.uint8)
    function = compiled(context.blueprint, features)
    read = cached.parameters_read(function, params, image)
    assert read and all(name.startswith("encoder/") for name in read)
    before = function(params, image)
    others = {name: value if name in read else value + 1 for name, value in params.items()}
    np.testing.assert_array_equal(function(others, image), before)
    if model is two_towers:
        texts = cached.parameters_read(compiled(context.blueprint, text_vectors), params, jnp.ones((2, 3), jnp.int32))
        assert texts and not set(texts) & set(read)


def test_digests(mesh):
    rng = np.random.default_rng(0)
    params = {"a": jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32), "b": jnp.ones((4,), jnp.bfloat16)}
    digest = cached.digest(params)
    assert cached.digest(dict(reversed(params.items()))) == digest
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("replica", "fsdp")))
    wide = {"a": jnp.arange(64.0).reshape(8, 8)}
    assert cached.digest({"a": jax.device_put(wide["a"], spread)}) == cached.digest(wide)
    rows = params["a"]
    others = [
        changed(params, "a"),
        params | {"a": rows[::-1]},
        params | {"a": rows.swapaxes(0, 1).reshape(3, 5, 7)},
        params | {"a": rows.at[0, 0, 0].set(rows[0, 0, 1]).at[0, 0, 1].set(rows[0, 0, 0])},
        params | {"b": jnp.ones((4,), jnp.float16)},
        {"a": params["b"], "b": params["a"]},
        {"a": params["a"]},
        params | {"a": rows.reshape(5, 3, 7)},
    ]
    assert len({digest, *map(cached.digest, others)}) == 1 + len(others)


EVALUATORS = {
    "fewshot": fewshot.FewShot(name="colors", shots=(1, 2), seeds=(0,)),
    "linear_probe": linear_probe.LinearProbe(name="colors", l2=(1e-3, 1e-1)),
    "knn": knn.Knn(name="colors", k=3),
}


@pytest.mark.parametrize("name", EVALUATORS)
def test_numbers_are_those_without_a_cache(name, colors, mesh, by_word, encoded, tmp_path, monkeypatch):
    context, params = context_of(two_towers, colors, mesh)
    plain = list(EVALUATORS[name].setup(context)(params))
    assert len(encoded) == 2
    for cache in ("memory", f"{tmp_path}/features"):
        encoded.clear()
        cached._KEPT.clear()
        kept = dataclasses.replace(EVALUATORS[name], cache=cache).setup(context)
        assert [list(kept(params)) for _ in range(3)] == [plain] * 3
        assert len(encoded) == 2, "each split once"
        again = dataclasses.replace(EVALUATORS[name], cache=cache).setup(context)
        other = changed(params, "text/")  # The text tower may train.
        assert list(again(other)) == plain and len(encoded) == 2
    cached._KEPT.clear()
    assert list(again(params)) == plain and len(encoded) == 2, "another process finds the folder's"


def test_a_probe_and_neighbours_share_features(colors, mesh, by_word, encoded):
    context, params = context_of(two_towers, colors, mesh)
    for name in ("linear_probe", "knn"):
        list(dataclasses.replace(EVALUATORS[name], cache="memory").setup(context)(params))
    assert len(encoded) == 2


def test_an_encoder_that_trains_turns_it_off(colors, mesh, by_word, encoded, capsys, tmp_path):
    context, params = context_of(two_towers, colors, mesh)
    source = open_labelled(context, "colors", "test")[0]
    function = compiled(context.blueprint, features)
    seen = []
    for _ in range(4):
        params = changed(params, "encoder/")
        found, _ = cached.image_features(context, source, function, params, "images", cache=str(tmp_path / "x"))
        np.testing.assert_array_equal(found, cached.image_features(context, source, function, params, "images")[0])
        seen.append(len(cached._KEPT))
    assert seen == [1, 0, 0, 0] and len(encoded) == 8
    assert capsys.readouterr().out.count("their features aren't kept") == 1


def test_other_files_other_images_other_crops(colors, mesh, by_word, encoded, monkeypatch):
    context, params = context_of(two_towers, colors, mesh)
    source, function = open_labelled(context, "colors", "test")[0], compiled(context.blueprint, features)

    def places(context=context, source=source, function=function):
        return cached._identity(context, source, function, params)

    first = places()
    assert places() == first
    assert places(source=sources.Subset(source, np.arange(5)))[0] != first[0]
    assert places(function=compiled(context.blueprint, image_vectors))[0] != first[0]
    data = dataclasses.replace(context.data, crop="squash")
    assert places(context=dataclasses.replace(context, data=data))[0] != first[0]
    stamps = annotations.stamps
    monkeypatch.setattr(annotations, "stamps", lambda *x: {k: [size, 0] for k, (size, _) in stamps(*x).items()})
    assert places()[0] == first[0] and places()[1] != first[1]


@pytest.mark.parametrize("harm", ["cut", "pickled", "a folder that is a file"])
def test_what_is_not_whole_is_computed_again(colors, mesh, by_word, encoded, harm, tmp_path, capsys):
    context, params = context_of(two_towers, colors, mesh)
    source, function = open_labelled(context, "colors", "test")[0], compiled(context.blueprint, features)
    cache = tmp_path / "kept/features"
    if harm == "a folder that is a file":
        (tmp_path / "kept").write_text("")
    plain = cached.image_features(context, source, function, params, "images", cache=str(cache))
    if harm == "a folder that is a file":
        assert "Features can't be kept in" in capsys.readouterr().out
    else:
        (file,) = cache.iterdir()
        content = file.read_bytes()
        file.write_bytes(content[:-50])
        if harm == "pickled":
            np.savez(file, state=np.array([print], object), features=np.zeros(1), labels=np.zeros(1))
        cached._KEPT.clear()
        capsys.readouterr()
    found = cached.image_features(context, source, function, params, "images", cache=str(cache))
    np.testing.assert_array_equal(found[0], plain[0])
    assert harm not in ("cut", "pickled") or "is not whole" in capsys.readouterr().out


def test_names_of_caches():
    for kind in (fewshot.FewShot, linear_probe.LinearProbe, knn.Knn):
        kind(cache="memory"), kind(cache="{data_dir}/features")
        with pytest.raises(UserError, match="cache='disk' should be 'memory', or a folder"):
            kind(cache="disk")


def test_neighbours_vote_by_their_cosines():
    labels = np.array([[0, 1, 1], [2, 2, 0], [1, 0, 0]])
    cosines = np.array([[0.9, 0.8, 0.8], [0.5, 0.4, 0.4], [0.7, 0.7, 0.1]])
    # exp(-1) twice is less than 1 at a temperature of 0.1, and exp(-0.1) twice is more at 1; 1 : 1 is a tie.
    assert knn.accuracy(labels, cosines, np.array([0, 2, 1]), 0.1) == pytest.approx(2 / 3)
    assert knn.accuracy(labels, cosines, np.array([1, 2, 1]), 1.0) == pytest.approx(2 / 3)
    assert knn.accuracy(labels, cosines, np.array([0, 3, 0]), 0.1) == pytest.approx(2 / 3)
    assert knn.accuracy(labels, 1000 * cosines, np.array([0, 2, 1]), 1e-3) == pytest.approx(2 / 3)


def test_neighbours_on_the_hand_made_encoder(colors, mesh, by_word):
    context, params = context_of(two_towers, colors, mesh)
    found = dict(EVALUATORS["knn"].setup(context)(params))
    assert found == {"accuracy": 1.0, "chance": pytest.approx(1 / 3)}
    with pytest.raises(UserError, match="k must be at least 1"):
        knn.Knn(k=0)
