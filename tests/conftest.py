"""A JupyterLab and a browser for each module that drives them."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.browser import ROOT, chromium, find_browser, jupyter_lab, write_notebook


@pytest.fixture(scope="module")
def url(request, tmp_path_factory) -> Iterator[str]:
    """Serve copies of the notebooks, and the module's own ``CELLS`` as one."""
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
def browser(url) -> Iterator[Browser]:
    with chromium() as browser:
        yield browser
