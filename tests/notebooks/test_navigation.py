"""Links between notebooks, and README's table, are as `make nav` writes them."""

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
