"""What one GPU recorded is found for a picture, named in it, and drawn in grey."""

import dataclasses

import pytest
from matplotlib.figure import Figure

from helpers.checkpointing import Plan
from helpers.plots import (
    INK,
    RECORDED,
    plot_lines,
    plot_peaks,
    plot_times,
    plot_tradeoff,
)
from helpers.recording import NOTHING, Recorded, all_recorded, find_recorded, recordings
from helpers.recording.recorded import read, write
from tests.recording.made_up import FIXTURE, PLANS, SETTINGS, tiny

TINY = "uniform_mlp", SETTINGS, 64
OLD, NEW = "A100, torch none, 2001-01-01", "H100, torch none, 2002-02-02"
KIB = 2**10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recordings that claim to be real, the older one first by name."""
    folder = tmp_path_factory.mktemp("recordings")
    for gpu, date in (("A100", "2001-01-01"), ("H100", "2002-02-02")):
        real = dataclasses.replace(read(FIXTURE), gpu=gpu, date=date, made_up=False)
        write(real, folder / real.file_name)
    return folder


@pytest.fixture(scope="module")
def gpu(folder):
    return find_recorded(*TINY, folder=folder)


@pytest.fixture(scope="module")
def reports():
    return [tiny().predicted(plan, "cuda") for plan in PLANS]


@pytest.fixture
def ax():
    return Figure().add_subplot()


def drawn(ax) -> list:
    return [line for line in ax.lines if len(line.get_xdata())]


def grey(ax) -> list:
    return [line for line in drawn(ax) if line.get_markerfacecolor() == RECORDED]


def notes(ax) -> list[str]:
    return [t.get_text() for t in ax.texts if t.get_text().startswith("grey: ")]


# Found


def test_the_newest_is_found_unless_another_is_named(folder):
    assert [recording.label for recording in recordings(folder)] == [NEW, OLD]
    assert find_recorded(*TINY, folder=folder).label == NEW
    assert find_recorded(*TINY, gpu="a100", folder=folder).label == OLD
    with pytest.raises(
        ValueError, match=f"no recording is of 'V100'; .*: {NEW}; {OLD}"
    ):
        find_recorded(*TINY, gpu="V100", folder=folder)


def test_what_nobody_recorded_is_nothing(folder, tmp_path):
    assert find_recorded("uniform_mlp", SETTINGS, 65, folder=folder) is NOTHING
    assert find_recorded("uniform_mlp", SETTINGS, 65, "A100", folder) is NOTHING
    assert find_recorded(*TINY, folder=tmp_path) is NOTHING
    with pytest.raises(ValueError, match="'A100'; there are: none"):
        find_recorded(*TINY, gpu="A100", folder=tmp_path)


def test_a_plan_is_found_by_itself_and_by_its_text(gpu):
    plan = PLANS[1]
    assert gpu.pair(plan) == gpu.pair(str(plan)) == gpu.pairs[plan]
    assert gpu.pair(Plan((("layer2", "layer3"),))) is None is NOTHING.pair(plan)


def test_reports_are_paired_with_no_checkpointing_of_the_same_run(folder):
    found = all_recorded(*TINY, folder=folder)
    assert [one.label for one in found] == [NEW, OLD]
    groups = [group for group in read(FIXTURE).groups if group.step == tiny()]
    for plan, (report, base) in found[0].pairs.items():
        group = next(group for group in groups if plan in group.plans)
        for one, wanted in ((report, plan), (base, Plan())):
            (measured,) = (m for m in group.measured if m.plan == wanted)
            assert one == dataclasses.replace(measured, source="recorded")
    assert len(found[0].pairs) == 10 and len(groups) == 2
    assert len(all_recorded("DocsMLP", {}, 32, folder)[1].pairs) == 8


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
    assert all_recorded(model, settings, rows, folder) == []


def test_without_recordings_there_is_nothing(tmp_path):
    assert all_recorded(*TINY, folder=tmp_path / "none") == []
    assert recordings(tmp_path / "none") == []


# Drawn


def test_nothing_recorded_changes_no_picture(reports):
    def texts_and_lines(recorded):
        figure, named = Figure(), dict(zip("abcd", reports, strict=True))
        ax, other, third = figure.subplots(3)
        plot_tradeoff(ax, reports, **recorded)
        plot_peaks(other, named, **recorded)
        plot_times(third, named, **recorded)
        return [
            ([t.get_text() for t in ax.texts], len(ax.lines), ax.get_xlabel())
            for ax in figure.axes
        ]

    assert texts_and_lines({}) == texts_and_lines({"recorded": NOTHING})


def test_the_trade_off_names_its_gpu_and_takes_the_rows_of_a_table(ax, gpu, reports):
    rows = [dataclasses.replace(r, plan=str(r.plan)) for r in reports]
    plot_tradeoff(ax, rows, recorded=gpu)
    (dots,) = grey(ax)
    pairs = [gpu.pairs[plan] for plan in PLANS]
    assert dots.get_xdata() == pytest.approx(
        [100 * (report.step_ms / base.step_ms - 1) for report, base in pairs]
    )
    assert (dots.get_ydata() * KIB).tolist() == [r.peak_bytes for r, _ in pairs]
    assert notes(ax) == ["grey: H100\ntorch none, 2002-02-02"]
    assert "recorded" not in ax.get_xlabel()


def test_axes_that_share_x_have_room_for_the_dots_of_both(gpu, reports):
    first, second = Figure().subplots(1, 2, sharex=True)
    slow = {plan: (r, dataclasses.replace(r, step_ms=r.step_ms / 9)) for plan, (r, _)
            in gpu.pairs.items()}  # fmt: skip
    plot_tradeoff(first, reports, recorded=dataclasses.replace(gpu, pairs=slow))
    plot_tradeoff(second, reports)
    assert second.get_xlim() == first.get_xlim() and first.get_xlim()[1] > 800


def test_a_recorded_peak_is_an_arrow_at_its_height(ax, gpu, reports):
    none, alone = reports[:2]
    other = dataclasses.replace(reports[1], plan=Plan((("layer2", "layer3"),)))
    plot_peaks(ax, {"none": none, "other": other, "alone": alone}, recorded=gpu)
    found = [arrow.get_xydata()[0].tolist() for arrow in grey(ax)]
    assert [round(x) for x, _ in found] == [0, 2], "the plan between is not recorded"
    assert [y * KIB for _, y in found] == [
        gpu.pairs[report.plan][0].peak_bytes for report in (none, alone)
    ]
    assert notes(ax) == ["grey: H100\ntorch none, 2002-02-02"]


def test_a_line_has_a_grey_dot_where_its_plan_was_recorded(ax, gpu, reports):
    plans = [*PLANS[:2], Plan((("layer2", "layer3"),))]
    series = {"gelu": [r.peak_bytes for r in reports[:3]], "relu": [1, 2, 3]}
    found = {"gelu": gpu, "relu": NOTHING}
    plot_lines(ax, [1, 2, 4], series, xlabel="", recorded=found, plans=plans)
    dots = [dot.get_xydata()[0].tolist() for dot in grey(ax)]
    peaks = [gpu.pairs[plan][0].peak_bytes for plan in plans[:2]]
    assert dots == [[x, peak / KIB] for x, peak in zip([1, 2], peaks, strict=True)]
    assert notes(ax) == ["grey: H100\ntorch none, 2002-02-02"]


def timed(report, ms):
    return dataclasses.replace(report, step_ms=ms, step_ms_quartiles=(ms - 1, ms + 1))


def test_recorded_times_are_grey_and_beside_the_measured_ones(ax, reports):
    none, plan = reports[:2]
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


def test_recorded_plans_are_grey_dots_in_the_tradeoff(ax, reports):
    reports, base = reports[:2], timed(reports[0], 10)
    found = {PLANS[1]: (timed(reports[1], 15), base), PLANS[2]: (base, base)}
    plot_tradeoff(ax, reports, recorded=Recorded(pairs=found))
    grey, rings = drawn(ax)
    assert grey.get_markerfacecolor() == RECORDED
    assert grey.get_xdata().tolist() == [pytest.approx(50)]
    assert grey.get_ydata()[0] == rings.get_ydata()[1]
    assert rings.get_markerfacecolor() == "none"
    assert ax.get_xlabel().endswith("grey: recorded") and not ax.texts
    ax.clear()
    plot_tradeoff(ax, reports)
    assert len(drawn(ax)) == 1 and "recorded" not in ax.get_xlabel()
