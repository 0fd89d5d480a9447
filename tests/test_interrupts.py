"""An interrupt at any line of the helpers leaves torch and the model as they were.

Ctrl-C arrives between two lines. Here it comes at one line after the other, until a
run has no line left at which it did not come.
"""

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import helpers
from helpers.checkpointing import Plan
from helpers.inspection import inspect_model
from helpers.measure import measure, memory_limit, predict
from helpers.models import MLP
from tests.torch_state import changes, put_back, torch_state

HELPERS = str(Path(helpers.__file__).parent)
PLAN = Plan.alone(["layer1"])
MODEL, X = MLP([4, 4, 4, 2], "gelu", dropout=0.1), torch.randn(3, 4)
MIXED = {"optimizer": torch.optim.AdamW, "autocast": torch.bfloat16}
PLAIN, LARGE = MLP([4, 4, 2]), 10**8


def limited() -> None:
    with memory_limit(LARGE, "cpu"):
        PLAIN(X).sum().backward()
    PLAIN.zero_grad()


# What is run, and how many times each of its lines is interrupted, in turn: the first
# time that it comes, the second time, …
CASES = {
    "predict": (lambda: predict(MODEL, X, PLAN), 2),
    "predict for a CPU": (lambda: predict(MODEL, X, PLAN, device="cpu"), 1),
    "predict AdamW in bf16": (lambda: predict(PLAIN, X, **MIXED), 1),
    "memory_limit": (limited, 1),
    "inspect_model": (lambda: inspect_model(PLAIN, X), 1),
    "measure": (lambda: measure(PLAIN, X, PLAN, repeats=0).peak_bytes, 1),
}


class Interrupts:
    """Raises KeyboardInterrupt at the first line of helpers whose turn has not been."""

    def __init__(self, times: int) -> None:
        self.place = ""
        self._times, self._done = times, Counter()

    def __enter__(self) -> None:
        self.place, self._seen = "", Counter()
        sys.settrace(self._call)

    def __exit__(self, kind: type | None, *_: object) -> bool:
        sys.settrace(None)
        return kind is KeyboardInterrupt

    def _call(self, frame, event, arg) -> Callable | None:
        inside = frame.f_code.co_filename.startswith(HELPERS)
        return self._line if inside and not self.place else None

    def _line(self, frame, event, arg) -> Callable:
        if event == "line" and not self.place:
            place = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            self._seen[place] += 1
            if self._done[place] < min(self._seen[place], self._times):
                self._done[place] += 1
                self.place = place.removeprefix(HELPERS)
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def everything() -> dict[str, object]:
    """Return what torch has, and what these models have."""
    found = torch_state()
    for model in (MODEL, PLAIN):
        for name, module in model.named_modules():
            hooks = module._forward_hooks, module._forward_pre_hooks
            found[name] = *vars(module), module.training, *map(len, hooks)
    return found


@pytest.fixture
def young_heap() -> Iterator[None]:
    """Hide what is there from the search for optimizers, which is long."""
    gc.freeze()
    yield
    gc.unfreeze()


# In a finalizer Python writes an interrupt down and goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", CASES)
def test_an_interrupt_leaves_nothing_behind(name, young_heap):
    run, times = CASES[name]
    expected = run()  # which also imports what is imported when it is used
    interrupts, left = Interrupts(times), []
    while True:
        before = everything()
        with interrupts:
            run()
        if not interrupts.place:
            break
        if changed := changes(before, everything()):
            left.append(f"{interrupts.place} leaves {', '.join(changed)}")
            put_back(before)
    assert not left, "\n".join(left)
    assert run() == expected
    other = threading.Thread(target=predict, args=(PLAIN, X), daemon=True)
    other.start()
    other.join(60)
    assert not other.is_alive(), "a lock is held, for which other threads wait"
