"""Every notebook is built as the others are, and every rule for it can fail."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tests.notebooks import anatomy
from tests.notebooks.anatomy import RULES
from tests.notebooks.notebook import Notebook

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, rule):
    problems = list(rule(Notebook.read(path)))
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_there_are_notebooks():
    assert NOTEBOOKS


def good_cells():
    """Return the cells of a notebook that keeps every rule."""
    steps = [
        cell
        for number in range(10)
        for cell in (
            new_markdown_cell(f"Let us look at step {number}:"),
            new_code_cell(f"peak_bytes = {number}\npeak_bytes"),
        )
    ]
    cells = [
        new_markdown_cell("# Title\n\n> What does one\n> checkbox do?\n\n10 minutes."),
        new_code_cell("import torch"),
        *steps,
        new_markdown_cell("## Summary\n\nSee [above](#Title)."),
        new_markdown_cell(
            "## Exercises\n\n<details>\n\n" + "word " * 200 + "</details>"
        ),
        new_code_cell("def stub():\n    return ..." + "\n" * 12),
        new_markdown_cell("## Next question\n\nAnd then? [Next](01_next.ipynb)"),
    ]
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    return cells


def write(folder, cells, **metadata):
    """Write a notebook, with another after it, and read it back."""
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(
        cells=cells, metadata={"kernelspec": kernelspec, **metadata}
    )
    for name in ("00_good.ipynb", "01_next.ipynb"):
        nbformat.write(notebook, folder / name)
    return Notebook.read(folder / "00_good.ipynb")


def with_source(index, source):
    return lambda cells: cells[index].update(source=source)


def without_prose(cells):
    cells[2:20] = [cell for cell in cells[2:20] if cell.cell_type == "code"]


def with_more_prose(index, count):
    more = [new_markdown_cell("And this?") for _ in range(count)]
    return lambda cells: cells.__setitem__(slice(index, index), more)


LAB = "lab = controls.LayerLab(batch=rows, settings=settings)\nlab"


def with_lab(*sources):
    """Fill code cells from the second on, which have prose between them."""

    def spoil(cells):
        for cell, source in zip(cells[3::2], sources, strict=False):
            cell.update(source=source)

    return spoil


def with_output(index, output):
    return lambda cells: cells[index].outputs.append(output)


def with_tag(index, tag):
    return lambda cells: cells[index].metadata.update(tags=[tag])


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


ERROR = new_output("error", ename="ValueError", evalue="no", traceback=["ValueError"])
PICTURE = new_output("display_data", {"image/png": "A" * 300_000})
SPOILED = [  # cell 0 the title, 1 the imports, 3 code, -4 summary, -2 stub, -1 the end
    ("counts_run_in_order", lambda cells: cells[3].update(execution_count=None)),
    ("counts_run_in_order", lambda cells: cells[3].update(execution_count=7)),
    ("opens_with_its_question", with_source(0, "## Title\n\n> What?")),
    ("opens_with_its_question", with_source(0, "# Title\n\nWhat?")),
    ("opens_with_its_question", with_source(0, "# Title\n\n> An answer.")),
    ("opens_with_its_question", with_source(2, "# Title again")),
    ("imports_in_one_cell", with_source(3, "def f():\n    import math")),
    ("imports_in_one_cell", with_source(1, "a = 1")),
    ("imports_in_one_cell", with_source(1, "import torch" + "\n" * 9)),
    ("installs_nothing", with_source(3, "%pip install torch")),
    ("installs_nothing", with_source(3, "sys.path.append('..')")),
    ("code_is_short", with_source(3, "a = 1\n" * 13)),
    ("code_is_short", with_source(-2, "a = ...\n" + "b: tuple[int, ...]\n" * 16)),
    ("code_is_short", with_source(-2, "b: tuple[int, ...]\n" * 13)),
    (
        "code_is_short",
        lambda cells: [c.update(source="a\n" * 6) for c in cells[3:19:2]],
    ),
    ("prose_is_short", with_source(2, "word " * 111)),
    ("has_a_sitting_of_cells", without_prose),
    ("has_a_sitting_of_cells", with_more_prose(2, 65)),
    ("is_a_small_file", with_output(3, PICTURE)),
    ("has_no_stray_metadata", lambda cells: cells[2].metadata.update(scrolled=True)),
    ("exempts_only_times_and_devices", with_tag(3, "hide-input")),
    ("exempts_only_times_and_devices", with_tag(3, "nbval-ignore-output")),
    ("fails_only_on_purpose", with_output(3, ERROR)),
    ("fails_only_on_purpose", with_tag(3, "raises-exception")),
    (
        "fails_only_on_purpose",
        with_output(3, stream("Traceback (most recent", "stderr")),
    ),
    ("links_lead_somewhere", with_source(2, "[a](nowhere.ipynb)")),
    ("links_lead_somewhere", with_source(2, "![a](images/nowhere.png)")),
    ("links_lead_somewhere", with_source(2, "[a](01_next.ipynb#Nothing)")),
    ("links_lead_somewhere", with_source(2, '<a href="#title">a</a>')),
    ("fits_in_its_columns", with_source(3, "a" * 80)),
    ("fits_in_its_columns", with_source(2, "```python\n" + "a" * 80 + "\n```")),
    ("ends_with_exercises", with_source(-4, "## End")),
    ("ends_with_exercises", with_source(-1, "The end: [Next](01_next.ipynb)")),
    ("names_no_machine", with_source(2, "See `/home/me`.")),
    (
        "names_no_machine",
        with_output(3, stream("ipykernel_1/2.py:1: UserWarning")),
    ),
    ("leaves_labs_as_shown", with_lab(LAB, "lab.plan = Plan()")),
    ("leaves_labs_as_shown", with_lab(LAB, "for lab.plan in plans:\n    f()")),
    ("leaves_labs_as_shown", with_lab(LAB, 'lab.boxes["a"].value = True\nlab')),
    (
        "leaves_labs_as_shown",
        with_lab("lab = BudgetLab(a)", "lab", "_ = lab.measure()"),
    ),
    ("leaves_labs_as_shown", with_lab(LAB, "a = 1", "lab.least.click()")),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_keeps_every_rule(rule, tmp_path):
    assert list(rule(write(tmp_path, good_cells()))) == []


@pytest.mark.parametrize("name, spoil", SPOILED, ids=[name for name, _ in SPOILED])
def test_a_spoiled_notebook_breaks_its_rule_alone(name, spoil, tmp_path):
    cells = good_cells()
    spoil(cells)
    notebook = write(tmp_path, cells)
    assert [rule.__name__ for rule in RULES if list(rule(notebook))] == [name]


def test_every_rule_can_fail():
    assert {name for name, _ in SPOILED} == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize(
    "sources",
    [
        (LAB, "print(lab.finding, lab.history[-1].peak_bytes)"),
        (LAB, "lab = LayerLab()\nlab.plan = Plan()\nlab"),
        (f"{LAB}.plan", "lab.plan = plan"),
        ("table = sweep(a)\ntable", "table.peaks = table.sort()"),
    ],
)
def test_a_lab_may_be_read_and_made_anew(sources, tmp_path):
    cells = good_cells()
    with_lab(*sources)(cells)
    assert not list(anatomy.leaves_labs_as_shown(write(tmp_path, cells)))


def test_a_lab_may_be_driven_where_no_prose_has_followed(tmp_path):
    cells = good_cells()
    with_lab(LAB, "lab.plan = Plan()")(cells)
    del cells[4]
    assert not list(anatomy.leaves_labs_as_shown(write(tmp_path, cells)))


def test_saved_widget_state_is_found(tmp_path):
    notebook = write(tmp_path, good_cells(), widgets={})
    assert list(anatomy.has_no_stray_metadata(notebook))


def test_a_third_of_the_cells_may_show_times(tmp_path):
    cells = good_cells()
    for cell in cells[3:11:2]:
        cell.update(source="step_ms", metadata={"tags": ["nbval-ignore-output"]})
    assert not list(anatomy.exempts_only_times_and_devices(write(tmp_path, cells)))
    cells[11].update(source="step_ms", metadata={"tags": ["nbval-ignore-output"]})
    assert list(anatomy.exempts_only_times_and_devices(write(tmp_path, cells)))
