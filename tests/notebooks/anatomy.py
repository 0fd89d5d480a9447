"""How a notebook of this workbook is built: a rule each, as a function.

A rule takes a notebook and yields a sentence for every problem that it finds.
"""

import ast
import re
import statistics
from collections.abc import Iterator
from urllib.parse import unquote

from tests.notebooks.notebook import (
    FENCE,
    Notebook,
    anchors,
    driven,
    is_stub,
    labs_made,
    output_text,
    shown_last,
    syntax,
    tags,
)

TAGS = {"nbval-ignore-output", "raises-exception"}
IMPORT_LINES, CELL_LINES, STUB_LINES, MEDIAN_LINES = 8, 12, 16, 5
PROSE_WORDS, COLUMNS, FILE_BYTES = 110, 79, 300_000
FEWEST_CELLS, MOST_CELLS = 25, 85

INSTALL = re.compile(
    r"^\s*[!%]\s*(pip|conda|wget|curl)\b|pip install|sys\.path|urlopen|urlretrieve"
    r"|requests\.get|load_state_dict_from_url|hf_hub_download|download=True",
    re.MULTILINE,
)
TIME_OR_DEVICE = re.compile(
    r"(?<![a-z])(ms|µs|seconds?|minutes?|time[sd]?|timing|measur\w*|clock"
    r"|device|machine|cuda|gpu|cpu)(?![a-z])"
)
MACHINE = re.compile(
    r"(?<![\w.])/(?:home|root|work|tmp|Users)/\w|site-packages/|ipykernel_\d"
)
LINK = re.compile(r"\]\(\s*<?([^)\s>]+)|(?:href|src)=\"([^\"]+)\"")
DETAILS = re.compile(r"<details.*?</details>", re.DOTALL)


def counts_run_in_order(notebook: Notebook) -> Iterator[str]:
    """nbval compares no cell that has no count."""
    for expected, (at, cell) in enumerate(notebook.code, 1):
        if cell.execution_count != expected:
            yield f"{at} has count {cell.execution_count}, not {expected}"


def opens_with_its_question(notebook: Notebook) -> Iterator[str]:
    """H1, then the question in a blockquote."""
    title, _, rest = notebook.content.cells[0].source.strip().partition("\n")
    quote = re.match(r"\s*((?:> ?.*\n?)+)", rest)
    if not title.startswith("# "):
        yield "the first cell starts without an H1"
    if not quote or not quote[1].rstrip().endswith("?"):
        yield "no question in a blockquote follows the title"
    if sum(level == 1 for level, _ in notebook.headings()) != 1:
        yield "there is more than one H1"


def imports_in_one_cell(notebook: Notebook) -> Iterator[str]:
    """The first code cell imports, and no other does."""
    for number, (at, cell) in enumerate(notebook.code):
        imports = any(isinstance(n, ast.Import | ast.ImportFrom) for n in syntax(cell))
        if imports != (number == 0):
            yield f"{at} {'imports too' if imports else 'comes before the imports'}"
        if imports and len(cell.source.splitlines()) > IMPORT_LINES:
            yield f"{at} has more than {IMPORT_LINES} lines"


def installs_nothing(notebook: Notebook) -> Iterator[str]:
    """No installs, no sys.path, no downloads."""
    for at, cell in notebook.code:
        if found := INSTALL.search(cell.source):
            yield f"{at} has {found[0]!r}"


def code_is_short(notebook: Notebook) -> Iterator[str]:
    """Short cells; an exercise's stub may be a little longer."""
    lengths = []
    for at, cell in notebook.code:
        lengths.append(len(cell.source.splitlines()))
        limit = STUB_LINES if is_stub(cell) else CELL_LINES
        if lengths[-1] > limit:
            yield f"{at} has {lengths[-1]} lines, more than {limit}"
    if lengths and statistics.median(lengths) > MEDIAN_LINES:
        yield f"the median code cell has {statistics.median(lengths)} lines"


def is_navigation(line: str) -> bool:
    """Tell whether a line is links to notebooks, arrows and nothing else."""
    rest = re.sub(r"\[[^\]]*\]\([^)]*\.ipynb\)", "", line)
    return rest != line and not re.sub(r"(?i)previous|next|\W", "", rest)


def prose_is_short(notebook: Notebook) -> Iterator[str]:
    """Short paragraphs: code, tables, folded solutions and navigation aside."""
    for at, cell in notebook.prose:
        lines = DETAILS.sub("", FENCE.sub("", cell.source)).splitlines()
        kept = [x for x in lines if not x.startswith("|") and not is_navigation(x)]
        text = re.sub(r"\]\([^)]*\)|<[^>]+>", "", "\n".join(kept))
        words = sum(bool(re.search(r"\w", word)) for word in text.split())
        if words > PROSE_WORDS:
            yield f"{at} has {words} words, more than {PROSE_WORDS}"


def has_a_sitting_of_cells(notebook: Notebook) -> Iterator[str]:
    """Neither a fragment nor a book."""
    count = len(notebook.cells)
    if not FEWEST_CELLS <= count <= MOST_CELLS:
        yield f"{count} cells, not {FEWEST_CELLS} to {MOST_CELLS}"


