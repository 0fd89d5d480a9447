"""A sweep's rows are what predict and measure say, and none is run twice."""

import gc
import itertools
import json
import random
import subprocess
import sys
import weakref
from functools import partial

import matplotlib
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from helpers import plots
from helpers import sweep as sweeping
from helpers.checkpointing import Plan
from helpers.measure import measured as measuring
from helpers.measure import predict
from helpers.models import MLP, uniform_mlp
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


@pytest.fixture
def runs(monkeypatch):
    """Note the plans that are predicted and measured."""
    noted = []

    def spy(name, plans_of):
        real = getattr(sweeping, name)

        def noting(model, batch, plans, *args, **kwargs):
            noted.extend((name, plan) for plan in plans_of(plans))
            return real(model, batch, plans, *args, **kwargs)

        monkeypatch.setattr(sweeping, name, noting)

    spy("predict", lambda plan: [plan])
    spy("measure_plans", list)
    return noted


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
    drawn = []

    class Spy(nn.Linear):
        def forward(self, x):
            if not x.is_meta:
                drawn.append((x[0, 0].item(), self.weight[0, 0].item()))
            return super().forward(x)

    def make():
        return nn.Sequential(Spy(WIDTH, 4))

    torch.manual_seed(5)
    before, state = random.getstate(), torch.get_rng_state()
    options = {"measured": True, "device": "cpu", "repeats": 1, "progress": False}
    for seed in (3, 3, 4):
        sweep(make, batch, [Plan()], 4, seed=seed, **options)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == before
    assert len(set(drawn)) == 2


def test_what_is_predicted_not_to_fit_is_not_run(runs):
    table = sweep(small, batch, BOTH, 4096, device="cpu", progress=False)
    limit_bytes = int(table.peak_bytes.min())
    assert limit_bytes < table.peak_bytes.max()
    runs.clear()
    options = {"measured": True, "device": "cpu", "repeats": 1, "progress": False}
    limited = sweep(small, batch, BOTH, 4096, limit_bytes=limit_bytes, **options)
    fitting = table.plan[table.peak_bytes.idxmin()]
    assert [plan for name, plan in runs if name == "measure_plans"] == [BOTH[fitting]]
    for row, dry in zip(limited.itertuples(), table.itertuples(), strict=True):
        fits = row.plan == fitting
        assert row.outcome == ("ok" if fits else "out of memory")
        assert row.source == ("measured" if fits else "predicted")
        assert row.peak_bytes == dry.peak_bytes and pd.isna(row.step_ms) != fits


def test_a_limit_holds_for_predictions_too():
    dry = quick()
    table = quick(limit_bytes=int(dry.peak_bytes.max()) - 1)
    full = dry.peak_bytes == dry.peak_bytes.max()
    assert (table.outcome == "out of memory").tolist() == full.tolist()
    assert table[BYTES].equals(dry[BYTES])


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


# The cache


def test_a_cached_sweep_runs_nothing_and_gives_the_same_table(tmp_path, runs):
    for run in (quick, timed):
        first = run(cache=tmp_path / "a")
        runs.clear()
        assert run(cache=tmp_path / "a").equals(first) and not runs


def test_a_new_plan_is_run_and_the_old_ones_are_found(tmp_path, runs):
    quick(cache=tmp_path)
    runs.clear()
    more = BOTH | {"second": Plan.alone(["layer2"])}
    sweep(small, batch, more, 4, cache=tmp_path, progress=False)
    assert runs == [("predict", more["second"])]


def test_times_from_different_runs_are_not_mixed(tmp_path, runs):
    timed(cache=tmp_path)
    runs.clear()
    more = BOTH | {"second": Plan.alone(["layer2"])}
    options = {"measured": True, "device": "cpu", "repeats": 2, "warmup": 1}
    sweep(small, batch, more, 4, cache=tmp_path, progress=False, **options)
    measured = [plan for name, plan in runs if name == "measure_plans"]
    assert measured == list(more.values())


