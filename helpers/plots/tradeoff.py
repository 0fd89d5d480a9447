"""Memory against work: every plan as a ring, and as a dot where it was measured."""

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from helpers.measure import StepReport, plain_step_flops
from helpers.plots._axes import INK, LINES, RECORDED, memory_axis, name_recorded, note
from helpers.recording import NOTHING, Pair, Recorded


def extra_work(report: StepReport) -> float:
    """Recomputed FLOPs as % of a step without checkpointing."""
    return 100 * report.recompute_flops / max(1, plain_step_flops(report))


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
    predicted, labels = list(predicted), labels or {}
    size = memory_axis(ax, top_bytes or max(r.peak_bytes for r in predicted))
    rings = [(extra_work(r), r.peak_bytes / size) for r in predicted]
    dots = _extra_times(measured, size)
    grey = _extra_times(filter(None, (recorded.pair(r.plan) for r in predicted)), size)
    named = {place: rings[place] for place in sorted(labels)}
    _plot_points(ax, grey, mfc=RECORDED, mec="white", mew=0.4, ms=5)
    _plot_points(ax, rings, mfc="none", mec="#A8A8A8")
    _plot_points(ax, dots, mfc=INK, mec=INK)
    _plot_points(ax, named.values(), mfc="none", mec=INK)
    _work_axis(ax, rings, dots + grey)
    over_dots = bool(grey and recorded.label)  # not in the lab: it is too slow
    _label_rings(ax, named, labels, over_dots)
    unit = "%" if grey else "% of a step"
    also = ", grey: recorded" if grey and not recorded.label else ""
    ax.set_xlabel(f"extra work, {unit}: ○ FLOPs  ● time{also}")
    name_recorded(ax, recorded.label if grey else "")


def plot_fronts(
    ax: Axes,
    series: Mapping[str, Sequence[StepReport]],
    *,
    cloud: Sequence[StepReport] = (),
    measured: Sequence[StepReport] = (),
) -> None:
    """Draw lines of plans, each named where most is recomputed; the first is black.

    Args:
        cloud: further plans, as grey rings.
        measured: reports of real steps; a dot at the bytes and FLOPs that were counted.
    """
    series = {name: sorted(plans, key=extra_work) for name, plans in series.items()}
    reports = [*cloud, *(report for plans in series.values() for report in plans)]
    size = memory_axis(ax, max(r.peak_bytes for r in reports))
    where = {id(r): (extra_work(r), r.peak_bytes / size) for r in (*reports, *measured)}
    _plot_points(ax, [where[id(r)] for r in cloud], mfc="none", mec="#A8A8A8")
    _work_axis(ax, [*where.values()], [])
    lowest = min(series, key=lambda name: series[name][-1].peak_bytes)
    for (name, plans), color in zip(series.items(), LINES, strict=False):
        xy = [where[id(report)] for report in plans]
        ax.plot(*zip(*xy, strict=True), "o-", color=color, mfc="white", lw=1)
        style = {"color": color, "weight": "bold"}
        style["va"], rise = ("top", -5) if name == lowest else ("bottom", 4)
        note(ax, name, xy[-1], (6, rise), **style)
    _plot_points(ax, [where[id(r)] for r in measured], mfc=INK, mec="none", ms=3.5)
    for plain in [report for report in reports if not report.plan.segments][:1]:
        note(ax, "no checkpointing", where[id(plain)], (8, 3), size=8)
    dots = "  ● measured" if measured else ""
    ax.set_xlabel(f"extra FLOPs, % of a step:  ○ predicted{dots}")


def _extra_times(pairs: Iterable[Pair], size: int) -> list[tuple[float, float]]:
    """Place pairs (report, the unchecked model's) at their extra time and peak."""
    return [
        (100 * (report.step_ms / base.step_ms - 1), report.peak_bytes / size)
        for report, base in pairs
    ]


def _plot_points(ax: Axes, points: Iterable[tuple[float, float]], **style) -> None:
    if points:
        ax.plot(*zip(*points, strict=True), "o", clip_on=False, **style)


def _work_axis(
    ax: Axes, rings: list[tuple[float, float]], dots: list[tuple[float, float]]
) -> None:
    """Make room for all points, and for those of the axes that share this one's x."""
    right = max([40.0, *(x for x, _ in rings + dots)])
    left = min([0.0, *(x for x, _ in dots)])  # times vary, and may be below
    ends = [left - 0.03 * right, right * 1.1]
    for other in ax.get_shared_x_axes().get_siblings(ax):
        ends += other.get_xlim() if other is not ax and other.lines else ()
    ax.set_xlim(min(ends), max(ends))


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
        style = {"ha": "right" if near_end else "left", "size": 8, "path_effects": halo}
        style["va"] = "top" if close else "baseline"
        offset = -7 if near_end else 7, -4 if close else 5
        note(ax, labels[place], (x, y), offset, **style)
