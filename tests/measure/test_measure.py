"""Predicted is measured is worked out by hand: a step's bytes, FLOPs and report."""

import copy
import dataclasses
import gc
import itertools
import json
import queue
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from helpers.checkpointing import Plan, checkpointed
from helpers.measure import (
    StepReport,
    measure,
    measure_plans,
    measuring_plans,
    predict,
    time_step_ms,
    training_step,
)
from helpers.measure import measured as measuring
from helpers.models import MLP, DocsMLP, uniform_mlp
from helpers.units import format_bytes
from tests.model_state import assert_same, state_of
from tests.oracles import profiled_bytes

NUMBER = 512  # a loss, or its gradient: 4 bytes in a block of 512
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW


def blocks(*shape: int, itemsize: int = 4) -> int:
    """Bytes of one tensor, in blocks of 512."""
    n_bytes = itemsize
    for size in shape:
        n_bytes *= size
    return (n_bytes + 511) // 512 * 512


def alone(n_layers: int) -> list[Plan]:
    """Every set of boxes for layers 1 to n, each ticked layer a segment."""
    names = [f"layer{i}" for i in range(1, n_layers + 1)]
    ticks = itertools.product((False, True), repeat=n_layers)
    return [Plan.alone(itertools.compress(names, row)) for row in ticks]


def pieces(n_layers: int, k: int) -> Plan:
    """Cut the first n layers into segments of k; no plan at all for k = 0."""
    names = [f"layer{i}" for i in range(1, n_layers + 1)]
    return Plan([names[i : i + k] for i in range(0, n_layers, k)] if k else ())


def numbers(report: StepReport) -> dict:
    """Take what must be the same in a prediction and in a measurement."""
    names = ["peak_bytes", "after_forward_bytes", "baseline_bytes", "categories"]
    names += ["forward_flops", "recompute_flops"]
    return {name: getattr(report, name) for name in names}


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="meta")


# The docs' MLP, by hand

DOCS_WEIGHTS = 2 * (blocks(1024, 1024) + blocks(1024))
DOCS_HEAD = blocks(10, 1024) + blocks(10)


def docs_bytes(rows: int) -> int:
    """Work out the peak: which boxes are ticked makes no difference."""
    parameters = DOCS_WEIGHTS + DOCS_HEAD
    hidden = blocks(rows, 1024)  # also the size of x
    always = parameters + hidden + blocks(rows, 10) + 2 * NUMBER
    at_the_end = DOCS_WEIGHTS + DOCS_HEAD + hidden  # all gradients, and a hidden one
    at_layer_2 = DOCS_HEAD + 4 * hidden  # two kept, two gradients of the same size
    return always + max(at_the_end, at_layer_2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("rows", "n_bytes"), [(32, 17_141_248), (8192, 176_580_608)])
def test_no_box_of_the_docs_mlp_changes_the_predicted_peak(rows, n_bytes, device):
    assert docs_bytes(rows) == n_bytes
    model = DocsMLP().to("meta")
    for plan in alone(3):
        report = predict(model, meta(rows, 1024), plan, device=device)
        assert report.peak_bytes == n_bytes, plan
        assert report.forward_flops == 2 * rows * (2 * 1024 * 1024 + 10 * 1024)
        assert report.recompute_flops == 0  # early stop: a lone Linear costs nothing
        kept = 2 * blocks(rows, 1024) + blocks(rows, 10) + NUMBER
        assert report.after_forward_bytes == report.baseline_bytes + kept


def test_no_box_of_the_docs_mlp_changes_the_measured_peak():
    model = DocsMLP()
    reports = measure_plans(model, torch.randn(32, 1024), alone(3), repeats=0, warmup=1)
    assert len(reports) == 8
    assert {report.peak_bytes for report in reports} == {17_141_248}
    plans = [Plan(), Plan.alone(["layer2", "layer3"])]  # the docs' own choice
    x = torch.randn(8192, 1024)
    for report in measure_plans(model, x, plans, repeats=0, warmup=1):
        assert report.peak_bytes == 176_580_608


# Uniform MLPs: the closed forms

KEEPS_OUTPUT, KEEPS_INPUT = ("relu", "tanh"), ("gelu", "silu")


def activations_at_peak(activation: str, n: int, k: int) -> float:
    """Count activations at the peak: n hidden layers in segments of k (0: none).

    The input does not count.
    """
    if activation in KEEPS_OUTPUT:
        return n / k + k + 1 if k else n + 2
    return n / k + 2 * k if k else 2 * n + 1


