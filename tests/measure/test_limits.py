"""A limit admits what is predicted to fit and refuses the rest, and nothing is lost."""

import gc
import math
import queue
import re
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from helpers.checkpointing import Plan, checkpointed
from helpers.measure import (
    largest_batch,
    measure,
    measure_plans,
    memory_bytes,
    memory_limit,
    predict,
    training_step,
)
from helpers.measure._cpu_limit import CpuLimit
from helpers.models import MLP, DocsMLP, uniform_mlp
from helpers.timeline import record_timeline
from helpers.units import format_bytes

SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
OutOfMemory = torch.OutOfMemoryError


def chain() -> nn.Sequential:
    """Convolution, BatchNorm and pooling: several outputs an operator, and buffers."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 16, 3), nn.GELU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(16 * 6 * 6, 10)),
    )


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layer2 = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)

    def forward(self, x):
        return self.layer2(self.layer1(x)).mean(1)


def floats(*shape: int):
    return lambda: torch.randn(*shape)


def labelled(rows: int, width: int):
    return lambda: (torch.randn(rows, width), torch.randint(10, (rows,)))


MODELS = {
    "docs": (DocsMLP, floats(64, 1024), "layer1", "layer2"),
    "gelu": (partial(uniform_mlp, 4, 96), labelled(100, 96), "layer1", "layer2"),
    "relu": (partial(uniform_mlp, 4, 96, "relu"), floats(64, 96), "layer2", "layer4"),
    "dropout": (
        partial(MLP, [40, 64, 72, 10], "gelu", 0.2),
        labelled(33, 40),
        "layer1",
        "layer2",
    ),
    "convolutions": (chain, floats(4, 3, 16, 16), "0", "1"),
    "attention": (Block, floats(3, 7, 32), "layer1", "layer2"),
}
OPTIMIZERS = {
    "none": None,
    "SGD": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "AdamW": AdamW,
    "foreach": partial(AdamW, foreach=True),
    "fused": partial(AdamW, fused=True),
}


PAIRS = [(model, optimizer) for model in MODELS for optimizer in ("none", "AdamW")]
PAIRS += [("gelu", name) for name in OPTIMIZERS if name not in ("none", "AdamW")]


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Every limit collects garbage; leave out what was there before this file."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def plans_of(model: nn.Module, first: str, second: str) -> list[Plan]:
    plans = [Plan(), Plan.alone([first]), Plan.alone([first, second])]
    if isinstance(model, nn.Sequential):
        plans.append(Plan.grouped(model, [first, second]))
    return plans


def state_of(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def refused(limit_bytes: int, step) -> str:
    """Run a step that must be refused, and return what is said."""
    with pytest.raises(OutOfMemory) as raised, memory_limit(limit_bytes, "cpu"):
        step()
    return str(raised.value)


# To the byte


@pytest.mark.parametrize(("case", "name"), PAIRS, ids=str)
def test_what_is_predicted_to_fit_runs_and_a_block_less_is_refused(case, name):
    factory, make_batch, *layers = MODELS[case]
    model, batch, optimizer = factory(), make_batch(), OPTIMIZERS[name]
    for plan in plans_of(model, *layers):
        report = predict(model, batch, plan, optimizer=optimizer, device="cpu")
        made = optimizer(model.parameters()) if optimizer else None
        step = training_step(model, batch, optimizer=made)
        with checkpointed(model, plan):
            step()  # the state that an optimizer makes in its first step
            with memory_limit(report.peak_bytes, "cpu"):
                step()
                step()
            refused(report.peak_bytes - 1, step)


def test_an_optimizers_first_step_fits_where_the_others_do():
    model, x = uniform_mlp(3, 64), torch.randn(16, 64)
    report = predict(model, x, optimizer=AdamW, device="cpu")
    step = training_step(model, x, optimizer=AdamW(model.parameters()))
    with memory_limit(report.peak_bytes, "cpu"):
        step()
        step()


def test_nothing_is_allocated_above_the_limit():
    """640 TB: CPU's allocator would refuse them in words of its own."""
    model, x = MLP([16, 16, 4]), torch.empty(1, 16).expand(10**13, 16)
    message = refused(2**20, lambda: model(x))
    assert message.startswith("CPU out of memory: addmm in layer1.0 (forward) wants")
    huge = [
        lambda: torch.zeros(2**50),
        lambda: torch.randn(2**50, dtype=torch.float64),
        lambda: torch.cat([x, x]),
        lambda: x.to(torch.float64, memory_format=torch.contiguous_format),
        lambda: torch.ones_like(x, memory_format=torch.contiguous_format),
    ]
    for make in huge:
        assert "and the limit is 1.0 MiB" in refused(2**20, make)


