"""A JupyterLab and a browser for each module that drives them.

What they need is imported where it is used: a machine with a GPU may have neither.
"""

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser


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
    with jupyter_lab(home) as url:
        yield url


# Not for the session: while Playwright runs, no other test can use asyncio.
@pytest.fixture(scope="module")
def browser(url) -> Iterator["Browser"]:
    from tests.browser.page import chromium

    with chromium() as browser:
        yield browser
