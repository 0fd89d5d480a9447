"""The timeline: each storage of a step, held against hand arithmetic and PyTorch's own.

PyTorch counts a step in three ways that share nothing with the tracker: MemTracker, the
allocator's events in the profiler, and FlopCounterMode.
"""

import itertools
import threading

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from helpers.checkpointing import Plan, checkpointed
from helpers.measure import training_step
from helpers.models import MLP
from helpers.timeline import CATEGORIES, PHASES, record_timeline, tracker
from tests.oracles import (
    RNG_STATE_BYTES,
    counted_flops,
    memtracker_peak_bytes,
    profiled_bytes,
)

PLANS = [
    Plan(),
    Plan.alone(["layer1", "layer2"]),
    Plan.alone(["layer3"]),
    Plan((("layer1", "layer2"),)),
    Plan((("layer1",), ("layer2", "layer3"))),
    Plan((("layer1.0", "layer1.1"),)),
]
# No width is a multiple of another, so that no two kinds of tensor have one size.
WIDTHS, ROWS = [33, 65, 47, 10], 60


def recorded(
    model, x, plan=Plan(), optimizer=None, *, warm_up=True, loss=None, **options
):
    """Record a step, after one that leaves gradients and optimizer state behind."""
    step = training_step(model, x, loss, optimizer)
    with checkpointed(model, plan, **options):
        if warm_up:
            step()
        batch = {"batch": x, "optimizer": optimizer}
        return record_timeline(step, model, **batch)


def happened(timeline) -> list[str]:
    """Write each event in a line, gradients dropped at the start left out."""
    return [
        f"{'+' if kind == 'alloc' else '-'}{made.bytes} {made.op} {made.module}"
        for kind, made, _, _ in timeline.events[timeline.first_allocation :]
    ]


# By hand: Linear 64 → 128, ReLU, Linear 128 → 8, on 32 rows
# hidden:  32 rows × 128 × 4 B = 16,384      weight1: 128 × 64 × 4 B = 32,768
# output:  32 rows ×   8 × 4 B =  1,024      weight2:   8 × 128 × 4 B = 4,096
# x:       32 rows ×  64 × 4 B =  8,192      a bias or a number:            512

FORWARD = [
    "+16384 addmm layer1.0",
    "+16384 relu layer1.1",
    "-16384 addmm layer1.0",  # ReLU keeps its output, not its input
    "+1024 addmm layer2",
    "+512 sum ",
]
BACKWARD_OF_LAYER2 = [
    "+512 ones_like ",
    "+16384 mm layer2",
    "+4096 mm layer2",
    "+512 sum layer2",
]
BACKWARD_OF_RELU = ["+16384 threshold_backward layer1.1"]
BACKWARD_OF_LAYER1 = [
    "+32768 mm layer1.0",
    "+512 sum layer1.0",
    "-16384 threshold_backward layer1.1",
    "-512 ones_like ",
]
END = ["-1024 addmm layer2", "-512 sum "]


def test_a_step_by_hand():
    timeline = recorded(MLP([64, 128, 8]), torch.randn(32, 64))
    frees = ["-16384 mm layer2", "-16384 relu layer1.1"]
    assert happened(timeline) == (
        FORWARD
        + BACKWARD_OF_LAYER2
        + BACKWARD_OF_RELU
        + frees
        + BACKWARD_OF_LAYER1
        + END
    )
    parameters = 32768 + 512 + 4096 + 512
    assert timeline.baseline_bytes == parameters + 8192
    # The ReLU's output, the model's, and the loss.
    assert timeline.after_forward_bytes == parameters + 8192 + 16384 + 1024 + 512
    # All gradients, one activation's gradient, the output, the loss and its gradient.
    peak_bytes = 2 * parameters + 8192 + 16384 + 1024 + 512 + 512
    assert timeline.peak_bytes == peak_bytes == 102_400
    assert timeline.flops == {
        "forward": 2 * 32 * (64 * 128 + 128 * 8),
        "backward": 2 * 32 * (64 * 128 + 2 * 128 * 8),  # x wants no gradient
        "recompute": 0,
        "optimizer": 0,
    }