def uniform_bytes(n: int, width: int, rows: int, activations: float) -> int:
    """Work out the peak where backward starts: no gradient yet but the head's."""
    layers = n * (blocks(width, width) + blocks(width))
    head = blocks(10, width) + blocks(10)
    around = blocks(rows, 10) + 2 * NUMBER + head  # the head's output and gradient
    return layers + head + around + round((1 + activations) * blocks(rows, width))


@pytest.mark.parametrize("n", [2, 16, 64])
@pytest.mark.parametrize("activation", KEEPS_OUTPUT + KEEPS_INPUT)
def test_closed_forms_of_the_peak(activation, n):
    width, rows = 256, 65536  # so that all weights together are 1/4 of an activation
    model = uniform_mlp(n, width, activation).to("meta")
    unit = rows * width * 4
    for k in sorted({0, 1, 2, n // 4, n // 2, n}):
        report = predict(model, meta(rows, width), pieces(n, k))
        expected = activations_at_peak(activation, n, k)
        assert report.peak_bytes == uniform_bytes(n, width, rows, expected)
        weights_and_input = report.baseline_bytes
        assert (report.peak_bytes - weights_and_input) / unit == pytest.approx(
            expected, abs=0.16
        )


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_reentrant_checkpoints_cost_about_one_activation_more(activation):
    n, width, rows = 16, 256, 65536
    model, x = uniform_mlp(n, width, activation).to("meta"), meta(rows, width)
    x.requires_grad_()
    for k in (2, 4):
        peaks = [
            predict(model, x, pieces(n, k), use_reentrant=reentrant).peak_bytes
            for reentrant in (False, True)
        ]
        assert 0 <= (peaks[1] - peaks[0]) / (rows * width * 4) <= 1.1


@pytest.mark.parametrize(
    ("activation", "k", "mebibytes", "activations", "layers_with_gradients"),
    [
        ("relu", 0, "384.4 MiB", 10, 0),
        ("relu", 1, "384.4 MiB", 10, 0),
        ("relu", 2, "288.4 MiB", 7, 0),
        ("relu", 3, "264.4 MiB", 6, 2),  # 3 + 3 + 2 layers: the peak is in the second
        ("relu", 8, "384.4 MiB", 10, 0),
        ("gelu", 0, "608.4 MiB", 17, 0),
        ("gelu", 1, "384.4 MiB", 10, 0),
        ("gelu", 2, "320.4 MiB", 8, 0),
        ("gelu", 3, "328.4 MiB", 8, 2),
        ("gelu", 8, "608.4 MiB", 17, 0),
    ],
)
def test_eight_layers_of_1024_at_batch_8192(
    activation, k, mebibytes, activations, layers_with_gradients
):
    x, model = meta(8192, 1024), uniform_mlp(8, 1024, activation).to("meta")
    gradients = layers_with_gradients * (blocks(1024, 1024) + blocks(1024))
    expected = uniform_bytes(8, 1024, 8192, activations) + gradients
    for device in ("cpu", "cuda"):
        report = predict(model, x, pieces(8, k), device=device)
        assert report.peak_bytes == expected
    assert format_bytes(expected) == mebibytes
    assert sum(report.categories.values()) == expected


def test_dropout_keeps_a_mask_of_the_devices_own_type():
    x, model = meta(8192, 1024), uniform_mlp(8, 1024, "gelu", dropout=0.1).to("meta")
    on = {d: predict(model, x, device=d).peak_bytes for d in ("cpu", "cuda")}
    # GELU's input, the dropped-out output and a mask for each layer, one gradient:
    # the mask takes as much as an activation on a CPU, and a quarter of it on CUDA.
    assert on["cpu"] == uniform_bytes(8, 1024, 8192, 2 * 8 + 8 + 1)
    assert on["cuda"] == uniform_bytes(8, 1024, 8192, 2 * 8 + 8 / 4 + 1)
    assert [format_bytes(on[d]) for d in ("cpu", "cuda")] == ["864.4 MiB", "672.4 MiB"]


def test_flops_of_a_recomputed_segment_by_hand():
    model, rows = uniform_mlp(4, 256).to("meta"), 64
    one = 2 * rows * 256 * 256
    for k, products in ((0, 0), (1, 4), (2, 4), (4, 4)):
        report = predict(model, meta(rows, 256), pieces(4, k))
        assert report.forward_flops == 4 * one + 2 * rows * 256 * 10
        assert report.recompute_flops == products * one


# Optimizers: what a step needs on top, by hand


@pytest.mark.parametrize(
    ("device", "optimizer", "states", "temporaries"),
    [
        ("cuda", AdamW, 2, 1.0),  # on lists: the roots of all second moments
        ("cuda", torch.optim.Adam, 2, 1.0),
        ("cuda", partial(AdamW, foreach=True), 2, 1.0),
        ("cuda", partial(AdamW, foreach=False), 2, None),
        ("cpu", AdamW, 2, None),  # one by one: a root and its quotient
    ],
    ids=str,
)
def test_what_adam_needs_beyond_its_gradients(device, optimizer, states, temporaries):
    widths = [512, 512, 256, 128]
    weights = [blocks(512, 512), blocks(256, 512), blocks(128, 256)]
    parameters = sum(weights) + blocks(512) + blocks(256) + blocks(128)
    report = predict(
        MLP(widths).to("meta"), meta(2, 512), optimizer=optimizer, device=device
    )
    steps = 6 * NUMBER if device == "cpu" else 0  # kept by the host
    around = blocks(2, 512) + blocks(2, 128) + NUMBER  # x, the output, the loss
    on_top = 2 * max(weights) if temporaries is None else temporaries * parameters
    assert report.peak_bytes == (2 + states) * parameters + steps + around + on_top
    assert report.categories["optimizer_state"] == states * parameters + steps
    assert report.categories["temporary"] == on_top


@pytest.mark.parametrize(
    ("optimizer", "state_bytes_per_parameter_byte", "steps"),
    [
        (SGD, 0, 0),
        (partial(SGD, lr=0.1, momentum=0.9), 1, 0),
        (partial(SGD, lr=0.1, fused=True), 0, 0),
        (partial(AdamW, fused=True), 2, 6),  # its counts lie on the GPU
    ],
    ids=str,
)
def test_optimizers_without_temporaries(
    optimizer, state_bytes_per_parameter_byte, steps
):
    report = predict(MLP([512] * 4).to("meta"), meta(2, 512), optimizer=optimizer)
    parameters = 3 * (blocks(512, 512) + blocks(512))
    state = state_bytes_per_parameter_byte * parameters + steps * NUMBER
    assert report.categories["optimizer_state"] == state
    # The peak is where backward ends: every gradient, and a hidden layer's.
    around = 2 * blocks(2, 512) + blocks(2, 512) + 2 * NUMBER
    assert report.peak_bytes == 2 * parameters + state + around
    assert report.baseline_bytes == parameters + state + blocks(2, 512)


# Predicted is measured, on a CPU to the byte

WIDTHS, ROWS = [33, 65, 47, 10], 60
MIXED = [
    Plan(),
    Plan.alone(["layer1", "layer2"]),
    Plan((("layer1", "layer2"),)),
    Plan((("layer1",), ("layer2", "layer3"))),
]


def assert_predicted(model, batch, plans, **settings) -> None:
    reports = measure_plans(model, batch, plans, repeats=0, warmup=1, **settings)
    for plan, measured in zip(plans, reports, strict=True):
        predicted = predict(model, batch, plan, device="cpu", **settings)
        assert numbers(predicted) == numbers(measured), plan
        assert (predicted.source, measured.source) == ("predicted", "measured")
        assert predicted.plan == measured.plan == plan


@pytest.mark.parametrize("optimizer", [None, SGD, AdamW])
@pytest.mark.parametrize("dropout", [0, 0.1])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_predicted_is_measured(activation, dropout, optimizer):
    model, x = MLP(WIDTHS, activation, dropout), torch.randn(ROWS, 33)
    assert_predicted(model, x, MIXED, optimizer=optimizer)


def test_predicted_is_measured_for_every_set_of_boxes():
    model = MLP([33, 65, 65, 47, 10], "gelu", dropout=0.1)
    assert_predicted(model, torch.randn(ROWS, 33), alone(4))


@pytest.mark.parametrize(
    "options",
    [
        {"early_stop": False},
        {"preserve_rng_state": False},
        {"use_reentrant": True},
    ],
    ids=str,
)
def test_predicted_is_measured_with_checkpoints_options(options):
    model = MLP(WIDTHS, "gelu", 0.1)
    x = torch.randn(ROWS, 33, requires_grad=True)
    assert_predicted(model, x, MIXED, **options)


@pytest.mark.parametrize(
    "loss",
    [
        None,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda output, target: (output.softmax(1)[:, 0] - target).square().mean(),
    ],
)
def test_predicted_is_measured_with_a_target(loss):
    batch = torch.randn(ROWS, 33), torch.randint(10, (ROWS,))
    assert_predicted(MLP(WIDTHS, "gelu"), batch, MIXED, loss=loss, optimizer=AdamW)


def frozen() -> nn.Module:
    model = MLP(WIDTHS, "gelu")
    model.layer1.requires_grad_(False)
    return model


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(33, 33), nn.GELU(), nn.Linear(33, 33))
    model[2].weight = model[0].weight
    return model


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (3, 11, 1)),
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@pytest.mark.parametrize(
    ("make", "segment"),
    [
        (frozen, ("layer2",)),
        (tied, ("0", "1")),
        (convolutions, ("1", "2", "3")),
        (lambda: MLP(WIDTHS, "silu").double(), ("layer1", "layer2")),
        (lambda: nn.Sequential(nn.Linear(33, 33), nn.LayerNorm(33)), ("0", "1")),
    ],
    ids=["frozen", "tied", "convolutions", "double", "norm"],
)
@pytest.mark.parametrize("optimizer", [None, AdamW])
def test_predicted_is_measured_for_other_models(make, segment, optimizer):
    model = make()
    x = torch.randn(ROWS, 33, dtype=next(model.parameters()).dtype)
    assert_predicted(model, x, [Plan(), Plan((segment,))], optimizer=optimizer)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.Adam,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        partial(SGD, lr=0.1, momentum=0.9),
        partial(AdamW, foreach=True),
        partial(AdamW, fused=True),
        partial(SGD, lr=0.1, fused=True),
    ],
    ids=str,
)
def test_predicted_is_measured_for_other_optimizers(optimizer):
    x = torch.randn(ROWS, 33)
    assert_predicted(MLP(WIDTHS, "gelu"), x, MIXED[:1], optimizer=optimizer)


