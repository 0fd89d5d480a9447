"""The browser that the tests drive."""

import shutil


def find_browser() -> str | None:
    """Return the path of a Chromium or Chrome on this machine, or None."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    return None
