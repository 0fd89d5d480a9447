"""Whether prediction, measurement and verification agree, and leave all as it was."""

import contextlib
import types
from collections.abc import Iterator

import numpy as np
import torch

from helpers.checkpointing import Plan
from helpers.measure import StepReport, measure, predict, verify
from tests.torch_state import changes, torch_state

OPAQUE = type, types.ModuleType, types.BuiltinFunctionType


def picture(thing: object, name: str = "", seen: dict | None = None) -> dict:
    """Describe a thing and all that it refers to: each tensor's bits, by its path."""
    seen = {} if seen is None else seen
    if id(thing) in seen or isinstance(thing, OPAQUE):
        return {name: id(thing)}
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        bits = thing.detach().to_dense().reshape(-1).numpy().tobytes()
        found = {name: (id(thing), tuple(thing.shape), thing.requires_grad, bits)}
        return found | picture(thing.grad if thing.is_leaf else None, f"{name}.grad")
    if isinstance(thing, dict):
        inner = {f"{name}[{key!r:.40}]": value for key, value in thing.items()}
    elif isinstance(thing, list | tuple):
        inner = {f"{name}[{place}]": value for place, value in enumerate(thing)}
    elif isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        inner = {f"{name} closes over {n}": cell for n, cell in enumerate(cells)}
    elif isinstance(thing, types.MethodType):
        inner = {f"{name} of": thing.__self__}
    elif hasattr(thing, "__dict__"):
        inner = {f"{name}.{key}": value for key, value in vars(thing).items()}
    else:
        return {name: repr(thing)}
    found = {name: (id(thing), *inner)}
    for path, value in inner.items():
        found |= picture(value, path, seen)
    return found


def surroundings() -> dict[str, object]:
    """Return what a process has of PyTorch, and of random numbers."""
    return torch_state() | {"NumPy's random numbers": repr(np.random.get_state())}


@contextlib.contextmanager
def untouched(*things: object) -> Iterator[None]:
    """Assert that a block leaves things, PyTorch and random numbers as they were."""
    before, around = picture(things), surroundings()
    yield
    after = picture(things)
    names = before | after
    assert [name for name in names if before.get(name) != after.get(name)] == []
    assert changes(around, surroundings()) == []


def counts(report: StepReport) -> dict[str, object]:
    """Take what is predicted and measured alike."""
    names = "peak_bytes after_forward_bytes baseline_bytes forward_flops categories"
    return {n: getattr(report, n) for n in (*names.split(), "recompute_flops")}


def assert_agreement(model, batch, *plans, others=(), **how) -> None:
    """Hold a step's prediction against its measurement, and it against no plan."""
    for plan in (Plan(), *plans):
        with untouched(model, batch, others, how):
            predicted = predict(model, batch, plan, device="cpu", **how)
            measured = measure(model, batch, plan, device="cpu", repeats=0, **how)
            verified = verify(model, batch, plan, device="cpu", **how)
        assert counts(predicted) == counts(measured)
        assert verified.same and verified.reproducible, str(verified)
