"""Read a notebook file: its cells, its syntax, what it says and where links end."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Notebook:
    """A notebook file and its cells, numbered from 1 as a reader counts them."""

    path: Path
    content: nbformat.NotebookNode

    @classmethod
    def read(cls, path: Path) -> "Notebook":
        """Read the notebook at ``path``."""
        return cls(path, nbformat.read(path, as_version=4))

    @property
    def cells(self) -> list[tuple[str, nbformat.NotebookNode]]:
        """Return every cell with the words that lead a writer to it."""
        return [
            (f"cell {number} ({cell.source.strip()[:30]!r})", cell)
            for number, cell in enumerate(self.content.cells, 1)
        ]

    @property
    def code(self) -> list[tuple[str, nbformat.NotebookNode]]:
        """Return the code cells, each with its place."""
        return [(at, cell) for at, cell in self.cells if cell.cell_type == "code"]

    @property
    def prose(self) -> list[tuple[str, nbformat.NotebookNode]]:
        """Return the Markdown cells, each with its place."""
        return [(at, cell) for at, cell in self.cells if cell.cell_type == "markdown"]

    @property
    def title(self) -> str:
        """Return the H1 of the first cell."""
        return self.content.cells[0].source.splitlines()[0].removeprefix("# ")

    @property
    def question(self) -> str:
        """Return the question in the blockquote under the title."""
        lines = self.content.cells[0].source.splitlines()
        return " ".join(x.removeprefix("> ") for x in lines if x.startswith("> "))

    def headings(self) -> list[tuple[int, str]]:
        """Return the level and the text of every heading."""
        text = "\n\n".join(FENCE.sub("", cell.source) for _, cell in self.prose)
        found = re.findall(r"^(#{1,6}) +(.+?) *#*$", text, re.MULTILINE)
        return [(len(marks), title) for marks, title in found]


def tags(cell: nbformat.NotebookNode) -> set[str]:
    """Return a cell's tags."""
    return set(cell.metadata.get("tags", []))


def syntax(cell: nbformat.NotebookNode) -> list[ast.AST]:
    """Return every node of a code cell; none where its syntax is wrong."""
    source = re.sub(r"^\s*[%!].*", "", cell.source, flags=re.MULTILINE)
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    try:
        return list(ast.walk(compile(source, "cell", "exec", flags)))
    except SyntaxError:
        return []


def output_text(cell: nbformat.NotebookNode) -> str:
    """Return all that a cell's outputs say, without pictures and colours."""
    parts = []
    for output in cell.get("outputs", []):
        parts += [output.get("text", ""), *output.get("traceback", [])]
        for kind, data in output.get("data", {}).items():
            if kind.startswith("text/") or kind == "image/svg+xml":
                parts.append(data)
    text = re.sub(r"data:image/[^\"')]+", "", "\n".join(parts))
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def is_stub(cell: nbformat.NotebookNode) -> bool:
    """Tell whether a cell leaves a ``...`` for the reader to replace."""
    kept = (node for node in syntax(cell) if isinstance(node, ast.stmt))
    values = (getattr(node, "value", None) for node in kept)
    return any(isinstance(v, ast.Constant) and v.value is ... for v in values)


def anchors(path: Path) -> set[str]:
    """Return what a link may name behind ``#`` in a notebook, as Lab spells it."""
    notebook = Notebook.read(path)
    text = "\n".join(cell.source for _, cell in notebook.prose)
    titles = (re.sub(r"[`*]|\]\([^)]*\)|\[", "", t) for _, t in notebook.headings())
    named = re.findall(r"(?:id|name)=\"([^\"]+)\"", text)
    return {title.replace(" ", "-") for title in titles} | set(named)


def root(node: ast.AST) -> str | None:
    """Return ``x`` of ``x.a[0].b(1)``."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def labs_made(cell: nbformat.NotebookNode) -> set[str]:
    """Return the names that a code cell gives to new labs."""
    made = [node for node in syntax(cell) if isinstance(node, ast.Assign)]
    made = [
        it for it in made if re.match(r"([\w.]+\.)?\w*Lab\(", ast.unparse(it.value))
    ]
    return {ast.unparse(target) for it in made for target in it.targets}


def shown_last(cell: nbformat.NotebookNode) -> str | None:
    """Return the name that a code cell shows by its last line."""
    last = [it for tree in syntax(cell)[:1] for it in tree.body[-1:]]
    words = "".join(map(ast.unparse, last))
    return words if words.isidentifier() else None


def driven(cell: nbformat.NotebookNode) -> set[str]:
    """Return the names whose values a code cell may change.

    Such is ``x`` in ``x.plan = …``, in ``x.boxes["layer1"].value = …``, also at the
    head of a loop, and where a part of it is called: ``x.least.click()``.
    """
    found = set()
    for node in syntax(cell):
        is_stored = isinstance(getattr(node, "ctx", None), ast.Store)
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if called or (is_stored and not isinstance(node, ast.Name)):
            found.add(root(node))
    return found - {None}
