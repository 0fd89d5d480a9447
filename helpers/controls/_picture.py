"""The lab's picture: two timelines, what is alive at the peak, time, every plan tried.

It is redrawn at each flip of a box and has some 50 ms for that. So the figure is made
once, and each part of it is painted again only when what it shows has changed.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from helpers.checkpointing import Plan
from helpers.controls._remembered_text import TextMemoryCanvas
from helpers.measure import StepReport
from helpers.plots import (
    COLORS,
    INK,
    LABEL_COLORS,
    PHASE_COLORS,
    QUIET,
    RECORDED,
    STYLE,
    plot_peaks,
    plot_timeline,
    plot_times,
    plot_tradeoff,
    timeline_length,
)
from helpers.recording import Recorded

WIDTH, HEIGHT, SCALE = 880, 500, 1.5  # CSS pixels, and device pixels for each
SIZE = round(WIDTH * SCALE), round(HEIGHT * SCALE)
ROOM = 1.32  # length of the time axis, in steps without checkpointing


class LabPicture:
    """Draws the state of a ``LayerLab`` as PNG."""

    def __init__(self) -> None:
        self._style = matplotlib.rc_params_from_file(STYLE, use_default_template=False)
        with matplotlib.rc_context(self._style):
            figure = Figure((WIDTH / 100, HEIGHT / 100), dpi=100 * SCALE)
            figure.set_layout_engine("none")
            self._canvas = TextMemoryCanvas(figure)
            self._indexed = np.zeros(SIZE[::-1], np.uint8)
            place, low = functools.partial(_Part, self._canvas, self._indexed), 0.03
            self._before = place("no checkpointing", (0, 0.5, 0.55, 0.5), 0.06, low)
            self._after = place("this plan", (0, 0, 0.55, 0.5), 0.06, low)
            bars = (0.55, 0.5, 0.25, 0.5), 0.055
            self._peaks = place("alive at the peak", *bars, right=0.08)
            self._times = place("iteration time", (0.8, 0.5, 0.2, 0.5), 0.05)
            self._tradeoff = place("every plan tried", (0.55, 0, 0.45, 0.5), 0.055)
            self._canvas.draw()

    def draw(
        self,
        before: StepReport,
        after: StepReport,
        tried: Sequence[StepReport] = (),
        measured: Sequence[tuple[StepReport, StepReport]] = (),
        recorded: Mapping[Plan, tuple[StepReport, StepReport]] | None = None,
    ) -> bytes:
        """Draw one state and return it as PNG.

        Args:
            before, after: without checkpointing and with this plan; measured reports
                where there are some, else predicted ones.
            tried: predictions of every plan so far, this one last.
            measured: of those, what was measured, beside the unchecked model.
            recorded: such pairs by plan, which another machine measured.
        """
        found, times = recorded or {}, {}
        grey = {r.plan: found[r.plan] for r in tried if r.plan in found}
        if after.plan in found:
            report, base = found[after.plan]
            times = {before.plan: (base, base), after.plan: (report, base)}
        top = {"top_bytes": max(r.peak_bytes for r in (before, after, *tried))}
        # Room for most plans: a new scale would have the first timeline drawn again.
        room = ROOM * timeline_length(before.timeline)
        length = max(room, timeline_length(after.timeline))
        pair, now = {"none": before, "this plan": after}, Recorded(pairs=times)
        others = {"recorded": Recorded(pairs=grey), **top}
        others["labels"] = {len(tried) - 1: "this plan", 0: "none"}
        with matplotlib.rc_context(self._style):
            for part, report in ((self._before, before), (self._after, after)):
                line = {"length": length, "measured": report.source == "measured"}
                part.paint(plot_timeline, report.timeline, **top, **line)
            self._peaks.paint(plot_peaks, pair, recorded=now, **top)
            self._times.paint(plot_times, pair, now)
            self._tradeoff.paint(plot_tradeoff, [*tried], [*measured], **others)
        return self._png()

    def _png(self) -> bytes:
        image = Image.fromarray(self._indexed, "P")
        image.putpalette(PALETTE.tobytes())
        out = io.BytesIO()
        image.save(out, "png", compress_level=1)
        return out.getvalue()


def _palette() -> tuple[np.ndarray, np.ndarray]:
    """Make the picture's colours: white, every hue, and its way to white at edges.

    They are fixed, so that a colour is the same after every flip.

    Returns:
        (n, 3) bytes of RGB, and for each colour of 5 bits a channel its nearest place.
    """
    hues = [*COLORS.values(), *PHASE_COLORS.values(), *LABEL_COLORS.values()]
    pure = np.array(
        [to_rgb(hue) for hue in ["white", *hues, INK, QUIET, RECORDED, "#A85B20"]]
    )
    shares = np.array([1, 0.85, 0.7, 0.55, 0.4, 0.25, 0.1])[:, None, None]
    palette = np.rint(255 * (1 - shares * (1 - pure)).reshape(-1, 3)).astype(int)
    code = np.arange(32**3)
    rgb = np.stack([code & 31, code >> 5 & 31, code >> 10], axis=1) * 255 // 31
    nearest = ((rgb[:, None] - palette[None]) ** 2).sum(-1).argmin(1)
    red, green, blue = (palette[: len(pure)] >> 3).T
    nearest[red | green << 5 | blue << 10] = range(len(pure))
    return palette.astype(np.uint8), nearest.astype(np.uint8)


PALETTE, NEAREST = _palette()


def indexed(pixels: np.ndarray) -> np.ndarray:
    """Turn (height, width, 4) bytes of RGBA into (height, width) palette places."""
    rgba = pixels.view("<u4")[..., 0]
    return NEAREST.take(rgba >> 3 & 31 | rgba >> 6 & 31 << 5 | rgba >> 9 & 31 << 10)


def smaller(png: bytes) -> bytes:
    """Compress a picture well, which takes too long at a flip, to keep it in a file."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).save(out, "png", optimize=True)
    return out.getvalue()


