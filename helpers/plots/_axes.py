"""What all pictures share: colours with one meaning, memory axes, labels.

One hue has one meaning everywhere. What is predicted is hollow, what is measured is
filled, and what another machine measured is grey. Memory axes start at zero.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.ticker import MaxNLocator

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
RECORDED = "#888888"  # what another machine measured: filled, and grey
LINES = ("#222222", "#009E73", "#CC79A7", "#A6761D")  # hues that mean nothing else


def memory_unit(top_bytes: int) -> tuple[int, str]:
    """Choose the unit of a memory axis: its size in bytes and its name."""
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if top_bytes >= size:
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
    ax.set_ylim(-below * top, top)
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(0, top)
    ax.set_yticks([tick for tick in ticks if 0 <= tick <= top])
    ax.set_ylabel(name)
    return size


def fill_polygons(
    ax: Axes, polygons: Sequence[np.ndarray], colors: Sequence[str], **style
) -> None:
    """Fill (n, 2) outlines by one artist, several times as fast as an artist each."""
    areas = PolyCollection(polygons, facecolors=colors, **style)
    ax.add_collection(areas, autolim=False)


def rectangle(left: float, bottom: float, width: float, height: float) -> np.ndarray:
    """Outline a rectangle."""
    right, top = left + width, bottom + height
    return np.array([(left, bottom), (right, bottom), (right, top), (left, top)])


def note(
    ax: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], **style
) -> None:
    """Write a text so many points beside what it is about."""
    ax.annotate(text, at, offset, textcoords="offset points", **{"color": INK} | style)


def label_above(
    ax: Axes, x: float, y: float, text: str, rise: float = 3, **style
) -> None:
    note(ax, text, (x, y), (0, rise), **({"ha": "center", "va": "bottom"} | style))


def name_at_end(
    ax: Axes, x: float, y: float, name: str, color: str, rise: float = 0
) -> None:
    style = {"va": "center", "weight": "bold", "color": color}
    note(ax, name, (x, y), (8, rise), annotation_clip=False, **style)


def name_recorded(ax: Axes, label: str, at_top: bool = False) -> None:
    """Say in a corner, in two lines, whose measurements are grey."""
    if label:
        text = f"grey: {label.replace(', ', chr(10), 1)}"
        style = {"va": "top" if at_top else "bottom", "ha": "right", "size": 7}
        style |= {"xycoords": "axes fraction", "color": QUIET}
        note(ax, text, (1, at_top), (-3, -2 if at_top else 2), **style)
