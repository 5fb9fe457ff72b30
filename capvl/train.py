"""The training loop: restore -> (batch -> step -> log the step before) -> evaluate -> save.

The host stays one step ahead of the devices: a step's metrics are read after the next step was
dispatched. Inside the loop every implicit transfer between host and device is an error.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable

import jax
from etils import epath
from jax.experimental import multihost_utils

from capvl import evals, goodput, lock, metrics, recipes, reporting, storage, terminal, trackers, workdirs
from capvl.checkpoint import Checkpointer
from capvl.convert.load import initial_state
from capvl.data.images.buckets import buckets_in
from capvl.data.options import DataOptions
from capvl.data.reading import fingerprint, loader
from capvl.errors import UserError
from capvl.optim import watching
from capvl.overview import print_overview
from capvl.parallel import distributed
from capvl.parallel.mesh import make_mesh
from capvl.parallel.rules import batch_sharding
from capvl.parallel.stopping import Stop, Watchdog
from capvl.step import TrainState
from capvl.terminal import say


@dataclasses.dataclass
class Run:
    """What `run` sets up once and the loop uses."""

    recipe: recipes.Recipe
    workdir: epath.Path
    mesh: jax.sharding.Mesh
    step: object
    update: object
    checkpointer: Checkpointer
    loader: loader.TrainLoader | loader.KindsLoader
    writer: metrics.MetricWriter
    evaluators: dict
    tests: dict
    ledger: goodput.Ledger
    clock: metrics.Clock
    watchdog: Watchdog
    check_held: Callable[[], None]
    trained_on: dict | None
    compiled: set = dataclasses.field(default_factory=set)
    ended: bool = False  # By what evaluations said, before the recipe's last step.

    @contextlib.contextmanager
    def compiling(self, step: int, batch):
        """Counts the block as compilation where it is the first with images of these sizes, and says so where there
        are several."""
        sizes = buckets_in(batch)
        if sizes in self.compiled:
            yield
            return
        self.compiled.add(sizes)
        begin = time.monotonic()
        with self.ledger.spend("compile"):
            yield
        count = len(self.recipe.buckets())
        if count > 1:
            seconds = time.monotonic() - begin
            of = f"{len(self.compiled)} of {count} sizes"
            shown = " and ".join(map(str, dict.fromkeys(sizes)))  # Kinds of batch may have the same.
            say(f"step {step}: compiling for images of {shown} took {seconds:.1f} s ({of})")

    def log(self, step: int, values: dict[str, jax.Array]) -> None:
        """Reads a finished step's metrics; stops the run after too many skipped steps in a row."""
        values = {k: float(v) for k, v in jax.device_get(values).items()}
        if values["skipped_in_row"] >= self.recipe.max_skipped:
            raise UserError(
                f"{int(values['skipped_in_row'])} steps in a row up to step {step} had a loss or gradient that is not "
                f"finite or explodes; nothing of them was kept. Lower optimizer.lr or look at the data."
            )
        first = not self.clock.started
        if first:
            self.ledger.enter("step")
            seconds = self.clock.compiled(step)
            say(f"step {step}/{self.recipe.steps}  loss {values['loss']:.4f}  compiled in {seconds:.1f} s")
        if step % self.recipe.log_every and step != self.recipe.steps:
            return
        values["bad_images"] = float(self.loader.bad)
        if not first:  # The first step's time is the compilation's.
            values |= self.clock.read(step)
            say(terminal.progress_line(step, self.recipe.steps, values))
        self.writer.write(step, values)
        self.ledger.write(step)

    def begin(self, state: TrainState) -> TrainState:
        """Makes the watched evaluation that a run which was stopped after this step left out."""
        if state.watched:
            step, watched = jax.device_get((state.step, state.watched))
            if step and self.recipe.evaluates(int(step)) and watched.evaluated < step:
                return self.evaluate(state)
            self.ended = watching.ends(watched, self.recipe.watch)
        return state

    def pause(self, state: TrainState, saves: bool, evaluates: bool) -> TrainState:
        """Saves, then evaluates, so that an evaluation that fails loses no step.

        A watched evaluation comes first: what it says is in the checkpoint, and a new best always has one.
        """
        watches = evaluates and bool(state.watched)
        if saves and not watches:
            self.save(state)
        if evaluates:
            state = self.evaluate(state)
        if watches and (saves or int(jax.device_get(state.watched.stale)) == 0):
            self.save(state)
        return state

    def evaluate(self, state: TrainState) -> TrainState:
        """Runs the evaluators and prints their table; what the watched number says goes into the state."""
        step = int(jax.device_get(state.step))
        with self.ledger.spend("evaluation"), self.watchdog.off():
            rows, shown = evals.run(self.evaluators, state.params | state.ema)
            reporting.save_shown(self.workdir, step, shown)
        if rows:
            self.writer.write(step, rows)
            terminal.print_results(step, rows)
        return self.watch(state, step, rows) if state.watched else state

    def watch(self, state: TrainState, step: int, rows: dict[str, float]) -> TrainState:
        """The state with what an evaluation says, the same on all hosts."""
        options, before = self.recipe.watch, jax.device_get(state.watched)
        value = distributed.first_number(lambda: watching.number(options, rows, step))
        now = watching.record(before, value, step, options, self.recipe.schedule)
        self.ended = watching.ends(now, options)
        drop = "; the learning rate drops" if now.drops > before.drops else ""
        say(f"step {step}: {watching.describe(now, options)}{drop}.")
        return state._replace(watched=jax.device_put(now, jax.tree.map(lambda x: x.sharding, state.watched)))

    def test(self, state: TrainState) -> None:
        """Says which evaluation was the best, and runs the evaluators that wait for the end on its checkpoint."""
        if not state.watched:
            return
        watched, shardings = jax.device_get(state.watched), self.step.blueprint.shardings(self.mesh)
        say(f"Training is over: {watching.describe(watched, self.recipe.watch)}.")
        if not self.tests:
            return
        with self.ledger.spend("evaluation"):
            best = int(watched.best_step)
            params, _ = self.checkpointer.read_params(self.step.param_shapes(), step=best, say=say)
            rows, shown = evals.run(self.tests, {k: jax.device_put(v, shardings[k]) for k, v in params.items()})
            reporting.save_evaluation(self.workdir, best, rows, shown)

    def save(self, state: TrainState) -> None:
        """Begins a checkpoint; the loop goes on while it is written."""
        self.check_held()
        with self.ledger.spend("checkpoint"):
            self.checkpointer.save(state, self.loader.position, self.recipe.source, self.trained_on, say=say)
            self.writer.flush()
            self.ledger.flush()

    def finish(self, state: TrainState) -> None:
        """Saves what isn't saved, and waits until it is written."""
        self.save(state)
        with self.ledger.spend("checkpoint"):
            self.checkpointer.wait()


