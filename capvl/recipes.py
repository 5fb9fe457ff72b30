"""Recipes: the sections of a config, each checked against the dataclass that uses it, put together.

So a key's name, type and default stand where it is used. `config.variants` of a config file maps short names to keys,
for `configs/cappa_l16.py:res=384,batch=16k` (k is 1,024). Nobody below the training loop knows recipes.
"""

import dataclasses
import json
import os
import pathlib
import re
import typing
from collections.abc import Collection
from typing import Any

import jax

from capvl import config, objectives, storage
from capvl.config import Trust
from capvl.data.images.buckets import Bucket
from capvl.data.options import DataOptions
from capvl.data.reading.loader import KindsLoader, TrainLoader
from capvl.data.text import tokenizers
from capvl.errors import UserError, nearest
from capvl.evals import EVALUATORS, RENAMED, Context
from capvl.objectives import OBJECTIVES
from capvl.optim import watching
from capvl.optim.optimizer import OptimizerOptions
from capvl.optim.schedules import ScheduleOptions
from capvl.parallel.mesh import MeshOptions
from capvl.step import TrainStep, check_batch
from capvl.values import Typed, unquoted


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """`config.checkpoint`.

    Attributes:
      every: steps between checkpoints.
      keep: how many of the newest stay, beside the best where `config.watch` has a number.
      keep_every: checkpoints of multiples of so many steps stay for good; 0 for none.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int = 0

    def __post_init__(self):
        if self.every < 1 or self.keep < 1 or self.keep_every < 0:
            raise UserError(
                "checkpoint.every and checkpoint.keep must be at least 1, checkpoint.keep_every at least 0."
            )


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A resolved recipe.

    Attributes:
      steps, batch_size: length of the run, and examples a step over all devices.
      seed: of weights, order, augmentation and everything else.
      objective, model, data, optimizer, schedule, watch, mesh, checkpoint: options of the parts.
      evals: name -> evaluator.
      micro_batches: gradient accumulation: parts that a batch is split into.
      spike: a step whose gradient norm is above spike times its running mean is skipped; 0: never.
      max_skipped: so many skipped steps in a row stop the run.
      log_every, eval_every: in steps; eval_every=0 evaluates at the end only.
      hang_timeout: seconds without a new step after which the process ends with all stacks on stderr; 0: never.
      profile: (first step, number of steps) of a profiler trace; (0, 0) for none.
      wandb: project in Weights & Biases; "" for none.
      init_from: parameters to begin with: a workdir or converted folder, or a big_vision .npz, or several with
        + between them; "" for none.
      init_only: regexes of the parameters that are taken from there, the others being fresh; () for all.
      source: the recipe as plain values, for config.json.
    """

    steps: int
    batch_size: int
    objective: Any
    model: Any
    data: Any
    optimizer: Any
    schedule: Any
    mesh: Any
    checkpoint: CheckpointOptions
    evals: dict
    watch: Any = watching.WatchOptions()
    seed: int = 0
    micro_batches: int = 1
    spike: float = 0.0
    max_skipped: int = 10
    log_every: int = 50
    eval_every: int = 0
    hang_timeout: float = 1800.0
    profile: tuple[int, int] = (0, 0)
    wandb: str = ""
    init_from: str = ""
    init_only: tuple[str, ...] = ()
    source: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("steps", "batch_size", "micro_batches", "max_skipped", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if min(self.eval_every, self.seed, self.spike, self.hang_timeout) < 0:
            raise UserError("eval_every, seed, spike and hang_timeout must not be negative.")
        watching.check(self.watch, self.schedule, self.eval_every)

    def check(self, mesh) -> int:
        """Examples of a micro-batch on one device of a mesh.

        Raises:
          UserError: the batch doesn't divide over the mesh, or options contradict each other.
        """
        watching.check_evaluators(self.watch, self.evals)
        kinds = objectives.kinds(self.objective)
        self.data.of_kinds(kinds)
        for name, kind in kinds.items():
            check_batch(kind.count(self.batch_size, name), self.micro_batches, mesh, kind=name)
        each = check_batch(self.batch_size, self.micro_batches, mesh)
        self.objective.check(self.model, each, self.micro_batches)
        return each

    def evaluates(self, step: int) -> bool:
        """Whether its evaluators run after a step."""
        return step == self.steps or bool(self.eval_every and step % self.eval_every == 0)

    def buckets(self) -> tuple[Bucket | None, ...]:
        """The buckets that batches come in: see `capvl.objectives.buckets`."""
        return objectives.buckets(self.objective, self.model)

    def batch_spec(self, sharding=None, bucket: Bucket | None = None, batch: int = 0) -> Any:
        """Shapes and dtypes of what a step takes, {key: …} or {kind: {key: …}}.

        Args:
          sharding: of all of it, where one is given.
          bucket: which of `buckets`; None for the model's own size.
          batch: examples; 0 for `batch_size`.
        """
        spec = self.objective.batch_spec(self.model, batch or self.batch_size, *([bucket] if bucket else ()))
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), spec)

    def transforms(self) -> dict[str, Any]:
        """The objective's training transform of each kind of batch."""
        kinds = self.data.of_kinds(objectives.kinds(self.objective))
        # Of all kinds, as evaluators have it: there is one tokenizer.
        found = self.objective.transform(self.model, self.data, train=True)
        return found if isinstance(found, dict) else {name: found for name in kinds}

    def train_loader(self, transforms: dict[str, Any], position: int = 0) -> TrainLoader | KindsLoader:
        """Endless batches of this host from example `position` on.

        Raises:
          UserError: a data set can't be read, or lacks what the objective needs.
        """
        kinds = objectives.kinds(self.objective)
        data = self.data.of_kinds(kinds)
        loaders = {
            name: TrainLoader(
                data[name],
                transforms[name],
                kind.features,
                batch=kind.count(self.batch_size, name),
                seed=self.seed + 1_000_003 * i,
                position=kind.count(position, name) if position else 0,
                examples=self.steps * kind.count(self.batch_size, name),
            )
            for i, (name, kind) in enumerate(kinds.items())
        }
        if "" in loaders:
            return loaders[""]
        return KindsLoader(loaders, batch=self.batch_size, position=position)

    def tokenizer(self):
        """The tokenizer of the data, for the model.

        Raises:
          UserError: there is none.
        """
        return tokenizers.load(self.data.tokenizer_path(), self.model.reads_start)

    def context(self, mesh, blueprint, folder) -> Context:
        """What its evaluators may know.

        Args:
          mesh: of devices.
          blueprint: of the model.
          folder: for files of results.
        """
        given = dict(mesh=mesh, blueprint=blueprint, folder=folder, recipe=self)
        return Context(self.model, self.data, self.objective, self.seed, self.batch_size, **given)

    def train_step(self):
        """The recipe's `capvl.step.TrainStep`."""
        return TrainStep(
            self.objective,
            self.model,
            self.optimizer,
            self.schedule,
            self.steps,
            seed=self.seed,
            micro_batches=self.micro_batches,
            spike=self.spike,
            watch=self.watch,
        )