def test_what_only_a_run_can_tell_is_counted_when_it_has_run():
    x = torch.ones(1000)
    with memory_limit(4096 + 8192, "cpu"):
        assert x.nonzero().shape == (1000, 1)  # 8 bytes a place, unknown before
    assert "nonzero (forward) wants 8.0 KiB" in refused(
        4096 + 8191 // 512 * 512, x.nonzero
    )


def test_the_level_is_the_timelines_and_comes_back_down():
    model, x = uniform_mlp(3, 64), torch.randn(32, 64)
    step, limit = training_step(model, x), CpuLimit(2**30)
    levels = []
    model.layer4.register_forward_hook(lambda *_: levels.append(limit.held_bytes))
    timeline = record_timeline(step, model, batch=x)
    with limit.holding():
        for _ in range(20):
            step()
            levels.append(limit.held_bytes)
    assert set(levels[2::2]) == {timeline.events[-1].level_bytes}
    assert len(set(levels[1::2])) == 1
    assert levels[1] == timeline.after_forward_bytes - 512  # the loss comes later
    assert (
        len(limit.tracker.module_of_node) < 60 and not limit.tracker.log
    )  # nothing piles up


def test_views_and_what_other_devices_hold_cost_nothing():
    x = torch.zeros(256)
    with memory_limit(1024, "cpu"):
        x.view(16, 16).t()[1:].add_(1).unbind()
        torch.empty(2**40, device="meta").add(1)
        x.to("meta").exp()


# What a refusal says, and what it leaves


def test_a_refusal_says_what_was_wanted_what_is_alive_and_what_is_allowed():
    model, x = MLP([64, 64, 64, 4], "gelu"), torch.randn(128, 64)
    weights = sum(math.ceil(p.numel() / 128) * 512 for p in model.parameters())
    activation = 4 * 128 * 64
    limit = weights + 3 * activation  # x, and two of the three before layer2's GELU
    assert refused(limit, lambda: model(x)) == (
        f"CPU out of memory: addmm in layer2.0 (forward) wants 32.0 KiB, "
        f"{format_bytes(limit)} are alive, and the limit is {format_bytes(limit)}; "
        "take a smaller batch, or checkpoint more layers"
    )
    limit = weights + 5 * activation + 4096  # two layers kept, output and loss
    message = refused(limit, lambda: model(x).sum().backward())
    assert message.startswith("CPU out of memory: mm in layer3 (backward) wants 32.0")


