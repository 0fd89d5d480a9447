"""A sweep's rows are what predict and measure say."""

import gc
import itertools
import queue
import random
import weakref
from functools import partial

import matplotlib
import pandas as pd
import pytest
import torch
from jupyter_client.manager import run_kernel
from matplotlib.figure import Figure
from torch import nn

from helpers import plots
from helpers import sweep as sweeping
from helpers.checkpointing import Plan
from helpers.measure import measured as measuring
from helpers.measure import predict
from helpers.models import uniform_mlp
from helpers.sweep import sweep

matplotlib.use("agg")
WIDTH = 16
BOTH = {"none": Plan(), "first": Plan.alone(["layer1"])}
BYTES = ["peak_bytes", "after_forward_bytes", "baseline_bytes"]
BYTES += ["forward_flops", "recompute_flops"]


def batch(rows: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH)


def pair(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, WIDTH), torch.randint(10, (rows,))


small = partial(uniform_mlp, depth=2, width=WIDTH)
quick = partial(sweep, small, batch, BOTH, (4,), progress=False)
timed = partial(quick, measured=True, device="cpu", repeats=2, warmup=1)


# The table


def test_every_row_is_what_predict_says():
    rules = {"none": Plan(), "all": lambda m: Plan.alone(f"layer{i}" for i in (1, 2))}
    settings = {"depth": [2, 3], "activation": ["relu", "gelu"]}
    table = sweep(
        partial(uniform_mlp, width=WIDTH),
        pair,
        rules,
        (4, 64),
        settings=settings,
        device="cpu",
        optimizer=torch.optim.AdamW,
        early_stop=False,
        progress=False,
    )
    grid = itertools.product([2, 3], ["relu", "gelu"], (4, 64), rules)
    for row, (depth, activation, rows, label) in zip(
        table.itertuples(), grid, strict=True
    ):
        expected = predict(
            uniform_mlp(depth, WIDTH, activation),
            pair(rows),
            Plan() if label == "none" else rules["all"](None),
            device="cpu",
            optimizer=torch.optim.AdamW,
            early_stop=False,
        )
        assert row[1:5] == (depth, activation, rows, label)
        assert [getattr(row, x) for x in BYTES] == [getattr(expected, x) for x in BYTES]
        assert (row.source, row.device, row.outcome) == ("predicted", "cpu", "ok")
        assert pd.isna(row.step_ms) and pd.isna(row.step_ms_low) and row.repeats == 0


def test_the_columns_are_named_and_typed():
    table = quick(settings={"activation": ["relu"]})
    assert list(table) == ["activation", *sweeping.COLUMNS]
    assert {str(table[name].dtype) for name in BYTES} == {"Int64"}
    assert table.step_ms.dtype == table.step_ms_high.dtype == float
    assert table.device.tolist() == ["cuda"] * 2


def test_plain_plans_are_labelled_by_themselves_and_may_come_twice():
    plans = [Plan(), Plan((("layer1", "layer2"),)), Plan()]
    table = sweep(small, batch, plans, 4, progress=False)
    none, joined, again = table.plan
    assert (none, joined, again) == ("no checkpointing", "layer1+layer2", none)
    assert table.peak_bytes[0] == table.peak_bytes[2]


def test_a_measured_row_has_the_predicted_bytes_and_its_time():
    table, dry = timed(repeats=5), quick(device="cpu")
    assert table[BYTES].equals(dry[BYTES])
    assert (table.source == "measured").all() and (table.repeats == 5).all()
    assert (0 < table.step_ms_low).all()
    assert (table.step_ms_low <= table.step_ms).all()
    assert (table.step_ms <= table.step_ms_high).all()


def test_a_step_that_looks_at_values_can_be_measured():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer1 = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.layer1(x) if x.sum().item() < 1e9 else x

    table = sweep(Picky, batch, BOTH, 4, measured=True, device="cpu", progress=False)
    assert table.outcome.tolist() == ["ok", "ok"]
    with pytest.raises(ValueError, match="looks at values"):
        sweep(Picky, batch, BOTH, 4, progress=False)


def test_the_trade_off_takes_a_table_as_it_is():
    table, ax = quick(), Figure().subplots()
    plots.plot_tradeoff(ax, table.itertuples(), labels={0: "none"})
    assert [text.get_text() for text in ax.texts] == ["none"]
    assert len(ax.lines[0].get_xdata()) == 2


# Measuring