def test_a_prediction_holds_beside_measurements_on_another_thread():
    small, x = MLP([16, 16, 16], "gelu", 0.2), torch.randn(8, 16)
    model, big = MLP(WIDTHS, "gelu", 0.1), torch.randn(ROWS, 33)
    settings = {"optimizer": AdamW, "device": "cpu"}
    expected = predict(small, x, MIXED[2], **settings)
    measured = [measure(model, big, MIXED[3], optimizer=AdamW, repeats=0)]
    stop, errors = threading.Event(), []

    def keep_measuring():
        try:
            while not stop.is_set():
                measured.append(
                    measure(model, big, MIXED[3], optimizer=AdamW, repeats=0)
                )
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=keep_measuring)
    thread.start()
    found = []
    try:
        while thread.is_alive() and (len(found) < 40 or len(measured) < 4):
            found.append(predict(small, x, MIXED[2], **settings))
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert all(numbers(report) == numbers(expected) for report in found)
    assert all(numbers(report) == numbers(measured[0]) for report in measured)


# A prediction leaves no trace


def lived_in() -> nn.Sequential:
    """A model with buffers, gradients for some, a frozen layer, and mixed modes."""
    model = nn.Sequential(
        nn.Linear(16, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(), nn.Linear(24, 4)
    )
    model(torch.randn(8, 16)).sum().backward()
    model[0].bias.grad = None
    model[1].bias.requires_grad_(False)
    model[2].eval()
    return model


SETTINGS = [{}, {"optimizer": AdamW}, {"optimizer": SGD, "loss": torch.mean}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "AdamW", "SGD"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_prediction_changes_nothing(settings, grad):
    model, x = lived_in(), torch.randn(8, 16, requires_grad=True)
    with torch.set_grad_enabled(grad):
        before = state_of(model)
        predict(model, x, Plan((("0", "1", "2", "3"),)), **settings)
        assert_same(state_of(model), before)
    assert x.grad is None


def test_a_factory_that_draws_numbers_does_not_move_the_generator():
    def factory():
        torch.manual_seed(1)
        return MLP([16, 16, 4], dropout=torch.rand((), device="cpu").item() / 2)

    before = torch.get_rng_state()
    predict(factory, torch.randn(8, 16, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_prediction_allocates_nothing():
    model, x = uniform_mlp(4, 512, "gelu", dropout=0.1), meta(10**10, 512)
    settings = {"optimizer": AdamW, "plan": pieces(4, 2)}
    reports = []
    changes = profiled_bytes(lambda: reports.append(predict(model, x, **settings)))
    # The generator's state, and the optimizer's step counts, which the host keeps.
    assert max(changes) <= 5056
    assert reports[0].peak_bytes > 7 * 10**10 * 512 * 4


def test_a_prediction_at_any_size_is_exact():
    rows = 10**10
    report = predict(uniform_mlp(4, 512, "relu").to("meta"), meta(rows, 512))
    assert report.peak_bytes == uniform_bytes(4, 512, rows, 4 + 2)
    assert report.forward_flops == 2 * rows * (4 * 512 * 512 + 512 * 10)


def test_a_model_a_factory_and_a_meta_model_predict_the_same():
    x, plan = torch.randn(ROWS, 33), MIXED[2]
    expected = numbers(predict(MLP(WIDTHS), x, plan))
    assert numbers(predict(lambda: MLP(WIDTHS), x, plan)) == expected
    assert numbers(predict(MLP(WIDTHS).to("meta"), x, plan)) == expected
    assert numbers(predict(MLP(WIDTHS), x.to("meta"), plan)) == expected
    again = predict(MLP(WIDTHS), x, plan)
    assert numbers(again) == expected and again.step_ms is None


# A measurement puts everything back


@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "AdamW", "SGD"])
@pytest.mark.parametrize("plan", [Plan(), Plan((("0", "1", "2"),))], ids=str)
def test_a_measurement_puts_everything_back(plan, settings):
    model, x = lived_in(), torch.randn(8, 16, requires_grad=True)
    x.grad = kept = torch.ones_like(x)
    with torch.no_grad():
        before = state_of(model)
        measure(model, x, plan, repeats=2, **settings)
        assert_same(state_of(model), before)
    assert x.grad is kept and torch.equal(kept, torch.ones_like(x))


@pytest.mark.parametrize("place", range(7))
def test_a_measurement_interrupted_anywhere_puts_everything_back(place):
    model, x = lived_in(), torch.randn(8, 16)
    before, calls = state_of(model), itertools.count()

    def interrupt():
        if next(calls) == place:
            raise KeyboardInterrupt

    plans = [Plan(), Plan((("0", "1", "2"),))]
    settings = {"optimizer": AdamW, "repeats": 2, "warmup": 1}
    with pytest.raises(KeyboardInterrupt) as raised:
        measure_plans(model, x, plans, between_steps=interrupt, **settings)
    assert raised.tb is not None  # so that nothing is put back by its end alone
    assert_same(state_of(model), before)


def test_an_interrupt_within_a_step_puts_everything_back():
    model, x = lived_in(), torch.randn(8, 16)
    seen = []

    def interrupt(module, args, output):
        seen.append(output.is_meta)
        if seen.count(False) == 3:
            raise KeyboardInterrupt

    model[2].register_forward_hook(interrupt)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        measure(model, x, Plan((("0", "1"),)), optimizer=AdamW, repeats=3)
    assert_same(state_of(model), before)


def test_a_measurement_that_is_closed_puts_everything_back():
    model, x = lived_in(), torch.randn(8, 16)
    before = state_of(model)
    steps = measuring_plans(model, x, [Plan((("0", "1"),))], optimizer=AdamW)
    for _ in range(3):
        next(steps)
        assert "forward" not in vars(model)  # nothing is replaced between steps
    steps.close()
    assert_same(state_of(model), before)


def test_a_closed_measurement_after_steps_had_changed_the_model():
    model, x = lived_in(), torch.randn(8, 16)
    before = state_of(model)
    steps = measuring_plans(model, x, [Plan()], optimizer=partial(SGD, lr=1.0))
    for _ in range(3):
        next(steps)
    changed = model.state_dict()
    assert not torch.equal(changed["0.weight"], before["tensors"]["0.weight"])
    assert int(changed["1.num_batches_tracked"]) > 1
    steps.close()
    assert_same(state_of(model), before)


# Times, and their order


def test_repeats_and_quartiles_are_recorded(monkeypatch):
    times = iter([7.0, 1.0, 3.0, 100.0, 2.0])
    monkeypatch.setattr(measuring, "time_step_ms", lambda step, device: next(times))
    report = measure(MLP(WIDTHS), torch.randn(ROWS, 33), repeats=5)
    assert (report.step_ms, report.repeats) == (3.0, 5)
    assert report.step_ms_quartiles == (2.0, 7.0)


@pytest.mark.parametrize(("repeats", "quartiles"), [(0, None), (1, (4.0, 4.0))])
def test_few_repeats(monkeypatch, repeats, quartiles):
    monkeypatch.setattr(measuring, "time_step_ms", lambda step, device: 4.0)
    report = measure(MLP(WIDTHS), torch.randn(ROWS, 33), repeats=repeats)
    assert report.repeats == repeats and report.step_ms_quartiles == quartiles
    assert report.step_ms == (4.0 if repeats else None)
    assert ("step" in report.rows()) == bool(repeats)


def test_plans_take_turns_after_their_warm_up(monkeypatch):
    model, ran = MLP([16, 16, 16, 4]), []

    def note(step, device):
        ran.append("forward" in vars(model.layer1))
        return float(len(ran))

    monkeypatch.setattr(measuring, "time_step_ms", note)
    turns = []
    plans = [Plan(), Plan.alone(["layer1"])]
    x = torch.randn(8, 16)
    reports = measure_plans(
        model, x, plans, repeats=3, warmup=2, between_steps=lambda: turns.append(0)
    )
    assert ran == [False, True] * 3
    assert [report.step_ms for report in reports] == [3.0, 4.0]
    assert [report.plan for report in reports] == plans
    assert len(turns) == 2 * (2 + 1) + 2 * 3  # before each step: warm-up, record, timed


def test_a_step_takes_as_long_as_the_clock_says():
    ms = time_step_ms(lambda: threading.Event().wait(0.03), "cpu")
    assert 30 <= ms < 3000


def test_steps_are_timed_unwatched(monkeypatch):
    watched = []

    def note(step, device):
        watched.append(len(_get_current_dispatch_mode_stack()))
        return 1.0

    monkeypatch.setattr(measuring, "time_step_ms", note)
    measure(MLP(WIDTHS), torch.randn(ROWS, 33), repeats=2)
    assert watched == [0, 0]


# What does not fit says so


@pytest.mark.parametrize("run", [predict, measure])
@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (
            lambda: torch.randn(4, 17),
            "(4, 17) does not fit this model at layer 'layer1.0'",
        ),
        (lambda: torch.randn(4, 16, 3), "at layer 'layer1.0'"),
        (lambda: (torch.randn(4, 16), torch.randint(4, (5,))), "target (5,)"),
        (lambda: (torch.randn(4, 16), torch.randint(4, (5,))), "at the loss"),
        (
            lambda: (torch.randn(4, 16),) * 3,
            "or a pair (x, target) or (dict, target), not (",
        ),
        (
            lambda: (torch.randn(4, 16),),
            "or a pair (x, target) or (dict, target), not (",
        ),
    ],
)
def test_a_batch_that_does_not_fit_says_where(run, batch, words):
    model, batch = MLP([16, 16, 4]), batch()
    before = state_of(model)
    for plan in (Plan(), Plan((("layer1", "layer2"),))):
        with pytest.raises(ValueError) as raised:
            run(model, batch, plan)
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)
    assert_same(state_of(model), before)


