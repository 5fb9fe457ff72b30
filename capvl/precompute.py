"""Embeddings of a locked image tower, computed once for a contrastive run with `objective.cached`.

Each view of an image is a crop (and flip) as in training, a function of (seed, view, index); with a MAP head
that trains, all tokens are kept, else the pooled feature. They are float16 in ArrayRecord files.
"""

import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from capvl import recipes, terminal
from capvl.convert.load import initial_state
from capvl.data.images.crops import Crop
from capvl.data.preparing.publish import check_name
from capvl.data.randomness import Uniforms
from capvl.data.reading import loader, sources
from capvl.errors import UserError
from capvl.models.abilities import Ability, abilities
from capvl.objectives.contrastive import LOCKED, embedding_shape
from capvl.objectives.images import unit_range
from capvl.parallel.mesh import make_mesh
from capvl.parallel.rules import batch_sharding

SHARD = 10_000


def write(recipe: recipes.Recipe, out: str, views: int, split: str) -> str:
    """Writes the embeddings of a recipe's images and their captions as a data set; returns its folder.

    Args:
      recipe: a contrastive one with a locked image tower; its `init_from` says where that comes from.
      out: name of the data set.
      views: of each image.
      split: to write; the new data set's is "train".

    Raises:
      UserError: the recipe is of another kind, or the data set is there already.
    """
    # tfds is slow to import.
    import tensorflow_datasets as tfds

    check_name(out)
    if LOCKED not in recipe.objective.frozen(recipe.model) or Ability.TEXTS not in abilities(recipe.model):
        raise UserError(
            "Embeddings are cached for recipes with objective.name='contrastive' and objective.locked=True."
        )
    if views < 1:
        raise UserError(f"--views must be at least 1, not {views}.")
    data, shape = recipe.data, embedding_shape(recipe.model)
    folder = pathlib.Path(data.directory(), out, "1.0.0")
    if folder.exists():
        raise UserError(
            f"Data set {out!r} is there already in {data.directory()!r}; choose another --out or remove it."
        )
    source = sources.open_source(
        data.parts()[0][0], split, data.directory(), features=("image", "text"), fields=data.fields()
    )
    embed = _compile(recipe)
    features = tfds.features.FeaturesDict(
        {
            "text": tfds.features.Sequence(tfds.features.Text()),
            "embedding": tfds.features.Tensor(shape=(views, *shape), dtype=np.float16),
        }
    )
    staging = folder.with_name(f"1.0.0.incomplete.{os.getpid()}")
    staging.mkdir(parents=True)
    try:
        lengths, size = _write_shards(recipe, source, embed, features, staging, out, views)
        template = tfds.core.ShardedFileTemplate(
            data_dir=staging, dataset_name=out, split="train", filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        )  # fmt: skip
        info = tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size, filename_template=template)
        tfds.folder_dataset.write_metadata(
            data_dir=str(staging),
            features=features,
            split_infos=[info],
            filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            description=f"Embeddings of {source.name} by {recipe.init_from}.",
            check_data=False,
        )
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return str(folder)


def _compile(recipe: recipes.Recipe):
    """A function from uint8 images to embeddings."""
    mesh = make_mesh(recipe.mesh)
    step = recipe.train_step()
    with jax.set_mesh(mesh):
        params = initial_state(recipe, step, mesh).params

    @jax.jit
    def embed(params, image):
        model = step.blueprint.bind(params)
        encoded = model.encode(unit_range(image))
        out = encoded if recipe.model.pool == "map" else model.encoder.pool(encoded)
        return out.astype(jnp.float16)

    def run(images: np.ndarray) -> np.ndarray:
        count = len(images)
        padded = np.concatenate([images, np.zeros((recipe.batch_size - count, *images.shape[1:]), np.uint8)])
        with jax.set_mesh(mesh):
            batch = loader.to_device({"image": padded}, batch_sharding(mesh))
            return np.asarray(jax.device_get(embed(params, batch["image"])))[:count]

    return run


def _write_shards(recipe, source, embed, features, folder, name, views):
    """(examples of each shard, bytes)."""
    # Slow to import.
    from array_record.python import array_record_module

    data, res, total = recipe.data, recipe.model.res, len(source)
    shards = -(-total // SHARD)
    lengths, size = [], 0
    serialize = features.get_serialized_info()
    # tfds is slow to import.
    from tensorflow_datasets.core import example_serializer

    encode = example_serializer.ExampleSerializer(serialize).serialize_example
    bounds = np.linspace(0, total, shards + 1).astype(int)
    for shard, (first, last) in enumerate(zip(bounds, bounds[1:], strict=False)):
        path = folder / f"{name}-train.array_record-{shard:05d}-of-{shards:05d}"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        step = max(1, recipe.batch_size // views)
        starts = range(first, last, step)
        for start in terminal.progress(starts, len(starts), f"shard {shard + 1} of {shards}"):
            examples = [source[i] for i in range(start, min(start + step, last))]
            images = [
                _view(e["image"], data, res, Uniforms(recipe.seed + view, start + i))
                for i, e in enumerate(examples)
                for view in range(views)
            ]
            rows = np.concatenate(
                [embed(np.stack(images[i : i + recipe.batch_size])) for i in range(0, len(images), recipe.batch_size)]
            )
            for example, row in zip(examples, rows.reshape(len(examples), views, *rows.shape[1:]), strict=True):
                record = encode(features.encode_example({"text": list(example["text"]), "embedding": row}))
                writer.write(record)
                size += len(record)
        writer.close()
        lengths.append(int(last - first))
    return lengths, size


def _view(image: bytes, data, res: int, uniforms: Uniforms) -> np.ndarray:
    pixels = Crop.from_options(data, res=res, train=True)({"image": image}, uniforms)
    return pixels[:, ::-1] if data.flip and uniforms() < 0.5 else pixels
