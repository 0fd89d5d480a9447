"""A training step as a picture: what is alive, event by event, and what is running."""

import re
from collections.abc import Callable
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes

from helpers.plots._axes import (
    COLORS,
    INK,
    PHASE_COLORS,
    QUIET,
    fill_polygons,
    memory_axis,
    note,
    rectangle,
)
from helpers.timeline import CATEGORIES, Timeline
from helpers.units import format_bytes


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
    fill_polygons(ax, list(areas.values()), list(areas), lw=0)
    ax.set_xlim(0, length or places[-1])
    ax.xaxis.set_visible(False)
    _plot_strip(ax, timeline)
    _mark_peak(ax, timeline, size, measured)


def timeline_length(timeline: Timeline) -> int:
    """Count the events that ``plot_timeline`` draws."""
    return len(timeline.events) - timeline.first_allocation + 1


def peak_cause(timeline: Timeline) -> str:
    """Say in which phase the peak is reached, by which operator, and in which layer."""
    event = timeline.at_peak().event
    if event is None:
        return "before the step"
    layer = _layer_namer(timeline)(event.allocation.module)
    return f"{event.phase}: {event.allocation.op} in {layer or 'the loss'}"


def _mark_peak(ax: Axes, timeline: Timeline, size: int, measured: bool) -> None:
    """Mark the peak with its value and its cause, on the side where there is room."""
    x = timeline.peak_place + 1.5 - timeline.first_allocation
    y = timeline.peak_bytes / size
    ax.plot(x, y, "o", ms=5, color=INK, mfc=INK if measured else "white", zorder=5)
    fits_right = x < 0.55 * ax.get_xlim()[1]
    for text, rise, style in (
        (f"peak {format_bytes(timeline.peak_bytes)}", 9, {"weight": "bold"}),
        (peak_cause(timeline), 0, {"color": QUIET, "size": 7.5}),
    ):
        style |= {"ha": "left" if fits_right else "right", "annotation_clip": False}
        style["bbox"] = {"fc": "white", "ec": "none", "alpha": 0.8, "pad": 0.6}
        note(ax, text, (x, y), (8 if fits_right else -8, rise), **style)


def _layer_namer(timeline: Timeline) -> Callable[[str], str]:
    """Make a function that names the layer a module lies in.

    It is a child of the model, or one of a list of blocks: blocks.3, where these have
    parts of their own.
    """
    in_list = re.compile(r"((?:[^.]+\.)*?\d+)\.")
    made_by = {event.allocation.module for event in timeline.events}
    blocks = {found[1] for module in made_by if (found := in_list.match(module))}

    def name(module: str) -> str:
        found = in_list.match(module + ".")
        return found[1] if found and found[1] in blocks else module.partition(".")[0]

    return name


def running(timeline: Timeline) -> list[tuple[str, str, int]]:
    """List what runs in turn: phase, layer, and for how many events."""
    now, what, name = ("forward", ""), [], _layer_namer(timeline)
    for event in timeline.events[timeline.first_allocation :]:
        if event.kind == "alloc":
            now = event.phase, name(event.allocation.module)
        what.append(now)
    return [(*now, len([*group])) for now, group in groupby(what)]


def _plot_strip(ax: Axes, timeline: Timeline) -> None:
    """Draw what is running, under zero: a box for each layer in its phase's colour."""
    bottom, width, place = ax.get_ylim()[0], ax.get_xlim()[1], 0
    box_bottom, boxes, colors, recomputed = 0.5 * bottom, [], [], []
    for phase, layer, length in running(timeline):
        boxes.append(rectangle(place, box_bottom, length, -0.9 * box_bottom))
        colors.append(PHASE_COLORS[phase])
        if phase == "recompute":
            recomputed.append(place)
        label = "".join(filter(str.isdigit, layer)) or layer
        if label and length > 0.014 * width * len(label):
            style = {"ha": "center", "va": "center", "size": 6.5, "color": INK}
            ax.text(place + length / 2, 0.54 * box_bottom, label, **style)
        place += length
    fill_polygons(ax, boxes, colors, edgecolor="w")
    y, style, latest = 0.78 * bottom, {"va": "center", "size": 7}, place - 0.29 * width
    ax.text(min(0, latest), y, "forward", color="#A85B20", **style)
    ax.text(place, y, "backward", color=QUIET, ha="right", **style)
    if recomputed:
        x = min(max(recomputed[0], 0.14 * width), latest)
        ax.text(x, y, "recompute", color=COLORS["recomputed"], **style)
