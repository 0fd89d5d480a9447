"""The workbook's pictures: each function draws one thing on one axes.

Here are those of reports: what is alive at the peak, times, and the trade-off. The
others are at hand under the same name.
"""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from helpers.axes import (
    COLORS,
    INK,
    LABEL_COLORS,
    LINES,
    QUIET,
    RECORDED,
    fill_polygons,
    label_above,
    memory_axis,
    rectangle,
)
from helpers.comparison_plot import plot_comparison
from helpers.report import StepReport
from helpers.series_plots import (
    plot_agreement,
    plot_frontier,
    plot_lines,
    plot_ranks,
    plot_runs,
)
from helpers.timeline_plot import plot_timeline, timeline_length
from helpers.tracker import CATEGORIES
from helpers.units import format_change, format_ms

__all__ = [
    "COLORS",
    "INK",
    "LINES",
    "extra_work",
    "plot_agreement",
    "plot_comparison",
    "plot_frontier",
    "plot_lines",
    "plot_peaks",
    "plot_ranks",
    "plot_runs",
    "plot_timeline",
    "plot_times",
    "plot_tradeoff",
    "timeline_length",
]


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
                boxes.append(rectangle(place - 0.37, bottom, 0.74, height))
                colors.append(COLORS[category])
                bottom += height
        text = f"{bottom:.2f}" if size == 2**30 else f"{bottom:,.1f}"
        label_above(ax, place, bottom, text, weight="bold")
    fill_polygons(ax, boxes, colors, edgecolor="white", linewidth=0.6)
    _label_plans(ax, reports)
    _label_categories(ax, list(reports.values()), size)


def _label_plans(ax: Axes, reports: Mapping[str, StepReport]) -> None:
    ax.set_xlim(-0.6, len(reports) - 0.4)
    if [tick.get_text() for tick in ax.get_xticklabels()] != list(reports):
        ax.set_xticks(range(len(reports)), list(reports))


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
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, top * 1.4)
    ticks = ticks[ticks <= top * 1.5] if top else []
    size, unit = (1000, "s") if top >= 1000 else (1, "ms")
    ax.set_yticks(ticks, [f"{tick / size:g}" for tick in ticks])
    ax.set_ylabel(unit)
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
        label_above(ax, x, low, text, size=8, color=ink, va="top", rise=-4)
    else:
        label_above(ax, x, high, text, size=8, color=ink)


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
    _label_rings(ax, {place: rings[place] for place in labels or {}}, labels or {})
    ax.set_xlabel(
        "extra work, %: ○ FLOPs  ● time, grey: recorded"
        if grey_dots
        else "extra work, % of a step: ○ FLOPs  ● time"
    )


def _label_rings(
    ax: Axes, rings: Mapping[int, tuple[float, float]], labels: Mapping[int, str]
) -> None:
    """Name rings to their right; a name that would lie on another goes below."""
    right, top = ax.get_xlim()[1], ax.get_ylim()[1]
    above: list[tuple[float, float]] = []
    for place, (x, y) in sorted(rings.items(), key=lambda ring: -ring[1][1]):
        close = any(abs(x - a) < 0.3 * right and b - y < 0.075 * top for a, b in above)
        above.append((x, y))
        near_end = x > 0.8 * right
        ax.annotate(
            labels[place],
            (x, y),
            (-7 if near_end else 7, -4 if close else 5),
            textcoords="offset points",
            ha="right" if near_end else "left",
            va="top" if close else "baseline",
            size=8,
            color=INK,
        )
