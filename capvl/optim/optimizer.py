"""The optimizer of a recipe: clip, precondition, learning rate, decoupled decay, schedule.

Order of the reference: clip by global norm; factored RMS and momentum (or Adam); times the
learning rate and its multiplier; plus weight decay times the parameter; times the schedule.
Weight decay is thus not multiplied with the learning rate, but is with the schedule.

"adamw_hf" is the AdamW of Hugging Face's transformers, with which BERT's descendants were trained: epsilon stands
beside the root of the second moment before its bias is corrected, and weight decay is times the learning rate and its
multiplier, of what the step leaves: p -= r * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps); p -= r * decay * p.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from capvl.errors import UserError, nearest
from capvl.optim.adafactor import momentum, scale_by_factored_rms

Rules = tuple[tuple[str, float], ...]
NAMES = ("adafactor", "adamw", "adamw_hf", "sgd")


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """`config.optimizer`. A path is a parameter's name, such as "encoder/blocks/attn/qkv/kernel".

    Attributes:
      name: "adafactor", "adamw", "adamw_hf" or "sgd".
      lr: base learning rate.
      weight_decay: decoupled; see `decay`. adamw_hf: times the learning rate.
      clip_norm: largest global norm of the gradients; 0 for no clipping.
      beta1: momentum; 0 for none (adafactor and sgd).
      beta2: decay of the second moment (adafactor: its cap).
      eps: adamw and adamw_hf only.
      momentum_dtype: "bfloat16" or "float32".
      clip_rms: adafactor only: largest RMS of a leaf's update; 0 for no clipping.
      decay: (regex, multiplier) pairs over whole paths, first match wins; others don't decay.
      lr_mult: (regex, multiplier) pairs over whole paths, first match wins; others have 1.
      frozen: regexes of paths that don't train: no gradient, no optimizer state.
      ema: decay of a running mean of the parameters; 0 for none.
    """

    name: str = "adafactor"
    lr: float = 1e-3
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    momentum_dtype: str = "bfloat16"
    clip_rms: float = 0.0
    decay: Rules = ((".*/(kernel|cross_kv)", 1.0),)
    lr_mult: Rules = ()
    frozen: tuple[str, ...] = ()
    ema: float = 0.0

    def __post_init__(self):
        for name, known in (("name", NAMES), ("momentum_dtype", ("bfloat16", "float32"))):
            if getattr(self, name) not in known:
                raise UserError(
                    f"optimizer.{name}={getattr(self, name)!r} is unknown." + nearest(getattr(self, name), known)
                )
        if self.lr < 0 or not 0 <= self.beta1 < 1 or not 0 <= self.beta2 <= 1 or not 0 <= self.ema < 1:
            raise UserError("optimizer: lr must not be negative, beta1 and ema must be in [0, 1), beta2 in [0, 1].")
        for name in ("weight_decay", "clip_norm", "clip_rms"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name} must not be negative, not {getattr(self, name)}.")
        if self.eps <= 0:
            raise UserError(f"optimizer.eps must be positive, not {self.eps}.")
        for name in ("decay", "lr_mult"):
            for pattern, value in getattr(self, name):
                if value < 0:
                    raise UserError(
                        f"optimizer.{name}: the multiplier of {pattern!r} must not be negative, not {value}."
                    )
        for pattern in (*self.frozen, *(p for p, _ in (*self.decay, *self.lr_mult))):
            try:
                re.compile(pattern)
            except re.error as e:
                raise UserError(f"optimizer: {pattern!r} is not a regular expression ({e}).") from e


def matches(rules: Rules, path: str, default: float) -> float:
    """The multiplier of the first rule whose regex matches the whole path, else `default`."""
    return next((value for pattern, value in rules if re.fullmatch(pattern, path)), default)


def split_trainable(params: dict, options: OptimizerOptions, also: tuple[str, ...] = ()) -> tuple[dict, dict]:
    """(trainable, frozen) parts of a flat dict of parameters; `also` are regexes of frozen ones beside the options'.

    Raises:
      UserError: a pattern matches nothing, or nothing is left to train.
    """
    patterns = (*options.frozen, *also)
    named = {"frozen": patterns} | {n: [p for p, _ in getattr(options, n)] for n in ("decay", "lr_mult")}
    for name, each in named.items():
        for pattern in each:
            if not any(re.fullmatch(pattern, path) for path in params):
                raise UserError(f"optimizer.{name}: {pattern!r} matches no parameter." + nearest(pattern, params))
    frozen = {p: v for p, v in params.items() if any(re.fullmatch(r, p) for r in patterns)}
    if len(frozen) == len(params):
        raise UserError("optimizer.frozen leaves no parameter to train.")
    return {p: v for p, v in params.items() if p not in frozen}, frozen


def make_optimizer(options: OptimizerOptions, batch_dims: dict[str, int] | None = None):
    """optax transformation over a flat dict of trainable parameters, without schedule and sign.

    Its `update` takes the schedule's multiplier of this step as the keyword `multiplier`, which adamw_hf needs, and one
    of the weight decay alone as `decay_multiplier`, None for none.

    Args:
      options: the recipe's options.
      batch_dims: leading stacked-layer dimensions by path (adafactor doesn't factor over them).
    """
    dtype = jnp.dtype(options.momentum_dtype)
    parts = [optax.clip_by_global_norm(options.clip_norm)] if options.clip_norm else []
    if options.name == "adafactor":
        parts.append(scale_by_factored_rms(options.beta2, batch_dims))
        if options.clip_rms:
            parts.append(optax.clip_by_block_rms(options.clip_rms))
        if options.beta1:
            parts.append(momentum(options.beta1, dtype))
    elif options.name == "sgd":
        if options.beta1:
            parts.append(optax.trace(options.beta1, accumulator_dtype=jnp.float32))
    else:
        parts.append(_adam(options, dtype))
    return optax.chain(*parts, _rate_and_decay(options))


def _adam(options: OptimizerOptions, dtype) -> optax.GradientTransformation:
    """optax's Adam, which mixes float32 with a bfloat16 momentum and so needs the standard promotion."""

    def adam(eps):
        return optax.scale_by_adam(options.beta1, options.beta2, eps, mu_dtype=dtype)

    def update(updates, state, params=None):
        eps = options.eps
        if options.name == "adamw_hf":  # optax adds it to the root of the corrected second moment.
            eps = eps / jnp.sqrt(1 - options.beta2 ** (state.count + 1).astype(jnp.float32))
        with jax.numpy_dtype_promotion("standard"):
            return adam(eps).update(updates, state, params)

    return optax.GradientTransformation(adam(options.eps).init, update)


def _rate_and_decay(options: OptimizerOptions) -> optax.GradientTransformationExtraArgs:
    """u * lr * lr_mult + weight_decay * decay_mult * p; adamw_hf: see the file's first lines."""

    def update(updates, state, params, *, multiplier=None, decay_multiplier=None):
        out = {}
        for path, u in updates.items():
            rate = options.lr * matches(options.lr_mult, path, 1.0)
            out[path] = u * rate
            decay = options.weight_decay * matches(options.decay, path, 0.0)
            decays = bool(decay)
            if decay_multiplier is not None:
                decay = decay * decay_multiplier
            if decays and options.name == "adamw_hf":
                out[path] = out[path] + rate * decay * (params[path] - multiplier * out[path])
            elif decays:
                out[path] = out[path] + decay * params[path]
        return out, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def apply(params: dict, updates: dict, multiplier: jax.Array) -> dict:
    """p - schedule multiplier * update."""
    return {path: p - multiplier * updates[path] for path, p in params.items()}
