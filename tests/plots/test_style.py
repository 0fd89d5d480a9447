"""Figures in notebooks are sharp and small."""

import io

import matplotlib
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure
from PIL import Image

from helpers.plots import style


@pytest.fixture(autouse=True)
def other_tests_keep_their_style():
    with matplotlib.rc_context():
        yield


def figure():
    made = Figure((4, 3), dpi=100)
    made.subplots().plot([0, 1, 4, 9])
    return made


def test_figure_png_is_twice_as_large_as_it_is_shown():
    png, shown = style.figure_png(figure())
    assert Image.open(io.BytesIO(png)).size == pytest.approx(
        (2 * shown["width"], 2 * shown["height"]), abs=1
    )


def test_figure_png_is_less_than_half_of_a_plain_one():
    plain = io.BytesIO()
    figure().savefig(plain, dpi=200, bbox_inches="tight")
    assert len(style.figure_png(figure())[0]) < len(plain.getvalue()) / 2


def test_use_style_makes_a_notebook_show_small_pictures(monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr(style, "get_ipython", lambda: shell)
    style.use_style()
    shown, metadata = shell.display_formatter.format(figure(), include=["image/png"])
    assert Image.open(io.BytesIO(shown["image/png"])).mode == "P"
    assert metadata["image/png"]["width"] > 0


def test_use_style_works_without_a_notebook(monkeypatch):
    monkeypatch.setattr(style, "get_ipython", lambda: None)
    style.use_style()
