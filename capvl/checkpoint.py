"""Checkpoints: asynchronous, atomic, and checked leaf by leaf when they are read.

orbax writes the arrays. Beside them stands a small JSON with the data position, the recipe,
each leaf's shape and dtype, and a checksum of each leaf's bits that was computed on the
devices before saving; so a truncated file or a flipped byte is found when the checkpoint is
read, whatever wrote it, and the newest whole checkpoint is used instead.
"""

import contextlib
import dataclasses
import json
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging

from capvl import storage
from capvl.errors import UserError
from capvl.parallel import distributed

absl_logging.set_verbosity(absl_logging.ERROR)

_FORMAT = 1
# A host whose part of a checkpoint is written waits so long for the others; one that failed never comes.
COMMIT_SECONDS = 300


class Restored(NamedTuple):
    """A checkpoint's state, its data position, the step it was saved after, and its data's fingerprint, if known."""

    state: Any
    position: int
    step: int
    data: dict | None


def names_of(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by dotted name, such as "params.encoder.norm.scale"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator=".").replace("/", "."): leaf for path, leaf in leaves}


def _checksum(x: jax.Array) -> jax.Array:
    """uint32 sum of the leaf's bits, each weighted by its place: the same however it is sharded."""
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    place = jnp.full(x.shape, 0x9E3779B9, jnp.uint32)
    for axis in range(x.ndim):
        place = place * jnp.uint32(0x01000193) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = (place ^ (place >> 15)) * jnp.uint32(0x2C1B3C6D)
    return jnp.sum(bits * (place | 1), dtype=jnp.uint32)


@jax.jit
def _checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: _checksum(x) for name, x in leaves.items()}


