"""Learning-rate schedules with warm-up and cool-down, as multipliers of the base rate."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from capvl.errors import UserError, nearest

KINDS = ("cosine", "rsqrt", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class ScheduleOptions:
    """Shape of the learning rate over a run; `config.schedule`.

    Attributes:
      kind: "cosine" to 0, "rsqrt" (reciprocal square root), "linear" to `end`, or "constant".
      warmup: steps of linear rise from 0.
      cooldown: last steps of linear fall to 0, on top of the kind.
      timescale: rsqrt only: 1 / sqrt(1 + (step - warmup) / timescale).
      end: linear only: the multiplier at the last step.
    """

    kind: str = "cosine"
    warmup: int = 10_000
    cooldown: int = 0
    timescale: int = 10_000
    end: float = 0.0

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


def make_schedule(options: ScheduleOptions, steps: int) -> Callable[[jax.Array], jax.Array]:
    """step -> float32 multiplier of the learning rate, for a run of `steps`.

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
            value = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        elif options.kind == "rsqrt":
            value = jax.lax.rsqrt(1 + jnp.maximum(step - options.warmup, 0.0) / options.timescale)
        elif options.kind == "linear":
            value = options.end + (1 - options.end) * (1 - progress)
        else:
            value = jnp.ones_like(progress)
        if options.warmup:
            value = value * jnp.minimum(1.0, step / options.warmup)
        if options.cooldown:
            value = value * jnp.clip((steps - step) / options.cooldown, 0.0, 1.0)
        return value

    return schedule
