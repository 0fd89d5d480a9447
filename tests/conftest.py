"""A JupyterLab and a browser for each module that drives them; what is run first.

No file of tests leaves anything in the temporary folder.

What they need is imported where it is used: a machine with a GPU may have neither.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# What takes longest comes first, so that no worker is left with it at the end; and
# browsers come apart, so that two are seldom at work at once.
SLOW = """tests/browser/test_lab.py notebooks/11_many_gpus.ipynb
  tests/distributed/test_distributed.py notebooks/12_get_the_speed_back.ipynb
  tests/browser/test_budget.py notebooks/09_choose_for_a_budget.ipynb
  tests/planner/test_profile.py tests/test_sweep.py tests/controls/test_lab.py
  notebooks/04_segments_and_functions.ipynb notebooks/07_out_of_memory.ipynb
  tests/browser/test_tree.py notebooks/08_the_price_in_time.ipynb
  tests/recording/test_recording.py tests/measure/test_measure.py
  tests/recording/test_published.py notebooks/13_is_it_true.ipynb
  notebooks/10_your_model.ipynb tests/test_interrupts.py
  tests/browser/test_elsewhere.py tests/test_house.py
  tests/browser/test_recorded.py""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(SLOW)))


def pytest_configure() -> None:
    """Give each worker a temporary folder of its own; pytest's stays where it was."""
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None):
    """After a file's last test, look at what it left in the temporary folder."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        for _ in range(20):  # a process that was told to end may take a moment
            if not (left := left_behind()):
                return result
            time.sleep(0.1)
        for path in left:
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        pytest.fail(f"{item.path.name} left {[path.name for path in left]}")
    return result


def left_behind() -> list[Path]:
    found = Path(os.environ["TMPDIR"]).iterdir()
    # That one is PyTorch's own, one for each user, to be used again.
    return [path for path in found if not path.name.startswith("torchinductor_")]


@pytest.fixture(scope="module")
def url(request, tmp_path_factory) -> Iterator[str]:
    """Serve copies of the notebooks, and the module's own ``CELLS`` as one."""
    from tests.browser.page import ROOT, find_browser, jupyter_lab, write_notebook

    if find_browser() is None:
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("no Chromium or Chrome on this machine")
    home = tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "notebooks", home / "root" / "notebooks")
    write_notebook(home / "root" / "cells.ipynb", *request.module.CELLS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(home))  # what cells leave there goes with it
        with jupyter_lab(home) as url:
            yield url


# Not for the session: while Playwright runs, no other test can use asyncio.
@pytest.fixture(scope="module")
def browser(url) -> Iterator["Browser"]:
    from tests.browser.page import chromium

    with chromium() as browser:
        yield browser