def test_a_batch_of_another_type_is_found_out_by_measuring():
    whole_numbers = torch.randint(9, (4, 16))  # which the meta kernels let pass
    with pytest.raises(ValueError, match="at layer 'layer1.0'"):
        measure(MLP([16, 16, 4]), whole_numbers)


@pytest.mark.parametrize("run", [predict, measure])
def test_a_loss_of_nothing_that_learns_says_so(run):
    model, x = MLP([16, 16, 4]), torch.randn(4, 16)
    with pytest.raises(ValueError, match="does not depend on anything"):
        run(model, x, loss=lambda output: output.detach().sum())
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="does not depend on anything"):
        run(model, x)


@pytest.mark.parametrize("run", [predict, measure])
def test_a_plan_that_does_not_fit_names_the_layers(run):
    with pytest.raises(ValueError, match="'layer7'.*layer1, layer2"):
        run(MLP([16, 16, 4]), torch.randn(4, 16), Plan.alone(["layer7"]))


@pytest.mark.parametrize("run", [predict, measure])
def test_other_devices_are_refused(run):
    with pytest.raises(ValueError, match="'cpu' (and|or) 'cuda', not"):
        run(MLP([16, 16, 4]), torch.randn(4, 16), device="meta")
    with pytest.raises(ValueError, match="not on 'meta'"):
        measure(MLP([16, 16, 4]).to("meta"), torch.randn(4, 16))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent_says_what_can_be_done():
    with pytest.raises(ValueError, match="no CUDA device.*predict"):
        measure(MLP([16, 16, 4]), torch.randn(4, 16), device="cuda")


