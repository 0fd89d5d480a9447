"""The lab's picture: its numbers go to the browser, and picture.js draws them.

A page without a kernel shows a PNG, which is drawn when somebody asks for it.
"""

import base64
import functools
import html
import json
import operator
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import traitlets

from helpers.checkpointing import Plan
from helpers.controls._answers import Answers, Pair, recorded_beside
from helpers.controls._findings import finding
from helpers.controls._png import Around, draw_png
from helpers.measure import StepReport
from helpers.plots import COLORS, extra_work, peak_cause, running
from helpers.timeline import CATEGORIES, Allocation
from helpers.units import format_change, format_ms

try:
    import anywidget
except ModuleNotFoundError as error:
    words = "the labs need anywidget in the kernel's environment: pip install anywidget"
    raise ModuleNotFoundError(words) from error

PACKED_FROM_BYTES = 8_192


def packed(value: object, _: object = None) -> object:
    """Pack what goes to the browser, where it is large: it repeats itself.

    A browser unpacks beside its other work, which takes longer than some kB more.
    """
    data = json.dumps(value, separators=(",", ":")).encode()
    return value if len(data) < PACKED_FROM_BYTES else zlib.compress(data, 1)


class Picture(anywidget.AnyWidget):
    """Draws the answers of a lab.

    Args:
        bring_back, compare: called with a plan that the reader chose.

    Attributes:
        before, after: a timeline each, as numbers.
        names: what their numbers stand for, if it is in ``before``.
        shown: what is beside them, and the finding; empty if nothing is shown.
        value: the picture as HTML for where there is no widget, or "". It is drawn when
            it is read; observers of it are told when it is another one.
    """

    _esm = Path(__file__).with_name("picture.js")
    _css = Path(__file__).with_name("lab.css")
    colors = traitlets.Dict(COLORS).tag(sync=True)
    before, after, shown = (
        traitlets.Dict().tag(sync=True, to_json=packed) for _ in range(3)
    )
    names = traitlets.List().tag(sync=True, to_json=packed)

    def __init__(
        self, bring_back: Callable[[Plan], None], compare: Callable[[Plan], None]
    ) -> None:
        super().__init__()
        self.add_class("layer-lab-picture")
        self._heard = {"bring_back": bring_back, "compare": compare}
        self._tried: list[Plan] = []
        self.on_msg(self._clicked)
        self.clear()

    def clear(self) -> None:
        """Show nothing."""
        self._set({}, {}, {"finding": ""}, [])
        self._draw: Callable[[], bytes] = bytes

    def show(
        self,
        found: Answers,
        recorded: Mapping[Plan, Pair],
        limit: Mapping[str, object] | None = None,
        around: Around = ([], []),
    ) -> None:
        """Show a plan beside the one that it is compared with, and every plan tried.

        Args:
            recorded: pairs by plan, which another machine measured.
            limit: the bytes that there are, if the plan takes more, and what to say.
            around: the rows and lines that a page without widgets shows.
        """
        self._tried = [*found.tried]
        drawn = functools.partial(draw_png, found, dict(recorded), around)
        self._draw = functools.cache(drawn)
        before, after = found.reports
        texts = _Numbered()
        first, names = _line(found.title, before, texts), [*texts]
        second = _line("this plan", after, texts)
        second["names"] = [*texts][len(names) :]
        numbers = _numbers(found, recorded) | {"limit": limit}
        self._set(first, second, numbers, names)

    def _set(self, before: dict, after: dict, shown: dict, names: list[str]) -> None:
        with self.hold_sync():  # one message, which says what has changed
            self.before, self.after = before, after
            self.shown, self.names = shown, names
        self.notify_change(traitlets.Bunch(name="value", type="change", owner=self))

    @property
    def png(self) -> bytes:
        """The picture as a file, or nothing."""
        return self._draw()

    @property
    def value(self) -> str:
        if not self.png:
            return ""
        source = base64.b64encode(self.png).decode()
        words = html.escape(self.shown["finding"])
        return f'<img alt="{words}" src="data:image/png;base64,{source}">'

    def copy(self, text: str, name: str) -> None:
        """Put a text into the clipboard of the reader's browser; say so at a button."""
        self.send({"copy": text, "from": name})

    def save(self) -> None:
        """Let the reader's browser save the picture as a file."""
        self.send({"save": "layer-lab.png"}, buffers=[self.png])

    def _clicked(self, _: object, message: dict, __: object) -> None:
        for kind in self._heard.keys() & message.keys():
            place = message[kind]
            if isinstance(place, int) and 0 <= place < len(self._tried):
                self._heard[kind](self._tried[place])