def test_a_checkpointed_step_by_hand():
    model, x = MLP([64, 128, 8]), torch.randn(32, 64)
    timeline = recorded(model, x, Plan.alone(["layer1"]))
    recompute = [
        "-16384 relu layer1.1",  # the first one; layer2 kept it as its input
        "+16384 addmm layer1.0",
        "+16384 relu layer1.1",
        "-16384 addmm layer1.0",
    ]
    frees = ["-16384 relu layer1.1", "-16384 mm layer2"]
    assert happened(timeline) == (
        FORWARD
        + BACKWARD_OF_LAYER2
        + recompute
        + BACKWARD_OF_RELU
        + frees
        + BACKWARD_OF_LAYER1
        + END
    )
    assert timeline.peak_bytes == 102_400
    assert timeline.flops["recompute"] == 2 * 32 * 64 * 128


def test_a_lone_linear_recomputes_nothing_unless_told_to():
    model, x, plan = MLP([64, 128, 8]), torch.randn(32, 64), Plan.alone(["layer2"])
    assert happened(recorded(model, x, plan)) == happened(recorded(model, x))
    timeline = recorded(model, x, plan, early_stop=False)
    assert timeline.flops["recompute"] == 2 * 32 * 128 * 8
    again = [event for event in timeline.events if event.phase == "recompute"]
    assert [(event.kind, event.allocation.bytes) for event in again] == [
        ("alloc", 1024),
        ("free", 1024),
    ]
    assert again[0].allocation.category == "temporary"


def test_an_adamw_step_by_hand():
    model, x = MLP([64, 128, 8]), torch.randn(32, 64)
    timeline = recorded(model, x, optimizer=torch.optim.AdamW(model.parameters()))
    parameters = 32768 + 512 + 4096 + 512
    state = 2 * parameters + 4 * 512  # two moments and a step count for each of four
    assert timeline.baseline_bytes == parameters + state + 8192
    # At the largest weight, the root of a moment and its quotient are alive together.
    alive = 2 * parameters + state + 8192 + 1024 + 512
    assert timeline.peak_bytes == alive + 2 * 32768
    peak = timeline.at_peak()
    assert (peak.event.phase, peak.event.allocation.op) == ("optimizer", "div")
    assert peak.categories["optimizer_state"] == state
    assert peak.categories["temporary"] == 2 * 32768
    assert {event.phase for event in timeline.events} == {
        "forward",
        "backward",
        "optimizer",
    }
    assert timeline.events[-1].phase == "optimizer"


def test_a_target_and_its_loss_are_counted():
    model = MLP([64, 128, 8])
    batch = torch.randn(32, 64), torch.randint(8, (32,))
    step = training_step(model, batch)
    timeline = record_timeline(step, model, batch=batch)
    parameters = 32768 + 512 + 4096 + 512
    assert timeline.baseline_bytes == parameters + 8192 + 512  # 32 × 8 B → 512
    assert happened(timeline)[4:7] == [
        "+1024 _log_softmax ",
        "+512 nll_loss_forward ",
        "+512 nll_loss_forward ",  # the total weight beside the loss
    ]


# Against PyTorch's MemTracker


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("dropout", [0, 0.1])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_peak_is_memtrackers(monkeypatch, activation, dropout, optimizer):
    monkeypatch.setattr(tracker, "round_to_block", int)  # MemTracker does not on a CPU
    model, x = MLP(WIDTHS, activation, dropout), torch.randn(ROWS, 33)
    made = optimizer and optimizer(model.parameters())
    for plan in PLANS:
        with checkpointed(model, plan):
            step = training_step(model, x, None, made)
            step()
            expected = memtracker_peak_bytes(step, model, x, made)
            timeline = record_timeline(step, model, batch=x, optimizer=made)
        assert timeline.peak_bytes == expected, plan


# Against the CPU allocator's own events


