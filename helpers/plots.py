"""The workbook's pictures: each function draws one thing on one axes.

One hue has one meaning everywhere. What is predicted is hollow, what is measured is
filled. Memory axes start at zero.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.collections import PolyCollection
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator

from helpers.report import StepReport
from helpers.timeline import Timeline
from helpers.tracker import CATEGORIES
from helpers.units import format_bytes, format_change, format_ms

STYLE = Path(__file__).with_name("workbook.mplstyle")
COLORS = {
    "parameter": "#404040",
    "optimizer_state": "#BFBFBF",
    "input": "#F0E442",
    "gradient": "#808080",
    "activation": "#D55E00",
    "recomputed": "#0072B2",
    "temporary": "#56B4E9",
}
LABEL_COLORS = {"input": "#8F8500", "optimizer_state": "#999999"}  # to be read on white
PHASE_COLORS = {
    "forward": "#F8E8DC",
    "backward": "#E4E4E4",
    "recompute": "#B5D3EA",
    "optimizer": "#F4F4F4",
}
INK, QUIET = "#222222", "#707070"
RECORDED = "#A8A8A8"  # what another machine measured: filled, and grey
LINES = ("#222222", "#009E73", "#CC79A7", "#A6761D")  # hues that mean nothing else


def memory_unit(top_bytes: int) -> tuple[int, str]:
    """Choose the unit of a memory axis: its size in bytes and its name."""
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if top_bytes >= 2 * size:
            return size, name
    return 1, "B"


def memory_axis(ax: Axes, top_bytes: int, below: float = 0) -> int:
    """Make y a memory axis from zero to a little over ``top_bytes``.

    Args:
        below: room under zero, as a share of the axis.

    Returns:
        The size of its unit in bytes; what is drawn is divided by it.
    """
    size, name = memory_unit(top_bytes)
    top = 1.16 * top_bytes / size
    if ax.get_ylim() == (-below * top, top) and ax.get_ylabel() == name:
        return size  # making ticks anew takes longer than all the rest
    ax.set_ylim(-below * top, top)
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, top)
    ax.set_yticks([tick for tick in ticks if 0 <= tick <= top])
    ax.set_ylabel(name)
    return size


def plot_timeline(
    ax: Axes,
    timeline: Timeline,
    *,
    top_bytes: int | None = None,
    length: int | None = None,
    measured: bool = False,
) -> None:
    """Draw what is alive through one step, stacked by category, with its peak marked.

    The strip under zero says what is running: the phase by colour, the layer by name.

    Args:
        top_bytes: upper end of the memory axis, to compare several; default: the peak.
        length: right end of the x axis, in allocations and releases.
        measured: whether the peak's mark is filled.
    """
    size = memory_axis(ax, top_bytes or timeline.peak_bytes, below=0.17)
    start = timeline.first_allocation
    rows = timeline.levels()
    stack = np.array([rows[category][start:] for category in CATEGORIES]) / size
    # Each level holds until the next event: repeat it, so that the steps are square.
    places = np.repeat(np.arange(stack.shape[1] + 1), 2)[1:-1]
    edges = np.vstack([np.zeros(len(places)), np.repeat(stack, 2, axis=1).cumsum(0)])
    outline = np.concatenate([places, places[::-1]])
    areas = {
        COLORS[category]: np.column_stack([outline, np.append(low, high[::-1])])
        for category, low, high in zip(CATEGORIES, edges, edges[1:], strict=False)
        if (high > low).any()
    }
    _add_polygons(ax, list(areas.values()), list(areas), lw=0)
    ax.set_xlim(0, length or places[-1])
    ax.xaxis.set_visible(False)
    _plot_strip(ax, timeline)
    _mark_peak(ax, timeline, size, measured)


def _add_polygons(
    ax: Axes, polygons: Sequence[np.ndarray], colors: Sequence[str], **style
) -> None:
    """Fill (n, 2) outlines by one artist, several times as fast as an artist each."""
    areas = PolyCollection(polygons, facecolors=colors, **style)
    ax.add_collection(areas, autolim=False)


def _box(left: float, bottom: float, width: float, height: float) -> np.ndarray:
    """Outline a rectangle."""
    right, top = left + width, bottom + height
    return np.array([(left, bottom), (right, bottom), (right, top), (left, top)])


def timeline_length(timeline: Timeline) -> int:
    """Count the events that ``plot_timeline`` draws."""
    return len(timeline.events) - timeline.first_allocation + 1


def _mark_peak(ax: Axes, timeline: Timeline, size: int, measured: bool) -> None:
    """Mark the peak with its value and its cause, on the side where there is room."""
    event = timeline.at_peak().event
    x = timeline.peak_place + 1.5 - timeline.first_allocation
    y = timeline.peak_bytes / size
    ax.plot(x, y, "o", ms=5, color=INK, mfc=INK if measured else "white", zorder=5)
    fits_right = x < 0.55 * ax.get_xlim()[1]
    layer = _layer(event.allocation.module)
    cause = " ".join(filter(None, (event.allocation.op, "in", layer or "the loss")))
    for text, rise, style in (
        (f"peak {format_bytes(timeline.peak_bytes)}", 9, {"weight": "bold"}),
        (f"{event.phase}: {cause}", 0, {"color": QUIET, "size": 7.5}),
    ):
        ax.annotate(
            text,
            (x, y),
            (8 if fits_right else -8, rise),
            textcoords="offset points",
            ha="left" if fits_right else "right",
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            **({"color": INK} | style),
        )


def _layer(module: str) -> str:
    """Name the layer that a module lies in: up to its first number, blocks.3 say."""
    layer = re.match(r"(?:[^.\d]+\.)*[^.\d]*\d[^.]*", module)
    return layer[0] if layer else module.partition(".")[0]


def _plot_strip(ax: Axes, timeline: Timeline) -> None:
    """Draw what is running, under zero: a box for each layer in its phase's colour."""
    running, what = ("forward", ""), []
    for event in timeline.events[timeline.first_allocation :]:
        if event.kind == "alloc":
            running = (event.phase, _layer(event.allocation.module))
        what.append(running)
    bottom, width, place = ax.get_ylim()[0], ax.get_xlim()[1], 0
    box_bottom, boxes, colors, labels, recomputed = 0.5 * bottom, [], [], [], []
    for (phase, layer), group in groupby(what):
        length = len(list(group))
        boxes.append(_box(place, box_bottom, length, -0.9 * box_bottom))
        colors.append(PHASE_COLORS[phase])
        if phase == "recompute":
            recomputed.append(place)
        label = "".join(filter(str.isdigit, layer)) or layer[:6]
        if label and length > 0.014 * width * len(label):
            labels.append((place + length / 2, 0.54 * box_bottom, label))
        place += length
    _add_polygons(ax, boxes, colors, edgecolor="w")
    ax.add_artist(SmallLabels(labels))
    for text, x, align, color in (
        ("forward", 0, "left", "#A85B20"),
        ("backward", place, "right", QUIET),
        ("recompute", max(recomputed[:1] + [0.14 * width]), "left", "#0072B2"),
    ):
        if text != "recompute" or recomputed:
            style = {"ha": align, "va": "center", "size": 7, "color": color}
            ax.text(
                min(x, 0.7 * place) if align == "left" else x,
                0.78 * bottom,
                text,
                **style,
            )


