"""The picture of a comparison: predicted bytes against measured ones, and the error."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from helpers.plots._axes import INK, QUIET, RECORDED, memory_unit, note
from helpers.recording import Comparison


def plot_comparison(ax: Axes, comparisons: Sequence[Comparison]) -> None:
    """Draw a grey dot for each case, as recorded, on the line where both are equal.

    Cases whose error is not 0 have a dark rim, and the largest error is named.
    """
    measured = [one.measured.allocator_peak_bytes for one in comparisons]
    predicted = [one.predicted.allocator_peak_bytes for one in comparisons]
    size, unit = memory_unit(max(measured))
    ends = [0.5 * min(measured) / size, 2 * max(measured) / size]
    ax.plot(ends, ends, color=QUIET, lw=0.8, zorder=1)
    for is_exact in (True, False):
        points = [
            (x / size, y / size)
            for x, y in zip(measured, predicted, strict=True)
            if (x == y) == is_exact
        ]
        rim = RECORDED if is_exact else INK
        ax.plot(*zip(*points or [((), ())], strict=True), "o", mfc=RECORDED, mec=rim)
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    ax.set_xlabel(f"measured peak, {unit}")
    ax.set_ylabel(f"predicted, {unit}")
    worst = max(comparisons, key=lambda one: abs(one.error))
    place = comparisons.index(worst)
    if worst.error_bytes:
        text = f"{worst.error_bytes:+,} B ({100 * worst.error:+.3f} %)"
        at = measured[place] / size, predicted[place] / size
        note(ax, text, at, (8, -8), va="top")
