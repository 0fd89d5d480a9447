"""Recordings are measured: in one run a group, resumed, and refused where they must be.

The steps are tiny, and the device a CPU: see made_up.py.
"""

import errno
import inspect
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers import planner
from helpers.checkpointing import Plan
from helpers.measure import memory_limit
from helpers.models import MLP, DocsMLP, uniform_mlp
from helpers.recording import RecordingError, compared
from helpers.recording import __main__ as command
from helpers.recording import record as recorder
from helpers.recording.record import (
    NAMED,
    WAIST,
    WAIST_NAMED,
    groups,
    measure_group,
    named,
    record,
)
from helpers.recording.recorded import Group, Step, read, write
from tests.recording.made_up import FIXTURE, GPU, GROUPS, PLANS, blank, tiny

ROOT = Path(__file__).parents[2]
SHORT = [Group(group.step, group.plans[:2]) for group in GROUPS[1:3]]


@pytest.fixture(scope="module")
def made_up():
    return read(FIXTURE)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "one.json"


# Recording


def test_a_recording_goes_on_where_it_stopped(path, monkeypatch, capsys):
    def stop(group, *args):
        if group.step == SHORT[1].step:
            raise KeyboardInterrupt
        return measure_group(group, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(recorder, "measure_group", stop)
        record(path, blank(), SHORT, device="cpu")
    (first,) = read(path).groups
    assert (first.step, first.plans) == (SHORT[0].step, SHORT[0].plans)
    capsys.readouterr()
    found = record(path, blank(), SHORT, device="cpu")
    step, told = capsys.readouterr().out.splitlines()
    assert step == f"[1/1] {SHORT[1].step}, 2 plans"
    assert told.startswith("  2 of 2 cases as predicted to the byte; ")
    assert found.groups[0] == first and len(found.groups) == 2
    assert read(path) == found
    assert record(path, blank(), SHORT, device="cpu") == found
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gpu", "another GPU"),
        ("torch", "2.12.0"),
        ("driver", "550.1"),
        ("cuda", "12.6"),
        ("processors", 8),
        ("repeats", 5),
        ("made_up", False),
    ],
)
def test_another_machines_file_is_not_written_to(name, other, path, capsys):
    write(blank(**{name: other}), path)
    before = path.read_bytes()
    with pytest.raises(RecordingError, match=f"one.json is of another.* its '{name}'"):
        record(path, blank(), GROUPS[:1], device="cpu")
    assert path.read_bytes() == before and not capsys.readouterr().out


def test_another_day_goes_on(path):
    first = blank(date="2000-01-02")
    write(first, path)
    assert record(path, blank(), [], device="cpu") == first


def test_a_file_that_is_broken_is_not_written_over(path):
    path.write_text("{")
    with pytest.raises(RecordingError, match="only a part"):
        record(path, blank(), GROUPS[:1], device="cpu")
    assert path.read_text() == "{"


def test_out_of_memory_is_noted_and_the_others_go_on(path, capsys):
    group = Group(tiny(), (Plan(), PLANS[1], PLANS[3]))
    peaks = [group.step.predicted(plan, "cpu").peak_bytes for plan in group.plans]
    assert peaks[0] > peaks[1]
    fits = [
        plan for plan, peak in zip(group.plans, peaks, strict=True) if peak <= peaks[1]
    ]
    with memory_limit(peaks[1], "cpu"):
        (found,) = record(path, blank(), [group], device="cpu").groups
    assert found.plans == group.plans
    assert [report.plan for report in found.measured] == fits
    assert found.measured[0].peak_bytes == peaks[1]
    assert f", {len(peaks) - len(fits)} out of memory\n" in capsys.readouterr().out
    assert read(path).of(tiny()).pairs == {}, "no checkpointing did not run"


def test_nothing_fits_and_it_is_noted(path):
    with memory_limit(512, "cpu"):
        record(path, blank(), SHORT[:1], device="cpu")
    assert read(path).groups == (SHORT[0],)
    assert compared(read(path)) == []
    assert len(record(path, blank(), SHORT[:1], device="cpu").groups) == 1, "noted"


# The command