def orders(monkeypatch, **options) -> list[tuple[Plan, ...]]:
    """Return the order of the plans in each round of timed steps."""
    now, timed_plans = [], []
    real_time, real_apply = measuring.time_step_ms, measuring.checkpointed

    def apply(model, plan, **kwargs):
        now[:] = [plan]
        return real_apply(model, plan, **kwargs)

    def time_step(step, device):
        timed_plans.extend(now)
        return real_time(step, device)

    monkeypatch.setattr(measuring, "checkpointed", apply)
    monkeypatch.setattr(measuring, "time_step_ms", time_step)
    plans = [Plan(), *(Plan.alone([f"layer{i}"]) for i in (1, 2, 3))]
    options |= {"measured": True, "device": "cpu", "progress": False, "warmup": 0}
    sweep(small, batch, plans, (4,), repeats=6, **options)
    monkeypatch.undo()
    rounds = [tuple(timed_plans[i : i + 4]) for i in range(0, 24, 4)]
    assert all(set(one_round) == set(plans) for one_round in rounds)
    return rounds


def test_rounds_are_interleaved_and_shuffled_by_the_seed(monkeypatch):
    rounds = orders(monkeypatch, seed=1)
    assert len(set(rounds)) > 1
    assert orders(monkeypatch, seed=1) == rounds
    assert orders(monkeypatch, seed=2) != rounds


def test_the_seed_makes_weights_and_batch_and_nothing_else_is_drawn():
    drawn = queue.SimpleQueue()  # a list would be put back

    class Spy(nn.Linear):
        def forward(self, x):
            if not x.is_meta:
                drawn.put((x[0, 0].item(), self.weight[0, 0].item()))
            return super().forward(x)

    def make():
        return nn.Sequential(Spy(WIDTH, 4))

    torch.manual_seed(5)
    before, state = random.getstate(), torch.get_rng_state()
    options = {"measured": True, "device": "cpu", "repeats": 1, "progress": False}
    for seed in (3, 3, 4):
        sweep(make, batch, [Plan()], 4, seed=seed, **options)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == before
    assert len({drawn.get() for _ in range(drawn.qsize())}) == 2


def test_what_is_predicted_not_to_fit_is_not_run(monkeypatch):
    measured, real = [], sweeping.measure_plans

    def noting(model, batch, plans, **options):
        measured.extend(plans)
        return real(model, batch, plans, **options)

    table = sweep(small, batch, BOTH, 4096, device="cpu", progress=False)
    limit_bytes = int(table.peak_bytes.min())
    assert limit_bytes < table.peak_bytes.max()
    monkeypatch.setattr(sweeping, "measure_plans", noting)
    monkeypatch.setattr(sweeping, "memory_bytes", lambda device: limit_bytes)
    options = {"measured": True, "device": "cpu", "repeats": 1, "progress": False}
    limited = sweep(small, batch, BOTH, 4096, **options)
    fitting = table.plan[table.peak_bytes.idxmin()]
    assert measured == [BOTH[fitting]]
    for row, dry in zip(limited.itertuples(), table.itertuples(), strict=True):
        fits = row.plan == fitting
        assert row.outcome == ("ok" if fits else "out of memory")
        assert row.source == ("measured" if fits else "predicted")
        assert row.peak_bytes == dry.peak_bytes and pd.isna(row.step_ms) != fits


class Full(nn.Linear):
    """Runs out of memory unless it is checkpointed, or is large."""

    weights: list = []

    def forward(self, x):
        self.weights.append(weakref.ref(self.weight))
        if not x.is_meta and ("forward" not in vars(self) or len(x) > 100):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_out_of_memory_is_a_row_and_the_sweep_goes_on():
    def make():
        return nn.Sequential(Full(WIDTH, WIDTH), nn.Linear(WIDTH, 4))

    plans = {"none": Plan(), "first": Plan.alone(["0"]), "last": Plan.alone(["1"])}
    options = {"measured": True, "device": "cpu", "repeats": 2, "progress": False}
    table = sweep(make, batch, plans, (200, 4), **options)
    ok = [
        plan == "first" and rows != 200
        for plan, rows in zip(table.plan, table.rows, strict=True)
    ]
    assert (table.outcome == "ok").tolist() == ok
    assert table.step_ms.notna().tolist() == ok
    assert table.peak_bytes.notna().all()
    gc.collect()
    assert not any(weight() is not None for weight in Full.weights)


def test_a_model_that_does_not_fit_is_a_row_as_well():
    def make():
        model = small()
        if not next(model.parameters()).is_meta:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model

    options = {"measured": True, "device": "cpu", "progress": False}
    table = sweep(make, batch, BOTH, 4, **options)
    assert table.outcome.tolist() == ["out of memory"] * 2


