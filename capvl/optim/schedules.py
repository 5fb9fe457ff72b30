"""Learning-rate schedules with warm-up and cool-down, as multipliers of the base rate."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from capvl.errors import UserError, nearest

KINDS = ("cosine", "rsqrt", "linear", "steps", "plateau", "constant")


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """Shape of the learning rate over a run; `config.schedule`.

    Attributes:
      kind: "cosine" to `end`, "rsqrt" (reciprocal square root), "linear" to `end`, "steps" (times `factor` at each of
        `milestones`), "plateau" (times `factor` whenever `config.watch.metric` has no new best in `patience`
        evaluations), or "constant".
      warmup: steps of linear rise from `warmup_from`.
      warmup_from: the multiplier at the first step.
      cooldown: last steps of linear fall to 0, on top of the kind.
      timescale: rsqrt only: 1 / sqrt(1 + (step - warmup) / timescale).
      end: cosine and linear only: the multiplier at the last step.
      factor: steps and plateau only.
      milestones: steps only: fractions of the run.
      decay_ahead: steps only: weight decay is times `factor` once more from this fraction of the way to each milestone
        on (GLIP-L: 0.667); 0: it only follows the rate.
      patience: plateau only: so many evaluations in a row without a new best, counted again after each drop.
    """

    kind: str = "cosine"
    warmup: int = 10_000
    warmup_from: float = 0.0
    cooldown: int = 0
    timescale: int = 10_000
    end: float = 0.0
    factor: float = 0.1
    milestones: tuple[float, ...] = (0.67, 0.89)
    decay_ahead: float = 0.0
    patience: int = 3

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"schedule.kind={self.kind!r} is unknown." + nearest(self.kind, KINDS))
        for name in ("warmup", "cooldown"):
            if getattr(self, name) < 0:
                raise UserError(f"schedule.{name} must not be negative, not {getattr(self, name)}.")
        if self.end < 0:
            raise UserError(f"schedule.end must not be negative, not {self.end}.")
        if self.timescale <= 0:
            raise UserError(f"schedule.timescale must be positive, not {self.timescale}.")
        for name in ("warmup_from", "decay_ahead"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"schedule.{name} must be between 0 and 1, not {getattr(self, name)}.")
        if not 0 < self.factor <= 1:
            raise UserError(f"schedule.factor must be above 0 and at most 1, not {self.factor}.")
        if not all(0 < m < 1 for m in self.milestones) or list(self.milestones) != sorted(set(self.milestones)):
            raise UserError(
                f"schedule.milestones must be rising fractions of the run between 0 and 1, not {self.milestones}."
            )
        if self.patience < 1:
            raise UserError(f"schedule.patience must be at least 1, not {self.patience}.")
        if self.decay_ahead and self.kind != "steps":
            raise UserError(f"schedule.decay_ahead needs schedule.kind='steps', not {self.kind!r}.")


def make_schedule(options: ScheduleOptions, steps: int) -> Callable[[jax.Array], jax.Array]:
    """step -> float32 multiplier of the learning rate, for a run of `steps`; of a plateau, before its first drop.

    Raises:
      UserError: warm-up and cool-down leave no step between them.
    """
    if options.warmup + options.cooldown > steps:
        raise UserError(
            f"schedule.warmup={options.warmup} and schedule.cooldown={options.cooldown} don't fit into steps={steps}."
        )

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - options.warmup) / max(steps - options.warmup, 1), 0.0, 1.0)
        if options.kind == "cosine":
            value = options.end + (1 - options.end) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif options.kind == "rsqrt":
            value = jax.lax.rsqrt(1 + jnp.maximum(step - options.warmup, 0.0) / options.timescale)
        elif options.kind == "linear":
            value = options.end + (1 - options.end) * (1 - progress)
        elif options.kind == "steps":
            value = _drops(step, [round(m * steps) for m in options.milestones], options.factor)
        else:
            value = jnp.ones_like(progress)
        if options.warmup:
            rise = options.warmup_from + (1 - options.warmup_from) * (step / options.warmup)
            value = value * jnp.minimum(1.0, rise)
        if options.cooldown:
            value = value * jnp.clip((steps - step) / options.cooldown, 0.0, 1.0)
        return value

    return schedule


def make_decay_schedule(options: ScheduleOptions, steps: int) -> Callable[[jax.Array], jax.Array] | None:
    """step -> float32 multiplier of the weight decay beside that of the rate; None where there is none."""
    if not options.decay_ahead:
        return None
    places = [options.decay_ahead * round(m * steps) for m in options.milestones]
    return lambda step: _drops(jnp.asarray(step, jnp.float32), places, options.factor)


def _drops(step: jax.Array, places: list[float], factor: float) -> jax.Array:
    """Times the factor from each of these steps on."""
    value = jnp.ones_like(step)
    for place in places:
        value = value * jnp.where(step >= place, factor, 1.0)
    return value