def checksums(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """Checksum of each leaf."""
    return {name: int(value) for name, value in jax.device_get(_checksums(leaves)).items()}


class Checkpointer:
    """Saves and restores the state of one workdir."""

    def __init__(self, workdir: str, options=None):
        """Opens `workdir`/checkpoints, where interrupted saves are cleared away.

        Args:
          workdir: of the run.
          options: `capvl.recipes.CheckpointOptions`; None to read only.
        """
        self.directory = storage.absolute(storage.folder(workdir)) / "checkpoints"
        self._read_only = options is None
        self._pending: int | None = None
        self._kept = _Kept()
        if self._read_only:
            manager_options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            storage.make_folder(self.directory)
            self._kept = _Kept(options.keep, options.keep_every)
            manager_options = ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=COMMIT_SECONDS),
            )
        self._options = manager_options
        self._manager = self._open() if self.directory.exists() else None

    def steps(self) -> list[int]:
        """Steps that have a committed checkpoint, in order."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def save(self, state: Any, position: int, recipe: dict, data: dict | None = None, *, say=print) -> None:
        """Begins to save the state in the background, after an earlier save is done.

        Where either fails by an error of storage that may pass, this state is saved again, with
        ever longer pauses, before the call returns. (One process only: with several, those that
        had no error would wait for the one that has; there the run ends and is started again.)

        Args:
          state: a TrainState.
          position: of the data.
          recipe: plain values, kept with the checkpoint.
          data: the data's fingerprint (`capvl.data.reading.fingerprint`), kept with it.
          say: told of every attempt that failed.

        Raises:
          UserError: this save, or the earlier one, failed.
        """
        step = int(jax.device_get(state.step))
        items = None
        for attempt, pause in enumerate((*storage.PAUSES, None)):
            try:
                self.wait()
                if step in self.steps():
                    return
                items = items or self._items(state, position, recipe, data)
                self._kept.best = int(jax.device_get(state.watched.best_step)) if state.watched else 0
                self._begin(step, items)
                if attempt:
                    self.wait()
                return
            except UserError as e:
                if pause is None or jax.process_count() > 1 or not storage.passes(e.__cause__):
                    raise
                say(f"{e} Trying again in {pause:g} s.")
            storage.wait(pause)
            self._reopen()

    def _items(self, state: Any, position: int, recipe: dict, data: dict | None) -> ocp.args.Composite:
        """What is saved of a state."""
        leaves = names_of(state)
        meta = {
            "format": _FORMAT,
            "position": position,
            "recipe": recipe,
            "data": data,
            "leaves": {n: [list(x.shape), str(x.dtype)] for n, x in leaves.items()},
            "checksums": checksums(leaves),
        }
        meta["crc"] = _crc(meta)
        return ocp.args.Composite(state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(meta))

    def _begin(self, step: int, items: ocp.args.Composite) -> None:
        self._pending = step
        try:
            self._manager.save(step, args=items)
        except Exception as e:  # orbax and tensorstore raise many kinds.
            raise self._failed(e) from e

    def wait(self) -> None:
        """Waits for a save under way.

        Raises:
          UserError: it failed; earlier checkpoints are whole.
        """
        if self._manager is None or self._read_only:
            return
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as e:
            raise self._failed(e) from e
        self._pending = None

    def _failed(self, error: Exception) -> UserError:
        kept = [s for s in self.steps() if s != self._pending]
        rest = f"the checkpoint of step {kept[-1]} is whole" if kept else "there is no earlier checkpoint"
        return UserError(
            f"The checkpoint of step {self._pending} could not be saved to {str(self.directory)!r} "
            f"({storage.reason(error)}); {rest}."
        )

    def restore(self, abstract: Any, *, say=print) -> Restored | None:
        """The newest whole checkpoint, or None where there is none at all.

        Args:
          abstract: the state's shapes, dtypes and shardings.
          say: told of checkpoints that are not whole; they are moved to `broken`.

        Raises:
          UserError: the checkpoint is of another model (its leaves are listed), or none is whole.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                meta = self._read_meta(step)
                check_leaves(meta["leaves"], names_of(abstract), str(self.directory / str(step)))
                state = self._read_state(step, abstract, meta["checksums"])
                return Restored(state, meta["position"], step, meta.get("data"))
            except BrokenError as e:
                say(f"The checkpoint of step {step} is broken ({e}); it is set aside and an earlier one is used.")
                self._set_aside(step)
        if steps:
            raise UserError(f"None of the {len(steps)} checkpoints in {str(self.directory)!r} is whole.")
        return None

    def _read(self, step: int, item: str, handler: ocp.CheckpointHandler, args: Any) -> Any:
        """What orbax reads; storage that fails for a moment does not make a checkpoint a broken one.

        The handler is asked, not the manager: a process that can't read its part would leave the
        others waiting for it there. Here all hear of it.
        """
        what = f"Reading the checkpoint of step {step} in {str(self.directory)!r}"
        found, error = None, None
        try:
            found = storage.retry(lambda: handler.restore(self.directory / str(step) / item, args=args), what=what)
        except Exception as e:  # orbax and tensorstore raise many kinds.
            error = e
        outcome = 0 if error is None else 2 if isinstance(error, UserError) else 1
        worst = distributed.largest(outcome)
        if isinstance(error, UserError):
            raise error
        if worst == 2:
            raise UserError(f"{what} failed on another process.")
        if worst:
            raise BrokenError(type(error).__name__ if error else "on another process") from error
        return found

    def _read_meta(self, step: int) -> dict:
        try:
            meta = self._read(step, "meta", ocp.JsonCheckpointHandler(), ocp.args.JsonRestore())
        except BrokenError as e:
            raise BrokenError(f"its description can't be read: {e}") from e
        if meta.pop("crc", None) != _crc(meta):
            raise BrokenError("its description was altered")
        return meta

    def _read_state(self, step: int, abstract: Any, expected: dict[str, int]) -> Any:
        wanted = names_of(abstract)
        try:
            leaves = self._read(step, "state", ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(wanted))
        except BrokenError as e:
            raise BrokenError(f"its arrays can't be read: {e}") from e
        found = checksums(leaves)
        wrong = [n for n in found if found[n] != expected[n]]
        if wrong:
            raise BrokenError(f"{wrong[0]} does not have the saved checksum")
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[n] for n in wanted])

    def read_params(self, shapes: dict[str, Any], *, step: int | None = None, ema: bool = True, say=print):
        """(parameters as NumPy arrays by path, step) of the newest whole checkpoint, or of `step`.

        Args:
          shapes: path -> anything with `shape` and `dtype`; None for whatever is there.
          step: a step, or None for the newest.
          ema: prefer the running mean of the parameters where it was kept.
          say: told of checkpoints that are not whole.

        Raises:
          UserError: there is none, none is whole, or it is of another model.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            wanted = "" if step is None else f" of step {step}"
            raise UserError(f"There is no checkpoint{wanted} in {str(self.directory)!r}; it has steps {steps}.")
        for candidate in [step] if step is not None else reversed(steps):
            try:
                meta = self._read_meta(candidate)
                stored = {n: v for n, v in meta["leaves"].items() if n.startswith("params.")}
                if shapes is not None:
                    check_leaves(stored, names_of({"params": shapes}), str(self.directory / str(candidate)))
                leaves = self._read_named(candidate, meta)
                paths = _paths(shapes, leaves)
                kept = "ema." if ema else "params."
                return {
                    path: np.asarray(leaves.get(kept + name, leaves["params." + name])) for name, path in paths.items()
                }, candidate
            except BrokenError as e:
                say(f"The checkpoint of step {candidate} is broken ({e}).")
        raise UserError(f"None of the checkpoints in {str(self.directory)!r} is whole.")

    def read_all(self) -> tuple[dict[str, np.ndarray], int]:
        """(every leaf by dotted name, step) of the newest checkpoint, to compare runs.

        Raises:
          UserError: there is none, or it is not whole.
        """
        if not self.steps():
            raise UserError(f"There is no checkpoint in {str(self.directory)!r}.")
        step = self.steps()[-1]
        try:
            return {n: np.asarray(x) for n, x in self._read_named(step, self._read_meta(step)).items()}, step
        except BrokenError as e:
            raise UserError(f"The checkpoint of step {step} in {str(self.directory)!r} is broken ({e}).") from e

    def _read_named(self, step: int, meta: dict) -> dict[str, jax.Array]:
        """All leaves as they were saved, on one device."""
        device = jax.local_devices()[0]
        host = jax.sharding.SingleDeviceSharding(device)
        abstract = {
            n: jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype), sharding=host)
            for n, (shape, dtype) in meta["leaves"].items()
        }
        # Whatever mesh is in force: this is about one device.
        with jax.set_mesh(jax.sharding.Mesh(np.array([device]), ("one",))):
            return self._read_state(step, abstract, meta["checksums"])

    def _set_aside(self, step: int) -> None:
        """Moves a broken checkpoint out of the way, so that its step can be saved again."""
        if self._read_only:
            return
        broken = self.directory.with_name("broken")
        broken.mkdir(exist_ok=True)
        target = broken / str(step)
        if jax.process_index() == 0:
            target.rmtree(missing_ok=True)
            (self.directory / str(step)).rename(target)
        distributed.largest(0)  # All wait until it is moved.
        self._reopen()

    def _open(self) -> ocp.CheckpointManager:
        what = f"Opening the checkpoints in {str(self.directory)!r}"
        names = ("state", "meta")
        try:
            return storage.retry(
                lambda: ocp.CheckpointManager(self.directory, options=self._options, item_names=names), what=what
            )
        except OSError as e:
            raise UserError(f"Checkpoints in {str(self.directory)!r} can't be opened: {storage.reason(e)}.") from e

    def _reopen(self) -> None:
        """A manager that knows of no failure; what an interrupted save left is cleared away."""
        with contextlib.suppress(Exception):  # The failure of a save, which is known.
            self._manager.close()
        self._manager = self._open()

    def close(self) -> None:
        """Waits for a save under way and closes the files."""
        self.wait()
        if self._manager is not None:
            self._manager.close()


@dataclasses.dataclass
class _Kept:
    """Which checkpoints stay when one is saved; orbax asks.

    Attributes:
      newest: so many of the newest.
      every: multiples of so many steps; 0 for none.
      best: the step of the best evaluation; 0 for none.
    """

    newest: int = 1
    every: int = 0
    best: int = 0

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Of each checkpoint, from the oldest to the newest; orbax gives them with their `step`."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        newest = set(steps[-self.newest :])
        return [s in newest or s == self.best or bool(self.every and s % self.every == 0) for s in steps]


class BrokenError(Exception):
    """A checkpoint that is not whole."""


def check_leaves(stored: dict[str, list], wanted: dict[str, Any], where: str) -> None:
    """Raises UserError, with the first differences, where stored leaves are not the wanted ones."""
    differences = []
    # Parameters first: they say what is different, the optimizer's state only follows.
    for name in sorted(stored.keys() | wanted.keys(), key=lambda n: (n.startswith("opt_state"), n)):
        if name not in wanted:
            differences.append(f"{name} is only in the checkpoint")
        elif name not in stored:
            differences.append(f"{name} is only in the model")
        else:
            (shape, dtype), leaf = stored[name], wanted[name]
            if tuple(shape) != tuple(leaf.shape) or dtype != str(leaf.dtype):
                differences.append(
                    f"{name} is {dtype}{list(shape)} in the checkpoint, {leaf.dtype}{list(leaf.shape)} here"
                )
    if differences:
        more = f"; and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise UserError(f"Checkpoint {where!r} is of another model: {'; '.join(differences[:8])}{more}.")


def _paths(shapes: dict | None, leaves: dict) -> dict[str, str]:
    """dotted name -> path with slashes."""
    if shapes is not None:
        return {path.replace("/", "."): path for path in shapes}
    names = [n.removeprefix("params.") for n in leaves if n.startswith("params.")]
    return {name: name.replace(".", "/") for name in names}


def _crc(meta: dict) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())
