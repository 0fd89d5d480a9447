"""On a GPU: the prediction is what CUDA's allocator counts, and time is the GPU's."""

import gc
import itertools
import statistics
import time

import pytest
import torch
from torch.nn import functional as F

from helpers.checkpointing import Plan, checkpointed
from helpers.measure import (
    free_memory,
    largest_batch,
    measure,
    measure_plans,
    memory_limit,
    predict,
    time_step_ms,
    training_step,
)
from helpers.models import GPT, MLP, DocsMLP, uniform_mlp
from helpers.planner import Planner, plan_for
from helpers.recording.record import measure_group
from helpers.recording.recorded import Group, Step
from tests.nocard.by_hand import fresh
from tests.planner.zoo import SMALL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; none is available"
    ),
]

MIXED = [
    Plan(),
    Plan.alone(["layer1", "layer2", "layer3"]),
    Plan((("layer1", "layer2"),)),
    Plan((("layer1",), ("layer2", "layer3", "layer4"))),
]


def numbers(report) -> dict:
    """Take what must be the same in a prediction and in a measurement."""
    names = ["peak_bytes", "after_forward_bytes", "baseline_bytes", "categories"]
    names += ["forward_flops", "recompute_flops", "allocator_peak_bytes"]
    names += ["workspace_bytes", "reserved_peak_bytes"]
    return {name: getattr(report, name) for name in names}


def all_alone(names: list[str]) -> list[Plan]:
    ticks = itertools.product((False, True), repeat=len(names))
    return [Plan.alone(itertools.compress(names, row)) for row in ticks]


def assert_predicted(model, batch, plans, **settings) -> None:
    """Hold tensors, and the allocator's own counts, against their predictions."""
    for plan in plans:
        measured = measure(model, batch, plan, repeats=0, **settings)
        predicted = predict(model, batch, plan, device="cuda", **settings)
        assert numbers(predicted) == numbers(measured), plan


@pytest.fixture(autouse=True)
def empty_cache():
    """Let each test begin as a new process would, and collect nothing older."""
    fresh()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def deterministic(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Bytes


@pytest.mark.parametrize(("rows", "n_bytes"), [(32, 17_141_248), (8192, 176_580_608)])
def test_no_box_of_the_docs_mlp_changes_the_peak(rows, n_bytes):
    model, x = DocsMLP().cuda(), torch.randn(rows, 1024, device="cuda")
    plans = all_alone(["layer1", "layer2", "layer3"])
    assert_predicted(model, x, plans)
    reports = measure_plans(model, x, plans, repeats=0)
    assert [report.peak_bytes for report in reports] == [n_bytes] * 8


@pytest.mark.parametrize(
    "optimizer", [None, torch.optim.SGD, torch.optim.AdamW], ids=str
)
@pytest.mark.parametrize("dropout", [0, 0.1])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_predicted_is_measured(activation, dropout, optimizer):
    model = MLP([512, 1024, 1024, 512, 10], activation, dropout).cuda()
    x = torch.randn(2048, 512, device="cuda")
    assert_predicted(model, x, MIXED, optimizer=optimizer)


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_odd_sizes_are_predicted(dropout):
    model = MLP([520, 1024, 776, 512, 10], "gelu", dropout).cuda()
    x = torch.randn(2048, 520, device="cuda")
    assert_predicted(model, x, MIXED)


@pytest.mark.parametrize("options", [{"foreach": False}, {"fused": True}], ids=str)
def test_predicted_is_measured_for_other_adamws(options):
    def optimizer(parameters):
        return torch.optim.AdamW(parameters, **options)

    model, x = MLP([512, 1024, 10]).cuda(), torch.randn(64, 512, device="cuda")
    assert_predicted(model, x, [Plan()], optimizer=optimizer)


def test_predicted_is_measured_with_a_target():
    batch = torch.randn(2048, 512).cuda(), torch.randint(10, (2048,)).cuda()
    assert_predicted(uniform_mlp(4, 512).cuda(), batch, MIXED)


def test_a_loop_by_hand_peaks_where_it_was_predicted():
    def workspaces() -> None:
        layer = torch.nn.Linear(1024, 1024).cuda()
        layer(torch.randn(8192, 1024, device="cuda")).sum().backward()

    workspaces()  # cuBLAS keeps its own from here on
    gc.collect()
    for plan in MIXED:
        before = torch.cuda.memory_allocated()
        model = uniform_mlp(8, 1024).cuda()
        x = torch.randn(8192, 1024, device="cuda")
        with checkpointed(model, plan):
            for _ in range(3):
                torch.cuda.reset_peak_memory_stats()
                model.zero_grad()
                output = model(x)
                loss = output.sum()
                loss.backward()
                del output, loss
        peak = torch.cuda.max_memory_allocated() - before
        assert peak == predict(model, x, plan).allocator_peak_bytes
        del model, x
        gc.collect()
        assert torch.cuda.memory_allocated() == before


def test_a_model_on_the_host_is_measured_on_a_copy():
    model, x = MLP([512, 512, 10], "gelu"), torch.randn(256, 512)
    before = torch.cuda.memory_allocated()
    report = measure(model, x, device="cuda", optimizer=torch.optim.AdamW, repeats=1)
    assert report.device == "cuda"
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
    fresh()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW], ids=["none", "AdamW"])
