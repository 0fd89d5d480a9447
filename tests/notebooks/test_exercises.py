"""The folded solutions solve the exercises, and neither stubs nor slips do.

Nothing that a reader sees before the third try gives an answer away.
"""

import ast
import contextlib
import functools
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
import torch

from helpers import checks
from helpers.checkpointing import Plan
from tests.notebooks.exercises import is_stub, needed, solved, with_solutions

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def run(cells: list[list[ast.stmt]], names: dict) -> list[str]:
    """Run cells one after the other in this process; return what each prints."""
    printed = []
    for statements in cells:
        code = compile(ast.Module(statements, []), "cell", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as text:
            exec(code, names)
        printed.append(text.getvalue())
    return printed


@dataclass(frozen=True)
class Exercise:
    """An exercise's stub and solution, its call of a check, and what that printed."""

    stub: nbformat.NotebookNode
    solution: str
    check: Callable
    args: tuple  # behind the answer
    how: dict
    said: str
    names: dict  # of the page at its end

    def asked(self, answer: object) -> str:
        """Give the check an answer, as if it were the first; return what it prints."""
        checks._tries.clear()
        with contextlib.redirect_stdout(io.StringIO()) as text:
            self.check(answer, *self.args, **self.how)
        return text.getvalue()


@functools.cache
def exercises_of(path: Path) -> list[Exercise]:
    """Solve a notebook's exercises by their folded solutions."""
    notebook = nbformat.read(path, as_version=4)
    stubs = [cell.copy() for cell in notebook.cells if "checks.check_" in cell.source]
    solved = with_solutions(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    places = [i for i, cell in enumerate(code) if cell in solved]
    calls: list[tuple] = []
    names = {"__name__": "__main__"}
    with pytest.MonkeyPatch.context() as patch:
        for name in CHECKS:
            check = getattr(checks, name)
            noting = functools.partial(note_call, calls, check)
            patch.setattr(checks, name, noting)
        said = run(needed([cell.source for cell in code], places), names)
    assert len(stubs) == len(places) and len(calls) >= len(places)
    calls = calls[-len(places) :]  # a page may use a check before
    return [
        Exercise(stub, code[place].source, *call, said[place], names)
        for stub, place, call in zip(stubs, places, calls, strict=True)
    ]


CHECKS = "check_number", "check_bytes", "check_plan", "check_gradients"


def note_call(calls: list, check: Callable, answer: object, *args, **how) -> None:
    calls.append((check, args, how))
    check(answer, *args, **how)


def printed(cell: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_solution_is_right_and_every_stub_is_not_attempted(path):
    """What stubs print is held against a new run by nbval."""
    source = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    exercises = exercises_of(path)
    assert len(exercises) == source.count("<summary>Solution") >= 2
    for exercise in exercises:
        assert printed(exercise.stub) == "not attempted\n"
        assert exercise.said.startswith("correct"), exercise.solution


NO_NUMBERS = ["", "17", [], {}, True, 1j, len, torch.ones(2), Plan()]
WRONG = {
    checks.check_number: [-1, math.nan, math.inf, 10**400, *NO_NUMBERS],
    checks.check_plan: [Plan(), Plan.alone(["no such layer"]), Plan, ["layer1"], 1, ""],
    checks.check_gradients: [
        1,
        "",
        Plan(),
        len,
        lambda: 1,
        lambda model, x: model(x),
    ],
}
WRONG[checks.check_bytes] = WRONG[checks.check_number]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_check_says_in_a_line_that_an_answer_is_wrong_or_none(path):
    for exercise in exercises_of(path):
        for answer in [*WRONG[exercise.check], *exercise.how.get("hints", ())]:
            line = exercise.asked(answer)
            assert re.fullmatch(r"not yet: .+\n", line), (answer, exercise.solution)
            for words in answers_in_words(exercise):
                assert not re.search(rf"(?<![\d,.]){words}(?![\d,]|\.\d)", line), line


def answers_in_words(exercise: Exercise) -> list[str]:
    """Spell the number that an exercise asks for, as pages and checks would."""
    if exercise.check not in (checks.check_number, checks.check_bytes):
        return []
    return [f"{exercise.args[0]:{style}}" for style in ("", ",", "_")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_page_shows_an_answer_outside_of_its_solution(path):
    cells = nbformat.read(path, as_version=4).cells
    shown = [re.sub(r"(?s)<details>.*?</details>", "", cell.source) for cell in cells]
    shown += [printed(cell) for cell in cells if cell.cell_type == "code"]
    page = "\n".join(shown)
    for exercise in exercises_of(path):
        source, right = exercise.stub.source, exercise.solution
        said = {
            ast.unparse(node) for node in ast.walk(ast.parse(source)) if node._fields
        }
        for answer in set(assigned(right)) - set(assigned(source)):
            assert answer not in said, source
        if words := answers_in_words(exercise):
            number = exercise.args[0]
            assert not any(math.isclose(n, number) for n in constants(source)), source
            if abs(number) >= 1000:  # smaller ones stand everywhere
                assert not any(word in page for word in words), words


def assigned(source: str) -> list[str]:
    """Return what a cell's own assignments give to names."""
    found = [x for x in ast.parse(source).body if isinstance(x, ast.Assign)]
    return [ast.unparse(statement.value) for statement in found]


def constants(source: str) -> list[float]:
    """Return the numbers in a cell, and what is reckoned from numbers alone."""
    kinds = ast.Expression, ast.BinOp, ast.UnaryOp, ast.Constant, ast.operator
    found = []
    for node in ast.walk(ast.parse(source)):
        plain = isinstance(node, ast.BinOp | ast.Constant | ast.UnaryOp) and all(
            isinstance(part, (*kinds, ast.unaryop)) for part in ast.walk(node)
        )
        value = eval(ast.unparse(node)) if plain else None
        found += [value] * isinstance(value, int | float)
    return found


def test_a_number_that_can_be_reckoned_from_a_cell_is_found():
    cell = "a = ...\nb = x + 3\ncheck(a, 1 - 0.75**0.5, unit='B', hints={-2: 'no'})"
    assert {3, 2, -2, 0.75**0.5, 1 - 0.75**0.5} <= set(constants(cell))
    assert not {x for x in constants("n = 7 * rows") if x != 7}


PLAINLY = "def {}(model, x):\n    model(x).sum().backward()"
WITH_THE_STATE = """def train_without_stash(net, x):
    plan = checkpointing.Plan.alone(["layer1", "layer2"])
    with checkpointing.checkpointed(net, plan):
        net(x).sum().backward()"""
REENTRANT = "Careful = torch.utils.checkpoint.CheckpointFunction"
THE_LAST_THREE = "my_plan = Plan.alone(names[1:])"
MISSED = {  # what leaves out what an exercise is about, by page and by what it asks for
    "02 train": [PLAINLY.format("train")],
    "04 train": [PLAINLY.format("train")],
    "05 Careful": [REENTRANT],
    "06 train_without_stash": [PLAINLY.format("train_without_stash"), WITH_THE_STATE],
    "07 train_somehow": [PLAINLY.format("train_somehow")],
    "12 my_plan": ["my_plan = first[0]", "my_plan = first[4]", THE_LAST_THREE],
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_answer_passes_that_leaves_out_what_is_asked_for(path):
    for exercise in exercises_of(path):
        (stub,) = filter(is_stub, ast.parse(exercise.stub.source).body)
        asked = re.search(r"\w+", ast.unparse(stub).removeprefix("def "))[0]
        missed = MISSED.get(f"{path.stem[:2]} {asked}", ())
        assert missed or exercise.check != checks.check_gradients
        for answer in missed:
            cell = ast.parse(solved(exercise.stub.source, answer)).body
            (line,) = run([cell], exercise.names.copy())
            assert line.startswith("not yet"), answer


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
