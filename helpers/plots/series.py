"""Series of numbers as pictures: lines, a frontier, runs, ranks."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from helpers.checkpointing import Plan
from helpers.measure import StepReport
from helpers.plots._axes import (
    INK,
    LINES,
    RECORDED,
    memory_axis,
    memory_unit,
    name_at_end,
    name_recorded,
)
from helpers.recording import Recorded
from helpers.units import format_ms


def plot_lines(
    ax: Axes,
    x: Sequence[float],
    series: Mapping[str, Sequence[int]],
    *,
    xlabel: str,
    measured: bool = False,
    colors: Sequence[str] = LINES,
    recorded: Mapping[str, Recorded] | None = None,
    plans: Sequence[Plan] = (),
) -> None:
    """Draw bytes against anything, a line for each series, named at its end.

    Args:
        colors: one for each series; give them where a hue has its meaning.
        recorded: what another machine measured, by the series' names; a ring whose
            plan it has gets a grey dot.
        plans: the plan at each ``x``, where ``recorded`` is given.
    """
    size = memory_axis(ax, max(max(values) for values in series.values()))
    for (name, values), color in zip(series.items(), colors, strict=False):
        y = np.asarray(values) / size
        ax.plot(x, y, "o-", ms=4.5, color=color, mfc=color if measured else "white")
        name_at_end(ax, x[-1], y[-1], name, color)
    for found in (recorded or {}).values():
        for at, plan in zip(x, plans, strict=True):
            if pair := found.pair(plan):
                ax.plot(at, pair[0].peak_bytes / size, "o", ms=3.5, color=RECORDED)
    labels = dict.fromkeys(found.label for found in (recorded or {}).values())
    name_recorded(ax, "; ".join(filter(None, labels)))
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
        name_at_end(ax, x[-1], rows[-1], name, color)
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
        name_at_end(ax, x[-1], y[-1] / size, name, color)
    dots = "  ● measured" if measured else ""
    ax.set_xlabel(f"{xlabel}:  — by hand  ○ predicted{dots}")


def plot_runs(ax: Axes, times_ms: Mapping[str, Sequence[float]]) -> None:
    """Draw every run of a few plans in its turn, and each plan's median as a line."""
    longest = max(map(len, times_ms.values()))
    medians = {name: float(np.median(times)) for name, times in times_ms.items()}
    for (name, times), color in zip(times_ms.items(), LINES, strict=False):
        middle = medians[name]
        ax.plot(range(1, len(times) + 1), times, "o", ms=3.5, color=color)
        ax.plot([1, longest], [middle, middle], color=color, lw=1)
        rank = sorted(medians.values()).index(middle)
        apart = 14 * rank - 7 * (len(medians) - 1)  # where the lines are not
        words = f"{name}: {format_ms(middle)}"
        name_at_end(ax, longest, middle, words, color, rise=apart)
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
