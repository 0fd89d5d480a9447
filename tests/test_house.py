"""The house keeps its order: layers, private files, sizes, and no trace of a visit.

A rule takes the folder of the helpers and yields a sentence for every problem.
"""

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HELPERS = ROOT / "helpers"

# A package imports from earlier layers, and from its own layer what WITHIN allows.
LAYERS = [
    ["units", "models"],
    ["checkpointing", "from_scratch"],
    ["timeline"],
    ["dry_run", "allocator"],
    ["measure"],
    ["planner", "inspection", "sweep", "recording", "distributed"]
    + ["compiled", "offload"],
    ["plots"],
    ["controls", "checks"],
]
RANKS = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
WITHIN = {"dry_run": {"allocator"}, "planner": {"inspection"}}
MOST_ENTRIES, MOST_LINES, FILE_LINES, FUNCTION_LINES = 20, 18_150, 330, 40
STARRED = """units models/mlp checkpointing/plan checkpointing/apply
  from_scratch/__init__ from_scratch/reentrant from_scratch/segment timeline/tracker
  timeline/record dry_run/__init__ measure/step measure/predicted
  controls/state""".split()
STARRED_LINES = 250  # files to learn from, which the notebooks link
CLOSURE_FILES, CLOSURE_LINES = 13, 2_625
NOT_IN_CLOSURE = "controls", "plots", "recording", "_cpu_limit"

Place = tuple[str, ...]  # a path, or a dotted name, below helpers


def files(folder: Path) -> Iterator[tuple[Place, str]]:
    """Yield each source file's place, and its text."""
    for path in sorted(folder.rglob("*.py")):
        yield path.relative_to(folder).parts, path.read_text()


def owner(place: Place) -> str:
    """Return the package, or the single module, that a file belongs to."""
    return place[0].removesuffix(".py")


def imports(place: Place, text: str) -> Iterator[tuple[str, Place]]:
    """Yield what a file imports from helpers: the name that it binds, and whence."""
    package = ".".join(["helpers", *place[:-1]])
    for node in ast.walk(ast.parse(text)):
        names, start = [], ""
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = node.names
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            start = importlib.util.resolve_name(module, package) + "."
        for name in names:
            top, *parts = (start + name.name).split(".")
            if top == "helpers":
                yield name.asname or name.name.split(".")[0], tuple(parts)


def imports_run_one_way(folder: Path) -> Iterator[str]:
    """Layers know those before them."""
    for place, text in files(folder):
        here = owner(place)
        if here == "__init__":  # it imports when it is asked
            continue
        if here not in RANKS:
            yield f"{'/'.join(place)} stands in no layer"
            continue
        targets = {there[0] if there else "all" for _, there in imports(place, text)}
        for target in sorted(targets - {here, "lazily"} - WITHIN.get(here, set())):
            if RANKS.get(target, len(LAYERS)) >= RANKS[here]:
                yield f"{'/'.join(place)} imports {target}"


def what_is_private_stays_at_home(folder: Path) -> Iterator[str]:
    """Nobody imports another package's private file or name, nor reaches for one."""
    for place, text in files(folder):
        guests = [(n, there) for n, there in imports(place, text)]
        guests = [(n, t) for n, t in guests if t and t[0] != owner(place)]
        for _, there in guests:
            if any(part.startswith("_") for part in there):
                yield f"{'/'.join(place)} imports {'.'.join(there)}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.endswith("__")
                if private and node.value.id in {name for name, _ in guests}:
                    yield f"{'/'.join(place)} reaches for {ast.unparse(node)}"


def files_are_short(folder: Path) -> Iterator[str]:
    """A file that outgrows its limit becomes a folder, and one to read even sooner."""
    for place, text in files(folder):
        name, lines = "/".join(place), len(text.splitlines())
        starred = name.removesuffix(".py") in STARRED
        if lines > FILE_LINES or (starred and lines >= STARRED_LINES):
            yield f"{name} has {lines} lines"


def functions_are_short(folder: Path) -> Iterator[str]:
    """From def to the last line, docstring included."""
    for place, text in files(folder):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    yield f"{'/'.join(place)}: {node.name} has {lines} lines"


def the_house_is_small(folder: Path) -> Iterator[str]:
    """Few enough lines to read, and few enough entries to know what is where."""
    lines = sum(len(text.splitlines()) for _, text in files(folder))
    kept = {path for path in folder.rglob("*") if path.is_file()}
    kept = {path.relative_to(folder).parts for path in kept}
    entries = {parts[0] for parts in kept if "__pycache__" not in parts}
    if lines > MOST_LINES:
        yield f"{lines} lines"
    if len(entries) > MOST_ENTRIES:
        yield f"{len(entries)} entries: {', '.join(sorted(entries))}"


def predict_is_small(folder: Path) -> Iterator[str]:
    """Importing predict loads little, and nothing that a prediction can do without."""
    program = (
        "import sys; from helpers.measure import predict; print(*("
        "m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'helpers'))"
    )
    paths = [Path(name) for name in run(program, folder.parent).split()]
    for path in paths:
        for word in NOT_IN_CLOSURE:
            if word in (path.stem, path.parent.name):
                yield f"predict loads {path}"
    trees = {path: ast.parse(path.read_text()) for path in paths}
    paths = [path for path in paths if not only_exports(path, trees[path])]
    lines = sum(len(path.read_text().splitlines()) for path in paths)
    if len(paths) > CLOSURE_FILES or lines > CLOSURE_LINES:
        names = sorted(str(path.relative_to(folder)) for path in paths)
        yield f"predict loads {lines} lines in {len(paths)} files: {names}"


