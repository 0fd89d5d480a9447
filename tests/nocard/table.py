"""What PyTorch's own CUDA code counted, by card: the table of notebook 13.

A run of the tests holds the file against what it has just counted. To write it anew:
``RENEW=1 make test-cuda``.
"""

import json
import os

import torch

from helpers.checkpointing import Plan
from helpers.recording.published import CUDA_CODE
from tests.nocard.cases import ADAMW, Case

# Those that the notebook predicts again, each without checkpointing and with pairs.
EXAMPLES = {
    "DocsMLP 8192": "DocsMLP",
    "gelu 0.1 1000x1000": "MLP",
    f"GPT (8, 1024) 0.1 {torch.bfloat16} {ADAMW}": "GPT",
}


def example(case: Case, plan: Plan, counted: dict[str, int]) -> list[dict]:
    """Make the row of a step that the notebook predicts again; none of another."""
    if str(case) not in EXAMPLES or plan not in (case.plans[0], case.plans[-1]):
        return []
    segments = [list(segment) for segment in plan.segments]
    return [{"step": EXAMPLES[str(case)], "plan": segments, **counted}]


def hold(group: str, cases: int, equal: int, examples: list[dict]) -> None:
    """Hold a group's counts against the file, or write them; a real card's are kept
    by ``make record``.
    """
    if "nocard" not in torch.cuda.get_device_name():
        return
    card = {"card": os.environ["NOCARD"]}
    rows = {
        "counts": [card | {"group": group, "cases": cases, "equal": equal}],
        "examples": [card | row for row in examples],
    }
    if os.environ.get("RENEW"):
        write(rows)
    table = json.loads(CUDA_CODE.read_text())
    assert table["torch"] == torch.__version__, f"{CUDA_CODE.name} is of another torch"
    for name, new in rows.items():
        missing = [row for row in new if row not in table[name]]
        assert not missing, f"not in {CUDA_CODE.name}, RENEW=1 writes it: {missing}"


def write(rows: dict[str, list[dict]]) -> None:
    """Put rows in the place of those of the same card and group, or step and plan."""
    table = {"torch": torch.__version__, "counts": [], "examples": []}
    if CUDA_CODE.exists():
        found = json.loads(CUDA_CODE.read_text())
        table = found if found["torch"] == table["torch"] else table

    def key(row: dict) -> list:
        return [row.get(name) for name in ("card", "group", "step", "plan")]

    for name, new in rows.items():
        keys = [key(row) for row in new]
        table[name] = [row for row in table[name] if key(row) not in keys] + new
    lines = [f'{{"torch": {json.dumps(table["torch"])}']
    for name in rows:
        listed = ",\n".join(f"  {json.dumps(row)}" for row in table[name])
        lines.append(f'"{name}": [\n{listed}]')
    CUDA_CODE.write_text(",\n".join(lines) + "}\n")