class SmallLabels(Artist):
    """Many short texts, centred on their points: one artist draws them faster."""

    def __init__(self, labels: Sequence[tuple[float, float, str]]) -> None:
        super().__init__()
        self.labels = labels
        self.set_zorder(4)

    def draw(self, renderer: RendererBase) -> None:
        """Draw every text without a ``Text`` of its own."""
        font, pen = FontProperties(size=6.5), renderer.new_gc()
        pen.set_foreground(INK)
        top = renderer.height if renderer.flipy() else 0
        for x, y, label in self.labels:
            x, y = self.axes.transData.transform((x, y))
            width, height, _ = renderer.get_text_width_height_descent(
                label, font, False
            )
            renderer.draw_text(
                pen, x - width / 2, abs(top - y) + height / 2, label, font, 0
            )
        pen.restore()


def plot_peaks(
    ax: Axes, reports: Mapping[str, StepReport], *, top_bytes: int | None = None
) -> None:
    """Draw what is alive at each report's peak, a bar each, categories named beside."""
    top = top_bytes or max(report.peak_bytes for report in reports.values())
    size = memory_axis(ax, top)
    boxes, colors = [], []
    for place, report in enumerate(reports.values()):
        bottom = 0.0
        for category in CATEGORIES:
            if height := report.categories.get(category, 0) / size:
                boxes.append(_box(place - 0.37, bottom, 0.74, height))
                colors.append(COLORS[category])
                bottom += height
        _label_above(ax, place, bottom, f"{bottom:,.1f}", weight="bold")
    _add_polygons(ax, boxes, colors, edgecolor="white", linewidth=0.6)
    _label_plans(ax, reports)
    _label_categories(ax, list(reports.values()), size)


