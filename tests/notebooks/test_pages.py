"""The pages of `make html` lead to each other, and say what their pictures show."""

import re
from urllib.parse import unquote

import pytest

from tests.notebooks.pages import ROOT, last_sentence, write_pages


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "html"
    write_pages(folder)
    return folder


def test_there_is_a_page_for_each_notebook_and_an_index(folder):
    names = {path.stem for path in ROOT.glob("notebooks/*.ipynb")}
    assert {path.stem for path in folder.glob("*.html")} == {*names, "index"}
    index = (folder / "index.html").read_text()
    assert all(f'href="{name}.html"' in index for name in names)


def test_every_link_leads_somewhere(folder):
    for page in folder.glob("*.html"):
        text = page.read_text()
        assert not re.search(r'href="(?!https:)[^"]*\.ipynb', text)
        for link in re.findall(r'(?:href|src)="([^"#:]+)(?:#[^"]*)?"', text):
            link = unquote(link)
            place = ROOT / link[3:] if link.startswith("../") else folder / link
            assert place.exists(), f"{page.name}: {link}"


def test_every_picture_says_what_it_shows(folder):
    for page in folder.glob("*.html"):
        for alt in re.findall(r'<img[^>]*\balt="([^"]*)"', page.read_text(), re.DOTALL):
            assert len(alt.split()) > 2 and "No description" not in alt, page.name


def test_every_page_is_dark_where_the_reader_wants_it(folder):
    for page in folder.glob("*.html"):
        _, found, rules = page.read_text().partition("prefers-color-scheme: dark")
        assert found and "--jp-layout-color0: #111" in rules, page.name


def test_the_sentence_before_a_picture():
    prose = "## Two *plans*\n\nThey differ. Here is [the first](01_a.ipynb), `layer1`:"
    assert last_sentence(prose) == "Here is the first, layer1"
