"""Write the notebooks as pages of HTML, and README as their index: `make html`."""

import html
import logging
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = re.compile(r"(?:notebooks/)?(\d\d_\w+)\.ipynb")
NOTHING_SAID = "No description has been provided for this image"  # by nbconvert
LOOK = """<style>
.jp-RenderedMarkdown .highlight {{ margin-bottom: 1em; }}
@media (prefers-color-scheme: dark) {{ {dark} }}
</style></head>"""
ELSEWHERE = re.compile(r"\]\((?!https?:|images/|#|\w+\.html)([\w./-]+)\)")


def write_pages(folder: Path) -> None:
    """Write a page for each notebook, and ``index.html``, with their images."""
    folder.mkdir(exist_ok=True)
    shutil.copytree(ROOT / "notebooks/images", folder / "images", dirs_exist_ok=True)
    exporter = HTMLExporter()
    exporter.log.setLevel(logging.ERROR)  # what pictures show is told after it
    themes = [Path(path, "static/theme-dark.css") for path in exporter.template_paths]
    dark = next(theme for theme in themes if theme.exists()).read_text()
    look = LOOK.format(dark=dark)
    for path in sorted(ROOT.glob("notebooks/*.ipynb")):
        book = nbformat.read(path, nbformat.NO_CONVERT)
        shown = map(html.escape, led_to_pages(book))
        page, _ = exporter.from_notebook_node(book, {"metadata": {"name": path.stem}})
        page = page.replace("{", "{{").replace("}", "}}").replace(NOTHING_SAID, "{}")
        page = page.format(*shown).replace("</head>", look, 1)
        (folder / f"{path.stem}.html").write_text(page)
    about = (ROOT / "README.md").read_text().replace("notebooks/images/", "images/")
    about = ELSEWHERE.sub(r"](../\1)", NOTEBOOK.sub(r"\1.html", about))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(about)])
    title = {"metadata": {"name": about.partition("\n")[0].removeprefix("# ")}}
    page, _ = exporter.from_notebook_node(book, title)
    (folder / "index.html").write_text(page.replace("</head>", look, 1))


def led_to_pages(book: nbformat.NotebookNode) -> list[str]:
    """Let links lead to pages; tell what each picture shows, as the prose before it."""
    said, shown = "", []
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = NOTEBOOK.sub(r"\1.html", cell.source)
            cell.source = cell.source.replace("](../README.md", "](index.html")
            said = last_sentence(cell.source) or said
        data = [output.get("data", {}) for output in cell.get("outputs", ())]
        texts = [one.get("text/plain", "<") for one in data if "image/png" in one]
        shown += [said if text.startswith("<") else text for text in texts]
    return shown


def last_sentence(markdown: str) -> str:
    """Take the sentence that leads over to the next cell, as plain text."""
    text = re.sub(r"<[^>]+>|[*`#>]|\$\$?", "", re.sub(r"\]\([^)]*\)", "]", markdown))
    sentences = re.split(r"(?<=[.?!])\s+", " ".join(text.split()))
    return sentences[-1].replace("[", "").replace("]", "").rstrip(":") if text else ""


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
