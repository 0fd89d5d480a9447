"""What one GPU recorded is found for a picture, named in it, and drawn in grey."""

import dataclasses

import pytest
import torch
from matplotlib.figure import Figure

from helpers import planner
from helpers.checkpointing import Plan
from helpers.measure import predict
from helpers.models import MLP, uniform_mlp
from helpers.plots import plot_lines, plot_peaks, plot_times, plot_tradeoff
from helpers.plots._axes import RECORDED
from helpers.recording._set import NAMED, WAIST, WAIST_NAMED, groups, segments
from helpers.recording.compare import compare, table
from helpers.recording.file import file_name, read, write
from helpers.recording.recorded import NOTHING, find_recorded, recordings
from tests.recording.made_up import FIXTURE, PLANS, tiny

SETTINGS = {"depth": 3, "width": 16, "activation": "gelu"}
TINY = "uniform_mlp", SETTINGS, 64
OLD, NEW = "A100, torch none, 2001-01-01", "H100, torch none, 2002-02-02"
KIB = 2**10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two recordings that claim to be real, the older one first by name."""
    folder = tmp_path_factory.mktemp("recordings")
    for gpu, date in (("A100", "2001-01-01"), ("H100", "2002-02-02")):
        real = dataclasses.replace(read(FIXTURE), gpu=gpu, date=date, made_up=False)
        write(real, folder / file_name(gpu, "none"))
    return folder


@pytest.fixture(scope="module")
def gpu(folder):
    return find_recorded(*TINY, folder=folder)


@pytest.fixture(scope="module")
def reports():
    with torch.device("meta"):
        batch = tiny().make_batch()
    return [predict(tiny().make_model, batch, plan) for plan in PLANS]


@pytest.fixture
def ax():
    return Figure().add_subplot()


def grey(ax) -> list:
    return [line for line in ax.lines if line.get_markerfacecolor() == RECORDED]


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


# Summed up, and complete


def test_the_table_counts_cases_and_has_the_largest_error():
    comparisons = compare(read(FIXTURE))
    first, *others = comparisons
    off = {
        name: getattr(first.predicted, name) - 3
        for name in ("peak_bytes", "allocator_peak_bytes")
    }
    worse = dataclasses.replace(
        first, predicted=dataclasses.replace(first.predicted, **off)
    )
    found = table([worse, *others])
    docs = found[found.model == "DocsMLP"].iloc[0]
    assert (docs.rows, docs.cases, docs.exact, docs.largest_error_bytes) == (
        32,
        8,
        7,
        3,
    )
    assert found.cases.sum() == len(comparisons) == found.exact.sum() + 1
    assert len(found) == len({tuple(one) for one in found.iloc[:, :4].values})


@pytest.mark.parametrize(
    ("factory", "settings", "names"),
    [
        (uniform_mlp, {"depth": 8, "width": 1024, "activation": "gelu"}, NAMED[8]),
        (uniform_mlp, {"depth": 8, "width": 1024, "activation": "relu"}, NAMED[8]),
        (MLP, {"widths": WAIST, "activation": "gelu"}, WAIST_NAMED),
    ],
    ids=["gelu", "relu", "waist"],
)
def test_the_plans_worth_having_are_recorded(factory, settings, names):
    """The planner says which they are; those of notebook 09's slider and pictures."""
    x = torch.empty(8192, 1024, device="meta")
    front = planner.pareto(planner.profile(factory(**settings), x))
    named = {Plan(), *map(segments, names.split(", "))}
    assert {plan for *_, plan in front} <= named
    recorded = {
        plan
        for group in groups()
        if group.step.model == factory.__name__
        and settings.items() <= group.step.settings.items()
        and (group.step.rows, group.step.optimizer) == (8192, "none")
        for plan in group.plans
    }
    assert named <= recorded


def test_a_plan_is_read_off_numbers():
    assert segments("1-3 5") == Plan((("layer1", "layer2", "layer3"), ("layer5",)))
