"""The folded solutions solve the exercises, and the stubs as they stand do not."""

import ast
import contextlib
import io
import re
from pathlib import Path

import nbformat
import pytest

from tests.notebooks.exercises import needed, with_solutions

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def run(cells: list[list[ast.stmt]]) -> list[str]:
    """Run cells one after the other in this process; return what each prints."""
    names, printed = {"__name__": "__main__"}, []
    for statements in cells:
        code = compile(ast.Module(statements, []), "cell", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as text:
            exec(code, names)
        printed.append(text.getvalue())
    return printed


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_solution_is_right_and_every_stub_is_not_attempted(path):
    """What stubs print is held against a new run by nbval."""
    notebook = nbformat.read(path, as_version=4)
    source = "".join(cell.source for cell in notebook.cells)
    stubs = [cell.copy() for cell in notebook.cells if "checks.check_" in cell.source]
    exercises = with_solutions(notebook)
    assert len(exercises) == len(stubs) == source.count("<summary>Solution") >= 2
    assert [printed(stub) for stub in stubs] == ["not attempted\n"] * len(stubs)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    places = [i for i, cell in enumerate(code) if cell in exercises]
    said = run(needed([cell.source for cell in code], places))
    for place in places:
        assert said[place].startswith("correct"), code[place].source


STUB = re.compile(r"def (\w+)\(.*\):\n    return \.\.\.")
PLAINLY = r"def \1(model, x):\n    model(x).sum().backward()"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_training_function_passes_that_leaves_out_what_is_asked_for(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    places = [i for i, cell in enumerate(code) if STUB.search(cell)]
    code = [STUB.sub(PLAINLY, cell) for cell in code]
    said = run(needed(code, places))
    assert all(said[place].startswith("not yet") for place in places), said


def test_only_what_an_exercise_needs_is_kept():
    cells = ["import lab", "a = 1\nb = lab.size()\nfound = {}"]
    cells += ["def use(): return a", "def note(key): found[key] = use()"]
    cells += ["lab.show(use())", "b = 3\na = b", "note(1)\nb.backward()"]
    cells += ["b = 4\nfor _ in found: a = b\nc = a", "found[1] + b"]
    kept = needed(cells, [8])
    lines = [ast.unparse(cell).replace("\n   ", "") for cell in kept]
    assert lines[:3] == ["", "a = 1\nfound = {}", "def use(): return a"]
    assert lines[3:6] == ["def note(key): found[key] = use()", "", "b = 3\na = b"]
    assert lines[6:] == ["note(1)", "b = 4", "found[1] + b"]