def only_exports(path: Path, tree: ast.Module) -> bool:
    """Say whether a file is a package's face, and defines nothing of its own."""
    defined = (ast.FunctionDef, ast.ClassDef)
    is_face = not any(isinstance(node, defined) for node in tree.body)
    return path.name == "__init__.py" and (is_face or path.parent.name == "helpers")


def run(program: str, folder: Path = ROOT) -> str:
    """Run a program in a Python of its own; return what it prints."""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


RULES = [
    imports_run_one_way,
    what_is_private_stays_at_home,
    files_are_short,
    functions_are_short,
    the_house_is_small,
    predict_is_small,
]
GOOD = {
    "__init__.py": "def lazily(): pass",
    "units.py": "MIB = 2**20",
    "plots.py": "from helpers import measure",
    "measure/__init__.py": "from helpers.measure.predicted import predict",
    "measure/predicted.py": "from helpers import units\ndef predict(): units.MIB",
    "measure/_own.py": "from .predicted import predict\nfrom helpers import lazily",
}
LONG = "a = 1\n" * 300
PRIVATE = "what_is_private_stays_at_home"
SPOILED = [
    ("imports_run_one_way", {"units.py": "import helpers.measure"}),
    ("imports_run_one_way", {"units.py": "def f():\n    from helpers import models"}),
    ("imports_run_one_way", {"measure/_own.py": "from .. import plots"}),
    ("imports_run_one_way", {"cellar.py": ""}),
    (PRIVATE, {"checks.py": "import helpers.measure._own"}),
    (PRIVATE, {"checks.py": "from helpers.units import _x"}),
    (PRIVATE, {"checks.py": "from helpers import units as sizes\nsizes._x"}),
    ("files_are_short", {"sweep.py": LONG + "a = 1\n" * 31}),
    ("files_are_short", {"measure/step.py": "a = 1\n" * 250}),
    ("functions_are_short", {"sweep.py": "def f():" + "\n    pass" * 40}),
    ("the_house_is_small", {f"measure/_{i}.py": LONG for i in range(62)}),
    ("the_house_is_small", {f"{i}.md": "" for i in range(17)}),
    ("predict_is_small", {"units.py": "import helpers.plots"}),
    ("predict_is_small", {"units.py": "a = 1\n" * 2_624}),
    (
        "predict_is_small",
        {f"measure/_{i}.py": "" for i in range(12)}
        | {"units.py": "".join(f"import helpers.measure._{i}\n" for i in range(12))},
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(rule):
    if problems := list(rule(HELPERS)):
        pytest.fail("\n".join(problems), pytrace=False)


def build(folder: Path, houses: dict[str, str]) -> Path:
    for name, text in houses.items():
        path = folder / "helpers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "helpers"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_house_keeps_every_rule(rule, tmp_path):
    assert list(rule(build(tmp_path, GOOD))) == []


@pytest.mark.parametrize("name, changes", SPOILED)
def test_a_spoiled_house_breaks_its_rule(name, changes, tmp_path):
    (rule,) = (rule for rule in RULES if rule.__name__ == name)
    assert list(rule(build(tmp_path, GOOD | changes)))


def test_every_rule_can_fail():
    assert {name for name, _ in SPOILED} == {rule.__name__ for rule in RULES}


def module_names() -> list[str]:
    places = [place for place, _ in files(HELPERS) if place[-1] != "__main__.py"]
    names = [".".join(["helpers", *place]).removesuffix(".py") for place in places]
    return [name.removesuffix(".__init__") for name in names]


# Each module in a process of its own, as if it were the first that a reader imports.
# What is not ours is there before, and a child takes it over as it is.
VISITS = """
import importlib, inspect, os, sys
import ipywidgets, matplotlib.pyplot, pandas, torch.distributed.fsdp, tqdm
for name in NAMES:
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            print(name)
        continue
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", []):
        assert not inspect.ismodule(getattr(module, public)), public
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="imports in forks of one process")
def test_every_module_can_be_the_first_to_be_imported():
    """A module that had the name of what its package exports would be found as well."""
    assert run(f"NAMES = {module_names()!r}" + VISITS) == ""


# Predictions of each kind, each with what it does to torch while it runs.
STAYS = """
from tests.torch_state import changes, torch_state
def check(what):
    global before
    if changed := changes(before, after := torch_state()):
        print(what, changed)
    before = after
import importlib, torch
before = torch_state()
for name in NAMES:
    importlib.import_module(name)
check("importing")
from helpers import inspection, measure, models, planner
from helpers.checkpointing import Plan
mlp = models.MLP([8, 8, 8, 4], "gelu", dropout=0.1)
chain = models.MLP([8, 8, 4])
x, plan = torch.randn(4, 8), Plan.alone(["layer1"])
gpt = models.GPT(1, 8, 2, vocabulary=10, context=4), torch.ones(2, 4, dtype=torch.long)
adamw, before = torch.optim.AdamW, torch_state()
for device in ("cuda", "cpu"):
    for name, words in {
        "plain": {},
        "AdamW": {"optimizer": adamw},
        "fused": {"optimizer": lambda p: adamw(p, fused=True)},
        "bf16": {"autocast": torch.bfloat16},
    }.items():
        measure.predict(mlp, x, plan, device=device, **words)
        check(f"{name} on {device}")
        measure.predict(*gpt, device=device, **words)
        check(f"attention, {name} on {device}")
inspection.inspect_model(mlp, x)
check("inspect_model")
planner.profile(chain, x)
check("profile")
measure.measure(mlp, x, plan, device="cpu", repeats=1, warmup=1)
check("measure")
with measure.memory_limit(2**30, "cpu"):
    chain(x).sum().backward()
check("memory_limit")
"""


def test_importing_and_predicting_leave_torch_as_it_was():
    assert run(f"NAMES = {module_names()!r}" + STAYS) == ""
