"""The pictures: what is drawn is the data, in the colours that mean it."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib import style
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from helpers.checkpointing import Plan
from helpers.measure import predict
from helpers.models import GPT, unequal_blocks, uniform_mlp
from helpers.plots import (
    COLORS,
    STYLE,
    extra_work,
    memory_axis,
    memory_unit,
    plot_agreement,
    plot_frontier,
    plot_fronts,
    plot_lines,
    plot_peaks,
    plot_ranks,
    plot_runs,
    plot_timeline,
    plot_times,
    plot_tradeoff,
)
from helpers.timeline import CATEGORIES

MIB = 2**20


@pytest.fixture
def ax():
    with style.context(STYLE):
        yield Figure().add_subplot()


@pytest.fixture(scope="module")
def reports():
    x = torch.empty(4096, 256, device="meta")
    plans = Plan(), Plan((("layer1", "layer2"), ("layer3", "layer4")))
    return [predict(lambda: uniform_mlp(4, 256), x, plan) for plan in plans]


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def layers_of(ax) -> list[str]:
    """Read the layers' names in the strip, which are the smallest texts."""
    return [text.get_text() for text in ax.texts if text.get_size() == 6.5]


def polygons(areas) -> list[tuple[str, np.ndarray]]:
    """Read the colour and the (n, 2) outline of every area that is filled."""
    colors = [to_hex(color).upper() for color in areas.get_facecolor()]
    outlines = [path.vertices for path in areas.get_paths()]
    return list(zip(colors, outlines, strict=True))


@pytest.mark.parametrize(
    ("top_bytes", "unit"), [(600, "B"), (9000, "KiB"), (5 * MIB, "MiB"), (2**32, "GiB")]
)
def test_a_memory_axis_starts_at_zero_and_carries_its_unit(ax, top_bytes, unit):
    size = memory_axis(ax, top_bytes)
    assert (size, unit) == memory_unit(top_bytes)
    assert ax.get_ylabel() == unit
    assert ax.get_ylim()[0] == 0 < top_bytes / size < ax.get_ylim()[1]


def test_a_timeline_is_stacked_to_the_level_of_every_event(ax, reports):
    timeline = reports[1].timeline
    plot_timeline(ax, timeline)
    areas = {color: outline[:, 1] for color, outline in polygons(ax.collections[0])}
    assert set(areas) <= set(COLORS.values())
    top = max(edges.max() for edges in areas.values())
    assert top * MIB == pytest.approx(timeline.peak_bytes)
    recomputed = timeline.levels()["recomputed"]
    height = np.ptp(areas[COLORS["recomputed"]])
    assert max(recomputed) > 0 and height * MIB >= max(recomputed) * 0.99


def test_a_timelines_peak_is_marked_with_value_and_cause(ax, reports):
    timeline = reports[0].timeline
    plot_timeline(ax, timeline)
    assert any(text.startswith("peak ") for text in texts(ax))
    assert any(text.startswith("backward: ") for text in texts(ax))
    (dot,) = ax.lines
    assert dot.get_markerfacecolor() == "white"  # hollow: predicted
    assert dot.get_ydata()[0] * MIB == pytest.approx(timeline.peak_bytes)


def test_a_timelines_strip_names_layers_and_phases(ax, reports):
    plot_timeline(ax, reports[1].timeline)
    assert {"forward", "backward", "recompute"} <= set(texts(ax))
    assert "".join(layers_of(ax)).startswith("1234")


@pytest.mark.parametrize(
    ("make_model", "sizes", "names"),
    [
        (unequal_blocks, (512, 64), {"wide", "pointwise", "deep", "narrow"}),
        (lambda: GPT(blocks=3, width=16, heads=2, vocabulary=20), None, {*"012"}),
    ],
    ids=["blocks by name", "blocks in a list"],
)
def test_a_strip_names_blocks_and_not_their_parts(ax, make_model, sizes, names):
    if sizes:
        make_model, batch = partial(make_model, sizes[1]), torch.empty(sizes)
    else:
        batch = torch.zeros(1, 8, dtype=torch.long)
    plot_timeline(ax, predict(make_model, batch).timeline)
    found = {*layers_of(ax)}
    assert names <= found and not {"0", "1"} & found - names


