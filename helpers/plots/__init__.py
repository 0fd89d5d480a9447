"""The workbook's pictures: each function draws one thing on one axes.

What finds recorded numbers, to be drawn beside what is predicted, is at hand as well.
"""

from helpers import lazily
from helpers.recording import find_recorded

_NAMES = {
    "_axes": "COLORS INK LABEL_COLORS LINES PHASE_COLORS QUIET RECORDED STYLE "
    "memory_axis memory_unit",
    "comparison": "plot_comparison",
    "peaks": "plot_peaks plot_times",
    "series": "plot_agreement plot_frontier plot_lines plot_ranks plot_runs",
    "style": "use_style",
    "timeline": "peak_cause plot_timeline running timeline_length",
    "tradeoff": "extra_work plot_fronts plot_tradeoff",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}
__all__ = ["find_recorded", *_HOMES]
__getattr__ = lazily(__name__, _HOMES)
