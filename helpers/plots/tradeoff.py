"""Memory against work: every plan as a ring, and as a dot where it was measured."""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from helpers.measure import StepReport
from helpers.plots._axes import INK, RECORDED, memory_axis, name_recorded
from helpers.recording.recorded import NOTHING, Pair, Recorded


def extra_work(report: StepReport) -> float:
    """Recomputed FLOPs as % of a step without checkpointing.

    Backward multiplies twice for each forward product, so such a step is three
    forward passes.
    """
    return 100 * report.recompute_flops / max(1, 3 * report.forward_flops)


def plot_tradeoff(
    ax: Axes,
    predicted: Iterable[StepReport],
    measured: Sequence[Pair] = (),
    *,
    recorded: Recorded = NOTHING,
    labels: Mapping[int, str] | None = None,
    top_bytes: int | None = None,
) -> None:
    """Draw memory against extra work: a ring for each prediction, a dot if measured.

    Args:
        predicted: reports, or rows of a sweep's table; a ring at their extra FLOPs.
        measured: pairs (report, the unchecked model's in the same run); a dot at the
            extra time.
        recorded: what another machine measured of the predicted plans; a grey dot.
        labels: names for some of the rings, by place in ``predicted``.
        top_bytes: upper end of the memory axis; default: the highest peak.
    """
    predicted = list(predicted)
    size = memory_axis(ax, top_bytes or max(r.peak_bytes for r in predicted))
    rings = [(extra_work(r), r.peak_bytes / size) for r in predicted]
    found = [recorded.pair(r.plan) for r in predicted]
    dots, grey_dots = (
        [
            (100 * (report.step_ms / base.step_ms - 1), report.peak_bytes / size)
            for report, base in pairs
        ]
        for pairs in (measured, filter(None, found))
    )
    named = [ring for place, ring in enumerate(rings) if place in (labels or {})]
    for points, style in (
        (grey_dots, {"mfc": RECORDED, "mec": "white", "mew": 0.4, "ms": 5}),
        (rings, {"mfc": "none", "mec": "#A8A8A8"}),
        (dots, {"mfc": INK, "mec": INK}),
        (named, {"mfc": "none", "mec": INK}),
    ):
        ax.plot(*zip(*points or [((), ())], strict=True), "o", clip_on=False, **style)
    right = max([40.0, *(x for x, _ in rings + dots + grey_dots)])
    left = min([0.0, *(x for x, _ in dots + grey_dots)])  # times vary, and may be below
    ends = [left - 0.03 * right, right * 1.1]
    for other in ax.get_shared_x_axes().get_siblings(ax):
        ends += other.get_xlim() if other is not ax and other.lines else ()
    ax.set_xlim(min(ends), max(ends))
    over_dots = bool(grey_dots and recorded.label)  # not in the lab: it is too slow
    named_rings = {place: rings[place] for place in labels or {}}
    _label_rings(ax, named_rings, labels or {}, over_dots)
    if grey_dots:
        note = "" if recorded.label else ", grey: recorded"  # which the label says
        ax.set_xlabel(f"extra work, %: ○ FLOPs  ● time{note}")
        name_recorded(ax, recorded.label)
    else:
        ax.set_xlabel("extra work, % of a step: ○ FLOPs  ● time")


def _label_rings(
    ax: Axes,
    rings: Mapping[int, tuple[float, float]],
    labels: Mapping[int, str],
    over_dots: bool,
) -> None:
    """Name rings to their right; a name that would lie on another goes below."""
    right, top = ax.get_xlim()[1], ax.get_ylim()[1]
    halo = [withStroke(linewidth=2, foreground="white")] if over_dots else []
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
            path_effects=halo,
        )