def _numbers(found: Answers, recorded: Mapping[Plan, Pair]) -> dict:
    """Give what is drawn beside the timelines."""
    plans, base = [*found.tried], found.pair[0]
    grey = recorded_beside(recorded, base.plan, found.shown)
    return {
        "finding": found.finding,
        "categories": CATEGORIES,
        "times": _times(found.reports, grey),
        "recordedPeaks": [[one.peak_bytes] if one else [] for one in grey],
        "tried": [
            {"work": extra_work(r), "peak": r.peak_bytes, "about": finding(base, r)}
            for r in found.tried.values()
        ],
        "pair": found.pair_names,
        "now": plans.index(found.shown),
        "compared": plans.index(base.plan),
        "none": plans.index(Plan()),
        "names": {plans.index(plan): name for plan, name in found.names.items()},
        "dots": _extra_times(found.measured.values()),
        "recorded": _extra_times(recorded[p] for p in plans if p in recorded),
    }


def _extra_times(pairs: Iterable[Pair]) -> list[tuple[float, int]]:
    """Place reports at their extra time in %, and their peak."""
    return [
        (100 * (report.step_ms / base.step_ms - 1), report.peak_bytes)
        for report, base in pairs
        if report.step_ms and base.step_ms
    ]


def _times(*series: Sequence[StepReport | None]) -> list[list[dict]]:
    """Give for both plans the medians that there are, of here and of a recording."""
    places: list[list[dict]] = [[], []]
    for reports in series:
        first = reports[0] and reports[0].step_ms
        for place, report in zip(places, reports, strict=True):
            if report is None or report.step_ms is None:
                continue
            words = [format_ms(report.step_ms)]
            if place is places[1] and first:
                words.append(format_change(report.step_ms, first))
            low, high = report.step_ms_quartiles
            is_grey = reports is series[-1]
            times = {"ms": report.step_ms, "low": low, "high": high, "words": words}
            place.append(times | {"recorded": is_grey})
    return places


def _line(title: str, report: StepReport, texts: dict[str, int]) -> dict:
    """Give what a timeline is drawn and asked from: each tensor, from when to when.

    A place is what lies between two events; the first one is before the forward pass.
    ``gaps`` lie between tensors' first places, and ``lasts`` is how many each has;
    ``makers`` has gaps as well, and ``shape`` none: numbers of ``texts``.
    """
    line, start = report.timeline, report.timeline.first_allocation
    born = dict.fromkeys(line.before, 0)
    gone: dict[Allocation, int] = {}
    for place, event in enumerate(line.events, 1 - start):
        ends = born if event.kind == "alloc" else gone
        ends[event.allocation] = max(0, place)
    length = len(line.events) - start + 1
    tensors = [one for one in born if gone.get(one, length) > 0]
    return {
        "title": title,
        "measured": report.source == "measured",
        "length": length,
        "peak": {
            "place": max(0, line.peak_place + 1 - start),
            "bytes": report.peak_bytes,
            "cause": peak_cause(line),
        },
        "categories": [report.categories.get(name, 0) for name in CATEGORIES],
        "running": running(line),
        "bytes": [one.bytes for one in tensors],
        "gaps": _gaps([born[one] for one in tensors]),
        "lasts": [gone.get(one, length) - born[one] for one in tensors],
        "category": [CATEGORIES.index(one.category) for one in tensors],
        "makers": _gaps([texts[_maker(one)] for one in tensors]),
        "shape": [texts[" × ".join(map(str, one.shape))] for one in tensors],
    }


def _gaps(numbers: list[int]) -> list[int]:
    """Give each number's distance from the one before: those repeat themselves."""
    return [*map(operator.sub, numbers, [0, *numbers])]


def _maker(tensor: Allocation) -> str:
    """Say what made a tensor, and in which module."""
    if not tensor.op:
        return "from before the step"
    return f"by {tensor.op}{f' in {tensor.module}' if tensor.module else ''}"


class _Numbered(dict):
    """Numbers texts from 0 up as they come."""

    def __missing__(self, text: str) -> int:
        return self.setdefault(text, len(self))