def test_a_step_beyond_all_memory_says_how_much_it_needs():
    model, x = MLP([16, 16, 4]), torch.empty(1, 16).expand(10**11, 16)
    before = state_of(model)
    needed = format_bytes(predict(model, x, device="cpu").peak_bytes)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        measure(model, x, optimizer=AdamW)
    message = str(raised.value)
    assert message.startswith(f"the step needs {needed} at its peak and does not fit")
    assert "smaller batch" in message and "checkpoint more layers" in message
    assert_same(state_of(model), before)


def test_an_allocator_that_refuses_is_explained_and_survived(monkeypatch):
    """Let the step run although it cannot fit: 10¹³ rows are 640 TB a layer."""
    monkeypatch.setattr(measuring, "memory_bytes", lambda device: 2**80)
    model, x = MLP([16, 16, 4]), torch.empty(1, 16).expand(10**13, 16)
    before = state_of(model)
    with pytest.raises(torch.OutOfMemoryError, match="does not fit"):
        measure(model, x, Plan((("layer1", "layer2"),)), optimizer=AdamW)
    assert_same(state_of(model), before)
    assert measure(model, torch.randn(4, 16), repeats=1).step_ms > 0


@pytest.mark.parametrize("plan", [Plan(), Plan((("layer1", "layer2"),))], ids=str)
@pytest.mark.parametrize("steps", [1, 4])
def test_after_a_refusal_no_tensor_of_the_step_is_alive(plan, steps):
    """A notebook keeps the last exception, and with it whatever hangs on it."""
    model, noted = MLP([16, 16, 16, 4], "gelu"), queue.SimpleQueue()  # not put back

    def note(module, args, output):
        noted.put(weakref.ref(output.untyped_storage()))

    def refuse(module, args):
        if not args[0].is_meta and next(calls) == steps:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    calls = itertools.count(1)
    model.layer1.register_forward_hook(note)
    model.layer3.register_forward_pre_hook(refuse)
    gc.disable()  # as quick as on a GPU, where the next step may follow at once
    try:
        with pytest.raises(torch.OutOfMemoryError, match="the step needs") as raised:
            measure(model, torch.randn(8, 16), plan)
    finally:
        gc.enable()
    made = [noted.get() for _ in range(noted.qsize())]
    assert raised.value is not None and len(made) >= steps
    assert [reference() for reference in made] == [None] * len(made)


class LooksAtValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        return self.layer(x if x.sum() > 0 else -x)


def test_a_step_that_looks_at_values_is_measured_but_not_predicted():
    model, x = LooksAtValues(), torch.randn(4, 16)
    report = measure(model, x, repeats=1)
    parameters = 2 * (blocks(4, 16) + blocks(4))  # with their gradients
    assert report.peak_bytes >= parameters + blocks(4, 16) + blocks(4, 4)
    with pytest.raises(ValueError, match="looks at values.*measure it"):
        predict(model, x)


@pytest.mark.parametrize("run", [predict, measure])
def test_other_errors_say_their_kind(run):
    class Unfinished(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x):
            raise NotImplementedError("some day")

    with pytest.raises(ValueError, match="its own forward.*some day"):
        run(Unfinished(), torch.randn(4, 16))


# The step


def test_a_step_is_zero_grad_forward_loss_backward_and_the_optimizers():
    model, twin = MLP(WIDTHS, "gelu"), MLP(WIDTHS, "gelu")
    twin.load_state_dict(model.state_dict())
    x, target = torch.randn(ROWS, 33), torch.randint(10, (ROWS,))
    step = training_step(model, (x, target), None, SGD(model.parameters(), lr=0.5))
    by_hand = SGD(twin.parameters(), lr=0.5)
    for _ in range(3):
        step()
        by_hand.zero_grad()
        nn.functional.cross_entropy(twin(x), target).backward()
        by_hand.step()
    for found, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, expected) and torch.equal(found.grad, expected.grad)


