"""The house has floors: imports go down only (DESIGN §1, docs/concepts.md), those inside functions too."""

import ast
import functools
import pathlib
import re

import pytest
from conftest import ROOT

# From the bottom up. What stands on one floor doesn't know its neighbours; a package is one place, and so is a room of
# data. A file may import its own place and whatever is below.
FLOORS = (
    ("errors",),
    ("values", "lines", "command", "chips"),
    ("config", "storage", "terminal"),
    ("goodput", "trackers", "parallel"),
    ("metrics", "nn", "lock"),
    ("losses", "models", "optim"),
    ("weights",),
    ("data.randomness",),
    ("data.images", "data.text"),
    ("data.scenes",),
    ("data.reading",),
    ("data.options", "data.examples", "data.preparing"),
    ("decoding",),
    ("objectives",),
    ("inference", "step"),
    ("evals",),
    ("recipes",),
    ("checkpoint", "overview", "workdirs", "reporting"),
    ("convert",),
    ("loading", "train", "evaluation", "precompute", "planning"),
    ("main", "sweeping"),
    ("bench", "chaos", "plan", "evaluate", "report", "embeddings", "sweep")
    + ("data.prepare", "data.tokenizer", "data.tsv", "data.frequencies", "data.teacher"),
)
PACKAGE = pathlib.Path(ROOT, "capvl")
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def place(module: str) -> str:
    """The place of a module: its first name, and in `data` its room."""
    return ".".join(module.split(".")[: 2 if module.startswith("data.") else 1])


@functools.cache
def imports(module: str) -> tuple[tuple[str, int, bool], ...]:
    """(imported name, its line, whether it is inside a function) of every import in a module."""

    def below(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, f"{module}: relative import"
                whole = [f"{child.module}.{alias.name}" for alias in child.names]
                yield from (
                    (n if n.removeprefix("capvl.") in MODULES else child.module, child.lineno, inside) for n in whole
                )
            yield from below(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    return tuple(below(ast.parse(MODULES[module].read_text()), False))


def arrows(module: str) -> set[str]:
    """Modules of ours that a module imports, wherever it does."""
    names = {name.removeprefix("capvl.") for name, _, _ in imports(module) if name.startswith("capvl.")}
    return {name for name in names if name in MODULES and name != module}


def test_every_place_has_a_floor():
    known = [name for floor in FLOORS for name in floor]
    assert len(known) == len(set(known))
    places = {place(m) for m in MODULES if m not in ("__init__", "data", "capvl")}
    assert places <= set(known), f"no floor: {sorted(places - set(known))}"
    assert set(known) <= places, f"nothing stands there: {sorted(set(known) - places)}"


def test_the_documents_show_these_floors():
    table = pathlib.Path(ROOT, "docs/concepts.md").read_text().partition("| floor | places |")[2].partition("\n\n")[0]
    shown = [tuple(re.findall(r"`([^`]+)`", row.split("|")[2])) for row in table.splitlines() if "`" in row]
    assert shown == list(reversed(FLOORS))


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("__init__", "data")])
def test_arrows_go_down(module):
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    for other in arrows(module):
        if place(other) != place(module) and other != "data":
            assert floor[place(other)] < floor[place(module)], f"{module} imports {other}, which is not below it"


def test_every_folder_is_a_package_that_says_what_it_is():
    for folder in {file.parent for file in MODULES.values()}:
        first = folder / "__init__.py"
        assert first.exists() and ast.get_docstring(ast.parse(first.read_text())), f"{folder} has no docstring"


def test_no_circle_within_a_place():
    done, path = set(), []

    def visit(module):
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            path.append(module)
            for other in sorted(arrows(module)):
                visit(other)
            done.add(path.pop())

    for module in MODULES:
        visit(module)


@pytest.mark.parametrize("module", MODULES)
def test_late_imports_say_why(module):
    """An import inside a function has a comment, beside it or above its block: the package is optional, or slow."""
    lines = MODULES[module].read_text().splitlines()
    late = [line for _, line, inside in imports(module) if inside]
    for line in late:
        first = line
        while first - 1 in late or (first >= 2 and not lines[first - 2].strip() and first - 2 in late):
            first -= 1 if first - 1 in late else 2
        said = "#" in lines[line - 1] or "#" in lines[first - 1] or lines[first - 2].strip().startswith("#")
        assert said, f"{module}, line {line}: {lines[line - 1].strip()!r} doesn't say why it is not at the top"


def test_sizes():
    """Files up to 400 lines, functions up to 60."""
    for module, file in MODULES.items():
        text = file.read_text()
        assert text.count("\n") <= 400, f"{module} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 60, f"{module}.{node.name} has {length} lines"


def test_test_files_have_names_of_their_own():
    """pytest imports them by these, and two of one name can't be collected together."""
    names = [file.name for file in pathlib.Path(ROOT, "tests").rglob("*.py") if file.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)
