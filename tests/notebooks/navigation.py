"""Write what leads from one notebook to the next: `make nav`.

Each notebook's last cell gets links to its neighbours, and README's table a row for
each notebook: its number and title, and the question that it answers.
"""

import re
from pathlib import Path

import nbformat

from tests.notebooks.notebook import Notebook

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
HEAD = "| Notebook | The question it answers |\n|---|---|\n"
ROWS = re.compile(re.escape(HEAD) + r"(?:\|.*\n)*")


def notebooks() -> list[Notebook]:
    """Read all notebooks, in reading order."""
    return [Notebook.read(path) for path in sorted(ROOT.glob("notebooks/*.ipynb"))]


def bar(before: Notebook | None, after: Notebook | None) -> str:
    """Write the links of a notebook's last cell."""
    links = [f"[← Previous: {before.title}]({before.path.name})"] if before else []
    links += [f"[Next: {after.title} →]({after.path.name})"] if after else []
    return " · ".join([*links, "[All notebooks](../README.md)"])


def bars(books: list[Notebook]) -> list[str]:
    """Write every notebook's links."""
    return [
        bar(before, after)
        for before, after in zip([None, *books], [*books[1:], None], strict=False)
    ]


def table(books: list[Notebook]) -> str:
    """Write README's table of notebooks."""
    return HEAD + "".join(
        f"| [{book.path.stem[:2]} {book.title}](notebooks/{book.path.name}) "
        f"| {book.question} |\n"
        for book in books
    )


def main() -> None:
    """Bring the bars and the table up to date."""
    books = notebooks()
    for book, links in zip(books, bars(books), strict=True):
        last = book.content.cells[-1]
        if last.source != links:
            last.source = links
            nbformat.write(book.content, book.path)
    README.write_text(ROWS.sub(lambda _: table(books), README.read_text()))


if __name__ == "__main__":
    main()
