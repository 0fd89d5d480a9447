"""Make the recording that tests read: of no GPU, but in the format of one.

It was measured on a CPU, in tiny sizes, and says in each place that it is made up. To
make it anew, after the format has changed: python -m tests.recording.made_up
"""

from pathlib import Path

import torch

from helpers.recording import Recording
from helpers.recording.record import boxes, in_pieces, record
from helpers.recording.recorded import Group, Step

FIXTURE = Path(__file__).parent / "fixtures" / "made_up_recording.json"
GPU = "made up for tests"
SETTINGS = {"depth": 3, "width": 16, "activation": "gelu"}
LAYERS = ["layer1", "layer2", "layer3"]
PLANS = in_pieces(3, (1, 2, 3))


def tiny(optimizer: str = "none", precision: str = "float32", **settings) -> Step:
    """Make a step of a tiny MLP."""
    return Step("uniform_mlp", SETTINGS | settings, 64, optimizer, precision)


GROUPS = [
    Group(Step("DocsMLP", {}, 32), boxes(3)),
    Group(tiny(), PLANS),
    Group(tiny(dropout=0.1, activation="relu"), PLANS),
    Group(tiny("AdamW"), PLANS[:3]),
    Group(tiny("AdamW fused"), PLANS[:3]),
    Group(tiny("SGD", "bfloat16"), PLANS[:3]),
    Group(tiny(), boxes(3)),
]


def blank(**changes: object) -> Recording:
    """Make a recording of no GPU that is empty."""
    return Recording(
        **{
            "gpu": GPU,
            "driver": "none",
            "cuda": "none",
            "torch": torch.__version__,
            "date": "2000-01-01",
            "processors": 1,
            "threads": 1,
            "capability": (9, 0),
            "repeats": 2,
            "warmup": 1,
            "made_up": True,
        }
        | changes
    )


if __name__ == "__main__":
    FIXTURE.unlink(missing_ok=True)
    record(FIXTURE, blank(torch="none"), GROUPS, device="cpu")