class _Part:
    """One axes and its region of the canvas, painted when what it shows changes.

    Args:
        region: (x, y, width, height), margins included; shares of the figure.
    """

    def __init__(
        self, canvas, indexed, title, region, left, low=0.1, right=0.015
    ) -> None:
        self._canvas, self._indexed = canvas, indexed
        self._shown = self._frame = self._empty = None
        x, y, width, height = region
        inside = x + left, y + low, width - left - right, height - low - 0.07
        self._ax = canvas.figure.add_axes(inside, title=title)
        columns, rows = SIZE
        self._region = (
            slice(round((1 - y - height) * rows), round((1 - y) * rows)),
            slice(round(x * columns), round((x + width) * columns)),
        )

    def paint(self, plot: Callable, *args, **kwargs) -> None:
        """Paint ``plot(ax, …)``, unless it shows the same already."""
        if (args, kwargs) == self._shown:
            return
        for artist in self._artists():
            artist.remove()
        plot(self._ax, *args, **kwargs)
        pixels = np.asarray(self._canvas.buffer_rgba())[self._region]
        pixels[:] = self._empty_axes(pixels)
        for artist in sorted(self._artists(), key=lambda artist: artist.zorder):
            artist.draw(self._canvas.get_renderer())
        self._indexed[self._region] = indexed(pixels)
        self._shown = args, kwargs

    def _artists(self) -> list[Artist]:
        ax = self._ax
        return [*ax.lines, *ax.patches, *ax.collections, *ax.texts, *ax.artists]

    def _empty_axes(self, pixels: np.ndarray) -> np.ndarray:
        """Draw the axes without data, but only where limits or labels have changed."""
        ax = self._ax
        labels = [label.get_text() for label in ax.get_xticklabels()]
        frame = ax.get_xlim(), ax.get_ylim(), labels, ax.get_xlabel(), ax.get_ylabel()
        if frame != self._frame:
            artists = self._artists()
            for artist in artists:
                artist.set_visible(False)
            pixels[:] = 255
            ax.draw(self._canvas.get_renderer())
            for artist in artists:
                artist.set_visible(True)
            self._frame, self._empty = frame, pixels.copy()
        return self._empty