class Scaled(nn.Module):
    """Prints nothing of its own."""

    def __init__(self, scale=1):
        super().__init__()
        self.layer1, self.scale = nn.Linear(WIDTH, WIDTH), scale

    def forward(self, x):
        return self.scale * self.layer1(x)


class Unscaled(Scaled):
    def forward(self, x):
        return self.layer1(x)


def mean(output):
    return output.mean()


CHANGES = {
    "width": {"model_factory": lambda: MLP([WIDTH, 8, 4])},
    "activation": {"model_factory": lambda: MLP([WIDTH, 16, 4], "gelu")},
    "dtype": {"model_factory": lambda: MLP([WIDTH, 16, 4]).half()},
    "frozen": {"model_factory": lambda: MLP([WIDTH, 16, 4]).requires_grad_(False)},
    "eval": {"model_factory": lambda: MLP([WIDTH, 16, 4]).eval()},
    "rows": {"rows": 5},
    "batch": {"make_batch": lambda rows: torch.randn(rows, WIDTH).double()},
    "plan": {"plans": [Plan.alone(["layer2"])]},
    "segments": {"plans": [Plan((("layer1", "layer2"),))]},
    "loss": {"loss": mean},
    "label smoothing": {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
    "optimizer": {"optimizer": torch.optim.SGD},
    "momentum": {"optimizer": partial(torch.optim.SGD, momentum=0.9)},
    "early stop": {"early_stop": False},
    "device": {"device": "cpu"},
    "measured": {"measured": True},
    "repeats": {"measured": True, "repeats": 3},
    "warm-up": {"measured": True, "warmup": 3},
    "seed": {"measured": True, "seed": 3},
}


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """Return the keys that a sweep looks for, without running its steps."""
    report = predict(small(), batch(4), device="cpu")
    monkeypatch.setattr(sweeping, "predict", lambda *args, **kwargs: report)
    monkeypatch.setattr(sweeping, "usable_device", lambda model, device: device)
    monkeypatch.setattr(sweeping, "memory_bytes", lambda device: 2**40)
    monkeypatch.setattr(
        sweeping, "measure_plans", lambda m, b, plans, **kwargs: [report] * len(plans)
    )
    folder = itertools.count()

    def look(**change):
        options = {"model_factory": lambda: MLP([WIDTH, 16, 4]), "make_batch": batch}
        options |= {"plans": [Plan.alone(["layer1"])], "rows": 4, "progress": False}
        options |= {"device": "cuda" if not change.get("measured") else "cpu"}
        place = tmp_path / str(next(folder))
        sweep(cache=place, **options | change)
        files = map(json.loads, (file.read_text() for file in place.glob("*.json")))
        return {str(file["key"]) for file in files}

    return look


def test_the_key_is_the_same_for_the_same_sweep(keys):
    assert keys() == keys() and len(keys(measured=True)) == 2
    assert keys(measured=True) == keys(measured=True)
    assert keys(plans={"another label": Plan.alone(["layer1"])}) == keys()
    assert keys(seed=3) == keys(repeats=3) == keys(limit_bytes=2**30) == keys()


def test_whatever_matters_changes_the_key(keys):
    looked = {name: keys(**change) for name, change in CHANGES.items()}
    looked["none"] = keys()
    shared = {
        (first, second)
        for first, second in itertools.combinations(looked, 2)
        if looked[first] <= looked[second] or looked[second] <= looked[first]
    }
    assert not shared


@pytest.mark.parametrize("factory", [Unscaled, partial(Scaled, 2)], ids=str)
def test_code_and_settings_that_are_not_printed_change_the_key(keys, factory):
    words = keys(model_factory=Scaled) | keys(model_factory=factory)
    assert len(words) == 2


def test_torch_helpers_autocast_and_the_machine_change_the_key(keys, monkeypatch):
    found = [keys(measured=True)]
    for target, value in (
        ("torch.__version__", "9.9"),
        ("helpers.sweep.helpers_digest", lambda: "other"),
        ("helpers.fingerprint.device_name", lambda device: "another machine"),
        ("torch.get_num_threads", lambda: 99),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            found.append(keys(measured=True))
    with torch.autocast("cpu", torch.bfloat16):
        found.append(keys(measured=True))
    assert all(a != b for a, b in itertools.combinations(found, 2))


def test_a_file_cut_short_or_foreign_is_run_again(tmp_path, runs):
    first = quick(cache=tmp_path)
    files = sorted(tmp_path.glob("*.json"))
    whole = [file.read_bytes() for file in files]
    bad = [whole[0][:size] for size in (0, 1, len(whole[0]) // 2, len(whole[0]) - 1)]
    bad += [whole[1], b"[]", b"null", b'{"key": {}}', b"\xff\xfe", b"\x00" * 4000]
    kept = json.loads(whole[0])
    for name in kept["report"]:
        less = {key: value for key, value in kept["report"].items() if key != name}
        bad.append(json.dumps(kept | {"report": less}, indent=1).encode())
    more = kept["report"] | {"more": 1}
    bad.append(json.dumps(kept | {"report": more}, indent=1).encode())
    for content in bad:
        files[0].write_bytes(content)
        runs.clear()
        assert quick(cache=tmp_path).equals(first)
        assert len(runs) == 1, content
        assert files[0].read_bytes() == whole[0]


def test_an_interrupt_keeps_what_was_finished_and_goes_on(tmp_path, runs):
    stop_at = 32

    def interrupted(rows):
        x = batch(rows)
        if rows == stop_at and not x.is_meta:
            raise KeyboardInterrupt
        return x

    options = {"measured": True, "device": "cpu", "repeats": 1, "progress": False}
    options["cache"] = tmp_path
    with pytest.raises(KeyboardInterrupt):
        sweep(small, interrupted, BOTH, (8, 16, 32, 64), **options)
    runs.clear()
    stop_at = None
    table = sweep(small, interrupted, BOTH, (8, 16, 32, 64), **options)
    measured = [plan for name, plan in runs if name == "measure_plans"]
    assert measured == [*BOTH.values()] * 2  # for 32 and 64 rows alone
    assert (table.outcome == "ok").all() and len(table) == 8


def test_an_interrupt_in_the_middle_of_a_prediction_sweep(tmp_path, runs, monkeypatch):
    real, left = sweeping.predict, [5]

    def predict(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    many = [Plan.alone(names) for names in (["layer1"], ["layer2"], [])]
    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "predict", predict)
        with pytest.raises(KeyboardInterrupt):
            sweep(small, batch, many, (4, 8), cache=tmp_path, progress=False)
    runs.clear()
    sweep(small, batch, many, (4, 8), cache=tmp_path, progress=False)
    assert len(runs) == 2


def test_an_interrupted_write_leaves_no_part(tmp_path, monkeypatch):
    quick(cache=tmp_path)
    before = sorted(tmp_path.iterdir())

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            quick(cache=tmp_path, settings={"activation": ["relu"]})
    assert sorted(tmp_path.iterdir()) == before


def test_a_sweep_killed_at_any_moment_can_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sweeping, "helpers_digest", lambda: "as it is")
    program = (
        "import os; from tests.test_sweep import *; count = [0]\n"
        "def dies(model, batch, plan, **options):\n"
        "    count[0] += 1\n"
        "    if count[0] == 4: os.kill(os.getpid(), 9)\n"
        "    return predict(model, batch, plan, **options)\n"
        "sweeping.predict = dies; sweeping.helpers_digest = lambda: 'as it is'\n"
        f"sweep(small, batch, BOTH, (4, 8, 16), cache={str(tmp_path)!r})\n"
    )
    subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert len(list(tmp_path.glob("*.json"))) == 3
    table = sweep(small, batch, BOTH, (4, 8, 16), cache=tmp_path, progress=False)
    again = sweep(small, batch, BOTH, (4, 8, 16), progress=False)
    assert table.equals(again) and len(list(tmp_path.iterdir())) == 6


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
        ({"cache": __file__}, "a folder to keep reports in"),
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
