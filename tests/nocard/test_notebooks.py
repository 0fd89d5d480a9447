"""Every notebook runs on a card without raising: its branches for CUDA are run.

Nothing is held against what it prints: on a card that is not there (README.md) values
and times mean nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; none is available"
    ),
]
ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = [sys.executable, str(Path(__file__).with_name("notebook.py"))]
# What may raise where nothing is computed: a notebook's cell, and why.
BY_VALUES: dict[tuple[str, int], str] = {}


def run(path: Path) -> dict[int, str]:
    """Run a notebook in a process of its own; return what its cells have raised."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*RUN, str(path)]
    told = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=600
    )
    assert told.returncode == 0, f"exit code {told.returncode}\n{told.stderr[-4000:]}"
    raised = json.loads(told.stdout.splitlines()[-1])
    return {int(place): reason for place, reason in raised.items()}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    raised = run(path)
    raised = {n: why for n, why in raised.items() if (path.stem, n) not in BY_VALUES}
    assert not raised, "\n".join(f"cell {n}: {why}" for n, why in raised.items())


def test_a_cell_that_raises_on_cuda_is_told(tmp_path):
    on_cuda = "import torch\nif torch.cuda.is_available():\n    raise ValueError('no')"
    sources = "x = 1", on_cuda, "y = x + torch.ones(2, device='cuda')"
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    path = tmp_path / "some.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown"}, *cells]}))
    assert run(path) == {2: "ValueError: no"}
