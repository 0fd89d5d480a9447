"""A measurement says which step it is at, and an interrupt ends it as Stop does."""

import asyncio
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from helpers.checkpointing import Plan
from helpers.controls import BudgetLab, LabState, LayerLab
from helpers.controls._idle import IdleWork
from helpers.models import MLP

WIDTHS, ROWS = [64] * 5, 256
MODEL = MLP(WIDTHS, "gelu")
STATUS = '<div role="status" aria-live="polite">'


@pytest.fixture
def idle_kernel() -> Iterator[None]:
    """Ignore interrupts, as a kernel does that runs no cell."""
    IdleWork._started.clear()  # of other tests, whose loops have ended
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, before)


def small_lab() -> LayerLab:
    return LayerLab(MODEL, torch.randn(ROWS, 64))


def measure_until(stop: Callable[[LayerLab, str], None]) -> tuple[LayerLab, str]:
    """Measure layer 2, and let something be done at each step; then flip layer 3.

    Returns:
        the lab, and what it said before the last flip.
    """

    async def measuring() -> tuple[LayerLab, str]:
        lab = small_lab()
        lab.boxes["layer2"].value = True
        lab.progress.observe(lambda change: stop(lab, change.new), "value")
        while lab._work.active:
            await asyncio.sleep(0.001)
        said = lab.readout.value
        lab.boxes["layer3"].value = True
        lab._work.stop()
        return lab, said

    return asyncio.run(measuring())


def interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("ticked", [(), ("layer2",)])
@pytest.mark.parametrize("against", [Plan(), Plan.alone(["layer1"])])
def test_all_steps_are_counted_before_the_first(ticked, against):
    state = LabState(lambda: MLP(WIDTHS, "gelu"), ROWS)
    state.set()
    state.plan, state.against = Plan.alone(ticked), against
    steps = state.measuring()
    next(steps)
    assert 1 + sum(1 for _ in steps) == state.steps


def test_each_step_is_shown_with_how_many_there_are():
    seen: list[str] = []
    _, said = measure_until(lambda _, text: seen.append(text))
    *steps, last = seen
    found = [re.search(r"step (\d+) of (\d+)$", text).groups() for text in steps]
    assert found == [(str(i), "25") for i in range(1, 26)] and last == ""
    assert "measured on" in said


def test_a_lab_for_a_budget_shows_them_as_well():
    panel, seen = BudgetLab(lambda: MLP(WIDTHS, "gelu"), ROWS), []
    panel.boxes["layer2"].value = True
    panel.lab.progress.observe(lambda change: seen.append(change.new), "value")
    panel.measure()
    assert seen[-2].endswith("step 25 of 25") and seen[-1] == ""
    assert panel.lab.progress in panel.children[0].children[2].children[1].children


def press_stop(lab: LayerLab, text: str) -> None:
    if "step 7 of" in text:
        asyncio.get_running_loop().call_soon(lab.measure_button.click)


def interrupt_between_steps(lab: LayerLab, text: str) -> None:
    if "step 7 of" in text:
        interrupt()


def interrupt_within_a_step(lab: LayerLab, text: str) -> None:
    if "step 7 of" in text:
        MODEL.layer3.register_forward_pre_hook(interrupt)


def lose_an_interrupt(lab: LayerLab, text: str) -> None:
    """Interrupt where Python cannot raise an error, but prints it."""

    class Lost:
        __del__ = interrupt

    def forward(*_: object) -> None:
        Lost()

    if "step 7 of" in text:
        MODEL.layer3.register_forward_pre_hook(forward)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "stop",
    [press_stop, interrupt_between_steps, interrupt_within_a_step, lose_an_interrupt],
)
def test_an_interrupt_ends_it_as_stop_does(idle_kernel, stop):
    before = {name: value.clone() for name, value in MODEL.state_dict().items()}
    lab, said = measure_until(stop)
    MODEL.layer3._forward_pre_hooks.clear()
    assert said.startswith(f"{STATUS}<div>layer 2 alone: peak ")
    assert said.endswith(
        '<div class="more">predicted for a CUDA step; '
        "the measurement was stopped</div></div>"
    )
    assert not lab.state.measured and lab.progress.value == ""
    assert lab.measure_button.description == "Measure"
    assert all(torch.equal(before[n], v) for n, v in MODEL.state_dict().items())
    assert all(parameter.grad is None for parameter in MODEL.parameters())
    assert "forward" not in vars(MODEL.layer2)
    assert lab.finding.startswith("layers 2, 3 each alone")
    assert lab.finding in lab.readout.value and "stopped" not in lab.readout.value


def test_what_was_measured_before_is_there_again_when_another_is_stopped():
    lab = small_lab()
    lab.boxes["layer2"].value = True
    lab.measure()
    before = lab.readout.value
    measured = dict(lab.state.measured)
    with pytest.raises(KeyboardInterrupt):
        lab.progress.observe(raise_interrupt, "value")
        lab.measure()
    end = "</div></div>"
    also = f"; the measurement was stopped{end}"
    assert lab.readout.value == before.removesuffix(end) + also
    assert lab.state.measured == measured


def raise_interrupt(_: object) -> None:
    raise KeyboardInterrupt


def test_a_refusal_stays_when_the_measurement_is_stopped(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no prediction of this")

    monkeypatch.setattr("helpers.controls.state.predict", fails)
    lab = small_lab()
    lab.progress.observe(raise_interrupt, "value")
    with pytest.raises(KeyboardInterrupt):
        lab.measure()
    assert "no prediction of this; the measurement was stopped" in lab.readout.value


def test_a_flip_that_takes_long_is_ended_by_an_interrupt(idle_kernel, monkeypatch):
    def slow(*_: object, **__: object) -> None:
        interrupt()
        raise AssertionError("the interrupt was not heard")

    async def flip() -> LayerLab:
        lab = small_lab()
        lab._work.stop()
        monkeypatch.setattr("helpers.controls.state.predict", slow)
        click = {"data": {"method": "update", "state": {"value": True}}}
        click["data"]["buffer_paths"] = []
        message = ({"content": click, "buffers": []},)
        box = lab.boxes["layer2"]
        thread = threading.Thread(target=box.comm.handle_msg, args=message)
        thread.start()
        thread.join()
        await asyncio.sleep(0)
        return lab

    assert "stopped; a box" in asyncio.run(flip()).readout.value


def test_an_interrupt_of_a_running_cell_is_left_to_the_cell():
    """Somebody else listens there."""
    heard: list[object] = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))

    def stop(lab: LayerLab, text: str) -> None:
        if "step 7 of" in text:
            interrupt()

    try:
        _, said = measure_until(stop)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [1] and "measured on" in said