@pytest.mark.parametrize(("activation", "dropout"), [("relu", 0), ("gelu", 0.1)])
def test_predicted_is_measured_under_autocast(activation, dropout, optimizer):
    model = MLP([512, 1024, 1024, 512, 10], activation, dropout).cuda()
    x = torch.randn(2048, 512, device="cuda")
    assert_predicted(model, x, MIXED, autocast=torch.bfloat16, optimizer=optimizer)


def test_what_is_reserved_holds_what_is_allocated_and_the_workspaces():
    model, x = uniform_mlp(8, 1024).cuda(), torch.randn(8192, 1024, device="cuda")
    report = measure(model, x, repeats=0)
    assert report.workspace_bytes > 0, "cuBLAS takes its own from the same allocator"
    allocated_bytes = report.allocator_peak_bytes + report.workspace_bytes
    assert report.reserved_peak_bytes >= allocated_bytes
    assert 0 <= report.padding_bytes < 2**20
    total = torch.cuda.get_device_properties(0).total_memory
    assert report.reserved_peak_bytes <= total


# Recording


def test_a_recorded_group_is_as_predicted():
    layers = ["layer1", "layer2", "layer3"]
    plans = (Plan(), Plan.alone(layers), Plan((tuple(layers),)))
    settings = {"depth": 3, "width": 512, "activation": "gelu", "dropout": 0.1}
    group = Group(Step("uniform_mlp", settings, 1024), plans)
    reports = measure_group(group, "cuda", repeats=2, warmup=1).measured
    assert [report.plan for report in reports] == list(plans)
    for measured in reports:
        predicted = group.step.predicted(measured.plan, "cuda")
        assert measured.peak_bytes == predicted.peak_bytes
        assert measured.allocator_peak_bytes == predicted.allocator_peak_bytes
        assert measured.reserved_peak_bytes > 0 and measured.step_ms > 0


def test_the_largest_batch_that_runs_is_near_the_one_that_is_predicted():
    """CUDA limits what is reserved: workspaces and what lies unused count as well."""
    model, limit_bytes = uniform_mlp(8, 1024).cuda(), 2**30

    def should_fit(rows: int) -> bool:
        x = torch.empty(rows, 1024, device="meta")
        return predict(model, x).allocator_peak_bytes <= limit_bytes

    def fits(rows: int) -> bool:
        model.zero_grad(set_to_none=True)
        free_memory("cuda")
        try:
            training_step(model, torch.randn(rows, 1024, device="cuda"))()
            return True
        except torch.OutOfMemoryError:
            return False

    predicted_rows = largest_batch(should_fit)
    with memory_limit(limit_bytes, "cuda"):
        assert 0.8 * predicted_rows < largest_batch(fits) <= predicted_rows


# Random numbers


@pytest.mark.parametrize("optimizer", [None, torch.optim.AdamW], ids=["none", "AdamW"])
@pytest.mark.parametrize("name", ["MLP", "GPT", "two levels", "mixer"])
def test_a_plan_for_a_budget_stays_below_it(name, optimizer):
    torch.manual_seed(0)
    model, batch, how = *budgeted(name), {"optimizer": optimizer}
    planner = Planner(model, batch, **how)
    least, most = planner.front(4)[0].needed_bytes, planner.plain.needed_bytes
    assert least < most
    model.cuda()
    for part in (0.0, 0.4, 0.8):
        budget_bytes = least + round(part * (most - least))
        plan = plan_for(model, batch, budget_bytes, **how).plan
        assert plan.segments
        measured = measure(model, batch, plan, repeats=0, **how)
        assert measured.needed_bytes <= budget_bytes


def budgeted(name: str) -> tuple:
    """Make a model to plan for, and a batch."""
    if name == "MLP":
        return MLP([256] * 6 + [10], "gelu"), torch.randn(4096, 256)
    if name == "GPT":
        return GPT(3, 128, 4, 500, 64), torch.randint(0, 500, (8, 64))
    make, batch = SMALL[name]
    return make(), batch


