"""The exercises of a notebook, and no more of its code than what they need."""

import ast
import re
import symtable
from collections.abc import Iterable
from dataclasses import dataclass

import nbformat

# Of gradients that steps leave behind no exercise makes use; and compiling takes
# seconds, so that what it brings is left out: an exercise that needs it would fail.
GRADIENTS_ALONE = {"zero_grad", "backward"}
SLOW = {"compiled"}
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


@dataclass(frozen=True)
class Statement:
    """A statement of a notebook: the names that it reads, binds and changes."""

    tree: ast.stmt
    reads: frozenset[str]
    binds: frozenset[str]
    changes: frozenset[str]  # what they refer to, in a function only when it is called

    @classmethod
    def of(cls, tree: ast.stmt) -> "Statement":
        """Look up a statement's names by Python's own rules of scope."""
        table = symtable.symtable(ast.unparse(tree), "cell", "exec")
        symbols = table.get_symbols()
        binds = {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}
        reads = {s.get_name() for s in symbols if s.is_referenced()}
        reads.update(*map(_free_names, table.get_children()))
        changes = _changed(tree) & (reads | binds)
        return cls(tree, *map(frozenset, (reads | changes, binds, changes)))

    @property
    def is_plain(self) -> bool:
        """Say whether what it binds is bound anew, come what may."""
        return not isinstance(
            self.tree, ast.For | ast.While | ast.If | ast.Try | ast.With
        )


def _free_names(table: symtable.SymbolTable) -> set[str]:
    """Find the notebook's names that a function or class refers to."""
    names = {s.get_name() for s in table.get_symbols() if s.is_global()}
    return names.union(*map(_free_names, table.get_children()))


def _changed(tree: ast.AST) -> set[str]:
    """Find ``x`` of ``x.a = 1``, of ``x[0] = 1``, of ``x += 1`` and of ``x.add(1)``."""
    places: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.AugAssign):
            places.append(node.target)
        elif isinstance(node, ast.Attribute | ast.Subscript):
            places += [node] * isinstance(node.ctx, ast.Store)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            func = node.value.func
            if isinstance(func, ast.Attribute) and func.attr not in GRADIENTS_ALONE:
                places.append(func)
    return {root.id for root in map(_root, places) if isinstance(root, ast.Name)}


def _root(node: ast.AST) -> ast.AST:
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node


def needed(cells: list[str], exercises: Iterable[int]) -> list[list[ast.stmt]]:
    """Keep of each cell what the exercises' cells need, which are kept whole."""
    book = [[Statement.of(tree) for tree in ast.parse(cell).body] for cell in cells]
    called = _Calls(statement for cell in book for statement in cell)
    wanted: set[str] = set()
    kept: list[list[ast.stmt]] = []
    for number, cell in reversed(list(enumerate(book))):
        kept.insert(0, [])
        for statement in reversed(cell):
            reads, changes = called.names(statement)
            useful = wanted & (statement.binds | changes) and not reads & SLOW
            if number in exercises or useful:
                kept[0].insert(0, statement.tree)
                if statement.is_plain:
                    wanted -= statement.binds
                wanted |= reads
    return kept


class _Calls:
    """What a statement reads and changes through the notebook's own functions."""

    def __init__(self, statements: Iterable[Statement]) -> None:
        self._imported: set[str] = set()
        self._functions: dict[str, list[Statement]] = {}
        for statement in statements:
            if isinstance(statement.tree, ast.Import | ast.ImportFrom):
                self._imported |= statement.binds
            elif any(
                isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)
                for node in ast.walk(statement.tree)
            ):
                for name in statement.binds:
                    self._functions.setdefault(name, []).append(statement)

    def names(self, statement: Statement) -> tuple[set[str], set[str]]:
        """Return the names that it reads and those whose values it changes."""
        reads, changes = set(statement.reads), set(statement.changes)
        ahead = list(reads)
        while ahead:
            for function in self._functions.get(ahead.pop(), ()):
                ahead += function.reads - reads
                reads |= function.reads
                changes |= function.changes
        return reads, changes - self._imported