def test_without_a_gpu_the_command_says_so(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "helpers.recording", "--folder", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("this PyTorch sees no CUDA device")
    assert run.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.0"])
def test_an_older_torch_is_refused_before_anything_needs_a_newer_one(
    version, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setitem(sys.modules, "helpers.recording.record", None)
    with pytest.raises(SystemExit, match="too old to record with") as raised:
        command.main([])
    assert raised.value.code.startswith(f"torch {version} is too old")


def test_a_machine_is_named_even_where_its_driver_cannot_be_asked(
    monkeypatch, tmp_path, path
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Made Up 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = recorder.this_machine()
    assert found.driver == "unknown" and not found.made_up
    assert found.label == f"NVIDIA Made Up 1, torch {torch.__version__}, {found.date}"
    write(found, path)
    assert read(path) == found
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 580.95.05\n")
    fake.chmod(0o755)
    assert recorder.this_machine().driver == "580.95.05"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be written .No sp"),
        (KeyboardInterrupt(), "stopped; the same command goes on from here"),
        (RecordingError("it is of another run"), "it is of another run"),
    ],
)
def test_what_stops_a_recording_is_one_sentence(
    error, words, monkeypatch, capsys, tmp_path
):
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(recorder, "this_machine", blank)
    monkeypatch.setattr(recorder, "record", fail)
    with pytest.raises(SystemExit, match=words):
        recorder.run(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{GPU}, torch ")


def test_a_recording_ends_in_the_comparison(monkeypatch, capsys, tmp_path, made_up):
    first = replace(made_up, groups=made_up.groups[:2])
    monkeypatch.setattr(recorder, "this_machine", blank)
    monkeypatch.setattr(recorder, "record", lambda *args: first)
    recorder.run(tmp_path)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "12 of 12 cases as predicted to the byte; the largest error is 0.000 %"
    ]


# The set


def test_the_set_is_complete():
    found = list(groups())
    assert (len(found), sum(len(group.plans) for group in found)) == (43, 644)
    assert max(len(group.plans) for group in found) == 256
    assert all(group.plans[0] == Plan() for group in found)
    steps = {str(group.step): group.plans for group in found}
    for rows in ("32", "8,192", "65,536"):
        assert len(steps[f"DocsMLP, {rows} rows"]) == 8
    for depth in (8, 16):
        hidden = tuple(f"layer{i}" for i in range(1, depth + 1))
        for width, rows in ((1024, "8,192"), (4096, "2,048")):
            for activation in ("relu", "gelu"):
                for dropout in (0.0, 0.1):
                    step = f"uniform_mlp, depth {depth}, width {width}, activation "
                    step += f"{activation}, dropout {dropout}, {rows} rows"
                    plans = {Plan(), Plan.alone(hidden), Plan((hidden,))}
                    assert plans <= {
                        p for g in found if str(g.step) == step for p in g.plans
                    }
    options = {(g.step.optimizer, g.step.precision) for g in found}
    optimizers = ("none", "SGD", "AdamW", "AdamW fused")
    assert options == {(o, p) for o in optimizers for p in ("float32", "bfloat16")}


def test_the_set_takes_minutes_on_a_modern_gpu():
    """At 45 TFLOP/s in float32, without the optimizers' and kernels' own time."""
    flops = 0
    for group in groups():
        report = group.step.predicted(group.plans[-1], "cuda")
        steps = len(group.plans) * (recorder.REPEATS + recorder.WARMUP + 3)
        flops += steps * (3 * report.forward_flops + report.recompute_flops)
    assert flops / 45e12 < 360


def test_settings_that_are_not_given_are_the_models_own():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(uniform_mlp).parameters.items()
    }
    assert Step("uniform_mlp", {}, 1).settings == defaults
    assert Step("DocsMLP", {}, 1).settings == {}
    assert isinstance(GROUPS[0].step.make_model(), DocsMLP)


@pytest.mark.parametrize(
    ("factory", "settings", "names"),
    [
        (uniform_mlp, {"depth": 8, "width": 1024, "activation": "gelu"}, NAMED[8]),
        (uniform_mlp, {"depth": 8, "width": 1024, "activation": "relu"}, NAMED[8]),
        (MLP, {"widths": [*WAIST, 10], "activation": "gelu"}, WAIST_NAMED),
    ],
    ids=["gelu", "relu", "waist"],
)
def test_the_plans_worth_having_are_recorded(factory, settings, names):
    """The planner says which they are; those of notebook 09's slider and pictures."""
    x = torch.empty(8192, 1024, device="meta")
    front = planner.pareto(planner.profile(factory(**settings), x))
    wanted = {Plan(), *named(names)}
    assert {plan for *_, plan in front} <= wanted
    recorded = {
        plan
        for group in groups()
        if group.step.model == factory.__name__
        and settings.items() <= group.step.settings.items()
        and (group.step.rows, group.step.optimizer) == (8192, "none")
        for plan in group.plans
    }
    assert wanted <= recorded


def test_plans_are_read_off_numbers():
    first, second = named("1-3 5, 2")
    assert first == Plan((("layer1", "layer2", "layer3"), ("layer5",)))
    assert second == Plan((("layer2",),))


def test_a_card_that_is_not_there_is_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "this_machine", lambda: blank(gpu="T4 (nocard)"))
    with pytest.raises(SystemExit, match="computes nothing"):
        recorder.run(tmp_path)
    assert not list(tmp_path.iterdir())