def _label_plans(ax: Axes, reports: Mapping[str, StepReport]) -> None:
    ax.set_xlim(-0.6, len(reports) - 0.4)
    if [tick.get_text() for tick in ax.get_xticklabels()] != list(reports):
        ax.set_xticks(range(len(reports)), list(reports))


def _label_above(
    ax: Axes, x: float, y: float, text: str, rise: float = 3, **style
) -> None:
    ax.annotate(
        text,
        (x, y),
        (0, rise),
        textcoords="offset points",
        ha="center",
        **({"color": INK, "va": "bottom"} | style),
    )


def _label_categories(ax: Axes, reports: Sequence[StepReport], size: int) -> None:
    """Name the categories to the right of the last bar, pushed apart to be readable."""
    gap = 0.072 * ax.get_ylim()[1]
    last = reports[-1].categories
    shown = {
        category
        for report in reports
        for category, n_bytes in report.categories.items()
        if n_bytes > 0.01 * report.peak_bytes
    }
    bottom = floor = 0.0
    for category in CATEGORIES:
        height = last.get(category, 0) / size
        if category in shown:
            floor = max(bottom + height / 2, floor)
            ax.text(
                len(reports) - 0.55,
                floor,
                category.replace("_", " "),
                va="center",
                size=8,
                weight="bold",
                color=LABEL_COLORS.get(category, COLORS[category]),
            )
            floor += gap
        bottom += height


def plot_times(
    ax: Axes,
    reports: Mapping[str, StepReport],
    recorded: Mapping[str, StepReport] | None = None,
) -> None:
    """Draw median step times with their quartiles, and the change from the first.

    Args:
        recorded: what another machine measured, by the same names; drawn in grey.
    """
    timed = [
        ({name: r for name, r in found.items() if r.step_ms is not None}, color)
        for found, color in ((reports, INK), (recorded or {}, RECORDED))
    ]
    highs = [r.step_ms_quartiles[1] for found, _ in timed for r in found.values()]
    top = max(highs, default=0.0)
    for place, name in enumerate(reports):
        here = [(found, color) for found, color in timed if name in found]
        for found, color in here:
            side = (len(here) - 1) * (-0.13 if color == INK else 0.13)
            above = [other[name].step_ms - found[name].step_ms for other, _ in here]
            is_close = any(0 < ms < 0.35 * top for ms in above)
            _mark_time(ax, place + side, found, name, color, below=is_close)
    _label_plans(ax, reports)
    ax.set_ylim(0, top * 1.5 or 1)
    ax.set_ylabel("ms")
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, top * 1.4)
    ax.set_yticks(ticks[ticks <= top * 1.5] if top else [])
    if not top:
        ax.text(
            0.5,
            0.5,
            "not yet\nmeasured",
            transform=ax.transAxes,
            ha="center",
            va="center",
            size=8,
            color=QUIET,
        )


def _mark_time(
    ax: Axes,
    x: float,
    reports: Mapping[str, StepReport],
    name: str,
    color: str,
    below: bool,
) -> None:
    """Draw one median with its quartiles, and write it above or below."""
    report, first = reports[name], next(iter(reports.values()))
    low, high = report.step_ms_quartiles
    ax.plot([x, x], [low, high], color=color, lw=6, alpha=0.25)
    ax.plot(x, report.step_ms, "o", ms=5, color=color)
    text = format_ms(report.step_ms)
    if report is not first:
        text += f"\n{format_change(report.step_ms, first.step_ms)}"
    ink = INK if color == INK else QUIET
    if below:
        _label_above(ax, x, low, text, size=8, color=ink, va="top", rise=-4)
    else:
        _label_above(ax, x, high, text, size=8, color=ink)


