"""The lab's tree of modules in JupyterLab, worked by mouse and keys."""

import pytest
import torch
from playwright.sync_api import Locator, expect

from helpers.checkpointing import Plan
from helpers.controls._findings import finding
from helpers.measure import predict
from helpers.models.architectures import GPT
from tests.browser.page import (
    PATIENCE_MS,
    Panel,
    open_notebook,
    run_all,
)

pytestmark = pytest.mark.browser
expect.set_options(timeout=PATIENCE_MS)

SIZES = {"width": 32, "vocabulary": 100, "context": 16}
ROWS, LENGTH = 64, 16
CELLS = (
    "import torch\n"
    "from helpers.models.architectures import GPT, ResNet\n"
    "from helpers.controls import LayerLab",
    f"ids = torch.empty({ROWS}, {LENGTH}, dtype=torch.long, device='meta')",
    *(
        f"with torch.device('meta'):\n    model = GPT(blocks={blocks}, **{SIZES})\n"
        "LayerLab(model, ids)"
        for blocks in (3, 40)
    ),
    "LayerLab(ResNet((1, 1), 4), torch.empty(2, 3, 8, 8, device='meta'))",
)


@pytest.fixture(scope="module")
def panels(browser, url) -> list[Panel]:
    page = open_notebook(browser, url, "cells.ipynb")
    run_all(page)
    return [Panel(page, number) for number in range(3)]


@pytest.fixture
def small(panels) -> Panel:
    return cleared(panels[0], 3)


@pytest.fixture
def large(panels) -> Panel:
    return cleared(panels[1], 40)


def cleared(panel: Panel, blocks: int) -> Panel:
    panel.button("none").click()
    panel.wait_for(says(Plan(), blocks))
    return panel


def says(plan: Plan, blocks: int) -> str:
    x = torch.empty(ROWS, LENGTH, dtype=torch.long, device="meta")
    with torch.device("meta"):
        model = GPT(blocks=blocks, **SIZES)
    return finding(*(predict(model, x, each) for each in (Plan(), plan)))


def labels(panel: Panel) -> list[str]:
    """Read the rows' labels, from top to bottom."""
    return panel.rows().locator(".widget-checkbox").all_inner_texts()


def unfold(panel: Panel, name: str) -> Locator:
    """Click the triangle of a row, which unfolds it or folds it again."""
    triangle = panel.button(f"what is in {name}")
    triangle.click()
    return triangle


def test_blocks_unfold_and_fold_again(small):
    rows = ["tokens", "places", "blocks.0", "blocks.1", "blocks.2", "norm", "head"]
    assert [label.strip() for label in labels(small)] == rows
    unfold(small, "blocks.1")
    inside = ["norm1", "attention", "norm2", "mlp", "dropout"]
    expect(small.rows()).to_have_count(len(rows) + len(inside))
    assert [label.strip() for label in labels(small)][4:9] == inside
    unfold(small, "blocks.1")
    expect(small.rows()).to_have_count(len(rows))


def test_a_module_inside_takes_the_place_of_the_one_around_it(small):
    small.box("blocks.1").click()
    small.wait_for(says(Plan.alone(["blocks.1"]), 3))
    unfold(small, "blocks.1")
    small.box("mlp").click()
    small.wait_for(says(Plan.alone(["blocks.1.mlp"]), 3))
    expect(small.box("blocks.1")).not_to_be_checked()
    small.box("blocks.1").click()
    small.wait_for(says(Plan.alone(["blocks.1"]), 3))
    expect(small.box("mlp")).not_to_be_checked()
    unfold(small, "blocks.1")


def test_neighbours_in_a_list_join(small):
    small.box("blocks.0").click()
    small.box("blocks.1").click()
    small.wait_for(says(Plan.alone(["blocks.0", "blocks.1"]), 3))
    # By their accessible names, which icons are no part of.
    small.button("join blocks.1 to blocks.0").click()
    small.wait_for(says(Plan((("blocks.0", "blocks.1"),)), 3))
    small.button("part blocks.1 from blocks.0").click()
    small.wait_for(says(Plan.alone(["blocks.0", "blocks.1"]), 3))


def test_the_tree_answers_the_keyboard(small):
    page = small.page
    small.box("blocks.0").focus()
    page.keyboard.press("Space")
    small.wait_for(says(Plan.alone(["blocks.0"]), 3))
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    expect(small.rows()).to_have_count(12)
    page.keyboard.press("Space")
    expect(small.rows()).to_have_count(7)


def test_forty_blocks_are_one_row_until_they_are_unfolded(large):
    blocks = tuple(f"blocks.{i}" for i in range(40))
    expect(large.rows()).to_have_count(5)
    large.box("blocks.0 … 39").click()
    large.wait_for(says(Plan.alone(blocks), 40))
    unfold(large, "blocks.0 …")
    expect(large.rows()).to_have_count(45)
    large.box("blocks.7").click()
    large.wait_for(says(Plan.alone([b for b in blocks if b != "blocks.7"]), 40))
    expect(large.box("blocks.0 … 39")).not_to_be_checked()
    unfold(large, "blocks.0 …")
    expect(large.rows()).to_have_count(5)
    expect(large.root).to_contain_text("39 ticked")
    large.button("pieces").click()
    pairs = Plan(tuple(zip(blocks[::2], blocks[1::2], strict=True)))
    large.wait_for(says(pairs, 40))
    expect(large.root).to_contain_text("20 segments")


def test_a_long_tree_scrolls_and_stays_as_high_as_a_picture(large):
    unfold(large, "blocks.0 …")
    expect(large.rows()).to_have_count(45)
    tree = large.rows().first.locator("xpath=..")
    picture = large.picture.bounding_box()
    assert tree.bounding_box()["height"] <= picture["height"]
    large.box("head").click()  # which scrolls there
    large.wait_for(says(Plan.alone(["head"]), 40))
    unfold(large, "blocks.0 …")


def test_what_is_not_safe_is_said_beside_the_box_and_above_the_picture(panels):
    panel = panels[2]
    marks = panel.root.get_by_role("img", name="'stem.1' updates its running")
    expect(marks).to_have_count(1)
    panel.box("stem").click()
    expect(panel.status).to_contain_text("Careful: 'stem.1' updates its running")
