"""A row for each layer: its checkbox, its join with the layer before, what it keeps."""

from collections.abc import Callable

import ipywidgets as widgets
import traitlets
from torch import nn

from helpers.checkpointing import Plan, follows, layer_names
from helpers.plots import COLORS
from helpers.timeline import Timeline
from helpers.units import format_bytes

# The glyph of an icon is its button's name, before the title, unless it is told to be
# silent; so a screen reader says what the title says.
SILENT_ICONS = "".join(
    f".layer-lab .fa-{icon}::before {{content: '\\{glyph}' / ''}}\n"
    for icon, glyph in (
        ("link", "f0c1"),
        ("caret-right", "f0da"),
        ("caret-down", "f0d7"),
        ("clock-o", "f017"),
    )
)

JOIN_LOOK = {"height": "22px", "padding": "0", "margin": "3px 0"}


class Shared(dict):
    """Makes each layout and style once, for all rows.

    Each is a message to the browser, and where too many come at once some are lost.
    """

    def __call__(self, kind: type[widgets.Widget], **values: str) -> widgets.Widget:
        key = kind, *values.items()
        if key not in self:
            self[key] = kind(**values)
        return self[key]


class Join(widgets.ToggleButton):
    """Joins a layer to the one before it; its title says what a click does."""

    before = traitlets.Unicode()

    def __init__(self, name: str, before: str = "", **shared: widgets.Widget) -> None:
        self.name = name
        look = shared or {"layout": wide(30, **JOIN_LOOK)}
        super().__init__(icon="link", before=before, **look)

    @traitlets.observe("value", "before")
    def _say(self, _: dict) -> None:
        words = ("part", "from") if self.value else ("join", "to")
        self.tooltip = f"{words[0]} {self.name} {words[1]} {self.before}"


class LayerRows(widgets.VBox):
    """Boxes and joins for a model's layers, and the plan that they show.

    Args:
        changed: called without arguments when the reader flips something.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__(layout=widgets.Layout(width="auto"))
        self.boxes: dict[str, widgets.Checkbox] = {}
        self.joins: dict[str, widgets.ToggleButton] = {}
        self._kept: dict[str, widgets.HTML] = {}
        self._changed = changed
        self._quiet = False

    @property
    def plan(self) -> Plan:
        """The plan that the boxes and joins show; may be set, silently."""
        segments: list[tuple[str, ...]] = []
        before = None
        for name, box in self.boxes.items():
            if box.value:
                joined = name in self.joins and self.joins[name].value
                if joined and segments and segments[-1][-1] == before:
                    segments[-1] += (name,)
                else:
                    segments.append((name,))
            before = name
        return Plan(tuple(segments))

    @plan.setter
    def plan(self, plan: Plan) -> None:
        unknown = [name for name in plan.names if name not in self.boxes]
        if unknown:
            raise ValueError(
                f"the lab has no box for {', '.join(map(repr, unknown))}; it has: "
                f"{', '.join(self.boxes)}"
            )
        joined = {name for segment in plan.segments for name in segment[1:]}
        self._quiet = True
        for name, box in self.boxes.items():
            box.value = name in plan.names
        for name, join in self.joins.items():
            join.value = name in joined
        self._quiet = False

    def pieces(self, size: int) -> Plan:
        """Cut all layers into segments of ``size``, as far as they are a chain."""
        segments: list[tuple[str, ...]] = []
        for name in self.boxes:
            if segments and name in self.joins and len(segments[-1]) < size:
                segments[-1] += (name,)
            else:
                segments.append((name,))
        return Plan(tuple(segments))

    def rebuild(self, model: nn.Module, inspection: object = None) -> None:
        """Make rows for a model's layers; a layer that stays keeps its row and ticks.

        The reader may be clicking: a row is not taken from under the mouse, and the
        names are exchanged at once, since clicks come on other threads.

        Args:
            inspection: what lies deeper in the model, which these rows do not show.
        """
        names = layer_names(model)
        if not names:
            raise ValueError(
                "this model has no layers to tick: none of its children has parameters"
            )
        old = dict(zip(self.boxes, self.children, strict=True))
        boxes, joins, kept, rows = {}, {}, {}, []
        for before, name in zip([None, *names], names, strict=False):
            joinable = before is not None and follows(model, before, name)
            row = old.get(name)
            if row is None or joinable != (name in self.joins):
                row = self._make_row(name, joinable)
            join, boxes[name], kept[name] = row.children
            if joinable:
                join.before, joins[name] = before, join
            rows.append(row)
        self.boxes, self.joins, self._kept = boxes, joins, kept
        if names != list(old):
            self.children = rows

    def _make_row(self, name: str, joinable: bool) -> widgets.HBox:
        """Make a layer's row: its join, or the room for one; its box; what it keeps."""
        join: widgets.Widget = widgets.Box(layout=wide(30))
        if joinable:
            join = Join(name)
            join.observe(self._flipped, "value")
        ticked = name in self.boxes and self.boxes[name].value
        box = widgets.Checkbox(ticked, description=name, indent=False, layout=wide(76))
        box.observe(self._flipped, "value")
        kept = widgets.HTML(layout=widgets.Layout(margin="0 0 0 4px"))
        layout = widgets.Layout(align_items="center", height="28px")
        return widgets.HBox([join, box, kept], layout=layout)

    def _flipped(self, _: dict) -> None:
        if not self._quiet:
            self._changed()

    @property
    def units(self) -> tuple[str, ...]:
        """What "each alone" ticks."""
        return tuple(self.boxes)

    def kept(self, timeline: Timeline) -> dict[str, int]:
        """Count what each layer keeps, by the names of the rows."""
        return timeline.kept_bytes()

    def show_kept(
        self, plan: Plan, now: dict[str, int], without: dict[str, int]
    ) -> None:
        """Show the bytes that each layer keeps, and a bar along each segment.

        Args:
            plan: what is shown; the boxes may be ahead of it.
            now, without: bytes by layer, under this plan and without checkpointing.
        """
        continued = {name for run in plan.segments for name in run[1:]}
        before_ticked = False
        for name, row in zip(self.boxes, self.children, strict=True):
            ticked = name in plan.names
            color = COLORS["recomputed"] if ticked else "transparent"
            row.layout.border_left = f"4px solid {color}"
            row.layout.margin = "0" if name in continued else "2px 0 0 0"
            if name in self.joins:
                self.joins[name].disabled = not (ticked and before_ticked)
            before_ticked = ticked
            kept, style = now.get(name, 0), "font-variant-numeric:tabular-nums"
            if kept != without.get(name, 0):
                style += f";color:{COLORS['recomputed']};font-weight:bold"
            text = f'<span style="{style}">keeps {format_bytes(kept)}</span>'
            self._kept[name].value = text


def is_flat(model: nn.Module) -> bool:
    """Say whether a model's children are all the layers that there are to tick.

    So it is with a chain of layers, or of layers with what belongs to them.
    """
    children = [list(child.children()) for child in model.children()]
    grand = [child for inner in children for child in inner]
    return not grand or (
        isinstance(model, nn.Sequential)
        and not any(list(child.children()) for child in grand)
    )


def wide(pixels: int, **layout: str) -> widgets.Layout:
    """Make a layout of a width in pixels."""
    return widgets.Layout(width=f"{pixels}px", **layout)