def test_without_a_target_the_output_is_summed_and_gradients_do_not_add_up():
    model, x = MLP([16, 4]), torch.randn(8, 16, requires_grad=True)
    step = training_step(model, x)
    for _ in range(2):
        step()
        torch.testing.assert_close(model.layer1.bias.grad, torch.full((4,), 8.0))
        torch.testing.assert_close(x.grad, model.layer1.weight.sum(0).expand(8, 16))


def test_a_loss_is_called_with_the_output_and_the_target():
    model, x, target = MLP([16, 4]), torch.randn(8, 16), torch.randn(8, 4)
    seen = []

    def loss(*arguments):
        seen.append(arguments)
        return arguments[0].mean()

    training_step(model, x, loss)()
    training_step(model, [x, target], loss)()
    assert [len(arguments) for arguments in seen] == [1, 2]
    assert seen[1][1] is target and torch.equal(seen[1][0], model(x))


# The report


@pytest.fixture(scope="module")
def reports() -> list[StepReport]:
    model, x = MLP(WIDTHS, "gelu"), torch.randn(ROWS, 33)
    return [
        measure(model, x, MIXED[3], optimizer=AdamW, repeats=3),
        predict(model, x, MIXED[3]),
        predict(model, x),
    ]


def test_a_report_survives_json(reports):
    for report in reports:
        written = json.dumps(report.to_dict())
        read = StepReport.from_dict(json.loads(written))
        assert read == report and read.to_dict() == report.to_dict()
        assert read.plan == report.plan and hash(read.plan) == hash(report.plan)
        assert read.step_ms_quartiles == report.step_ms_quartiles
        assert read.timeline is None and report.timeline is not None
        recorded = dataclasses.replace(read, source="recorded")
        assert recorded != report
        assert StepReport.from_dict(recorded.to_dict()) == recorded