def in_blocks(changes: list[int]) -> list[int]:
    return [
        -(-abs(n_bytes) // 512) * 512 * (1 if n_bytes > 0 else -1)
        for n_bytes in changes
    ]


def left_over(changes: list[int], recorded: list[int]) -> list[int]:
    """Take what was recorded out of all changes, in order; all of it must be there."""
    wanted, rest = iter(recorded), []
    following = next(wanted, None)
    for change in changes:
        if change == following:
            following = next(wanted, None)
        else:
            rest.append(change)
    assert following is None, "the timeline holds an event that the allocator has not"
    return rest


@pytest.mark.parametrize(
    ("activation", "dropout", "plan", "options"),
    [
        ("relu", 0, PLANS[0], {}),
        ("gelu", 0, PLANS[0], {}),
        ("relu", 0, PLANS[1], {}),
        ("gelu", 0, PLANS[4], {}),
        ("gelu", 0, PLANS[4], {"use_reentrant": True}),
        ("silu", 0, PLANS[3], {"preserve_rng_state": False}),
        ("tanh", 0, PLANS[1], {"preserve_rng_state": False, "early_stop": False}),
        ("gelu", 0.1, PLANS[3], {}),
    ],
    ids=str,
)
def test_events_are_the_allocators_own(activation, dropout, plan, options):
    model = MLP(WIDTHS, activation, dropout)
    x = torch.randn(ROWS, 33, requires_grad=True)
    timeline = recorded(model, x, plan, warm_up=False, **options)
    ours = [
        event.allocation.bytes * (1 if event.kind == "alloc" else -1)
        for event in timeline.events
    ]
    model.zero_grad()
    x.grad = None
    with checkpointed(model, plan, **options):
        changes = profiled_bytes(training_step(model, x))

    # preserve_rng_state keeps the generator's state, in host memory, for each segment.
    # It is no tensor of the step, so the timeline leaves it out.
    states = [n_bytes for n_bytes in changes if abs(n_bytes) == RNG_STATE_BYTES]
    stashed = len(plan.segments) * options.get("preserve_rng_state", True)
    assert states.count(RNG_STATE_BYTES) == 2 * stashed  # once more while recomputing
    assert sum(states) == 0
    tensors = in_blocks([n_bytes for n_bytes in changes if n_bytes not in states])

    # What is left is scratch within one operator, which frees it before it returns:
    # the gradient of sum(), spread out for a product; two numbers of bernoulli_'s.
    scratch = left_over(tensors, ours)
    assert sum(scratch) == 0
    assert max(scratch) == 2560 and set(map(abs, scratch)) <= {2560, 512}
    levels = list(itertools.accumulate(tensors))
    scratch_at_peak = 2 * 512 if dropout else 0
    peak_bytes = timeline.peak_bytes - timeline.baseline_bytes + scratch_at_peak
    assert max(levels) == peak_bytes
    if not stashed:
        assert max(itertools.accumulate(in_blocks(changes))) == peak_bytes


def test_the_allocator_sees_adamws_temporaries_as_well():
    model, x = MLP(WIDTHS), torch.randn(ROWS, 33)
    optimizer = torch.optim.AdamW(model.parameters())
    step = training_step(model, x, None, optimizer)
    step()
    model.zero_grad()
    levels = list(itertools.accumulate(in_blocks(profiled_bytes(step))))
    timeline = record_timeline(step, model, batch=x, optimizer=optimizer)
    assert max(levels) == timeline.peak_bytes - timeline.baseline_bytes


# Against PyTorch's FLOP counter


@pytest.mark.parametrize(
    "options", [{}, {"early_stop": False}, {"use_reentrant": True}]
)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_flops_are_the_flop_counters(plan, options):
    model, x = MLP(WIDTHS, "gelu", 0.1), torch.randn(ROWS, 33, requires_grad=True)
    timeline = recorded(model, x, plan, **options)
    with checkpointed(model, plan, **options):
        assert sum(timeline.flops.values()) == counted_flops(training_step(model, x))
    a, b, c, d = WIDTHS
    products = {"layer1": a * b, "layer2": b * c, "layer3": c * d}
    forward = 2 * ROWS * sum(products.values())
    assert timeline.flops["forward"] == forward
    assert timeline.flops["backward"] == 2 * forward
    assert timeline.flops["optimizer"] == 0
    again = [
        # With early stop, a segment's last Linear is not reached if nothing needs it.
        segment[:-1] if segment[-1] == "layer3" and not options else segment
        for segment in plan.segments
    ]
    layers = {name.partition(".")[0] for segment in again for name in segment}
    expected = 2 * ROWS * sum(products[layer] for layer in layers)
    assert timeline.flops["recompute"] == expected


def test_convolutions_count_as_work_too():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), torch.randn(2, 3, 8, 8)
    timeline = recorded(model, x, Plan((("0", "1"),)))
    assert timeline.flops["forward"] == 2 * 2 * 4 * 6 * 6 * 3 * 3 * 3
    assert timeline.flops["recompute"] == timeline.flops["forward"]


