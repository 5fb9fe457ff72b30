"""What a run does by a number of its own evaluations: the rate drops on a plateau, training ends, the best is kept.

The record is part of the train state. So a step stays a function of (state, batch), and a resumed run goes on from what
the evaluations said up to its checkpoint.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capvl.errors import UserError, nearest
from capvl.optim.schedules import ScheduleOptions


@dataclasses.dataclass(frozen=True)
class WatchOptions:
    """`config.watch`. An evaluation is a new best where its number is better than all before, not where it equals one.

    Attributes:
      metric: the number, as evaluations print it: "detection/AP" is AP of `config.evals.detection`; "" for none. The
        checkpoint of its best evaluation is kept.
      lower: whether less is better.
      stop_patience: training ends after so many evaluations in a row without a new best; 0: never.
      test: names in `config.evals` of those that don't run in training, but once at its end, on the best checkpoint.
    """

    metric: str = ""
    lower: bool = False
    stop_patience: int = 0
    test: tuple[str, ...] = ()

    def __post_init__(self):
        if self.stop_patience < 0:
            raise UserError(f"watch.stop_patience must not be negative, not {self.stop_patience}.")
        if not self.metric and (self.stop_patience or self.test):
            raise UserError("watch.stop_patience and watch.test need watch.metric.")

    @property
    def evaluator(self) -> str:
        """Whose number it is."""
        return self.metric.partition("/")[0]


class Watched(NamedTuple):
    """The record of the evaluations so far, scalars: float32 and int32.

    Attributes:
      best: the best number; infinitely bad before the first.
      best_step: the step that it is of, 0 before the first.
      stale: evaluations in a row without a new best.
      waited: the same, counted again after each drop of the rate.
      drops: how often the rate dropped.
      evaluated: the step of the last evaluation.
    """

    best: jax.Array
    best_step: jax.Array
    stale: jax.Array
    waited: jax.Array
    drops: jax.Array
    evaluated: jax.Array


def check(options: WatchOptions, schedule: ScheduleOptions, eval_every: int) -> None:
    """Raises UserError where nothing is watched that should be, or nothing is evaluated before the end."""
    plateau = schedule.kind == "plateau"
    if plateau and not options.metric:
        raise UserError("schedule.kind='plateau' needs watch.metric, a number of an evaluation such as 'detection/AP'.")
    if not eval_every and (options.stop_patience or plateau):
        raise UserError("watch.stop_patience and schedule.kind='plateau' need eval_every, steps between evaluations.")


def check_evaluators(options: WatchOptions, evaluators: dict) -> None:
    """Raises UserError where there is no evaluator whose number is watched, or that shall run at the end."""
    if not options.metric:
        return
    for key, name in (("watch.metric", options.evaluator), *(("watch.test", name) for name in options.test)):
        if name not in evaluators:
            raise UserError(f"{key}: there is no evaluator {name!r} in config.evals." + nearest(name, evaluators))
    if options.evaluator in options.test:
        raise UserError(f"watch.metric={options.metric!r} is of an evaluator in watch.test, which runs after training.")


def fresh(options: WatchOptions) -> Watched | tuple[()]:
    """The record before the first evaluation; () where nothing is watched."""
    if not options.metric:
        return ()
    zero = [jnp.zeros((), jnp.int32) for _ in Watched._fields[1:]]
    return Watched(jnp.asarray(math.inf if options.lower else -math.inf, jnp.float32), *zero)


def number(options: WatchOptions, rows: dict[str, float], step: int) -> float:
    """The watched number among those of an evaluation.

    Raises:
      UserError: it isn't there, or is not a number.
    """
    if options.metric not in rows:
        own = [name for name in rows if name.partition("/")[0] == options.evaluator]
        raise UserError(
            f"watch.metric={options.metric!r} is none of what was evaluated at step {step}: {', '.join(own)}."
            + nearest(options.metric, own)
        )
    value = float(rows[options.metric])
    if not math.isfinite(value):
        raise UserError(f"watch.metric={options.metric!r} is {value} at step {step}: no number that can be compared.")
    return value


def record(watched: Watched, value: float, step: int, options: WatchOptions, schedule: ScheduleOptions) -> Watched:
    """The record after an evaluation: host numbers in, host numbers out."""
    value, step = np.float32(value), np.int32(step)
    better = value < watched.best if options.lower else value > watched.best
    if better:
        none = np.int32(0)
        return Watched(value, step, none, none, np.int32(watched.drops), step)
    stale, waited, drops = (int(n) for n in (watched.stale + 1, watched.waited + 1, watched.drops))
    if schedule.kind == "plateau" and waited >= schedule.patience:
        waited, drops = 0, drops + 1
    counts = np.int32(stale), np.int32(waited), np.int32(drops)
    return Watched(np.float32(watched.best), np.int32(watched.best_step), *counts, step)


def describe(watched: Watched, options: WatchOptions) -> str:
    """One line of the record."""
    of = f"{options.metric} is {float(watched.best):.4f} after step {int(watched.best_step)}"
    stale = f", and no later evaluation of {int(watched.stale)} is better" if watched.stale else ""
    return f"the best {of}{stale}"


def ends(watched: Watched | tuple[()], options: WatchOptions) -> bool:
    """Whether training ends by what the evaluations said."""
    return bool(options.stop_patience) and int(watched.stale) >= options.stop_patience


def rate(watched: Watched | tuple[()], schedule: ScheduleOptions) -> jax.Array | float:
    """The multiplier of the learning rate by the drops of a plateau."""
    if schedule.kind != "plateau":
        return 1.0
    return jnp.float32(schedule.factor) ** watched.drops.astype(jnp.float32)
