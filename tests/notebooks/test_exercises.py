"""The folded solutions solve the exercises, and the stubs as they stand do not."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.DOTALL)


def is_stub(statement: ast.stmt) -> bool:
    """Say whether the reader fills it in: it assigns, or returns, ``...``."""
    value = statement.body[-1] if isinstance(statement, ast.FunctionDef) else statement
    value = getattr(value, "value", None)
    return isinstance(value, ast.Constant) and value.value is ...


def solved(cell: str, solution: str) -> str:
    """Put a solution in the place of a cell's stub."""
    lines = cell.splitlines()
    (stub,) = filter(is_stub, ast.parse(cell).body)
    lines[stub.lineno - 1 : stub.end_lineno] = solution.splitlines()
    return "\n".join(lines)


def with_solutions(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Solve a notebook's exercises in place, and return their cells."""
    exercises = []
    for cell, after in zip(notebook.cells, notebook.cells[1:], strict=False):
        found = SOLUTION.search(after.source)
        if cell.cell_type == "code" and found:
            cell.source = solved(cell.source, found[1])
            exercises.append(cell)
    return exercises


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_solution_is_right_and_every_stub_is_not_attempted(path):
    notebook = nbformat.read(path, as_version=4)
    source = "".join(cell.source for cell in notebook.cells)
    stubs = [cell.copy() for cell in notebook.cells if "checks.check_" in cell.source]
    exercises = with_solutions(notebook)
    assert len(exercises) == len(stubs) == source.count("<summary>Solution") >= 2
    assert [printed(stub) for stub in stubs] == ["not attempted\n"] * len(stubs)
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    for cell in exercises:
        assert printed(cell).startswith("correct"), cell.source
