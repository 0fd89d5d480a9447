"""The map leads where it says: its example, its names, a flip's way, what to read.

The examples in the docstrings of what it names are run as well.
"""

import contextlib
import doctest
import importlib
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch

import helpers
from helpers.measure import measure
from tests.test_house import HELPERS, LAYERS, STARRED, STARRED_LINES

MAP = (HELPERS / "README.md").read_text()


def section(title: str) -> str:
    """Return the text below a heading of the map, to the next one."""
    _, _, rest = MAP.partition(f"\n## {title}")
    return rest.partition("\n")[2].partition("\n## ")[0]


def files_linked(text: str) -> list[str]:
    """List the files that a list's items, or a table's rows, begin with."""
    return re.findall(r"^(?:\d+\.|\|) \[.*?\]\((\S+\.py)\)", text, re.M)


def test_its_example_prints_what_it_shows():
    code, shown = re.findall(r"```\w*\n(.*?)```", section("Predict"), re.S)
    assert len([line for line in code.splitlines() if line]) == 6
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue() == shown


def test_it_names_every_entry_in_the_order_of_imports():
    entries = {path.name for path in HELPERS.iterdir()}
    entries -= {"README.md", "__init__.py", "__pycache__"}
    rows = re.findall(r"^\| \[`(.+?)/?`\]", section("What is where"), re.M)
    assert set(rows) == entries
    ranks = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
    places = [ranks[row.removesuffix(".py")] for row in rows]
    assert places == sorted(places)


def test_its_layers_are_those_that_imports_keep():
    (shown,) = re.findall(r"```\w*\n(.*?)```", section("What is where"), re.S)
    layers = [set(layer.split()) for layer in shown.split("←")]
    assert layers == [set(layer) for layer in LAYERS]
    lines = re.findall(r"^    (.+?)(?:  |$)", helpers.__doc__, re.M)
    assert [set(line.split(", ")) for line in lines] == layers


def test_every_path_that_it_names_exists():
    links = re.findall(r"\]\(([^)#]+)\)", MAP)
    assert [link for link in links if not (HELPERS / link).exists()] == []


class Entered:
    """Notes the helpers' files in the order in which they are first entered."""

    def __init__(self) -> None:
        self.files: dict[str, None] = {}

    def __call__(self, frame, event: str, _) -> None:
        # By module: a dataclass's own methods lie in no file.
        if frame.f_code.co_name == "__del__":  # which comes when it comes
            return
        name = frame.f_globals.get("__name__", "")
        if event == "call" and name.partition(".")[0] == "helpers":
            path = Path(sys.modules[name].__file__)
            self.files.setdefault(path.relative_to(HELPERS).as_posix())


def test_a_flip_goes_the_way_that_is_listed():
    way = files_linked(section("The way of a flip"))
    lab = helpers.LayerLab(batch=8, settings={"depth": 2, "width": 8})
    before, entered = sys.getprofile(), Entered()
    sys.setprofile(entered)
    try:
        lab.boxes["layer1"].value = True
    finally:
        sys.setprofile(before)
    assert lab.plan == helpers.Plan.alone(["layer1"])
    assert [name for name in entered.files if name in way] == way
    folders = {name.partition("/")[0] for name in way}
    assert {"controls", "measure", "dry_run", "timeline", "plots"} <= folders


def test_the_files_to_read_are_those_that_stay_short():
    starred = [f"{name}.py" for name in STARRED]
    assert files_linked(section("What to read")) == starred
    lengths = [len((HELPERS / name).read_text().splitlines()) for name in starred]
    assert max(lengths) < STARRED_LINES


def links_of(notebook: Path) -> set[str]:
    """Collect what a notebook's prose links."""
    cells = json.loads(notebook.read_text())["cells"]
    prose = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
    return set(re.findall(r"\]\((\S+?)\)", "\n".join(prose)))


def test_each_file_to_read_is_linked_by_the_notebook_that_teaches_it():
    table = section("What to read")
    rows = re.findall(r"^\| \[.*?\]\((\S+)\).*\]\((\S+\.ipynb)\)", table, re.M)
    missing = [
        (file, notebook)
        for file, notebook in rows
        if f"../helpers/{file}" not in links_of(HELPERS / notebook)
    ]
    assert len(rows) == len(STARRED) and not missing


@pytest.mark.parametrize("name", [*helpers.__all__, "measure"])
def test_its_docstring_begins_with_an_example_that_runs(name):
    thing = measure if name == "measure" else getattr(helpers, name)
    first, blank, example = thing.__doc__.splitlines()[:3]
    assert first.endswith(".") and not blank and example.startswith("    >>> ")
    names = vars(importlib.import_module(thing.__module__)).copy()
    (test,) = doctest.DocTestFinder(recurse=False).find(thing, name, globs=names)
    with torch.random.fork_rng(devices=[]):
        found = doctest.DocTestRunner().run(test)
    assert found.attempted and not found.failed