def run(recipe: recipes.Recipe, workdir: str, *, new_data: bool = False) -> None:
    """Trains a recipe in a workdir, from its newest checkpoint where it has one.

    Args:
      recipe: what to train.
      workdir: where.
      new_data: go on where the data is not what the checkpoint was trained on.

    Raises:
      UserError: whatever the user can mend.
    """
    distributed.check_same(
        configuration=json.dumps([workdir, recipe.source], sort_keys=True), version_of_capvl=distributed.code_version()
    )
    path = metrics.open_workdir(workdir)
    with Stop() as stop, lock.held(path, leaving=lambda: stop.asked) as check_held:
        _run(recipe, path, stop, check_held, new_data)


def _run(recipe: recipes.Recipe, path: epath.Path, stop: Stop, check_held: Callable[[], None], new_data: bool) -> None:
    """Trains in a workdir that this run has to itself."""
    workdirs.check(path, recipe)
    recipe = workdirs.with_tokenizer(path, recipe)
    ledger = goodput.Ledger(path)
    if not jax.config.jax_compilation_cache_dir:  # $JAX_COMPILATION_CACHE_DIR may share one between runs.
        jax.config.update("jax_compilation_cache_dir", str(storage.absolute(path) / "compiled"))
    mesh = make_mesh(recipe.mesh)
    with jax.set_mesh(mesh), distributed.ends_when_others_are_lost():
        training, state = set_up(recipe, path, mesh, ledger, check_held, new_data)
        try:
            distributed.check_same(train_step=lowered_text(training, state))
            with distributed.ends_when_others_are_lost():  # Before anything is closed, which would wait for them.
                state = loop(training, state, stop)
                done = int(jax.device_get(state.step))
                if done == recipe.steps or training.ended:
                    training.test(state)
        finally:
            training.watchdog.close()
            training.writer.close()
            with contextlib.suppress(UserError):
                training.checkpointer.close()
    if done < recipe.steps and not training.ended:
        say(f"Stopped by a signal and saved after step {done}; start again with the same workdir to resume.")
        return
    if jax.process_index() == 0:
        say(goodput.describe(goodput.summary(path)))
        say(f"Report: {reporting.write([path], path / 'report.html')}")


def lowered_text(training: Run, state: TrainState) -> str:
    """The step's program as the compiler gets it, for hosts to compare; "" for one process."""
    if jax.process_count() == 1:
        return ""
    batch = training.recipe.batch_spec(batch_sharding(training.mesh))
    return training.update.lower(state, batch).as_text()