def test_names_of_rings_do_not_lie_on_one_another(ax, reports):
    plot_tradeoff(ax, [reports[0]] * 2 + [reports[1]], labels={0: "a", 1: "b", 2: "c"})
    places = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert places == {"a": 5, "b": -4, "c": 5}


def test_long_times_are_in_seconds(ax, reports):
    slow = dataclasses.replace(reports[0], step_ms=2000, step_ms_quartiles=(1900, 2100))
    plot_times(ax, {"none": slow})
    assert ax.get_ylabel() == "s"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["0", "1", "2", "3"]


def test_bars_are_as_high_as_the_categories(ax, reports):
    plot_peaks(ax, {"none": reports[0], "pairs": reports[1]})
    heights = [0, 0]
    for color, box in polygons(ax.collections[0]):
        place, height = round(box[:, 0].mean()), np.ptp(box[:, 1]) * MIB
        (category,) = (name for name, hue in COLORS.items() if hue == color)
        assert height == pytest.approx(list(reports)[place].categories[category])
        heights[place] += height
    assert heights == pytest.approx([r.peak_bytes for r in reports])
    named = {name.replace("_", " ") for name in CATEGORIES} & set(texts(ax))
    assert {"activation", "recomputed", "parameter"} <= named


def test_times_say_when_there_are_none_and_compare_when_there_are(ax, reports):
    plot_times(ax, {"none": reports[0], "pairs": reports[1]})
    assert texts(ax) == ["not yet\nmeasured"]
    timed = {
        name: dataclasses.replace(
            report, step_ms=ms, step_ms_quartiles=(ms - 1, ms + 1), repeats=5
        )
        for name, report, ms in zip(("none", "pairs"), reports, (10, 12), strict=True)
    }
    ax.clear()
    plot_times(ax, timed)
    assert texts(ax) == ["10 ms", "12 ms\n+20 %"]


def test_the_tradeoff_has_a_ring_for_each_prediction_and_a_dot_if_measured(ax, reports):
    timed = [
        dataclasses.replace(report, step_ms=ms, step_ms_quartiles=(ms, ms))
        for report, ms in zip(reports, (10, 12), strict=True)
    ]
    plot_tradeoff(ax, reports, [(timed[1], timed[0])], labels={1: "pairs"})
    rings, dots, named = (line.get_xydata().tolist() for line in ax.lines)
    peaks = [report.peak_bytes / MIB for report in reports]
    extra = [extra_work(report) for report in reports]
    assert rings == [list(point) for point in zip(extra, peaks, strict=True)]
    assert extra[0] == 0 < extra[1]
    assert dots == [[pytest.approx(20), peaks[1]]]
    assert named == rings[1:]
    faces = [line.get_markerfacecolor() for line in ax.lines]
    assert faces[0] == faces[2] == "none" != faces[1]
    assert texts(ax) == ["pairs"]


def test_fronts_are_lines_of_rings_with_a_dot_for_each_step_that_ran(ax, reports):
    plain, pairs = reports
    series = {"planned": [pairs, plain], "by hand": [plain]}
    plot_fronts(ax, series, cloud=[plain], measured=[pairs])
    cloud, planned, by_hand, dots = ax.lines
    ring, dot = [(extra_work(r), r.peak_bytes / MIB) for r in reports]
    assert list(zip(*planned.get_data(), strict=True)) == [ring, dot]
    for line, places in ((cloud, [ring]), (by_hand, [ring]), (dots, [dot])):
        assert list(zip(*line.get_data(), strict=True)) == places
    assert planned.get_markerfacecolor() == by_hand.get_markerfacecolor() == "white"
    assert dots.get_markerfacecolor() == planned.get_color() != by_hand.get_color()
    assert texts(ax) == ["planned", "by hand", "no checkpointing"]
    assert ax.get_xlabel().endswith("○ predicted  ● measured")