def test_a_report_is_frozen(reports):
    with pytest.raises(dataclasses.FrozenInstanceError):
        reports[0].peak_bytes = 0


def test_a_reports_fields_agree_with_its_timeline(reports):
    for report in reports:
        timeline = report.timeline
        assert report.peak_bytes == timeline.peak_bytes
        assert report.after_forward_bytes == timeline.after_forward_bytes
        assert sum(report.categories.values()) == report.peak_bytes
        assert report.recompute_flops == timeline.flops["recompute"]
        assert report.peak_bytes >= report.after_forward_bytes > report.baseline_bytes
    assert [report.device for report in reports] == ["cpu", "cuda", "cuda"]


def test_a_report_reads_well(reports):
    measured, predicted, plain = map(repr, reports)
    assert measured.startswith("StepReport, measured for cpu\n")
    assert predicted.startswith("StepReport, predicted for cuda\n")
    assert "layer1, layer2+layer3" in measured and "no checkpointing" in plain
    assert f"({reports[0].peak_bytes:,} B)" in measured
    assert "optimizer state" in measured and "optimizer state" not in predicted
    assert "half of 3 runs" in measured and "runs" not in predicted
    assert max(map(len, plain.splitlines())) < 120


# Where the model lives


def test_a_measured_model_may_have_a_forward_of_its_own():
    """The snippet, pasted for good: measured, predicted and copied like any model."""
    model, x, plan = MLP(WIDTHS, "gelu"), torch.randn(ROWS, 33), MIXED[3]
    expected = numbers(measure(model, x, plan, repeats=0))
    exec(plan.code(model), {"model": model})
    assert numbers(measure(model, x, repeats=0)) == expected
    assert numbers(predict(model, x, device="cpu")) == expected
    assert numbers(measure(copy.deepcopy(model), x, repeats=0)) == expected


def test_gradients_under_measurement_are_those_of_the_plan():
    """What is measured is a real step: its gradients are the unchecked model's."""
    model, x = MLP(WIDTHS, "gelu", 0.3), torch.randn(ROWS, 33)
    found = []
    for plan in MIXED:
        torch.manual_seed(3)
        with checkpointed(model, plan):
            training_step(model, x)()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, found[0], other) for other in found[1:])


class Own(dict):
    """A dict of a class of one's own, as data loaders return."""


def test_a_batch_in_a_dict_of_a_class_of_ones_own():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> dict:
            return Own(scores=self.layer(x))

    model, x, target = Named(), torch.randn(8, 16), torch.randint(4, (8,))
    plain = {"x": x}, target
    expected = predict(model, plain, device="cpu").peak_bytes
    for batch in (plain, (Own(plain[0]), target)):
        assert predict(model, batch, device="cpu").peak_bytes == expected
        assert measure(model, batch, repeats=0).peak_bytes == expected
