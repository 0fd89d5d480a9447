"""The lab as a picture for pages without a kernel: rows, plots, and the sentence."""

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from helpers.checkpointing import Plan
from helpers.controls._answers import Answers, recorded_beside
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

# Rows (name, which box, in a segment with the one before), and the lines below.
Around = tuple[list[tuple[str, str, bool]], list[str]]
BOXES = {"none": "☐", "part": "⊟", "all": "☑"}  # by what of a row is ticked
ROOM = 1.32  # length of the time axis, in steps without checkpointing
ROWS = 21  # at most
PLACES = (
    (0.18, 0.58, 0.40, 0.36),  # both timelines
    (0.18, 0.16, 0.40, 0.36),
    (0.64, 0.60, 0.14, 0.34),  # peaks, times, and every plan tried
    (0.87, 0.60, 0.12, 0.34),
    (0.64, 0.21, 0.35, 0.30),
)
TITLES = "this plan", "alive at the peak", "iteration time", "every plan tried"


def draw_png(found: Answers, recorded: Mapping[Plan, Pair], around: Around) -> bytes:
    """Draw one state of a lab.

    Args:
        recorded: pairs by plan, which another machine measured.
    """
    style = matplotlib.rc_params_from_file(STYLE, use_default_template=False)
    with matplotlib.rc_context(style):
        figure = Figure((10.2, 5.6), dpi=72)
        figure.set_layout_engine("none")
        pair, tried = found.reports, found.predictions
        titles = found.title, *TITLES
        named = zip(PLACES, titles, strict=True)
        axes = [figure.add_axes(at, title=name) for at, name in named]
        top_bytes = max(report.peak_bytes for report in (*pair, *tried))
        _plot_pair(axes[:4], found, recorded, top_bytes)
        grey = {r.plan: recorded[r.plan] for r in tried if r.plan in recorded}
        others = {"recorded": Recorded(pairs=grey), "top_bytes": top_bytes}
        others["labels"] = {
            place: found.names[one.plan]
            for place, one in enumerate(tried)
            if one.plan in found.names
        }
        plot_tradeoff(axes[4], tried, [*found.measured.values()], **others)
        _write_around(figure, *around)
        return figure_png(figure)[0]


def _plot_pair(
    axes: Sequence[Axes],
    found: Answers,
    recorded: Mapping[Plan, Pair],
    top_bytes: int,
) -> None:
    """Plot timelines, peaks and times of both plans."""
    pair = before, after = found.reports
    lengths = [timeline_length(report.timeline) for report in pair]
    room = max(ROOM * lengths[0], lengths[1])
    for ax, report in zip(axes[:2], pair, strict=True):
        is_measured = {"measured": report.source == "measured"}
        line = report.timeline
        plot_timeline(ax, line, top_bytes=top_bytes, length=room, **is_measured)
    beside = filter(None, recorded_beside(recorded, before.plan, after.plan))
    grey = {one.plan: (one, one) for one in beside}
    named = dict(zip(found.pair_names, pair, strict=True))
    plot_peaks(axes[2], named, recorded=Recorded(pairs=grey), top_bytes=top_bytes)
    plot_times(axes[3], named, Recorded(pairs=grey))


def _write_around(
    figure: Figure, rows: list[tuple[str, str, bool]], lines: list[str]
) -> None:
    """Write boxes and names to the left, a bar along each segment, and lines below."""
    y = 0.95
    for name, ticked, joined in rows[:ROWS]:
        color = INK if ticked == "none" else COLORS["recomputed"]
        style = {"color": color, "va": "center", "size": 9, "parse_math": False}
        figure.text(0.018, y, BOXES[ticked], **style)
        figure.text(0.04, y, name[:16], **style)
        if ticked == "all":
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
