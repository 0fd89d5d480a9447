"""Write functions as a script of their own, which other processes can run."""

import ast
import inspect
import symtable
import textwrap
from collections.abc import Callable, Iterator


def script(*functions: Callable) -> str:
    """Write a script with the functions and with all that they refer to.

    Modules, and what belongs to a module, are imported. Functions defined beside them
    are written out, and so are numbers, texts, and lists, tuples and dicts of these.

    Raises:
        ValueError: for a function without a source, or one that refers to anything
            else; names it.
    """
    imports: dict[str, str] = {}  # by the name that is made
    parts: dict[str, str] = {}
    for function in functions:
        _add(function, imports, parts)
    lines = "\n".join(line for line in parts.values() if not line.startswith("def "))
    definitions = [part for part in parts.values() if part.startswith("def ")]
    plain_first = sorted(imports.values(), key=lambda line: (line[0] != "i", line))
    blocks = ["\n".join(plain_first), lines]
    start = "\n\n".join(block for block in blocks if block)
    return "\n\n\n".join([start, *definitions]).strip()


def _add(function: Callable, imports: dict[str, str], parts: dict[str, str]) -> None:
    """Add a function, after what it needs, unless it is there already."""
    if function.__name__ in parts:
        return
    source = _source(function)
    parts[function.__name__] = ""  # so that a function may refer to itself
    used = set(_global_names(symtable.symtable(source, "script", "exec")))
    for name in sorted((used & function.__globals__.keys()) - parts.keys()):
        value = function.__globals__[name]
        home = getattr(value, "__module__", None)
        if inspect.ismodule(value):
            imports[name] = _import(*value.__name__.rpartition(".")[::2], name)
        elif inspect.isfunction(value) and home == function.__module__:
            _add(value, imports, parts)
        elif home and home != function.__module__ and hasattr(value, "__qualname__"):
            imports[name] = _import(home, value.__qualname__, name)
        else:
            parts[name] = f"{name} = {_literal(function, name, value)}"
    del parts[function.__name__]  # its place is behind what it needs
    parts[function.__name__] = source


def _global_names(table: symtable.SymbolTable) -> Iterator[str]:
    """Yield the names that code takes from outside, in defaults and inside it too."""
    for symbol in table.get_symbols():
        if symbol.is_global() and symbol.is_referenced():
            yield symbol.get_name()
    for inner in table.get_children():
        yield from _global_names(inner)


def _source(function: Callable) -> str:
    try:
        source = textwrap.dedent(inspect.getsource(function)).rstrip()
    except (OSError, TypeError):
        source = ""
    if not source.startswith("def ") or function.__closure__:
        raise ValueError(
            f"{getattr(function, '__name__', function)!s} cannot be sent to another "
            "process; only a function can that is defined by def, in a cell or a file, "
            "and not inside another function"
        )
    return source


def _import(package: str, member: str, name: str) -> str:
    line = f"from {package} import {member}" if package else f"import {member}"
    return line if member == name else f"{line} as {name}"


def _literal(function: Callable, name: str, value: object) -> str:
    try:
        if ast.literal_eval(repr(value)) == value:
            return repr(value)
    except (ValueError, SyntaxError):
        pass
    raise ValueError(
        f"{function.__name__} refers to {name}, a {type(value).__name__}, which cannot "
        f"be sent to another process; make it inside {function.__name__}"
    )