def _sections() -> list[str]:
    return [f.name for f in dataclasses.fields(Recipe) if f.name != "source"]


def _targets(value: Any) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# What may differ when a run is resumed: nothing of it changes what is learned, or it is the
# user's declared right (another batch size sees the same examples).
WITHOUT_EFFECT = (
    r"micro_batches|log_every|hang_timeout|profile|max_skipped|wandb|(mesh|checkpoint)(\..*)?|model\.(remat|unroll)"
    r"|objective\.chunk|data\.(data_dir|index|threads|workers|prefetch|max_bad)"
)
RESUMABLE = WITHOUT_EFFECT + r"|batch_size|eval_every|init_from|init_only|evals(\..*)?|watch\.test"


def load(spec: str, overrides: list[tuple[str, str]] = ()) -> Recipe:
    """The recipe of "FILE.py" or "FILE.py:variant=value,…" with `--config.key=value` overrides.

    Raises:
      UserError: no such file, variant, key or value.
    """
    path, _, variant = spec.partition(":")
    values = config.read_file(path)
    variants = values.pop("variants", {})
    for pair in filter(None, variant.split(",")):
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"Variant {pair!r} of {path!r} should read name=value.")
        if key not in variants and key.split(".")[0] not in _sections():
            raise UserError(f"{path!r} has no variant {key!r}." + nearest(key, variants))
        for target in _targets(variants.get(key, key)):
            set_key(values, target, text)
    for key, text in overrides:
        set_key(values, key, text)
    return resolve(values)


def default_workdir(spec: str) -> str:
    """runs/NAME of "…/NAME.py", with the variant in the name."""
    path, _, variant = spec.partition(":")
    name = pathlib.Path(path).stem + (f"-{variant}" if variant else "")
    return os.path.join("runs", re.sub(r"[^A-Za-z0-9_.=,-]", "_", name))


def resolve(values: dict, trust: Trust = True) -> Recipe:
    """A checked recipe from nested plain values (a config file's, or config.json's).

    Args:
      values: of the sections.
      trust: what may be imported, for values from elsewhere.

    Raises:
      UserError: an unknown key, a value of the wrong type, or code that is not trusted.
    """
    values = dict(values)
    objective_values = config.section(values.pop("objective", {}), "objective")
    objective_class = config.find_class(OBJECTIVES, objective_values.pop("name", None), "objective.name", trust)
    if not dataclasses.is_dataclass(getattr(objective_class, "Model", None)):
        raise UserError(f"objective.name: {objective_class.__qualname__} is no objective: it has no dataclass Model.")
    parts = {
        "objective": config.build(objective_class, objective_values, "objective"),
        "model": config.build(objective_class.Model, values.pop("model", {}), "model"),
        "data": config.build(DataOptions, values.pop("data", {}), "data"),
        "optimizer": config.build(OptimizerOptions, values.pop("optimizer", {}), "optimizer"),
        "schedule": config.build(ScheduleOptions, values.pop("schedule", {}), "schedule"),
        "watch": config.build(watching.WatchOptions, values.pop("watch", {}), "watch"),
        "mesh": config.build(MeshOptions, values.pop("mesh", {}), "mesh"),
        "checkpoint": config.build(CheckpointOptions, values.pop("checkpoint", {}), "checkpoint"),
        "evals": {},
    }
    for name, options in config.section(values.pop("evals", {}), "evals").items():
        options = config.section(options, f"evals.{name}")
        kind = _renamed(options.pop("type", name), name)
        kind = config.find_class(EVALUATORS, kind, f"evals.{name}.type", trust)
        parts["evals"][name] = config.build(kind, options, f"evals.{name}")
    recipe = config.build(Recipe, values, "", given=parts)
    return dataclasses.replace(recipe, source=describe(recipe))


