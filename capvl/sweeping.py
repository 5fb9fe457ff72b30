"""Recipes over data sets, shots and seeds: a run for each in a workdir of its own, and the means over them."""

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence

import jax
from etils import epath

from capvl import evaluation, metrics, recipes, storage, train, workdirs
from capvl.data.reading import sources
from capvl.data.reading.shots import few_shot
from capvl.errors import UserError
from capvl.evals import odinw
from capvl.parallel import distributed
from capvl.terminal import say


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      mode: what the recipe is called.
      spec: of the recipe, "FILE.py:variant=value,…".
      dataset: `data.name`.
      shots: images of each class; 0: no training; "all": the whole data set.
      copies: of its images in an epoch.
      seed: of the choice of images, and of the run.
      overrides: (key, text) of the recipe.
    """

    mode: str
    spec: str
    dataset: str
    shots: int | str
    copies: int
    seed: int
    overrides: tuple[tuple[str, str], ...] = ()

    def facts(self) -> dict:
        """What its row begins with."""
        return {"dataset": self.dataset, "shots": self.shots, "seed": self.seed, "mode": self.mode}

    def workdir(self, out: epath.Path) -> epath.Path:
        """Its own folder."""
        names = self.mode, self.dataset, f"{self.shots}shots_seed{self.seed}"
        return out.joinpath(*(re.sub(r"[^A-Za-z0-9_.=,-]", "_", name) for name in names))

    def recipe(self, epochs: int) -> recipes.Recipe:
        """Its recipe, with `epochs` epochs where they are told, and an evaluation after each.

        Raises:
          UserError: see `capvl.recipes.load`, or it doesn't say on what is tested.
        """
        few = self.shots if isinstance(self.shots, int) else 0
        own = {"data.name": self.dataset, "data.shots": few, "data.shots_seed": self.seed, "seed": self.seed}
        told = [*self.overrides, *((key, str(value)) for key, value in own.items())]
        recipe = recipes.load(self.spec, told)
        if len(recipe.watch.test) != 1:
            raise UserError(f"{self.spec!r} has to name one evaluator in watch.test, whose numbers the rows have.")
        if not epochs or self.shots == 0:
            return recipe
        each = math.ceil(self.copies * _images(recipe.data) / recipe.batch_size)
        return recipes.load(self.spec, [*told, ("steps", str(epochs * each)), ("eval_every", str(each))])


def _images(data) -> int:
    """How many images are trained on."""
    source = sources.open_source(data.name, data.split, data.directory(), features=("image",), fields=data.fields())
    return len(few_shot(source, data.shots, data.shots_seed) if data.shots else source)


def cells(
    configs: Sequence[str], datasets: Sequence[str], shots: str, seeds: str, overrides: Sequence[tuple[str, str]] = ()
) -> list[Cell]:
    """All runs of a sweep, those of one data set together.

    Args:
      configs: "MODE=FILE.py:variant=value,…" each.
      datasets: names.
      shots: "0,1*8,3*4,10,all".
      seeds: "3,30,300".
      overrides: (key, text) of all recipes.

    Raises:
      UserError: one of them can't be read, or stands there twice.
    """
    modes = [re.fullmatch(r"([\w-]+)=(.+)", config) for config in configs]
    if not all(modes):
        raise UserError(f"--config={configs[modes.index(None)]} should read MODE=FILE.py, with a name for the table.")
    amounts = [re.fullmatch(r"(all|\d+)(?:\*([1-9]\d*))?", text.strip()) for text in shots.split(",")]
    numbers = [text.strip() for text in seeds.split(",")]
    if not all(amounts) or not all(text.isdecimal() for text in numbers):
        raise UserError("--shots should read as 0,1*8,3*4,10,all and --seeds as 3,30,300.")
    found = [
        Cell(
            mode=mode[1],
            spec=mode[2],
            dataset=dataset.strip(),
            shots="all" if amount[1] == "all" else int(amount[1]),
            copies=int(amount[2] or 1),
            seed=int(number),
            overrides=tuple(overrides),
        )
        for dataset in datasets
        for mode in modes
        for amount in amounts
        for number in (numbers if amount[1] != "0" else numbers[:1])  # Nothing is drawn where nothing is trained.
    ]
    if len({tuple(cell.facts().values()) for cell in found}) < len(found):
        raise UserError("A mode, data set, number of shots or seed stands there twice.")
    return found


def run(cells: Sequence[Cell], out: str, *, epochs: int = 0, number: str = "") -> list[dict]:
    """Runs what isn't finished, and prints the means of all that is; returns the rows.

    Args:
      cells: the runs.
      out: folder of their workdirs, and of rows.json.
      epochs: 0 for the steps of the recipes.
      number: of the test that is shown; "" for the one that is called as the watched one is.

    Raises:
      UserError: see `capvl.train.run`, also of what is finished; all recipes are looked at before the first run.
    """
    path = metrics.open_workdir(out)
    made = [cell.recipe(epochs) for cell in cells]
    for recipe in made:
        recipe.data.check_prepared()
    rows = []
    for i, (cell, recipe) in enumerate(zip(cells, made, strict=True), 1):
        say(f"Run {i} of {len(cells)}: {', '.join(f'{k} {v}' for k, v in cell.facts().items())}")
        row = _row(cell, recipe, cell.workdir(path))
        if row is None:
            say("Stopped by a signal; start again with the same --out to go on.")
            return rows
        rows.append(row)
        jax.clear_caches()  # The next run compiles its own step, and hundreds of them fill the memory.
        if jax.process_index() == 0:
            storage.replace_text(path / "rows.json", json.dumps(rows, indent=1))
    print_tables(rows, number or made[0].watch.metric.partition("/")[2])
    return rows


def _row(cell: Cell, recipe: recipes.Recipe, workdir: epath.Path) -> dict | None:
    """A cell's row, from its workdir where it is finished; None where the run was stopped before its end."""
    file, test = workdir / "row.json", recipe.watch.test[0]
    if distributed.largest(int(file.exists())):
        workdirs.check(workdir, recipe, finished=True)
        return storage.read_json(file)
    if cell.shots == 0:
        workdirs.write(metrics.open_workdir(str(workdir)), recipe, "")
        distributed.largest(0)  # All wait until it is written.
        numbers = evaluation.evaluate(str(workdir), only=[test], untrained=True, trust=True)
    else:
        train.run(recipe, str(workdir))
        lines = metrics.read_evaluations(workdir)
        if not lines:
            return None
        numbers = lines[-1]
    row = cell.facts() | {k.partition("/")[2]: v for k, v in numbers.items() if k.startswith(f"{test}/")}
    if jax.process_index() == 0:
        storage.replace_text(file, json.dumps(row))
    return row


def by_mode(rows: Sequence[dict], number: str) -> dict[str, odinw.Results]:
    """mode -> shots -> data set -> the number of each seed, as `capvl.evals.odinw` makes tables of.

    Raises:
      UserError: a row lacks the number.
    """
    found = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if not isinstance(row.get(number), int | float):
            raise UserError(f"--number={number}: the test of {row['dataset']!r} gave {', '.join(list(row)[4:])}.")
        found[row["mode"]][str(row["shots"])][row["dataset"]].append(row[number])
    return found


def print_tables(rows: Sequence[dict], number: str) -> None:
    """A table for each mode."""
    for mode, results in by_mode(rows, number).items():
        say(f"\n{mode}: {number} in percent, means over the seeds, and their deviation\n\n{odinw.table(results)}")
