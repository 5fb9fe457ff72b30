"""The train step as a pure function of (state, batch). Training, planning and benchmarks build it here.

A step that is not finite, or whose gradient explodes, changes nothing but the counters.
"""

import dataclasses
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from capvl.errors import UserError
from capvl.models.parameters import Blueprint
from capvl.objectives import Mean, Objective, updates
from capvl.optim import watching
from capvl.optim.optimizer import OptimizerOptions, apply, make_optimizer, split_trainable
from capvl.optim.schedules import ScheduleOptions, make_decay_schedule, make_schedule
from capvl.parallel import compiler
from capvl.parallel.rules import constrain, data_groups

NORM_MEMORY = 0.99
SPIKE_WARMUP = 50


class TrainState(NamedTuple):
    """All that survives a step.

    Attributes:
      step: steps done, skipped ones included.
      params: flat dict of parameters: float32, or the activations' dtype where they don't train.
      opt_state: the optimizer's state.
      ema: running mean of the parameters, or an empty dict.
      skipped, skipped_in_row: steps that changed nothing.
      norm_mean: running mean of the accepted gradient norms.
      watched: what evaluations said so far; () where no number of theirs is watched.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    opt_state: Any
    ema: dict[str, jax.Array]
    skipped: jax.Array
    skipped_in_row: jax.Array
    norm_mean: jax.Array
    watched: watching.Watched | tuple[()] = ()


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """Builds and runs the step of one recipe.

    Attributes:
      objective, model, optimizer, schedule: the recipe's parts.
      steps: length of the run.
      seed: of all randomness in the step: a step's key is fold_in(key(seed), step).
      micro_batches: gradient accumulation; the batch is split in so many equal parts.
      spike: a step whose gradient norm is above spike * its running mean is skipped; 0: never.
      watch: the number of evaluations by which a plateau's rate drops.
    """

    objective: Objective
    model: Any
    optimizer: OptimizerOptions
    schedule: ScheduleOptions
    steps: int
    seed: int = 0
    micro_batches: int = 1
    spike: float = 0.0
    watch: watching.WatchOptions = watching.WatchOptions()

    def __post_init__(self):
        blueprint = Blueprint(self.model)
        object.__setattr__(self, "blueprint", blueprint)
        object.__setattr__(self, "learning_rate", make_schedule(self.schedule, self.steps))
        object.__setattr__(self, "decay_multiplier", make_decay_schedule(self.schedule, self.steps))
        frozen = self.objective.frozen(self.model)
        trainable, _ = split_trainable(blueprint.shapes, self.optimizer, frozen)
        object.__setattr__(self, "trainable", frozenset(trainable))
        object.__setattr__(self, "transformation", make_optimizer(self.optimizer, blueprint.batch_dims()))

    def init(self, params: dict[str, jax.Array]) -> TrainState:
        """The state before the first step; parameters that don't train are kept in the activations' dtype."""
        params = {k: v if k in self.trainable else v.astype(self.model.dtype) for k, v in params.items()}
        trainable = {k: v for k, v in params.items() if k in self.trainable}
        # A copy: donated buffers must not be shared.
        ema = {k: jnp.copy(v) for k, v in trainable.items()} if self.optimizer.ema else {}
        zero = partial(jnp.zeros, (), jnp.int32)
        opt_state = self.transformation.init(trainable)
        norm_mean, watched = jnp.zeros((), jnp.float32), watching.fresh(self.watch)
        return TrainState(zero(), params, opt_state, ema, zero(), zero(), norm_mean, watched)

    def init_from_seed(self) -> TrainState:
        """The state of a fresh run; `make_state` has it on a mesh."""
        return self.init(self.blueprint.init(jax.random.key(self.seed)))

    def make_state(self, mesh, loaded: dict[str, jax.Array] | None = None) -> TrainState:
        """The state of a fresh run, created where it belongs.

        Args:
          mesh: where.
          loaded: parameters that are there already; the others are drawn.
        """

        def init(loaded):
            return self.init(self.blueprint.init(jax.random.key(self.seed)) | loaded)

        return jax.jit(
            init, out_shardings=self.state_shardings(mesh), compiler_options=compiler.options_of_one_call(mesh) or None
        )(loaded or {})

    @cached_property
    def state_shapes(self) -> TrainState:
        """Shapes and dtypes of the state; traced once."""
        return jax.eval_shape(self.init_from_seed)

    def param_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the parameters as they are kept and checkpointed."""
        return self.state_shapes.params

    def abstract_state(self, mesh) -> TrainState:
        """Shapes, dtypes and shardings of the state on a mesh."""
        shardings = self.state_shardings(mesh)
        return jax.tree.map(
            lambda s, n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=n), self.state_shapes, shardings
        )

    def state_shardings(self, mesh) -> TrainState:
        """Optimizer state is sharded as the parameter that it belongs to; scalars are replicated."""
        of_params = self.blueprint.shardings(mesh)

        def of_leaf(path, leaf):
            names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
            if not names:
                return NamedSharding(mesh, P())
            parameter = self.blueprint.shapes[names[-1]]
            if leaf.ndim != parameter.ndim:
                return NamedSharding(mesh, P())
            spec = of_params[names[-1]].spec
            kept = [a if n == m else None for a, n, m in zip(spec, leaf.shape, parameter.shape, strict=True)]
            return NamedSharding(mesh, P(*kept))

        return jax.tree_util.tree_map_with_path(of_leaf, self.state_shapes)

    def jit(self, mesh):
        """The compiled step of a mesh: (state, batch) -> (state, metrics), which takes the old state's memory."""
        return jax.jit(
            self.__call__,
            donate_argnums=0,
            out_shardings=(self.state_shardings(mesh), None),
            compiler_options=compiler.options(mesh) or None,
        )

    def __call__(self, state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        """One step: an update, or one for each part of the batch that the objective wants (`Objective.updates`).

        Metrics are float32 scalars: the objective's, grad_norm, lr, skipped, skipped_in_row. Of several updates,
        grad_norm is the largest, and the losses are added.
        """
        key = jax.random.fold_in(jax.random.key(self.seed), state.step)
        batch = self.objective.prepare(batch, train=True)
        multiplier = self.learning_rate(state.step) * watching.rate(state.watched, self.schedule)
        new, metrics, ok = state, {}, jnp.ones((), bool)
        for i, part in enumerate(updates(self.objective)):
            rows, part_key = ({k: batch[k] for k in part}, jax.random.fold_in(key, i)) if part else (batch, key)
            new, found, accepted = self._update(new, rows, part_key, multiplier)
            metrics |= {k: _TOGETHER[k](metrics[k], v) if k in metrics else v for k, v in found.items()}
            ok = ok & accepted
        skip = 1 - ok.astype(jnp.int32)
        counters = dict(skipped=state.skipped + skip, skipped_in_row=(state.skipped_in_row + 1) * skip)
        new = new._replace(step=state.step + 1, **counters)
        metrics |= {
            "lr": self.optimizer.lr * multiplier,
            "skipped": new.skipped.astype(jnp.float32),
            "skipped_in_row": new.skipped_in_row.astype(jnp.float32),
        }
        return new, metrics

    def _update(self, state: TrainState, batch, key, multiplier):
        """(state after one update, counters as before; metrics; whether it was made)."""
        trainable = {k: v for k, v in state.params.items() if k in self.trainable}
        grads, metrics = self._gradients(trainable, state.params, batch, key)
        norm = optax.global_norm(grads)
        ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & ~self._is_spike(state, norm)

        cut = self.decay_multiplier(state.step) if self.decay_multiplier else None
        scales = dict(multiplier=multiplier, decay_multiplier=cut)
        changes, opt_state = self.transformation.update(grads, state.opt_state, trainable, **scales)
        updated = apply(trainable, changes, multiplier)
        decay = self.optimizer.ema
        ema = {k: decay * state.ema[k] + (1 - decay) * updated[k] for k in state.ema}

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)

        state = state._replace(
            params=state.params | keep(updated, trainable),
            opt_state=keep(opt_state, state.opt_state),
            ema=keep(ema, state.ema),
            norm_mean=keep(NORM_MEMORY * state.norm_mean + (1 - NORM_MEMORY) * norm, state.norm_mean),
        )
        return state, metrics | {"grad_norm": norm}, ok

    def _is_spike(self, state: TrainState, norm) -> jax.Array:
        if not self.spike:
            return jnp.zeros((), bool)
        accepted = state.step - state.skipped
        counted = jnp.maximum(accepted * len(updates(self.objective)), 1)
        mean = state.norm_mean / (1 - NORM_MEMORY ** counted.astype(jnp.float32))
        return (accepted >= SPIKE_WARMUP) & (norm > self.spike * mean)

    def _gradients(self, trainable, params, batch, key):
        """Gradients and metrics of the whole batch, gathered over the micro-batches."""

        def loss(trainable, batch, key):
            return self.objective.loss(self.blueprint.bind(params | trainable), batch, key)

        gradient = jax.grad(loss, has_aux=True)
        n = self.micro_batches
        if n == 1:
            grads, metrics = gradient(trainable, batch, key)
            return grads, _means(metrics, 1)
        batch = jax.tree.map(lambda x: _micro_batches(x, n), batch)

        def add(total, xs):
            i, micro = xs
            micro = jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), micro)
            return jax.tree.map(jnp.add, total, gradient(trainable, micro, jax.random.fold_in(key, i))), None

        shapes = jax.eval_shape(gradient, trainable, jax.tree.map(lambda x: x[0], batch), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        (grads, metrics), _ = jax.lax.scan(add, zeros, (jnp.arange(n), batch))
        return jax.tree.map(lambda x: x / n, grads), _means(metrics, n)


_TOGETHER = {"loss": jnp.add, "grad_norm": jnp.maximum, "temperature": lambda before, after: after}
"""What several updates say by the same name."""


def _means(metrics: dict[str, jax.Array | Mean], n: int) -> dict[str, jax.Array]:
    """Metrics summed over n micro-batches -> those of the batch."""
    return {name: value.value() if isinstance(value, Mean) else value / n for name, value in metrics.items()}


def _micro_batches(x: jax.Array, n: int) -> jax.Array:
    """(B, ...) -> (n, B / n, ...) so that every device keeps its own examples."""
    groups = data_groups()
    split = x.reshape(groups, n, x.shape[0] // (groups * n), *x.shape[1:])
    return jnp.swapaxes(split, 0, 1).reshape(n, -1, *x.shape[1:])


def check_batch(batch: int, micro_batches: int, mesh, kind: str = "") -> int:
    """Examples of a micro-batch on one device.

    Args:
      batch: examples of all devices.
      micro_batches: parts of it.
      mesh: of the devices.
      kind: of batch, for the sentence.

    Raises:
      UserError: the batch doesn't divide over the data axes of the mesh and the micro-batches.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        parts = data_groups() * micro_batches
    if batch < 1 or batch % parts:
        near = max(1, round(batch / parts)) * parts
        wrong = f"{batch} examples of {kind!r} a step don't" if kind else f"batch_size={batch} doesn't"
        raise UserError(
            f"{wrong} divide over {parts // micro_batches} data-parallel devices and "
            f"micro_batches={micro_batches}; the nearest that does is {near}."
        )
    return batch // parts
