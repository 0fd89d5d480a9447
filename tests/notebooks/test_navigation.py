"""Links between notebooks, and README's table, are as `make nav` writes them."""

import re

import pytest

from tests.notebooks.navigation import README, bar, bars, notebooks, table

BOOKS = notebooks()


def test_the_ends_have_one_neighbour():
    first, second = BOOKS[:2]
    assert bar(None, second) == (
        "[Next: Where memory goes →](01_where_memory_goes.ipynb) · "
        "[All notebooks](../README.md)"
    )
    assert bar(first, None) == (
        "[← Previous: Start here](00_start_here.ipynb) · [All notebooks](../README.md)"
    )


@pytest.mark.parametrize(
    ("book", "links"),
    list(zip(BOOKS, bars(BOOKS), strict=True)),
    ids=[book.path.stem for book in BOOKS],
)
def test_a_notebook_ends_with_links_to_its_neighbours(book, links):
    assert book.content.cells[-1].source == links


def test_the_readme_lists_every_notebook_with_its_question():
    assert table(BOOKS) in README.read_text()


def minutes(book) -> int:
    """Read how long a notebook takes, from its first cell."""
    (found,) = re.findall(r"^About (\d+) minutes", book.content.cells[0].source, re.M)
    return int(found)


def test_the_hours_that_are_promised_are_the_sum_of_the_pages():
    first, *_ = BOOKS
    for text in (README.read_text(), first.content.cells[0].source):
        assert "about eight hours" in text
    assert 7.25 * 60 <= sum(map(minutes, BOOKS)) <= 8.5 * 60
    by_number = {book.path.stem[:2]: book for book in BOOKS}
    own = by_number["10"].content.cells[0].source
    assert "of which your own model takes ten" in own
    assert minutes(by_number["00"]) + minutes(by_number["03"]) + 10 <= 60