def test_a_limit_below_the_weights_says_the_least_that_works():
    model, x = MLP([64, 64, 4]), torch.randn(8, 64)
    least = 2 * (64 * 64 * 4 + 512 + 64 * 4 * 4 + 512)
    words = f"gradients and optimizer state alone take {format_bytes(least)}$"
    for limit in (1, least // 2, least - 512):
        message = refused(limit, training_step(model, x))
        assert "no batch is small enough" in message and re.search(words, message)
        with pytest.raises(OutOfMemory, match=words), memory_limit(limit, "cpu"):
            measure(model, x)
    assert "smaller batch" in refused(least + 512, training_step(model, x))


def test_with_adamw_the_least_is_sixteen_bytes_a_parameter():
    model, x = nn.Linear(256, 256, bias=False), torch.randn(2, 256)
    words = f"alone take {format_bytes(16 * 256 * 256)}"
    with pytest.raises(OutOfMemory, match=words), memory_limit(2**19, "cpu"):
        measure(model, x, optimizer=AdamW)
    optimizer = AdamW(model.parameters())
    training_step(model, x, optimizer=optimizer)()
    assert words in refused(2**19, training_step(model, x, optimizer=optimizer))


@pytest.mark.parametrize("share", [0.6, 0.9, 0.999])
@pytest.mark.parametrize("plan", [Plan(), Plan((("layer1", "layer2"),))], ids=str)
def test_after_a_refusal_model_and_memory_are_as_before(plan, share):
    model, x = uniform_mlp(4, 64), torch.randn(256, 64)
    before, made = state_of(model), []

    def note(module, args, output):
        made.append(weakref.ref(output.untyped_storage()))

    for layer in model:
        layer.register_forward_hook(note)

    def step():
        output = model(x)
        loss = output.sum()
        loss.backward()

    peak = predict(model, x, plan, device="cpu").peak_bytes
    made.clear()
    with checkpointed(model, plan), pytest.raises(OutOfMemory) as raised:
        with memory_limit(int(share * peak), "cpu"):
            step()
    assert raised.tb is not None and made  # the traceback is there, and holds nothing
    assert [reference() for reference in made] == [None] * len(made)
    assert all(map(torch.equal, state_of(model), before))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert _get_current_dispatch_mode_stack() == []
    with checkpointed(model, plan), memory_limit(peak, "cpu"):
        step()


def test_gradients_that_were_there_stay():
    model, x = MLP([64, 64, 4]), torch.randn(64, 64)
    training_step(model, x)()
    gradients = [parameter.grad for parameter in model.parameters()]
    refused(2**16, lambda: model(x).sum().backward())
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


def test_inside_the_block_the_error_keeps_its_tensors_until_it_is_gone():
    model, x = uniform_mlp(4, 64), torch.randn(256, 64)
    with memory_limit(2**19, "cpu"):
        try:
            model(x)
        except OutOfMemory as error:
            kept = error
        with pytest.raises(OutOfMemory):
            torch.zeros(2**16)  # 256 KiB would fit beside model and batch
        kept.__traceback__ = None
        gc.collect()
        assert torch.zeros(2**16).sum() == 0


def test_other_errors_pass_with_their_variables():
    def fail():
        held = torch.zeros(4)
        raise RuntimeError(f"not {len(held)}")

    with pytest.raises(RuntimeError, match="not 4") as raised:
        with memory_limit(2**20, "cpu"):
            fail()
    assert "held" in raised.traceback[-1].frame.f_locals


def test_an_error_that_is_being_handled_keeps_its_traceback():
    try:
        raise KeyError("first")
    except KeyError as error:
        first = error
        refused(512, lambda: torch.zeros(1024))
    assert first.__traceback__ is not None


def test_a_refused_optimizer_can_be_tried_again_inside_the_block():
    model, x = MLP([64, 64, 4]), torch.randn(8, 64)
    step = training_step(model, x, optimizer=AdamW(model.parameters()))
    plain = predict(model, x, device="cpu").peak_bytes
    with memory_limit(plain + 2048, "cpu"):
        words = r"\(optimizer\) wants 16.0 KiB.*; no batch and no plan changes"
        with pytest.raises(OutOfMemory, match=words):
            step()
        gc.collect()
        training_step(model, x)()  # the phases are told apart again


# With what else there is


@pytest.mark.parametrize("optimizer", [None, AdamW])
def test_a_measurement_needs_its_step_and_no_byte_more(optimizer):
    model, x = uniform_mlp(3, 64), torch.randn(64, 64)
    training_step(model, x, optimizer=AdamW(model.parameters()))()
    before = state_of(model)
    gradients = [parameter.grad for parameter in model.parameters()]
    settings = {"optimizer": optimizer, "repeats": 2}
    plans = [Plan(), Plan((("layer1", "layer2"),))]
    peaks = [
        predict(model, x, plan, optimizer=optimizer, device="cpu").peak_bytes
        for plan in plans
    ]
    with memory_limit(max(peaks), "cpu"):
        reports = measure_plans(model, x, plans, **settings)
        assert [report.peak_bytes for report in reports] == peaks
        assert all(report.step_ms > 0 for report in reports)
    needed, limit = map(format_bytes, (peaks[0], peaks[0] - 512))
    words = f"needs {needed} at its peak and does not fit into the {limit}"
    with pytest.raises(OutOfMemory, match=words):
        with memory_limit(peaks[0] - 512, "cpu"):
            measure_plans(model, x, plans, **settings)
    assert all(map(torch.equal, state_of(model), before))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x if x.sum() > 0 else -x)


def test_a_step_that_nobody_can_predict_is_measured_up_to_the_limit():
    model, x = LooksAtValues(), torch.randn(256, 64)
    peak = measure(model, x, repeats=0).peak_bytes
    with memory_limit(peak, "cpu"):
        assert measure(model, x, repeats=1).peak_bytes == peak
    with pytest.raises(OutOfMemory, match="^the step does not fit") as raised:
        with memory_limit(peak - 512, "cpu"):
            measure(model, x)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert raised.value.__context__.__traceback__ is None  # so it holds no tensors


def test_times_are_taken_without_the_count():
    model, x = uniform_mlp(2, 16), torch.randn(4, 16)
    noted = queue.SimpleQueue()  # a list would be put back
    model.layer1.register_forward_hook(
        lambda *_: noted.put(_get_current_dispatch_mode_stack())
    )
    with memory_limit(2**20, "cpu"):
        measure(model, x, warmup=1, repeats=3)
        assert len(_get_current_dispatch_mode_stack()) == 1
    modes = [noted.get() for _ in range(noted.qsize())]
    assert modes[-3:] == [[]] * 3
    assert _get_current_dispatch_mode_stack() == []


def test_predictions_are_not_counted():
    model, x = uniform_mlp(4, 64), torch.empty(2**20, 64, device="meta")
    expected = predict(model, x, optimizer=AdamW, device="cpu").peak_bytes
    with memory_limit(512, "cpu"):
        report = predict(model, x, optimizer=AdamW, device="cpu")
        assert report.peak_bytes == expected > 2**30
        assert memory_bytes("cpu") == 512
    assert memory_bytes("cpu") > 2**20