def test_the_tradeoff_has_room_for_a_plan_that_was_measured_faster(ax, reports):
    timed = [
        dataclasses.replace(report, step_ms=ms, step_ms_quartiles=(ms, ms))
        for report, ms in zip(reports, (10, 6), strict=True)
    ]
    plot_tradeoff(ax, reports, [(timed[1], timed[0])])
    assert ax.get_xlim()[0] < -40


def test_lines_are_named_at_their_ends(ax):
    plot_lines(ax, [1, 2], {"relu": [MIB, 4 * MIB], "gelu": [2, 3]}, xlabel="pieces")
    assert texts(ax) == ["relu", "gelu"]
    assert ax.get_xlabel() == "pieces"
    assert list(ax.lines[0].get_ydata()) == [1, 4]


def test_formula_prediction_and_measurement_are_told_apart(ax, reports):
    peaks = [(r.peak_bytes - r.baseline_bytes) / MIB for r in reports]
    by_hand, dry = {"gelu": [MIB, 2 * MIB]}, {"gelu": reports}
    plot_agreement(ax, [1, 2], by_hand, dry, dry, xlabel="pieces")
    line, rings, dots = ax.lines
    assert list(line.get_ydata()) == [1, 2] and line.get_marker() == "None"
    assert list(rings.get_ydata()) == list(dots.get_ydata()) == peaks
    assert rings.get_markerfacecolor() == "white" != dots.get_markerfacecolor()
    assert rings.get_markersize() > dots.get_markersize()
    assert texts(ax) == ["gelu"] and "● measured" in ax.get_xlabel()
    ax.clear()
    plot_agreement(ax, [1, 2], by_hand, dry, xlabel="pieces")
    assert len(ax.lines) == 2 and "measured" not in ax.get_xlabel()


def test_the_frontier_fills_what_was_run_and_starts_at_zero(ax):
    limits = [8 * MIB, 16 * MIB]
    rows = {"none": [100, 200], "pairs": [150, 300]}
    plot_frontier(ax, limits, rows, {"none": {}, "pairs": {16 * MIB: 300}})
    none, pairs, run = ax.lines
    assert list(none.get_xdata()) == list(pairs.get_xdata()) == [8, 16]
    assert list(none.get_ydata()) == [100, 200]
    assert list(zip(*run.get_data(), strict=True)) == [(16, 300)]
    assert none.get_markerfacecolor() == pairs.get_markerfacecolor() == "white"
    assert run.get_markerfacecolor() == run.get_color() == pairs.get_color()
    assert texts(ax) == ["none", "pairs"] and "MiB" in ax.get_xlabel()
    assert ax.get_xlim()[0] == ax.get_ylim()[0] == 0


def test_every_run_is_a_dot_and_the_median_a_line(ax):
    plot_runs(ax, {"none": [9.0, 1.0, 2.0], "alone": [2.5, 3.0, 2.0]})
    dots, line, *others = ax.lines
    assert list(dots.get_ydata()) == [9, 1, 2] and list(dots.get_xdata()) == [1, 2, 3]
    assert list(line.get_ydata()) == [2, 2] and list(others[1].get_ydata()) == [2.5] * 2
    assert dots.get_color() == line.get_color() != others[0].get_color()
    assert texts(ax) == ["none: 2 ms", "alone: 2.5 ms"]
    low, high = (text.xyann[1] for text in ax.texts)
    assert high - low >= 14  # their lines are half a millisecond apart
    assert ax.get_ylim()[0] == 0


def test_ranks_are_bars_from_the_top_with_their_numbers(ax):
    plot_ranks(ax, {"wide": 4.0, "narrow": 0.5, "noisy": None}, number="{:.2f}")
    assert [bar.get_width() for bar in ax.patches] == [4, 0.5, 0]
    assert texts(ax) == ["4.00", "0.50", "–"] and ax.yaxis_inverted()
    assert to_hex(ax.patches[0].get_facecolor()) == "#ffffff"
    ax.clear()
    plot_ranks(ax, {"wide": 4.0}, measured=True)
    assert to_hex(ax.patches[0].get_facecolor()) != "#ffffff"
