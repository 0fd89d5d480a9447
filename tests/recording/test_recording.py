"""Recordings: measured, written whole, read with care, found again, and compared.

What is read here was made up on a CPU: see tests/made_up.py.
"""

import dataclasses
import errno
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from helpers.allocator import H100, Gpu, on_gpu
from helpers.checkpointing import Plan
from helpers.controls._picture import LabPicture
from helpers.measure import memory_limit, predict
from helpers.models import DocsMLP, uniform_mlp
from helpers.plots import INK, plot_comparison, plot_times, plot_tradeoff
from helpers.plots._axes import RECORDED
from helpers.recording import file as recording
from helpers.recording import record as recorder
from helpers.recording._schema import CASE, RECORDING, REPORT, SEARCH, RecordingError
from helpers.recording._set import Group, Search, Step, groups, searches
from helpers.recording.compare import compare, describe_search, lines
from helpers.recording.file import FOLDER, RecordedCase, file_name, read, write
from helpers.recording.record import measure_group, record, run_search
from helpers.recording.recorded import Recorded, recorded, recordings
from tests.recording.made_up import FIXTURE, GPU, GROUPS, PLANS, SEARCHES, blank, tiny

ROOT = Path(__file__).parents[2]
COMMITTED = sorted(FOLDER.glob("*.json"))
SETTINGS = {"depth": 3, "width": 16, "activation": "gelu"}


@pytest.fixture(scope="module")
def made_up():
    return read(FIXTURE)


@pytest.fixture
def heard():
    return []


def short(group: Group, number: int = 2) -> Group:
    return Group(group.step, group.plans[:number])


# Today's predictions


@pytest.mark.parametrize("path", [*COMMITTED, FIXTURE], ids=lambda path: path.stem)
def test_what_was_recorded_is_what_is_predicted_today(path):
    comparisons = compare(read(path))
    assert comparisons
    for one in comparisons:
        if one.must_be_exact:
            errors = one.error_bytes, one.after_forward_error_bytes
            assert errors == (0, 0), one.row()
        assert abs(one.error) <= 0.001, one.row()


def test_no_recording_is_made_up():
    for path in COMMITTED:
        found = read(path)
        assert not found.made_up and found.settings["repeats"] >= 20
        assert path.name == file_name(found.gpu, found.torch)


# The fixture


def test_the_fixture_says_that_it_is_made_up_and_no_reader_sees_it(made_up, tmp_path):
    assert made_up.made_up and made_up.gpu == GPU and made_up.date == "2000-01-01"
    assert FIXTURE.parent != FOLDER
    write(made_up, tmp_path / "one.json")
    assert recordings(tmp_path) == []
    assert recorded("uniform_mlp", SETTINGS, 64, tmp_path) == {}


def test_the_fixture_holds_every_case_once(made_up):
    wanted = {(str(g.step), plan) for g in GROUPS for plan in g.plans}
    keys = [case.key for case in made_up.cases]
    assert set(keys) == wanted and len(keys) == len(wanted)
    assert [found.search for found in made_up.searches] == SEARCHES


# Written and read


def test_what_is_written_is_read(made_up, tmp_path):
    path = tmp_path / "deep" / "one.json"
    write(made_up, path)
    assert read(path) == made_up
    assert path.read_text() == FIXTURE.read_text()
    assert list(path.parent.iterdir()) == [path]
    empty = blank()
    write(empty, path)
    assert read(path) == empty


def test_every_field_of_a_report_has_a_kind(made_up):
    assert list(REPORT) == list(made_up.cases[0].predicted.to_dict())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_named(share, tmp_path):
    text, path = FIXTURE.read_text(), tmp_path / "cut.json"
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(RecordingError, match="cut.json is no JSON, or only a part"):
        read(path)


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '{"a": 1}', '{"format": "other"}', '{"format": [1]}']
)
def test_another_json_is_no_recording(text, tmp_path):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(RecordingError, match="foreign.json is no recording.*'format'"):
        read(path)


def test_bytes_that_are_no_text_and_files_that_are_none_are_named(tmp_path):
    path = tmp_path / "picture.json"
    path.write_bytes(b"\x89PNG\r\n\xff\xfe")
    with pytest.raises(RecordingError, match="picture.json is no JSON"):
        read(path)
    with pytest.raises(RecordingError, match="gone.json cannot be read: No such file"):
        read(tmp_path / "gone.json")


