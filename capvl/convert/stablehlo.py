"""A model's functions as StableHLO with a free batch size, parameters inside, for programs that don't have capvl."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from capvl import storage
from capvl.convert.files import Target
from capvl.errors import UserError
from capvl.models.abilities import Ability, abilities
from capvl.models.parameters import Blueprint
from capvl.objectives.images import unit_range
from capvl.weights import Weights

PLATFORMS = ("cpu", "cuda", "tpu")


def functions(options, params: dict[str, np.ndarray]) -> dict[str, tuple]:
    """name -> (function, shape of its argument without the batch, dtype): what the model can do.

    `image`: uint8 images -> embeddings (two towers, normalised) or pooled features. `text`: tokens -> embeddings.
    """
    able = abilities(options)
    if Ability.IMAGES not in able:
        raise UserError("Only models with an image tower are exported to StableHLO.")
    blueprint = Blueprint(options)
    params = {k: jnp.asarray(v) for k, v in params.items()}

    def image(pixels):
        model = blueprint.bind(params)
        embed = model.embed_image if Ability.TEXTS in able else model.features
        return embed(unit_range(pixels))

    def text(tokens):
        return blueprint.bind(params).embed_text(tokens)

    out = {"image": (image, options.image_shape(), jnp.uint8)}
    if Ability.TEXTS in able:
        out["text"] = (text, (options.length,), jnp.int32)
    return out


def export(path: str, options, params: dict[str, np.ndarray]) -> list[str]:
    """Writes one file a function; returns their paths.

    The image function goes to `path`; a text function to the same name with `.text` before its suffix.
    `jax.export.deserialize(file.read()).call(images)` runs one, on a CPU, a GPU or a TPU.

    Raises:
      UserError: the model has no image tower, or the file can't be written.
    """
    written = []
    for name, (function, shape, dtype) in functions(options, params).items():
        (batch,) = jax.export.symbolic_shape("batch")
        argument = jax.ShapeDtypeStruct((batch, *shape), dtype)
        exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(argument)
        file = pathlib.Path(path)
        file = file if name == "image" else file.with_name(f"{file.stem}.{name}{file.suffix}")
        try:
            with storage.new_file(epath.Path(file)) as temporary:
                pathlib.Path(temporary).write_bytes(exported.serialize())
        except OSError as e:
            raise UserError(f"{str(file)!r} can't be written: {e.strerror or e}.") from e
        written.append(str(file))
    return written


def write(weights: Weights, target: Target) -> None:
    """See `export`."""
    export(target.path, weights.options, weights.params)