# What a timeline says


@pytest.fixture(params=[(None, 0), (torch.optim.AdamW, 0.1)], ids=["plain", "AdamW"])
def timeline(request):
    optimizer, dropout = request.param
    model, x = MLP(WIDTHS, "gelu", dropout), torch.randn(ROWS, 33)
    made = optimizer and optimizer(model.parameters())
    return recorded(model, x, PLANS[4], made)


def test_every_level_follows_from_the_one_before(timeline):
    level, alive = timeline._start_bytes, set()
    for kind, allocation, phase, level_bytes in timeline.events:
        level += allocation.bytes if kind == "alloc" else -allocation.bytes
        assert level_bytes == level > 0
        assert allocation.bytes % 512 == 0 < allocation.bytes
        assert phase in PHASES and allocation.category in CATEGORIES
        if kind == "alloc":
            assert allocation not in alive and allocation.phase == phase
            alive.add(allocation)
        else:
            assert allocation in alive or allocation.phase == "before"
            alive.discard(allocation)
    # The gradients of the step before went, and this step's have come.
    assert level == timeline._start_bytes
    gradients = {made for made in alive if made.category == "gradient"}
    assert gradients == alive and len(gradients) == 6


def test_the_peak_is_the_highest_level_and_says_what_is_alive(timeline):
    levels = [event.level_bytes for event in timeline.events]
    peak = timeline.at_peak(largest=1000)
    assert timeline.peak_bytes == peak.peak_bytes == max(levels)
    assert peak.event.level_bytes == peak.peak_bytes and peak.event.kind == "alloc"
    assert list(peak.categories) == list(CATEGORIES)
    assert sum(peak.categories.values()) == peak.peak_bytes
    assert sum(tensor.bytes for tensor in peak.tensors) == peak.peak_bytes
    for category, n_bytes in peak.categories.items():
        alive = [tensor for tensor in peak.tensors if tensor.category == category]
        assert sum(tensor.bytes for tensor in alive) == n_bytes
    sizes = [tensor.bytes for tensor in peak.tensors]
    assert sizes == sorted(sizes, reverse=True)
    assert timeline.at_peak(3).tensors == peak.tensors[:3]
    assert str(peak).startswith("peak ") and "before the step" in str(peak)
    assert f"{len(timeline.events)} events" in repr(timeline)


def test_the_levels_of_all_categories_add_up(timeline):
    rows = timeline.levels()
    assert list(rows) == list(CATEGORIES)
    assert all(len(row) == len(timeline.events) + 1 for row in rows.values())
    totals = [sum(column) for column in zip(*rows.values(), strict=True)]
    assert totals == [timeline._start_bytes] + [e.level_bytes for e in timeline.events]
    assert min(map(min, rows.values())) == 0


def test_phases_come_in_their_order(timeline):
    phases = [event.phase for event in timeline.events]
    backward = phases.index("backward")
    assert set(phases[:backward]) == {"forward"}
    assert "forward" not in phases[backward:]
    assert {"backward", "recompute"} <= set(phases[backward:])
    if "optimizer" in phases:
        assert set(phases[phases.index("optimizer") :]) == {"optimizer"}
    assert timeline.forward_end == backward
    after_forward = timeline.events[backward - 1].level_bytes
    assert timeline.after_forward_bytes == after_forward


