"""A data set of images of one colour each, and evaluators of hand-made models on it."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import pytest
from conftest import write_tar
from handmade import COLORS, WORDS, ByWord, two_towers
from PIL import Image

from capvl import recipes
from capvl.data.text import tokenizers
from capvl.models.parameters import Blueprint
from capvl.parallel.mesh import MeshOptions, make_mesh

NAMES = list(WORDS)


def jpeg(color) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """A prepared data set of 12 images of one colour each, with captions, labels, class names and image ids."""
    folder = tmp_path_factory.mktemp("colors")
    samples = []
    for i in range(12):
        name = NAMES[i % 3]
        meta = {"label": i % 3, "class_name": name, "captions": [f"the {name} thing", name], "image_id": f"img{i}"}
        members = {"png": jpeg(COLORS[name]), "txt": name.encode(), "json": json.dumps(meta).encode()}
        samples.append((f"{i:09d}", members))
    write_tar(folder / "a.tar", samples)
    from capvl.data.prepare import main

    main(
        [
            "tars",
            "--name=colors",
            f"--train={folder}/a.tar",
            f"--test={folder}/a.tar",
            f"--data_dir={folder}",
            "--min_side=1",
        ]
    )
    return folder


@pytest.fixture
def by_word(monkeypatch):
    monkeypatch.setattr(tokenizers, "load", lambda path, start=True: ByWord())


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshOptions())


def context_of(model, colors, mesh, **changes):
    options, params = model()
    name = "contrastive" if model is two_towers else "cappa"
    values = {
        "steps": 1,
        "batch_size": 8,
        "objective": {"name": name},
        "model": dataclasses.asdict(options),
        "data": {"name": "colors", "data_dir": str(colors), "tokenizer": "by word"},
        "evals": {},
    }
    recipe = recipes.resolve(values)
    return recipe.context(mesh, Blueprint(recipe.model), None), jax.device_put(params)


def run(evaluator, model, colors, mesh, **changes):
    context, params = context_of(model, colors, mesh)
    with jax.set_mesh(mesh):
        return dict(evaluator.setup(context)({k: v for k, v in (params | changes).items()}))