def loop(training: Run, state: TrainState, stop: Stop) -> TrainState:
    """The loop itself. Returns the last state, which is saved."""
    recipe, ledger = training.recipe, training.ledger
    sharding = batch_sharding(training.mesh)
    first = int(jax.device_get(state.step))
    previous = None
    ledger.enter("compile")
    state = training.begin(state)
    with jax.transfer_guard("disallow"):
        for step in range(first + 1, first + 1 if training.ended else recipe.steps + 1):
            training.watchdog.beat()
            with ledger.spend("data_wait"):
                host_batch = next(training.loader)
            with profiled(training, step), training.compiling(step, host_batch):
                state, values = training.update(state, loader.to_device(host_batch, sharding))
            if previous is not None:
                training.log(step - 1, previous)
            previous = values
            stopping = stop.now(step)
            saves = step % recipe.checkpoint.every == 0 or step == recipe.steps or stopping
            evaluates = recipe.evaluates(step) and not stopping
            if saves or evaluates:
                training.log(step, previous)  # A run that must stop does so before it saves.
                previous = None
                with jax.transfer_guard("allow"):
                    state = training.pause(state, saves, evaluates)
            if stopping or training.ended:
                break
    training.finish(state)
    ledger.write(int(jax.device_get(state.step)))
    ledger.flush()
    return state


@contextlib.contextmanager
def profiled(training: Run, step: int):
    """Traces the steps of `config.profile` into workdir/profile."""
    begin, count = training.recipe.profile
    path = training.workdir / "profile"
    # The profiler writes local files only.
    local = os.path.join(tempfile.gettempdir(), f"capvl-profile-{os.getpid()}") if storage.in_bucket(path) else path
    if count and step == begin:
        jax.profiler.start_trace(str(local))
    yield
    if count and step == begin + count - 1:
        with jax.transfer_guard("allow"):
            jax.effects_barrier()
        jax.profiler.stop_trace()
        if local != path:
            storage.copy_up(local, path)
        say(f"Profile of steps {begin} to {step}: {path}")


def set_up(
    recipe: recipes.Recipe,
    path: epath.Path,
    mesh,
    ledger: goodput.Ledger,
    check_held: Callable[[], None],
    new_data: bool,
) -> tuple[Run, TrainState]:
    """Opens everything that the loop needs, and the state to begin with."""
    step = recipe.train_step()
    recipe.check(mesh)
    trackers.check(recipe.wandb)
    _prepare_data(recipe)
    transforms = recipe.transforms()
    workdirs.write(path, recipe, _check_vocabulary(recipe, transforms))
    context = recipe.context(mesh, step.blueprint, path)
    evaluators = {n: e.setup(context) for n, e in recipe.evals.items() if n not in recipe.watch.test}
    apart = recipe.context(mesh, step.blueprint, path / "evaluate")
    tests = {name: recipe.evals[name].setup(apart) for name in recipe.watch.test}
    checkpointer = Checkpointer(str(path), recipe.checkpoint)
    abstract = step.abstract_state(mesh)
    restored = checkpointer.restore(abstract, say=say)
    seen = restored.data if restored else None
    trained_on = distributed.first(lambda: _check_data(recipe.data, seen, new_data))
    if restored:
        state, position = restored.state, restored.position
        say(f"Resumed after step {restored.step} of {path}.")
    else:
        state, position = initial_state(recipe, step, mesh), 0
    data = recipe.train_loader(transforms, position)
    distributed.check_same(records_of_the_streams=data.records())
    print_overview(recipe, step, mesh, path)
    writer = metrics.MetricWriter(path, int(jax.device_get(state.step)), recipe.wandb, recipe.source)
    ledger.write(int(jax.device_get(state.step)))
    clock = metrics.Clock(ledger, recipe.batch_size, recipe.objective.flops(recipe.model))
    watchdog = Watchdog(recipe.hang_timeout)
    update = step.jit(mesh)
    shown = (writer, evaluators, tests, ledger, clock, watchdog)
    return Run(recipe, path, mesh, step, update, checkpointer, data, *shown, check_held, trained_on), state


def _check_data(options: DataOptions, seen: dict | None, new_data: bool) -> dict:
    """The data's fingerprint, which is that of the checkpoint where it has one; shards that are gone stay in it."""
    now = fingerprint.fingerprint(options)
    for difference in fingerprint.check(seen, now, new_data):
        say(f"The data is other than it was: {difference}.")
    return fingerprint.with_gone(seen, now)


def _prepare_data(recipe: recipes.Recipe) -> None:
    """Checks that the data sets are there; the first host makes embedded ones before the others look."""
    if jax.process_count() == 1:
        recipe.data.check_prepared()
        return
    if jax.process_index() == 0:
        recipe.data.check_prepared()
    multihost_utils.sync_global_devices("data sets")
    recipe.data.check_prepared()


def _check_vocabulary(recipe: recipes.Recipe, transforms: dict) -> str:
    """Path of the tokenizer that texts go through; "" for none."""
    tokenizer = next((t.tokenizer for t in transforms.values() if hasattr(t, "tokenizer")), None)
    if tokenizer is None:
        return ""
    if tokenizer.vocab > recipe.model.vocab:
        raise UserError(
            f"Tokenizer {tokenizer.path!r} has {tokenizer.vocab} pieces, more than model.vocab={recipe.model.vocab}."
        )
    return tokenizer.path