# What does not fit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": {"dept": [1]}}, "no setting 'dept'; it has: depth, width, act"),
        ({"settings": {"depth": []}}, "'depth' has \\[\\]"),
        ({"settings": {"activation": "relu"}}, "lists of values .* has 'relu'"),
        ({"settings": {"depth": [2, 0]}}, "depth must be a positive whole number"),
        ({"plans": {}}, "no plan to sweep"),
        ({"plans": []}, "no plan to sweep"),
        ({"plans": Plan()}, "a list of Plans, or a dict"),
        ({"plans": ["layer1"]}, "a list of Plans, or a dict"),
        ({"plans": {"a": ["layer1"]}}, "'a' is a list; a Plan is wanted"),
        ({"plans": {"a": lambda model: None}}, "'a' is a NoneType; a Plan is wanted"),
        ({"plans": [Plan.alone(["x"])]}, "no layer named 'x'; this model has: layer1"),
        ({"rows": ()}, "no batch size"),
        ({"rows": 0}, "at least 1, got 0"),
        ({"rows": (4, -1)}, "at least 1, got -1"),
        ({"rows": (4, 2.5)}, "at least 1, got 2.5"),
        ({"rows": True}, "at least 1, got True"),
        ({"repeats": -1}, "0 or more, got -1"),
        ({"model_factory": uniform_mlp(2, 16)}, "a function that makes the model"),
        ({"make_batch": lambda rows: torch.ones(rows, 3)}, "does not fit this model"),
        ({"device": "tpu"}, "'cpu' or 'cuda', not on 'tpu'"),
        ({"measured": True, "device": "meta"}, "'cpu' or 'cuda', not on 'meta'"),
    ],
    ids=lambda part: part if isinstance(part, str) else next(iter(part)),
)
def test_what_is_wrong_is_said_in_one_sentence(change, says):
    options = {"model_factory": uniform_mlp, "plans": BOTH, "rows": 4}
    options |= {"make_batch": lambda rows: torch.ones(rows, 1024), "progress": False}
    with pytest.raises(ValueError, match=says) as raised:
        sweep(**options | change)
    assert "\n" not in str(raised.value)


def test_a_setting_may_not_be_called_as_a_column():
    def make(plan):
        return small()

    with pytest.raises(ValueError, match="'plan' is a column of the table"):
        sweep(make, batch, BOTH, 4, settings={"plan": [1]}, progress=False)


# The progress bar: a reader sees it, and nothing stays in a file

USE = """
from helpers.checkpointing import Plan
from helpers.models import uniform_mlp
from helpers.sweep import sweep
import torch
table = sweep(uniform_mlp, lambda rows: torch.ones(rows, 1024), [Plan()], 4)
print(len(table))
"""


@pytest.fixture(scope="module")
def kernel():
    with run_kernel() as client:
        yield client


def outputs(kernel, code: str, watched: bool) -> list[str]:
    """Run code as a notebook's cell; return what kinds of output it has."""
    found = []

    def note(message):
        if message["msg_type"] in ("stream", "display_data", "error"):
            found.append(message["content"].get("name", message["msg_type"]))

    kernel.execute_interactive(
        code, allow_stdin=watched, output_hook=note, stdin_hook=print, timeout=60
    )
    return found


def test_a_notebook_that_nobody_watches_gets_no_bar(kernel):
    assert outputs(kernel, USE, watched=False) == ["stdout"]


def test_a_reader_sees_a_bar(kernel):
    assert outputs(kernel, USE, watched=True) == ["display_data", "stdout"]


def test_without_widgets_there_is_a_plain_bar(kernel):
    block = "import sys; sys.modules['ipywidgets'] = None\n"
    block += "for name in [name for name in sys.modules if 'tqdm' in name]:\n"
    block += "    del sys.modules[name]\n"
    assert set(outputs(kernel, block + USE, watched=True)) == {"stderr", "stdout"}


@pytest.mark.parametrize("shown", [True, False])
def test_a_terminal_sees_a_bar_and_then_no_more(capsys, shown):
    quick(progress=shown)
    out, err = capsys.readouterr()
    assert not out and bool(err) == shown
    assert not err.split("\r")[-2:][0].strip()  # the last that is drawn is blank


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_runs_out_of_memory_and_is_free_again():
    before = torch.cuda.memory_allocated()
    peaks = sweep(small, batch, BOTH, (64, 2**20), device="cuda", progress=False)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(int(peaks.peak_bytes[1]) * 3 / total)
    try:
        table = sweep(small, batch, BOTH, (64, 2**20, 64), measured=True)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert table.outcome.tolist() == ["ok"] * 2 + ["out of memory"] * 2 + ["ok"] * 2
    assert table.peak_bytes[:2].tolist() == peaks.peak_bytes[:2].tolist()
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 2**26  # cuBLAS keeps its workspace