def extra_work(report: StepReport) -> float:
    """Recomputed FLOPs as % of a step without checkpointing.

    Backward multiplies twice for each forward product, so such a step is three
    forward passes.
    """
    return 100 * report.recompute_flops / max(1, 3 * report.forward_flops)


def plot_tradeoff(
    ax: Axes,
    predicted: Iterable[StepReport],
    measured: Sequence[tuple[StepReport, StepReport]] = (),
    *,
    recorded: Sequence[tuple[StepReport, StepReport]] = (),
    labels: Mapping[int, str] | None = None,
    top_bytes: int | None = None,
) -> None:
    """Draw memory against extra work: a ring for each prediction, a dot if measured.

    Args:
        predicted: reports, or rows of a sweep's table; a ring at their extra FLOPs.
        measured: pairs (report, the unchecked model's in the same run); a dot at the
            extra time.
        recorded: such pairs that another machine measured; a grey dot.
        labels: names for some of the rings, by place in ``predicted``.
        top_bytes: upper end of the memory axis; default: the highest peak.
    """
    predicted = list(predicted)
    size = memory_axis(ax, top_bytes or max(r.peak_bytes for r in predicted))
    rings = [(extra_work(r), r.peak_bytes / size) for r in predicted]
    dots, grey_dots = (
        [
            (100 * (report.step_ms / base.step_ms - 1), report.peak_bytes / size)
            for report, base in pairs
        ]
        for pairs in (measured, recorded)
    )
    named = [ring for place, ring in enumerate(rings) if place in (labels or {})]
    for points, style in (
        (grey_dots, {"mfc": RECORDED, "mec": RECORDED}),
        (rings, {"mfc": "none", "mec": "#A8A8A8"}),
        (dots, {"mfc": INK, "mec": INK}),
        (named, {"mfc": "none", "mec": INK}),
    ):
        ax.plot(*zip(*points or [((), ())], strict=True), "o", clip_on=False, **style)
    right = max([40.0, *(x for x, _ in rings + dots + grey_dots)])
    left = min([0.0, *(x for x, _ in dots + grey_dots)])  # times vary, and may be below
    ax.set_xlim(left - 0.03 * right, right * 1.1)
    for place, text in (labels or {}).items():
        x, y = rings[place]
        near_end = x > 0.8 * ax.get_xlim()[1]
        ax.annotate(
            text,
            (x, y),
            (-7 if near_end else 7, 5),
            textcoords="offset points",
            ha="right" if near_end else "left",
            size=8,
            color=INK,
        )
    ax.set_xlabel(
        "extra work, %: ○ FLOPs  ● time, grey: recorded"
        if grey_dots
        else "extra work, % of a step: ○ FLOPs  ● time"
    )


def plot_lines(
    ax: Axes,
    x: Sequence[float],
    series: Mapping[str, Sequence[int]],
    *,
    xlabel: str,
    measured: bool = False,
    colors: Sequence[str] = LINES,
) -> None:
    """Draw bytes against anything, a line for each series, named at its end.

    Args:
        colors: one for each series; give them where a hue has its meaning.
    """
    size = memory_axis(ax, max(max(values) for values in series.values()))
    for (name, values), color in zip(series.items(), colors, strict=False):
        y = np.asarray(values) / size
        ax.plot(x, y, "o-", ms=4.5, color=color, mfc=color if measured else "white")
        _name_at_end(ax, x[-1], y[-1], name, color)
    ax.set_xlabel(xlabel)