def test_each_category_holds_what_its_name_says(timeline):
    made = [event.allocation for event in timeline.events if event.kind == "alloc"]

    def shapes(category: str, phase: str | None = None) -> list[tuple]:
        return [a.shape for a in made if a.category == category and a.phase == phase]

    a, b, c, d = WIDTHS
    # layer1 and layers 2 to 3 are segments: layer1's output is layer2's kept input.
    kept = shapes("activation", "forward")
    assert (ROWS, b) in kept and (ROWS, d) in kept and (ROWS, c) not in kept
    assert kept.count((ROWS, b)) == 1
    again = shapes("recomputed", "recompute")
    assert {(ROWS, b), (ROWS, c)} <= set(again)
    assert {(ROWS, c)} <= set(shapes("temporary", "forward"))
    gradients = shapes("gradient", "backward")
    assert {(b, a), (c, b), (d, c)} <= set(gradients) and len(gradients) == 6
    assert not shapes("gradient", "forward") and not shapes("activation", "backward")
    assert not {a.category for a in made} & {"parameter", "input", "optimizer_state"}
    before = timeline.at_peak(1000).categories
    sizes = [b * a, b, c * b, c, d * c, d]
    parameters = sum(-(-4 * size // 512) * 512 for size in sizes)
    assert before["parameter"] == parameters
    assert before["input"] == -(-4 * ROWS * a // 512) * 512
    if before["optimizer_state"]:
        assert before["optimizer_state"] == 2 * parameters + 6 * 512


def test_modules_are_named_in_every_phase(timeline):
    named = {phase: set() for phase in PHASES}
    for kind, allocation, phase, _ in timeline.events:
        if kind == "alloc":
            named[phase].add(allocation.module)
    layers = {"layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3"}
    assert layers <= named["forward"]
    assert layers <= named["backward"]
    assert {"layer1.0", "layer2.0", "layer2.1"} <= named["recompute"]
    assert "layer3" not in named["recompute"]  # early stop
    assert named["optimizer"] <= {""}


def test_kept_bytes_are_what_each_layer_leaves_for_backward():
    model, x = MLP([64, 128, 128, 8], "gelu"), torch.randn(32, 64)
    hidden = 32 * 128 * 4
    plain = recorded(model, x).kept_bytes()
    assert plain == {  # GELU's input, and its output as the next layer's input
        "layer1": 2 * hidden,
        "layer2": 2 * hidden,
        "layer3": 1024,
        "": 512,
    }
    in_one = recorded(model, x, Plan((("layer1", "layer2"),))).kept_bytes()
    assert in_one == {"layer2": hidden, "layer3": 1024, "": 512}


def test_first_step_makes_the_optimizers_state():
    model, x = MLP(WIDTHS), torch.randn(ROWS, 33)
    optimizer = torch.optim.AdamW(model.parameters())
    first = recorded(model, x, optimizer=optimizer, warm_up=False)
    made = [e.allocation for e in first.events if e.kind == "alloc"]
    state = [a for a in made if a.category == "optimizer_state"]
    assert len(state) == 3 * 6 and {a.phase for a in state} == {"optimizer"}
    second = recorded(model, x, optimizer=optimizer, warm_up=False)
    assert second.at_peak().categories["optimizer_state"] == sum(a.bytes for a in state)
    assert second.peak_bytes > first.peak_bytes


def test_shared_storage_is_counted_once():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(8, 64)
    apart = recorded(model, x).baseline_bytes
    model[1].weight = model[0].weight
    assert apart - recorded(model, x).baseline_bytes == 64 * 64 * 4
    whole = torch.randn(16, 64)
    batch = (whole[:8], whole[8:])  # two views of one storage
    step = training_step(model, batch, lambda y, target: (y - target).square().sum())
    found = record_timeline(step, model, batch=batch).at_peak().categories["input"]
    assert found == 16 * 64 * 4


# Any function is a step


def test_a_closure_needs_no_batch_and_no_optimizer():
    model, x = MLP(WIDTHS, "gelu"), torch.randn(ROWS, 33)
    target = torch.randint(10, (ROWS,))
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        optimizer.zero_grad()
        output = model(x)
        loss = nn.functional.cross_entropy(output, target)
        loss.backward()
        optimizer.step()

    step()
    batch = {"batch": (x, target), "optimizer": optimizer}
    told = record_timeline(step, model, **batch)
    found = record_timeline(step, model)
    assert found.peak_bytes == told.peak_bytes
    assert found.at_peak().categories == told.at_peak().categories
    assert found.baseline_bytes == told.baseline_bytes
    assert happened(found) == happened(told)


def test_a_gradient_that_accumulates_was_there_before():
    model, x = MLP(WIDTHS), torch.randn(ROWS, 33, requires_grad=True)

    def step():
        model(x).sum().backward()

    step()
    timeline = record_timeline(step, model, batch=x)
    assert not any(e.allocation.category == "gradient" for e in timeline.events)
    assert not any(e.allocation.op == "add_" for e in timeline.events)
    gradients = [x.grad, *(p.grad for p in model.parameters())]
    n_bytes = sum(-(-4 * gradient.numel() // 512) * 512 for gradient in gradients)
    assert timeline.at_peak().categories["gradient"] == n_bytes


def test_two_passes_in_one_step():
    model, x = MLP(WIDTHS), torch.randn(ROWS, 33)
    step = training_step(model, x)

    def accumulate():
        step()
        model(x).sum().backward()

    once, twice = record_timeline(step, model), record_timeline(accumulate, model)
    assert twice.flops["forward"] == 2 * once.flops["forward"]
    assert twice.flops["backward"] == 2 * once.flops["backward"]


def test_other_devices_do_not_count():
    model, x = MLP(WIDTHS).to("meta"), torch.empty(ROWS, 33, device="meta")

    def step():
        torch.ones(1000, 1000)
        model(x).sum().backward()

    with_scratch = record_timeline(step, model)
    assert all(a.shape != (1000, 1000) for _, a, _, _ in with_scratch.events)
    both = record_timeline(step, model, devices=("meta", "cpu"))
    assert any(a.shape == (1000, 1000) for _, a, _, _ in both.events)


def test_a_step_that_does_nothing():
    model = MLP([64, 128, 8])
    timeline = record_timeline(lambda: None, model)
    assert timeline.events == []
    parameters = 32768 + 512 + 4096 + 512
    assert timeline.peak_bytes == timeline.baseline_bytes == parameters
    assert sum(timeline.levels()["parameter"]) == parameters


# Nothing is left behind


def global_hooks() -> list[int]:
    modules = torch.nn.modules.module
    return [
        len(modules._global_forward_pre_hooks),
        len(modules._global_forward_hooks),
        len(modules._global_forward_hooks_always_called),
        len(optimizers._global_optimizer_pre_hooks),
        len(optimizers._global_optimizer_post_hooks),
        len(_get_current_dispatch_mode_stack()),
        torch.autograd.is_multithreading_enabled(),
    ]


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer", "nowhere"])
@pytest.mark.parametrize("error", [AssertionError, KeyboardInterrupt])
def test_no_hook_is_left_behind(where, error):
    model, x = MLP(WIDTHS, "gelu"), torch.randn(ROWS, 33)
    optimizer = torch.optim.SGD(model.parameters())
    armed = True

    def fail(*arguments):
        if armed:
            raise error("on purpose")

    if where == "forward":
        model.layer2.register_forward_hook(fail)
    elif where == "backward":
        model.layer2[0].weight.register_hook(fail)
    elif where == "optimizer":
        optimizer.register_step_pre_hook(fail)
    before = global_hooks()
    step = training_step(model, x, None, optimizer)
    if where == "nowhere":
        record_timeline(step, model)
    else:
        told = ValueError if error is AssertionError else error
        with pytest.raises(told, match="on purpose"):
            record_timeline(step, model)
    assert global_hooks() == before
    armed = False
    assert happened(recorded(model, x, optimizer=optimizer)) == happened(
        recorded(model, x, optimizer=optimizer)
    )


def test_a_recorded_step_computes_what_the_step_computes():
    model, x = MLP(WIDTHS, "gelu", 0.3), torch.randn(ROWS, 33)
    step = training_step(model, x)
    gradients = []
    for run in (step, lambda: record_timeline(step, model)):
        torch.manual_seed(1)
        run()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_another_threads_steps_are_not_recorded():
    model, x = MLP(WIDTHS, "gelu"), torch.randn(ROWS, 33)
    optimizer = torch.optim.AdamW(model.parameters())
    other = MLP([16, 16, 16])
    others = torch.optim.AdamW(other.parameters())
    expected = recorded(model, x, PLANS[4], optimizer)

    def disturb(*arguments):
        def train():
            training_step(other, torch.randn(4, 16), None, others)()

        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

    model.layer2.register_forward_hook(disturb)
    model.layer2[0].weight.register_hook(disturb)
    optimizer.register_step_pre_hook(disturb)
    found = recorded(model, x, PLANS[4], optimizer)
    assert happened(found) == happened(expected)
    assert found.peak_bytes == expected.peak_bytes
    assert found.flops == expected.flops


def test_a_step_without_any_event_has_its_peak_before_it():
    model = MLP([16, 16])
    timeline = record_timeline(lambda: None, model)
    assert str(timeline.at_peak()).startswith("peak 1.5 KiB before the step\n")
    assert "0 events, peak 1.5 KiB before the step" in repr(timeline)