def test_of_two_limits_the_lower_one_counts():
    with memory_limit(2**20, "cpu"), memory_limit(2**30, "cpu"):
        assert memory_bytes("cpu") == 2**20
        with pytest.raises(OutOfMemory, match="limit is 1.0 MiB"):
            torch.zeros(2**19)
        with memory_limit(2**10, "cpu"):
            assert memory_bytes("cpu") == 2**10


@pytest.mark.parametrize("limit", [0, -1, math.inf, math.nan, "1 GiB", None])
def test_what_is_no_number_of_bytes_is_refused(limit):
    with pytest.raises(ValueError, match="a limit is a number of bytes.*got"):
        with memory_limit(limit, "cpu"):
            pass


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match="'cpu' or 'cuda', not on 'meta'"):
        with memory_limit(2**20, "meta"):
            pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_limit_on_an_absent_gpu_says_what_can_be_done():
    with pytest.raises(ValueError, match="sees no CUDA device"):
        with memory_limit(2**30, "cuda"):
            pass


# The largest batch


@pytest.mark.parametrize("at_most", [1, 2, 7, 64, 100])
def test_the_largest_batch_is_found_wherever_it_is(at_most):
    for most in range(at_most + 3):
        assert largest_batch(lambda rows: rows <= most, at_most) == min(most, at_most)  # noqa: B023


def test_the_search_is_short_and_asks_no_batch_twice():
    asked = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return rows <= 1_000_003

    assert largest_batch(fits) == 1_000_003
    assert len(asked) == len(set(asked)) <= 2 * 21
    assert max(asked) <= 2 * 1_000_003


@pytest.mark.parametrize("at_most", [0, -4, 2.5, None])
def test_at_most_is_a_number_of_rows(at_most):
    with pytest.raises(ValueError, match="whole number of rows from 1 up"):
        largest_batch(lambda rows: True, at_most)


@pytest.mark.parametrize("plan", [Plan(), Plan((("layer1", "layer2"),))], ids=str)
def test_the_largest_batch_runs_and_one_row_more_is_refused(plan):
    model, limit = uniform_mlp(4, 32), 200_000

    def fits(rows: int) -> bool:
        x = torch.empty(rows, 32, device="meta")
        return predict(model, x, plan, device="cpu").peak_bytes <= limit

    rows = largest_batch(fits)
    with checkpointed(model, plan):
        with memory_limit(limit, "cpu"):
            training_step(model, torch.randn(rows, 32))()
        refused(limit, training_step(model, torch.randn(rows + 1, 32)))


# On a GPU


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; none is available")
    gc.collect()
    torch.cuda.empty_cache()


def reserve_workspaces() -> None:
    """cuBLAS keeps its own from here on, inside the same allocator."""
    layer = nn.Linear(1024, 1024).cuda()
    layer(torch.randn(1024, 1024, device="cuda")).sum().backward()


@pytest.mark.gpu
def test_cudas_own_limit_refuses_and_is_put_back(gpu):
    reserve_workspaces()
    model, x = uniform_mlp(8, 1024).cuda(), torch.randn(16384, 1024, device="cuda")
    step, before = training_step(model, x), state_of(model)
    room = torch.cuda.memory_reserved() + 2**28  # 17 activations of 64 MiB want more
    fraction = torch.cuda.get_per_process_memory_fraction()
    allocated = torch.cuda.memory_allocated()
    with pytest.raises(OutOfMemory, match="CUDA out of memory"):
        with memory_limit(room, "cuda"):
            assert memory_bytes("cuda") == pytest.approx(room, abs=1)
            step()
    assert torch.cuda.get_per_process_memory_fraction() == fraction
    assert torch.cuda.memory_allocated() == allocated
    assert all(map(torch.equal, state_of(model), before))
    assert all(parameter.grad is None for parameter in model.parameters())
    step()


@pytest.mark.gpu
def test_under_cudas_limit_a_measurement_names_the_amount(gpu):
    reserve_workspaces()
    model, x = uniform_mlp(8, 1024).cuda(), torch.randn(16384, 1024, device="cuda")
    room = torch.cuda.memory_reserved() + 2**28
    peak = format_bytes(predict(model, x).peak_bytes)
    with pytest.raises(OutOfMemory, match=f"needs {peak} .* the {format_bytes(room)}"):
        with memory_limit(room, "cuda"):
            measure(model, x)


@pytest.mark.gpu
def test_a_limit_below_what_is_there_already_says_so(gpu):
    held = torch.zeros(2**26, device="cuda")
    with pytest.raises(OutOfMemory, match="holds .* already and the limit is 64.0 MiB"):
        with memory_limit(2**26, "cuda"):
            pass
    del held
