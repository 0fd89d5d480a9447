"""The workbook's pictures: each function draws one thing on one axes.

What finds recorded numbers, to be drawn beside what is predicted, is at hand as well.
"""

from helpers.plots._axes import (
    COLORS,
    INK,
    LABEL_COLORS,
    LINES,
    PHASE_COLORS,
    QUIET,
    RECORDED,
    STYLE,
    memory_axis,
    memory_unit,
)
from helpers.plots.comparison import plot_comparison
from helpers.plots.peaks import plot_peaks, plot_times
from helpers.plots.series import (
    plot_agreement,
    plot_frontier,
    plot_lines,
    plot_ranks,
    plot_runs,
)
from helpers.plots.style import use_style
from helpers.plots.timeline import plot_timeline, timeline_length
from helpers.plots.tradeoff import extra_work, plot_tradeoff
from helpers.recording import find_recorded

__all__ = [
    "COLORS",
    "INK",
    "LABEL_COLORS",
    "LINES",
    "PHASE_COLORS",
    "QUIET",
    "RECORDED",
    "STYLE",
    "extra_work",
    "find_recorded",
    "memory_axis",
    "memory_unit",
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
    "use_style",
]
