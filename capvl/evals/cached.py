"""Features of a split's images that are computed once, as long as nothing that they hang on changes.

What they hang on is looked at, not inferred from a recipe: the values of the parameters that the function reads (from
its jaxpr; their digest is made on the devices in one pass over them), the files and records of the split, how images
become pixels, the model's options, the device and the package's code. So an encoder that is locked, by whatever option,
is encoded with once in a run; and of one that trains, features are kept no longer than until that is seen.
"""

import functools
import hashlib
import json
import os
import re
import zipfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from capvl import storage
from capvl.errors import UserError
from capvl.evals import Context
from capvl.evals.encode import image_transform, over_images
from capvl.parallel import distributed
from capvl.terminal import say

_KEPT: dict[str, tuple[str, np.ndarray, np.ndarray]] = {}
"""Place -> (state, features, labels)."""
_TRAINS: set[str] = set()
"""Places whose parameters have changed while this process ran."""


def check(cache: str, evaluator: str) -> None:
    """Raises UserError where an evaluator's option `cache` is none."""
    if cache not in ("", "memory") and "/" not in cache:
        raise UserError(f"{evaluator}: cache={cache!r} should be 'memory', or a folder such as {{data_dir}}/features.")


def image_features(
    context: Context, source, function, params, what: str, *, cache: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) of all images of a source, and their labels (N,).

    Args:
      context, source, function, params, what: as for `encode.over_images`.
      cache: where features are kept for the next time: "" nowhere, "memory", or a folder that all hosts see.

    Raises:
      UserError, NotFiniteError: see `encode.over_images`.
    """
    place, state = ("", "") if not cache else _identity(context, source, function, params)
    if cache and place not in _TRAINS:
        file = None if cache == "memory" else storage.folder(context.path(cache)) / f"{place}.npz"
        found = _find(place, state, file)
        if not distributed.largest(int(found is None)):  # On all hosts, or all compute.
            return found
        if place in _KEPT:  # Of other parameters or files than the last time.
            del _KEPT[place]
            _TRAINS.add(place)
            say(f"What encodes {what} changes as it trains: their features aren't kept.")
    found, rest = over_images(context, source, function, params, what)
    if cache and place not in _TRAINS:
        _KEPT[place] = state, found, rest["label"]
        if file is not None and jax.process_index() == 0:
            _write(file, state, found, rest["label"])
    return found, rest["label"]


def _identity(context: Context, source, function, params) -> tuple[str, str]:
    """(name of the place where features are kept, what they hang on beside it)."""
    shape = (context.batch, *context.model.image_shape())
    images = jax.ShapeDtypeStruct(shape, jnp.uint8)
    read = parameters_read(function, params, images)
    about, files = source.identity()
    program = re.sub(r" at 0x[0-9a-f]+", "", str(function.trace(params, images).jaxpr))
    how = [about, repr(context.model), repr(image_transform(context)), program]
    now = [files, digest({name: params[name] for name in read}), _code()]
    now += [jax.devices()[0].device_kind, jax.__version__]
    return tuple(hashlib.blake2b(json.dumps(x).encode(), digest_size=16).hexdigest() for x in (how, now))


@functools.cache
def _code() -> str:
    """The package's code as this process found it."""
    return distributed.code_version()


def parameters_read(function, params: dict[str, jax.Array], rows: Any) -> list[str]:
    """Names of the parameters that the outputs of a compiled function of (params, rows) hang on."""
    jaxpr = function.trace(params, rows).jaxpr.jaxpr
    needed = {x for x in jaxpr.outvars if isinstance(x, core.Var)}
    for equation in reversed(jaxpr.eqns):
        if any(x in needed for x in equation.outvars):
            needed |= {x for x in equation.invars if isinstance(x, core.Var)}
    return [name for name, x in zip(sorted(params), jaxpr.invars, strict=False) if x in needed]


def digest(params: dict[str, jax.Array]) -> str:
    """Of the values of parameters, wherever they are and however they are divided: sums of whole numbers are exact."""
    hashes = jax.device_get(_hashes(params))
    told = [[name, params[name].shape, str(params[name].dtype), hashes[name].tolist()] for name in sorted(params)]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


@jax.jit
def _hashes(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """(4,) uint32 of each array: sums of its bits, mixed with their places."""

    def mix(x):
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        return x ^ (x >> 16)

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]).astype(jnp.uint32)
        place = sum(
            (jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride))
            for axis, stride in enumerate(np.cumprod([1, *x.shape[:0:-1]])[::-1].tolist())
        )
        salted = [mix(bits ^ mix(place + jnp.uint32(salt))) for salt in (1, 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35)]
        return jnp.stack([hashed.sum(dtype=jnp.uint32) for hashed in salted])

    return {name: one(x) for name, x in params.items()}


def _find(place: str, state: str, file) -> tuple[np.ndarray, np.ndarray] | None:
    if place in _KEPT and _KEPT[place][0] == state:
        return _KEPT[place][1:]
    if place in _KEPT or file is None or not file.exists():
        return None
    try:
        with storage.local_copy(file) as local, np.load(local, allow_pickle=False) as arrays:
            if str(arrays["state"]) != state:
                return None
            found, labels = arrays["features"], arrays["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        say(f"{str(file)!r} is not whole; the features are computed again.")
        return None
    _KEPT[place] = state, found, labels
    return found, labels


def _write(file, state: str, found: np.ndarray, labels: np.ndarray) -> None:
    try:
        storage.make_folder(file.parent)
        with storage.new_file(file) as local, open(local, "wb") as out:
            np.savez(out, state=np.array(state), features=found, labels=labels)
    except (OSError, UserError) as e:
        say(f"Features can't be kept in {os.fspath(file.parent)!r}: {storage.reason(e)}.")