def plot_frontier(
    ax: Axes,
    limits_bytes: Sequence[int],
    predicted: Mapping[str, Sequence[int]],
    confirmed: Mapping[str, Mapping[int, int]],
) -> None:
    """Draw the largest batch against the memory limit, a line for each plan.

    Args:
        predicted: rows at each limit, by the plan's name, which is written at its end.
        confirmed: rows by limit, by the same names, where they were run.
    """
    size, unit = memory_unit(max(limits_bytes))
    x = np.asarray(limits_bytes) / size
    for (name, rows), color in zip(predicted.items(), LINES, strict=False):
        ax.plot(x, rows, "o-", ms=4.5, color=color, mfc="white")
        for limit_bytes, run in confirmed[name].items():
            ax.plot(limit_bytes / size, run, "o", ms=4.5, color=color)
        _name_at_end(ax, x[-1], rows[-1], name, color)
    ax.set_xlim(0, 1.03 * x[-1])
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"memory limit, {unit}:  ○ predicted  ● run")
    ax.set_ylabel("rows in the largest batch")


def plot_agreement(
    ax: Axes,
    x: Sequence[float],
    by_hand: Mapping[str, Sequence[float]],
    predicted: Mapping[str, Sequence[StepReport]],
    measured: Mapping[str, Sequence[StepReport]] | None = None,
    *,
    xlabel: str,
) -> None:
    """Draw peaks above the baseline: a formula's line, rings if predicted, dots if
    measured.

    Args:
        by_hand: bytes at each ``x``, by the series' name, which is written at its end.
        predicted, measured: a report at each ``x``, by the same names.
    """

    def above(reports: Sequence[StepReport]) -> np.ndarray:
        return np.array([r.peak_bytes - r.baseline_bytes for r in reports])

    rings = {name: above(reports) for name, reports in predicted.items()}
    size = memory_axis(ax, max(map(max, rings.values())))
    for (name, y), color in zip(rings.items(), LINES, strict=False):
        ax.plot(x, np.asarray(by_hand[name]) / size, color=color, lw=1)
        ax.plot(x, y / size, "o", ms=7, mfc="white", mec=color)
        if measured:
            ax.plot(x, above(measured[name]) / size, "o", ms=3, color=color)
        _name_at_end(ax, x[-1], y[-1] / size, name, color)
    dots = "  ● measured" if measured else ""
    ax.set_xlabel(f"{xlabel}:  — by hand  ○ predicted{dots}")


def _name_at_end(ax: Axes, x: float, y: float, name: str, color: str) -> None:
    ax.annotate(
        name,
        (x, y),
        (8, 0),
        textcoords="offset points",
        va="center",
        weight="bold",
        color=color,
        annotation_clip=False,
    )


def plot_runs(ax: Axes, times_ms: Mapping[str, Sequence[float]]) -> None:
    """Draw every run of a few plans in its turn, and each plan's median as a line."""
    longest = max(map(len, times_ms.values()))
    medians = {name: float(np.median(times)) for name, times in times_ms.items()}
    for (name, times), color in zip(times_ms.items(), LINES, strict=False):
        middle = medians[name]
        ax.plot(range(1, len(times) + 1), times, "o", ms=3.5, color=color)
        ax.plot([1, longest], [middle, middle], color=color, lw=1)
        rank = sorted(medians.values()).index(middle)
        ax.annotate(
            f"{name}: {format_ms(middle)}",
            (longest, middle),
            (8, 14 * rank - 7 * (len(medians) - 1)),  # apart, where the lines are not
            textcoords="offset points",
            va="center",
            weight="bold",
            color=color,
            annotation_clip=False,
        )
    ax.set_ylim(0, 1.04 * max(map(max, times_ms.values())))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel("ms")
    ax.set_xlabel("run; the line is the median")


def plot_ranks(
    ax: Axes,
    values: Mapping[str, float | None],
    *,
    number: str = "{:,.1f}",
    measured: bool = False,
) -> None:
    """Draw a bar for each name from the top down, with its number beside it.

    Args:
        values: None where there is no number; a dash is drawn.
        number: the format of the numbers.
        measured: whether the bars are filled.
    """
    lengths = [value or 0 for value in values.values()]
    top = max(*lengths, 1e-9)
    ax.barh(list(values), lengths, color=INK if measured else "white", edgecolor=INK)
    for place, value in enumerate(values.values()):
        text = "–" if value is None else number.format(value)
        at = max(value or 0, 0) + 0.03 * top
        ax.text(at, place, text, va="center", size=8, color=INK)
    ax.invert_yaxis()
    ax.set_xlim(min(0, *lengths), 1.45 * top)
    ax.set_xticks([])
    ax.grid(False)
