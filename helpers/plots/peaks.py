"""Reports as pictures: what is alive at the peak, a bar each, and times."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from helpers.measure import StepReport
from helpers.plots._axes import (
    COLORS,
    INK,
    LABEL_COLORS,
    QUIET,
    RECORDED,
    fill_polygons,
    label_above,
    memory_axis,
    name_recorded,
    rectangle,
)
from helpers.recording import NOTHING, Recorded
from helpers.timeline import CATEGORIES
from helpers.units import format_change, format_ms


def plot_peaks(
    ax: Axes,
    reports: Mapping[str, StepReport],
    *,
    recorded: Recorded = NOTHING,
    top_bytes: int | None = None,
) -> None:
    """Draw what is alive at each report's peak, a bar each, categories named beside.

    Args:
        recorded: what another machine measured; a grey arrow at a bar's end.
    """
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
    pairs = [recorded.pair(report.plan) for report in reports.values()]
    for place, pair in enumerate(pairs):
        if pair:
            y = pair[0].peak_bytes / size
            ax.plot(place - 0.43, y, ">", ms=5, color=RECORDED)
    name_recorded(ax, recorded.label if any(pairs) else "", at_top=True)
    _label_plans(ax, reports)
    _label_categories(ax, list(reports.values()), size)


def _label_plans(ax: Axes, reports: Mapping[str, StepReport]) -> None:
    ax.set_xlim(-0.6, len(reports) - 0.4)
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
            style = {"color": LABEL_COLORS.get(category, COLORS[category]), "size": 8}
            style |= {"va": "center", "weight": "bold"}
            ax.text(len(reports) - 0.55, floor, category.replace("_", " "), **style)
            floor += gap
        bottom += height


def plot_times(
    ax: Axes, reports: Mapping[str, StepReport], recorded: Recorded = NOTHING
) -> None:
    """Draw median step times with their quartiles, and the change from the first.

    Args:
        recorded: what another machine measured of these plans; drawn in grey.
    """
    pairs = {name: recorded.pair(report.plan) for name, report in reports.items()}
    grey = {name: pair[0] for name, pair in pairs.items() if pair}
    series = [
        ({name: r for name, r in found.items() if r.step_ms is not None}, color)
        for found, color in ((reports, INK), (grey, RECORDED))
    ]
    highs = [r.step_ms_quartiles[1] for timed, _ in series for r in timed.values()]
    top = max(highs, default=0.0)
    for place, name in enumerate(reports):
        here = [(timed, color) for timed, color in series if name in timed]
        _mark_times(ax, place, name, here, top)
    _label_plans(ax, reports)
    ax.set_ylim(0, top * 1.5 or 1)
    ticks = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(0, top * 1.4)
    ticks = ticks[ticks <= top * 1.5] if top else []
    size, unit = (1000, "s") if top >= 1000 else (1, "ms")
    ax.set_yticks(ticks, [f"{tick / size:g}" for tick in ticks])
    ax.set_ylabel(unit)
    if grey and recorded.label:
        runs = next(iter(grey.values())).repeats
        name_recorded(ax, f"{recorded.label}, medians of {runs} runs", at_top=True)
    if not top:
        style = {"ha": "center", "va": "center", "size": 8, "color": QUIET}
        ax.text(0.5, 0.5, "not yet\nmeasured", transform=ax.transAxes, **style)


def _mark_times(
    ax: Axes,
    place: int,
    name: str,
    series: Sequence[tuple[Mapping[str, StepReport], str]],
    top: float,
) -> None:
    """Draw a plan's medians with their quartiles, and write each above or below."""
    times_ms = sorted(timed[name].step_ms for timed, _ in series)
    below, rise = _room_for_texts(times_ms, top, place)
    for timed, color in series:
        report, first = timed[name], next(iter(timed.values()))
        x = place + (len(series) - 1) * (-0.13 if color == INK else 0.13)
        low, high = report.step_ms_quartiles
        ax.plot([x, x], [low, high], color=color, lw=6, alpha=0.25)
        ax.plot(x, report.step_ms, "o", ms=5, color=color)
        text = format_ms(report.step_ms)
        if report is not first:
            text += f"\n{format_change(report.step_ms, first.step_ms)}"
        style = {"size": 8, "color": INK if color == INK else QUIET}
        is_lower = report.step_ms == times_ms[0]
        if below and is_lower:
            label_above(ax, x, low, text, -4, va="top", **style)
        else:
            label_above(ax, x, high, text, 3 if is_lower else rise, **style)


def _room_for_texts(
    times_ms: Sequence[float], top: float, place: int
) -> tuple[bool, float]:
    """Say whether the lower time's text goes below it, and how high the other's is.

    Args:
        times_ms: of one plan, the lower one of two first.
    """
    lines = 2 if place else 1  # the first one has no change to tell
    if len(times_ms) < 2 or times_ms[1] - times_ms[0] > 0.35 * top:
        return False, 3
    if times_ms[0] > 0.15 * lines * top:
        return True, 3
    return False, 3 + 11 * lines