def is_a_small_file(notebook: Notebook) -> Iterator[str]:
    """Pictures are committed with the notebook; they have to be small."""
    size = notebook.path.stat().st_size
    if size >= FILE_BYTES:
        yield f"{size} bytes, not under {FILE_BYTES}"


def has_no_stray_metadata(notebook: Notebook) -> Iterator[str]:
    """Saved widget state breaks a notebook's static rendering."""
    metadata = notebook.content.metadata
    if stray := set(metadata) - {"kernelspec", "language_info"}:
        yield f"the notebook's metadata has {sorted(stray)}"
    if metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    for at, cell in notebook.cells:
        if stray := set(cell.metadata) - {"tags"}:
            yield f"{at} has the metadata {sorted(stray)}"


def exempts_only_times_and_devices(notebook: Notebook) -> Iterator[str]:
    """What is the same on every machine is compared."""
    exempt = [
        place for place in notebook.code if "nbval-ignore-output" in tags(place[1])
    ]
    for at, cell in notebook.cells:
        if stray := tags(cell) - TAGS:
            yield f"{at} has the tags {sorted(stray)}"
    for at, cell in exempt:
        if not TIME_OR_DEVICE.search((cell.source + "\n" + output_text(cell)).lower()):
            yield f"{at} is not compared, and shows neither a time nor a device"
    if len(exempt) * 3 > len(notebook.code):
        yield f"{len(exempt)} of {len(notebook.code)} code cells are not compared"


def fails_only_on_purpose(notebook: Notebook) -> Iterator[str]:
    """A cell is tagged raises-exception if, and only if, it raises."""
    for at, cell in notebook.code:
        tagged = "raises-exception" in tags(cell)
        raised = any(output.output_type == "error" for output in cell.outputs)
        if raised and not tagged:
            yield f"{at} raised without the tag raises-exception"
        if tagged and not raised:
            yield f"{at} has the tag raises-exception and raised nothing"
        if "Traceback (most" in output_text(cell) and not tagged:
            yield f"{at} prints a traceback"


def links_lead_somewhere(notebook: Notebook) -> Iterator[str]:
    """Relative links and anchors resolve; links into the web are not followed."""
    for at, cell in notebook.prose:
        text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", cell.source))
        for link in (first or second for first, second in LINK.findall(text)):
            if re.match(r"https?:|mailto:|data:|attachment:", link):
                continue
            file, _, anchor = unquote(link).partition("#")
            target = notebook.path.parent / file if file else notebook.path
            if not target.exists():
                yield f"{at} links to {link}, which is not there"
            elif anchor and target.suffix == ".ipynb" and anchor not in anchors(target):
                yield f"{at} links to {link}, and no heading is called so"


def fits_in_its_columns(notebook: Notebook) -> Iterator[str]:
    """Code is narrow, also where it stands in Markdown."""
    for at, cell in notebook.cells:
        is_code = cell.cell_type == "code"
        blocks = [cell.source]
        if not is_code:
            blocks = [found[0] for found in FENCE.finditer(cell.source)]
        for line in "\n".join(blocks).splitlines():
            if len(line) > COLUMNS:
                yield f"{at} has a line of {len(line)} columns"


def ends_with_exercises(notebook: Notebook) -> Iterator[str]:
    """Summary, exercises, the next question."""
    titles = [title.lower() for level, title in notebook.headings() if level == 2]
    ends = [word for t in titles for word in ("summary", "exercise") if word in t]
    if ends != ["summary", "exercise"]:
        yield "the sections Summary and Exercises are not there once, in this order"
    closing = "\n".join(cell.source for _, cell in notebook.prose[-2:])
    closing = DETAILS.sub("", closing)
    if "?" not in closing or "next" not in closing.lower():
        yield "it does not close with the next question"


def names_no_machine(notebook: Notebook) -> Iterator[str]:
    """A path of the writer's machine means nothing to a reader."""
    for at, cell in notebook.cells:
        if found := MACHINE.search(cell.source + "\n" + output_text(cell)):
            yield f"{at} has {found[0]!r}"


def leaves_labs_as_shown(notebook: Notebook) -> Iterator[str]:
    """After Run All a lab shows what the prose below it says: no later cell drives it.

    A cell shows a lab by its last line. Before prose follows it may still be driven.
    """
    labs: set[str] = set()
    shown: dict[str, str] = {}
    described: dict[str, str] = {}
    for at, cell in notebook.cells:
        if cell.cell_type != "code":
            described |= shown
            continue
        for name in described.keys() & driven(cell) - labs_made(cell):
            yield f"{at} drives {name!r}, which {described[name]} shows"
        labs |= labs_made(cell)
        described = {n: p for n, p in described.items() if n not in labs_made(cell)}
        shown = {name: at for name in labs & {shown_last(cell)}}


RULES = [
    counts_run_in_order,
    opens_with_its_question,
    imports_in_one_cell,
    installs_nothing,
    code_is_short,
    prose_is_short,
    has_a_sitting_of_cells,
    is_a_small_file,
    has_no_stray_metadata,
    exempts_only_times_and_devices,
    fails_only_on_purpose,
    links_lead_somewhere,
    fits_in_its_columns,
    ends_with_exercises,
    names_no_machine,
    leaves_labs_as_shown,
]