_said: set[tuple[str, str]] = set()


def _renamed(kind: Any, name: str) -> Any:
    """The type of the evaluator `evals.NAME` as it is called today; where a config has its name of before, it is said,
    once."""
    old = unquoted(kind) if isinstance(kind, Typed) else kind
    if not isinstance(old, str) or old not in RENAMED:
        return kind
    # To ask which process this is starts the devices, which a plan must not.
    first = not jax.distributed.is_initialized() or jax.process_index() == 0
    if first and (name, old) not in _said:
        print(f"The evaluator {old!r} is called {RENAMED[old]!r} now: evals.{name}.type={RENAMED[old]!r}.", flush=True)
        _said.add((name, old))
    return RENAMED[old]


def read_values(path) -> dict:
    """The plain values in a workdir's config.json; nothing is imported.

    Raises:
      UserError: it can't be read, or is no recipe.
    """
    values = storage.read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{str(path)!r} is not the recipe of a run.")
    return values


def describe(recipe: Recipe) -> dict:
    """The recipe as nested plain values; `resolve` of it gives the recipe back."""
    out = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if field.name == "source":
            continue
        if field.name == "evals":
            value = {n: {"type": config.name_of(EVALUATORS, e)} | dataclasses.asdict(e) for n, e in value.items()}
        elif dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        if field.name == "objective":
            value = {"name": config.name_of(OBJECTIVES, recipe.objective)} | value
        out[field.name] = value
    return json.loads(json.dumps(out))


def check_same(old: dict, new: dict, workdir: str, moved: Collection[str] = (), *, finished: bool = False) -> None:
    """Compares a workdir's recipe with the one that shall be resumed.

    Args:
      old, new: their plain values.
      workdir: for the sentence.
      moved: keys that may differ too.
      finished: nothing is resumed: its results are taken.

    Raises:
      UserError: they differ in what makes the run, or the results.
    """
    old, new, free = config.flatten(old), config.flatten(new), WITHOUT_EFFECT if finished else RESUMABLE
    if "stream:" not in str(new.get("data.name")):
        free += r"|data\.(readers|window)"
    fixed = [k for k in sorted(old.keys() | new.keys()) if k not in moved and not re.fullmatch(free, k)]
    if new.get("watch.metric"):  # Training goes by what this evaluator says, so it makes the run too.
        evaluator = f"evals.{new['watch.metric'].partition('/')[0]}."
        fixed += [k for k in old if k == "eval_every" or k.startswith(evaluator)]
    changed = [k for k in fixed if old.get(k) != new.get(k)]
    if changed:
        shown = "; ".join(f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in changed[:3])
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        other = "remove it, or choose another place" if finished else "choose another --workdir"
        raise UserError(f"Workdir {workdir!r} belongs to another recipe ({shown}{more}); {other}.")


def own_code(values: dict) -> set[str]:
    """The "module:Class" names in a recipe's plain values."""
    evaluators = values.get("evals", {})
    named = [o.get("type", n) for n, o in evaluators.items() if isinstance(o, dict)]
    return {str(name) for name in [*named, values.get("objective", {}).get("name", "")] if ":" in str(name)}


def set_key(values: dict, key: str, text: str) -> None:
    """Sets a dotted key of a recipe's plain values to a text, which means what the key's type says.

    Raises:
      UserError: there is no such section or evaluator.
    """
    *sections, last = key.split(".")
    if sections and sections[0] not in _sections():
        raise UserError(f"Unknown key {key!r}." + nearest(sections[0], _sections()))
    evaluators = values.get("evals", {})
    if sections[:1] == ["evals"] and len(sections) > 1 and sections[1] not in evaluators:
        raise UserError(
            f"Unknown key {key!r}: there is no evaluator {sections[1]!r}." + nearest(sections[1], evaluators)
        )
    hint = typing.get_type_hints(Recipe).get(last)
    whole = sections == ["evals"] or (not sections and (hint in (Any, dict) or dataclasses.is_dataclass(hint)))
    config.set_key(values, key, text, whole=whole)
