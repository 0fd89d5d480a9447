"""The lab as a picture for pages without a kernel: rows, plots, and the sentence."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helpers.checkpointing import Plan
from helpers.measure import StepReport
from helpers.plots import (
    COLORS,
    INK,
    QUIET,
    STYLE,
    plot_peaks,
    plot_timeline,
    plot_times,
    plot_tradeoff,
    timeline_length,
)
from helpers.plots.style import figure_png
from helpers.recording import Pair, Recorded

# Rows (name, ticked, in a segment with the one before), and the lines below.
Around = tuple[list[tuple[str, bool, bool]], list[str]]
ROOM = 1.32  # length of the time axis, in steps without checkpointing
ROWS = 21  # at most
PLACES = {
    "no checkpointing": (0.18, 0.58, 0.40, 0.36),
    "this plan": (0.18, 0.16, 0.40, 0.36),
    "alive at the peak": (0.64, 0.60, 0.14, 0.34),
    "iteration time": (0.87, 0.60, 0.12, 0.34),
    "every plan tried": (0.64, 0.21, 0.35, 0.30),
}


def draw_png(
    before: StepReport,
    after: StepReport,
    tried: Sequence[StepReport],
    measured: Sequence[Pair],
    recorded: Mapping[Plan, Pair],
    around: Around,
) -> bytes:
    """Draw one state of a lab.

    Args:
        before, after: without checkpointing and with this plan; measured reports where
            there are some, else predicted ones.
        tried: predictions of every plan so far, no checkpointing first, this one last.
        measured: of those, what was measured, beside the unchecked model.
        recorded: such pairs by plan, which another machine measured.
    """
    style = matplotlib.rc_params_from_file(STYLE, use_default_template=False)
    with matplotlib.rc_context(style):
        figure = Figure((10.2, 5.6), dpi=72)
        figure.set_layout_engine("none")
        axes = [figure.add_axes(at, title=name) for name, at in PLACES.items()]
        top_bytes = max(report.peak_bytes for report in (before, after, *tried))
        _plot_pair(axes[:4], before, after, recorded, top_bytes)
        grey = {r.plan: recorded[r.plan] for r in tried if r.plan in recorded}
        others = {"recorded": Recorded(pairs=grey), "top_bytes": top_bytes}
        labels = {len(tried) - 1: "this plan", 0: "none"}
        plot_tradeoff(axes[4], tried, measured, labels=labels, **others)
        _write_around(figure, *around)
        return figure_png(figure)[0]


def _plot_pair(
    axes: Sequence[Axes],
    before: StepReport,
    after: StepReport,
    recorded: Mapping[Plan, Pair],
    top_bytes: int,
) -> None:
    """Plot timelines, peaks and times of both plans."""
    lengths = [timeline_length(report.timeline) for report in (before, after)]
    room = max(ROOM * lengths[0], lengths[1])
    for ax, report in zip(axes[:2], (before, after), strict=True):
        is_measured = {"measured": report.source == "measured"}
        line = report.timeline
        plot_timeline(ax, line, top_bytes=top_bytes, length=room, **is_measured)
    grey = Recorded()
    if after.plan in recorded:
        report, base = recorded[after.plan]
        grey = Recorded(pairs={before.plan: (base, base), after.plan: (report, base)})
    pair = {"none": before, "this plan": after}
    plot_peaks(axes[2], pair, recorded=grey, top_bytes=top_bytes)
    plot_times(axes[3], pair, grey)


def _write_around(
    figure: Figure, rows: list[tuple[str, bool, bool]], lines: list[str]
) -> None:
    """Write boxes and names to the left, a bar along each segment, and lines below."""
    y = 0.95
    for name, ticked, joined in rows[:ROWS]:
        color = COLORS["recomputed"] if ticked else INK
        style = {"color": color, "va": "center", "size": 9, "parse_math": False}
        figure.text(0.018, y, "☑" if ticked else "☐", **style)
        figure.text(0.04, y, name[:16], **style)
        if ticked:
            ends = y - 0.015, y + (0.025 if joined else 0.015)
            figure.add_artist(Line2D([0.012] * 2, ends, color=color, lw=3))
        y -= 0.04
    if len(rows) > ROWS:
        more = f"… {len(rows) - ROWS} more"
        figure.text(0.04, y, more, color=QUIET, va="center", size=9)
    for i, line in enumerate(lines):
        style = {"size": 9, "color": QUIET} if i else {"size": 11, "color": INK}
        figure.text(
            0.01, 0.07 - 0.035 * i, line, va="center", parse_math=False, **style
        )
