"""Predictions of today, held against what was recorded: exact, told, and drawn."""

import dataclasses

import pytest
import torch
from matplotlib.figure import Figure

from helpers.allocator import H100, Gpu, on_gpu
from helpers.measure import predict
from helpers.models import DocsMLP
from helpers.plots import RECORDED, plot_comparison
from helpers.recording import FOLDER, compared, error_table, summed_up
from helpers.recording.recorded import Group, Step, read
from tests.recording.made_up import FIXTURE

COMMITTED = sorted(FOLDER.glob("*.json"))


@pytest.fixture(scope="module")
def comparisons():
    return compared(read(FIXTURE))


def must_be_exact(one) -> bool:
    """Say whether not one byte may be wrong: in float32, without an optimizer."""
    return (one.step.optimizer, one.step.precision) == ("none", "float32")


@pytest.mark.parametrize("path", [*COMMITTED, FIXTURE], ids=lambda path: path.stem)
def test_what_was_recorded_is_what_is_predicted_today(path, comparisons):
    found = comparisons if path == FIXTURE else compared(read(path))
    assert any(map(must_be_exact, found))
    for one in found:
        if must_be_exact(one):
            assert one.error_bytes == 0, str(one)
            assert one.predicted.after_forward_bytes == one.measured.after_forward_bytes
        assert abs(one.error) <= 0.001, str(one)


def off(one, more_bytes: int, of: str = "predicted", **changes: int):
    """Change a comparison's peak."""
    peak = {"allocator_peak_bytes": one.measured.peak_bytes + more_bytes}
    return dataclasses.replace(
        one, **{of: dataclasses.replace(getattr(one, of), **peak | changes)}
    )


def test_a_worse_predictor_shows(comparisons):
    peak = comparisons[3].measured.peak_bytes
    one = off(comparisons[3], 1024, "measured", padding_bytes=300)
    assert one.error_bytes == -1024
    assert str(one) == (
        f"{one.step}, {one.measured.plan}: predicted {peak:,} B, measured "
        f"{peak + 1024:,} B, error -1,024 B ({-102400 / (peak + 1024):+.3f} %); "
        "tensors +0 B, kernels' scratch -1,024 B; blocks were 300 B larger than what "
        "was asked for"
    )
    assert summed_up([one]).startswith("0 of 1 cases as predicted to the byte; the ")
    assert summed_up([]).startswith("0 of 0 cases")


def test_a_gpu_is_held_against_predictions_for_its_own_kind():
    """Kernels' scratch depends on it."""
    step = Step("DocsMLP", {}, 8192)
    with on_gpu(H100), torch.device("meta"):
        report = predict(DocsMLP, step.make_batch())
    group = Group(step, (report.plan,), (report,))
    errors = []
    for kind in (H100, Gpu(40, 1024, (7, 5))):
        changes = {"groups": (group,), **kind._asdict()}
        (one,) = compared(dataclasses.replace(read(FIXTURE), **changes))
        assert one.predicted.peak_bytes == one.measured.peak_bytes
        errors.append(one.error_bytes)
    assert errors == [0, -report.scratch_bytes] and report.scratch_bytes > 0


def test_the_table_counts_cases_and_has_the_largest_error(comparisons):
    first, *others = comparisons
    found = error_table([off(first, -3), *others])
    docs = found[found.model == "DocsMLP"].iloc[0]
    assert docs.drop("model").to_dict() == {
        "rows": 32,
        "optimizer": "none",
        "precision": "float32",
        "cases": 8,
        "exact": 7,
        "largest_error_bytes": 3,
    }
    assert found.cases.sum() == len(comparisons) == found.exact.sum() + 1
    assert len(found) == len({tuple(one) for one in found.iloc[:, :4].values})


def test_the_picture_has_a_grey_dot_for_each_case(comparisons):
    ax = Figure().add_subplot()
    plot_comparison(ax, comparisons)
    _, exact = ax.lines
    assert len(exact.get_xdata()) == len(comparisons)
    assert exact.get_markerfacecolor() == RECORDED and not ax.texts
    assert exact.get_xdata()[0] * 2**20 == comparisons[0].measured.peak_bytes
    assert (exact.get_xdata() == exact.get_ydata()).all()


def test_the_picture_names_the_largest_error(comparisons):
    one, other = comparisons[:2]
    ax = Figure().add_subplot()
    plot_comparison(ax, [one, off(other, 5120)])
    _, exact, wrong = ax.lines
    assert [len(dots.get_xdata()) for dots in (exact, wrong)] == [1, 1]
    assert wrong.get_ydata()[0] > wrong.get_xdata()[0]
    (text,) = ax.texts
    share = 512000 / other.measured.peak_bytes
    assert text.get_text() == f"+5,120 B ({share:+.3f} %)"