@pytest.mark.arithmetic
@pytest.mark.parametrize("plan", MIXED[1:], ids=str)
def test_recomputation_draws_the_same_masks_and_puts_cudas_state_back(plan):
    model = MLP([256] * 4 + [10], "gelu", 0.5).cuda()
    x = torch.randn(128, 256, device="cuda")

    def run(plan: Plan) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.cuda.manual_seed(0)
        model.zero_grad()
        with checkpointed(model, plan):
            loss = model(x).sum()
            after_forward = torch.cuda.get_rng_state()
            loss.backward()
        assert torch.equal(torch.cuda.get_rng_state(), after_forward)
        return [parameter.grad for parameter in model.parameters()], after_forward

    (expected, state), (found, other) = run(Plan()), run(plan)
    assert torch.equal(state, other)
    torch.testing.assert_close(found, expected)


def test_measuring_leaves_cudas_random_numbers_alone():
    model, x = MLP([64, 64, 10], "gelu", 0.5).cuda(), torch.randn(32, 64, device="cuda")
    before = torch.cuda.get_rng_state()
    measure(model, x, Plan.alone(["layer1"]), repeats=2)
    assert torch.equal(torch.cuda.get_rng_state(), before)


# Gradients


@pytest.mark.arithmetic
@pytest.mark.parametrize(("activation", "dropout"), [("relu", 0), ("gelu", 0.3)])
def test_gradients_are_bit_equal(deterministic, activation, dropout):
    model = MLP([512, 512, 512, 512, 10], activation, dropout).cuda()
    x = torch.randn(256, 512, device="cuda")
    target = torch.randint(10, (256,), device="cuda")

    def gradients(plan: Plan) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        with checkpointed(model, plan):
            F.cross_entropy(model(x), target).backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(Plan())
    plans = all_alone(["layer1", "layer2", "layer3", "layer4"])
    for plan in [*plans, *MIXED]:
        assert all(map(torch.equal, gradients(plan), expected)), plan


# Running out of memory


def test_a_step_that_does_not_fit_is_explained_and_gives_its_memory_back():
    model = uniform_mlp(4, 1024).cuda()
    small = torch.randn(32, 1024, device="cuda")
    measure(model, small, repeats=0)
    gc.collect()
    before = torch.cuda.memory_allocated()
    weights = [parameter.clone() for parameter in model.parameters()]
    total = torch.cuda.get_device_properties("cuda").total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((before + 2**30) / total)
    try:
        large = torch.randn(2**17, 1024, device="cuda")  # 512 MiB, and 9 times that
        with pytest.raises(torch.OutOfMemoryError, match="the step needs") as raised:
            measure(model, large, optimizer=torch.optim.SGD)
        assert raised.value.__context__ is None
        del large, raised  # its traceback holds the batch as well
        fresh()
        n_bytes = sum(tensor.numel() * 4 for tensor in weights)
        assert torch.cuda.memory_allocated() <= before + n_bytes + 512 * len(weights)
        if "nocard" not in torch.cuda.get_device_name():  # which computes nothing
            assert all(map(torch.equal, model.parameters(), weights))
        assert measure(model, small, repeats=1).step_ms > 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_step_larger_than_the_card_is_refused_before_it_runs():
    model = uniform_mlp(4, 1024).cuda()
    x = torch.empty(1, 1024, device="cuda").expand(2**31, 1024)
    before = torch.cuda.memory_allocated()
    with pytest.raises(torch.OutOfMemoryError, match="does not fit.*CUDA"):
        measure(model, x)
    assert torch.cuda.memory_allocated() == before


def test_the_labs_next_flip_works_after_it_ran_out_of_memory():
    pytest.importorskip("ipywidgets")
    from helpers import controls

    settings = {"depth": 8, "width": 1024, "activation": "gelu"}
    lab = controls.LayerLab(batch=32, settings=settings)
    lab.measure()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with memory_limit(torch.cuda.memory_reserved() + 2**29, "cuda"):
        lab.controls["batch"].value = 2**16
        with pytest.raises((MemoryError, torch.OutOfMemoryError)):
            lab.measure()
        gc.collect()
        assert torch.cuda.memory_allocated() <= before
        lab.controls["batch"].value = 32
        lab.plan = Plan.alone(["layer1"])
        assert lab.measure().source == "measured"
    assert "measured on" in lab.readout.value


# Time


@pytest.mark.arithmetic
def test_events_and_the_clock_tell_of_the_same_steps(capsys):
    model, x = uniform_mlp(8, 1024).cuda(), torch.randn(8192, 1024, device="cuda")
    step = training_step(model, x)
    for _ in range(3):
        step()
    by_events, by_clock = [], []
    for _ in range(20):
        torch.cuda.synchronize()
        by_events.append(time_step_ms(step, "cuda"))
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        by_clock.append((time.perf_counter() - started) * 1000)
    with capsys.disabled():
        print(
            f"\n8 GELU layers, batch 8192, median of 20: "
            f"{statistics.median(by_events):.3f} ms by events, "
            f"{statistics.median(by_clock):.3f} ms by the synchronised clock"
        )
    assert min(by_events) > 0