def places(values: dict) -> list[tuple[str, dict, dict]]:
    """List the objects of a file, with what they are called and their fields."""
    case, search = values["cases"][0], values["searches"][0]
    return [
        ("", values, RECORDING),
        (", case 1", case, CASE),
        (", case 1, 'predicted'", case["predicted"], REPORT),
        (", case 1, 'measured'", case["measured"], REPORT),
        (", search 1", search, SEARCH),
    ]


FIELDS = [
    (place, name)
    for place, (_, _, fields) in enumerate(places(json.loads(FIXTURE.read_text())))
    for name in fields
    if (place, name) != (0, "format")
]


@pytest.mark.parametrize(("place", "name"), FIELDS)
def test_a_field_that_is_missing_or_of_another_kind_is_named(place, name, tmp_path):
    path = tmp_path / "wrong.json"
    for spoil in ("missing", {"no": 1}, -1.5, True, ["x"]):
        values = json.loads(FIXTURE.read_text())
        where, owner, fields = places(values)[place]
        words = f"{where}: '{name}' should be .*, and is "
        if spoil == "missing":
            del owner[name]
            words = f"{where} lacks the field '{name}'$"
        elif fields[name].fits(spoil) if name != "model" else False:
            continue
        else:
            owner[name] = spoil
        path.write_text(json.dumps(values))
        with pytest.raises(RecordingError, match=f"wrong.json{words}"):
            read(path)


def spoiled(**changes):
    """Read a fixture whose first case is changed."""

    def change(values: dict) -> None:
        values["cases"][0] |= changes

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(extra=1), "has a field 'extra', which none has"),
        (lambda v: v["cases"].append(3), "case 32 should be an object, and is 3"),
        (spoiled(outcome="out of memory"), "case 1: 'outcome' and 'measured' do not"),
        (spoiled(measured=None), "case 1: 'outcome' and 'measured' do not"),
        (spoiled(settings={"depth": 3}), "case 1: 'settings' do not fit: .*'depth'"),
        (spoiled(model="Net"), "'model' should be one of 'DocsMLP', .*, and is 'Net'"),
        (
            lambda v: v["cases"][0]["measured"].update(plan=[["layer1"]]),
            "'plan' is not the same in both",
        ),
        (
            lambda v: v["cases"][0]["predicted"].update(plan=[[]]),
            "'plan' should be a list of segments",
        ),
        (
            lambda v: v["cases"][0]["predicted"]["categories"].pop("activation"),
            "'categories' should be an object with a whole number for each of param",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(change, words, tmp_path):
    values, path = json.loads(FIXTURE.read_text()), tmp_path / "wrong.json"
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(RecordingError, match=words) as raised:
        read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_files_are_named_by_gpu_and_torch():
    assert file_name("NVIDIA H100 80GB HBM3", "2.13.0+cu130") == (
        "nvidia-h100-80gb-hbm3-torch-2.13.0-cu130.json"
    )
    names = {file_name(gpu, v) for gpu in ("A", "B") for v in ("2.11.0", "2.13.0")}
    assert len(names) == 4


# Recording


def test_a_recording_goes_on_where_it_stopped(tmp_path, heard):
    path, wanted = tmp_path / "one.json", [short(GROUPS[1]), short(GROUPS[2])]

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(path, blank(), wanted, device="cpu", say=stop)
    first = read(path)
    assert [case.key for case in first.cases] == [
        (str(wanted[0].step), plan) for plan in PLANS[:2]
    ]
    found = record(path, blank(), wanted, device="cpu", say=heard.append)
    assert "there already" in heard[0] and "2 of 2 as predicted to the byte" in heard[1]
    assert found.cases[:2] == first.cases and len(found.cases) == 4
    assert read(path) == found
    heard.clear()
    assert record(path, blank(), wanted, device="cpu", say=heard.append) == found
    assert all("there already" in line for line in heard) and len(heard) == 2


def test_a_case_that_is_there_is_kept(tmp_path, heard):
    """All boxes hold two plans of the group before; those stay as they were."""
    path = tmp_path / "one.json"
    first = record(path, blank(), [GROUPS[1]], device="cpu", say=heard.append)
    more = Group(GROUPS[6].step, GROUPS[6].plans[:3])
    found = record(path, blank(), [more], device="cpu", say=heard.append)
    assert found.cases[: len(first.cases)] == first.cases
    assert len(found.cases) == len(first.cases) + 2


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gpu", "another GPU"),
        ("torch", "2.12.0"),
        ("driver", "550.1"),
        ("cuda", "12.6"),
        ("settings", {"repeats": 5, "warmup": 1}),
        ("made_up", False),
    ],
)
def test_another_machines_file_is_not_written_to(name, other, tmp_path, heard):
    path = tmp_path / "one.json"
    write(blank(**{name: other}), path)
    before = path.read_bytes()
    with pytest.raises(
        RecordingError, match=f"one.json is of another run: its '{name}'"
    ):
        record(path, blank(), GROUPS[:1], device="cpu", say=heard.append)
    assert path.read_bytes() == before and not heard


