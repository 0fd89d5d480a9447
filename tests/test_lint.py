"""Ruff finds nothing to mend in the helpers, the tests and the notebooks."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("command", ["check", "format --check --diff"])
def test_ruff(command):
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache"]
    run = subprocess.run(
        [*ruff, "helpers", "tests", "notebooks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        pytest.fail(run.stdout + run.stderr, pytrace=False)