def test_a_file_that_is_broken_is_not_written_over(tmp_path):
    path = tmp_path / "one.json"
    path.write_text("{")
    with pytest.raises(RecordingError, match="only a part"):
        record(path, blank(), GROUPS[:1], device="cpu")
    assert path.read_text() == "{"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_or_a_kill_leaves_the_file_whole(failing, tmp_path, monkeypatch):
    path = tmp_path / "one.json"
    write(blank(), path)
    before = path.read_bytes()

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(recording.os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write(blank(driver="1"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"


def test_a_run_that_is_killed_leaves_the_file_whole(made_up, tmp_path):
    path = tmp_path / "one.json"
    write(made_up, path)
    program = (
        "import itertools, pathlib; from helpers.recording.file import read, write;"
        f"path = pathlib.Path({str(path)!r}); found = read(path); print(flush=True);"
        "[write(found, path) for _ in itertools.count()]"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE
    )
    run.stdout.readline()
    for _ in range(5):
        time.sleep(0.05)
        assert read(path) == made_up
    run.kill()
    run.communicate()
    assert read(path) == made_up
    assert recordings(tmp_path) == [], "and no part of a file counts as one"


def test_out_of_memory_is_noted_and_the_others_go_on():
    group = Group(tiny(), (Plan(), PLANS[1], PLANS[3]))
    with torch.device("meta"):
        batch = group.step.make_batch()
    peaks = [
        predict(group.step.make_model, batch, plan, device="cpu").peak_bytes
        for plan in group.plans
    ]
    assert peaks[0] > peaks[1]
    with memory_limit(peaks[1], "cpu"):
        cases = measure_group(group, "cpu", repeats=2, warmup=1)
    assert [case.plan for case in cases] == list(group.plans)
    fits = [peak <= peaks[1] for peak in peaks]
    assert [case.measured is not None for case in cases] == fits
    assert cases[0].to_dict()["outcome"] == "out of memory"
    assert cases[1].measured.peak_bytes == peaks[1]
    assert cases[1].base_ms is None, "no checkpointing did not run"
    assert recorder.outcome(cases).endswith(f", {fits.count(False)} out of memory")


def test_nothing_fits_and_it_is_noted(tmp_path, heard):
    path = tmp_path / "one.json"
    with memory_limit(512, "cpu"):
        record(path, blank(), [short(GROUPS[1])], device="cpu", say=heard.append)
    assert [case.measured for case in read(path).cases] == [None, None]
    assert compare(read(path)) == []


def test_the_largest_batch_is_found_by_prediction_and_by_running(made_up):
    found = run_search(Search(tiny(), PLANS[1], 100_000), "cpu")
    assert found.predicted_rows == found.measured_rows > 0
    plain, checkpointed = made_up.searches
    assert plain.measured_rows < checkpointed.measured_rows
    assert describe_search(plain).startswith(
        "uniform_mlp, no checkpointing, under 195.3 KiB: "
    )


def test_progress_is_told_now_and_then(monkeypatch, heard):
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(recorder.time, "monotonic", lambda: next(now))
    tell = recorder._teller(heard.append)
    for _ in range(8):
        tell()
    assert heard == ["  … 4 steps", "  … 8 steps"]


# The command


def run_command(*words: str, program: str = "", **env: str):
    start = ["-c", program] if program else ["-m", "helpers.recording"]
    return subprocess.run(
        [sys.executable, *start, *words],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def test_without_a_gpu_the_command_says_so(tmp_path):
    run = run_command("--folder", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert (run.returncode, run.stderr) == (1, "")
    assert re.fullmatch(r"this PyTorch sees no CUDA device.*\n", run.stdout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.0"])
def test_an_older_torch_is_refused_before_anything_needs_a_newer_one(version):
    program = (
        f"import sys, torch; torch.__version__ = {version!r};"
        "sys.modules['helpers.recorder'] = None;"
        "from helpers.recording.file import main; sys.exit(main([]))"
    )
    run = run_command(program=program)
    assert (run.returncode, run.stderr) == (1, "")
    assert run.stdout.startswith(f"torch {version} is too old to record with")


def test_a_machine_is_named_even_where_its_driver_cannot_be_asked(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Made Up 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = recorder.this_machine()
    assert found.driver == "unknown" and not found.made_up
    assert found.label == f"NVIDIA Made Up 1, torch {torch.__version__}, {found.date}"
    write(found, tmp_path / "one.json")
    assert read(tmp_path / "one.json") == found
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 580.95.05\n")
    fake.chmod(0o755)
    assert recorder.this_machine().driver == "580.95.05"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be written (No sp"),
        (KeyboardInterrupt(), "stopped; the same command goes on from here"),
        (RecordingError("it is of another run"), "it is of another run"),
    ],
)
def test_what_stops_a_recording_is_one_sentence(
    error, words, monkeypatch, capsys, tmp_path
):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(recorder, "this_machine", blank)
    monkeypatch.setattr(recorder, "record", fail)
    assert recorder.run(tmp_path) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{GPU}, torch ") and words in second


def test_a_recording_ends_in_the_comparison(monkeypatch, capsys, tmp_path, made_up):
    monkeypatch.setattr(recorder, "this_machine", blank)
    monkeypatch.setattr(recorder, "record", lambda *args: made_up)
    assert recorder.run(tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "31 of 31 cases as predicted to the byte; the largest error is 0.000 %"
    )


# What is recorded


def test_the_set_is_complete_and_every_plan_fits_its_model():
    found = list(groups())
    words = [str(group.step) for group in found]
    for rows in ("32", "8,192", "65,536"):
        (group,) = (g for g in found if str(g.step) == f"DocsMLP, {rows} rows")
        assert len(group.plans) == 8
    for depth in (8, 16):
        for width in (1024, 4096):
            for activation in ("relu", "gelu"):
                for dropout in (0.0, 0.1):
                    start = f"uniform_mlp, depth {depth}, width {width}, activation "
                    start += f"{activation}, dropout {dropout}, "
                    (name, *_) = (word for word in words if word.startswith(start))
                    plans = found[words.index(name)].plans
                    hidden = tuple(f"layer{i}" for i in range(1, depth + 1))
                    assert {Plan(), Plan.alone(hidden), Plan((hidden,))} <= set(plans)
    assert max(len(group.plans) for group in found) == 256
    options = {(g.step.optimizer, g.step.precision) for g in found}
    optimizers = ("none", "SGD", "AdamW", "AdamW fused")
    assert options == {(o, p) for o in optimizers for p in ("float32", "bfloat16")}
    assert all(group.plans[0] == Plan() for group in found)
    assert len(list(searches())) == 6


def test_the_set_takes_minutes_on_a_modern_gpu():
    """At 45 TFLOP/s in float32, without the optimizers' and kernels' own time."""
    flops = 0
    for group in groups():
        with torch.device("meta"):
            batch = group.step.make_batch()
        report = predict(group.step.make_model, batch, group.plans[-1])
        steps = len(group.plans) * (recorder.REPEATS + recorder.WARMUP + 3)
        flops += steps * (3 * report.forward_flops + report.recompute_flops)
    assert flops / 45e12 < 360


def test_settings_that_are_not_given_are_the_models_own():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(uniform_mlp).parameters.items()
    }
    recording_set = sys.modules["helpers.recording._set"]
    assert recording_set.all_settings("uniform_mlp", {}) == defaults
    assert recording_set.all_settings("DocsMLP", {}) == {}
    assert isinstance(GROUPS[0].step.make_model(), DocsMLP)


# Found again


@pytest.fixture
def folder(made_up, tmp_path):
    """Two recordings that claim to be real, as real ones will; only here."""
    for gpu in ("GPU 1", "GPU 2"):
        real = dataclasses.replace(made_up, gpu=gpu, made_up=False)
        write(real, tmp_path / file_name(gpu, "none"))
    return tmp_path


def test_what_was_recorded_is_found_by_model_settings_and_rows(folder, made_up):
    found = recorded("uniform_mlp", SETTINGS, 64, folder)
    assert list(found) == [f"GPU {i}, torch none, 2000-01-01" for i in (1, 2)]
    pairs = found["GPU 1, torch none, 2000-01-01"]
    cases = {case.plan: case for case in made_up.cases if case.step == tiny()}
    assert set(pairs) == set(cases) and len(cases) == 10
    for plan, (report, base) in pairs.items():
        assert report.source == base.source == "recorded"
        assert report.plan == plan and base.plan == Plan()
        assert report.peak_bytes == cases[plan].measured.peak_bytes
        assert base.step_ms == cases[plan].base_ms
    assert (
        len(recorded("DocsMLP", {}, 32, folder)["GPU 2, torch none, 2000-01-01"]) == 8
    )


@pytest.mark.parametrize(
    ("model", "settings", "rows"),
    [
        ("uniform_mlp", SETTINGS, 65),
        ("uniform_mlp", SETTINGS | {"depth": 4}, 64),
        ("uniform_mlp", SETTINGS | {"heads": 4}, 64),
        ("DocsMLP", SETTINGS, 64),
        ("another", {}, 64),
        ("<lambda>", {}, 64),
    ],
)
def test_what_was_not_recorded_is_not_found(model, settings, rows, folder):
    assert recorded(model, settings, rows, folder) == {}


def test_without_recordings_there_is_nothing(tmp_path):
    assert recorded("uniform_mlp", SETTINGS, 64, tmp_path / "none") == {}
    if not COMMITTED:
        assert recordings() == []


def test_a_file_that_changes_is_read_anew(folder, made_up):
    path = next(folder.iterdir())
    assert len(recordings(folder)) == 2
    path.write_text("{")
    with pytest.raises(RecordingError, match="only a part"):
        recordings(folder)


# Drawn beside what is predicted and measured


def timed(report, ms):
    return dataclasses.replace(report, step_ms=ms, step_ms_quartiles=(ms - 1, ms + 1))


@pytest.fixture(scope="module")
def reports():
    with torch.device("meta"):
        batch = tiny().make_batch()
    return [predict(tiny().make_model, batch, plan) for plan in PLANS[:2]]


def test_recorded_times_are_grey_and_beside_the_measured_ones(reports):
    ax = Figure().add_subplot()
    none, plan = reports
    base, slower = timed(none, 10), timed(plan, 13)
    pairs = {none.plan: (base, base), plan.plan: (slower, base)}
    grey = Recorded("GPU, torch 2, today", pairs)
    note = "grey: GPU\ntorch 2, today, medians of 0 runs"
    plot_times(ax, {"none": none, "plan": plan}, grey)
    assert [text.get_text() for text in ax.texts] == ["10 ms", "13 ms\n+30 %", note]
    assert {line.get_color() for line in ax.lines} == {RECORDED}
    ax.clear()
    both = {"none": timed(none, 11), "plan": timed(plan, 110)}
    plot_times(ax, both, grey)
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    found = [(dot.get_color(), *dot.get_xydata()[0]) for dot in dots]
    assert [(color, y) for color, _, y in found] == [
        (INK, 11), (RECORDED, 10), (INK, 110), (RECORDED, 13),
    ]  # fmt: skip
    assert [round(x) for _, x, _ in found] == [0, 0, 1, 1]
    assert found[0][1] < 0 < found[1][1], "side by side"
    above = {text.get_text(): text.get_va() == "bottom" for text in ax.texts[:-1]}
    assert above == {
        "11 ms": True, "10 ms": True, "110 ms\n+900 %": True, "13 ms\n+30 %": True,
    }  # fmt: skip
    rises = {text.get_text(): text.xyann[1] for text in ax.texts}
    assert rises["11 ms"] > rises["10 ms"] + 10, "no room below: one above the other"
    ax.clear()
    plot_times(ax, {"none": timed(none, 12)}, grey)
    assert [text.get_va() for text in ax.texts[:2]] == ["bottom", "top"]


def test_recorded_plans_are_grey_dots_in_the_tradeoff(reports):
    ax, base = Figure().add_subplot(), timed(reports[0], 10)
    found = {PLANS[1]: (timed(reports[1], 15), base), PLANS[2]: (base, base)}
    plot_tradeoff(ax, reports, recorded=Recorded(pairs=found))
    grey, rings = ax.lines
    assert grey.get_markerfacecolor() == RECORDED
    assert grey.get_xdata().tolist() == [pytest.approx(50)]
    assert grey.get_ydata()[0] == rings.get_ydata()[1]
    assert rings.get_markerfacecolor() == "none"
    assert ax.get_xlabel().endswith("grey: recorded") and not ax.texts
    ax.clear()
    plot_tradeoff(ax, reports)
    assert len(ax.lines) == 1 and "recorded" not in ax.get_xlabel()


def test_the_labs_picture_shows_the_plans_that_were_tried_and_recorded(reports):
    none, plan = reports
    base = timed(none, 10)
    found = {none.plan: (base, base), plan.plan: (timed(plan, 13), base)}
    drawer = LabPicture()
    plain = drawer.draw(none, plan, reports)
    grey = drawer.draw(none, plan, reports, recorded=found)
    assert drawer.draw(none, plan, reports, recorded={}) == plain != grey
    other = {PLANS[2]: (timed(plan, 13), base)}
    assert drawer.draw(none, plan, reports, recorded=other) == plain
    assert drawer.draw(none, plan, reports, recorded=found) == grey
    assert LabPicture().draw(none, plan, reports, recorded=found) == grey


# The comparison


def test_a_worse_predictor_shows(made_up):
    case = made_up.cases[3]
    peak = case.measured.peak_bytes
    more = {"allocator_peak_bytes": peak + 1024, "padding_bytes": 300}
    measured = dataclasses.replace(case.measured, **more)
    other = dataclasses.replace(case, measured=measured)
    (one,) = compare(dataclasses.replace(made_up, cases=(other,)))
    assert one.error_bytes == -1024 and one.must_be_exact
    assert one.row()["measured_bytes"] - one.row()["predicted_bytes"] == 1024
    *_, wrong, total = lines([one])
    assert wrong == (
        f"  {case.plan}: predicted {peak:,} B, measured {peak + 1024:,} B, error "
        f"-1,024 B ({-102400 / (peak + 1024):+.3f} %); tensors +0 B, kernels' scratch "
        "-1,024 B; blocks were 300 B larger than what was asked for"
    )
    assert total.startswith("0 of 1 cases as predicted to the byte")


def test_a_gpu_is_held_against_predictions_for_its_own_kind(made_up):
    """Kernels' scratch depends on it."""
    step = Step("DocsMLP", {}, 8192)
    with on_gpu(H100), torch.device("meta"):
        report = predict(DocsMLP, step.make_batch())
    case = RecordedCase(step, report, report, base_ms=None)
    errors = []
    for kind in (H100, Gpu(40, 1024)):
        there = dataclasses.replace(made_up, cases=(case,), **kind._asdict())
        (one,) = compare(there)
        assert one.tensors_error_bytes == 0
        errors.append(one.error_bytes)
    assert errors == [0, -report.scratch_bytes] and report.scratch_bytes > 0


def test_only_optimizers_and_lower_precision_may_differ(made_up):
    exact = {
        (one.case.step.optimizer, one.case.step.precision)
        for one in compare(made_up)
        if one.must_be_exact
    }
    assert exact == {("none", "float32")}


def test_the_picture_has_a_grey_dot_for_each_case(made_up):
    comparisons = compare(made_up)
    ax = Figure().add_subplot()
    plot_comparison(ax, comparisons)
    line, exact = ax.lines
    assert len(exact.get_xdata()) == len(comparisons)
    assert exact.get_markerfacecolor() == RECORDED and not ax.texts
    unit = 2**20
    assert exact.get_xdata()[0] * unit == made_up.cases[0].measured.peak_bytes
    assert (exact.get_xdata() == exact.get_ydata()).all()


def test_the_picture_names_the_largest_error(made_up):
    one, other = compare(made_up)[:2]
    peak = other.predicted.peak_bytes
    worse = dataclasses.replace(other.predicted, allocator_peak_bytes=peak + 5120)
    ax = Figure().add_subplot()
    plot_comparison(ax, [one, dataclasses.replace(other, predicted=worse)])
    line, exact, wrong = ax.lines
    assert [len(dots.get_xdata()) for dots in (exact, wrong)] == [1, 1]
    assert wrong.get_ydata()[0] > wrong.get_xdata()[0]
    (text,) = ax.texts
    assert text.get_text() == f"+5,120 B ({512000 / peak:+.3f} %)"
