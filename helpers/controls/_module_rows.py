"""A tree of rows for a model's modules: what can be ticked, folded where it is deep.

A row's widgets are made when it is first shown, so that a model of hundreds of modules
opens at once. What is ticked and joined is kept apart from them, by name.
"""

import html
from collections.abc import Callable

import ipywidgets as widgets
from ipywidgets.widgets.widget_bool import CheckboxStyle, ToggleButtonStyle
from ipywidgets.widgets.widget_button import ButtonStyle
from ipywidgets.widgets.widget_string import HTMLStyle
from torch import nn

from helpers.checkpointing import Plan
from helpers.controls._ticks import Ticks
from helpers.controls.rows import JOIN_LOOK, Join, LayerRows, Shared
from helpers.inspection import Inspection, kept_by_module
from helpers.plots import COLORS
from helpers.timeline import Timeline
from helpers.units import format_bytes

FOLDED = 8  # so many alike and more are one row at first
INDENT = 14  # pixels a level


class ModuleRows(LayerRows):
    """Boxes for all modules whose forward is called, and joins where a chain allows.

    A module and one inside it cannot both be ticked: the later tick takes the place of
    the earlier. ``boxes["a.b"]`` makes the row if it was folded away.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        super().__init__(changed)
        self.layout.max_height, self.layout.overflow = "430px", "hidden auto"
        self._ticks: Ticks | None = None
        self._share = Shared()
        self._open: set[str] = set()  # modules, and first modules of a run alike
        self._rows: dict[str, widgets.HBox] = {}
        self._runs: dict[str, list[str]] = {}  # runs of modules alike, by a row's key
        self._groups: dict[str, widgets.Checkbox] = {}
        self._marks: dict[str, str] = {}
        self._keys: list[str] = []  # of the rows that are shown
        self._shown = Plan(), {}, {}

    # The plan -------------------------------------------------------------------------

    @property
    def plan(self) -> Plan:
        """The plan that the boxes and joins show; may be set, silently."""
        return self._ticks.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._ticks.plan = plan
        self._write()

    def pieces(self, size: int) -> Plan:
        """Cut the units into segments of ``size``, as far as they are a chain."""
        return self._ticks.pieces(size)

    @property
    def units(self) -> tuple[str, ...]:
        """What "each alone" ticks."""
        return self._inspection.units

    def _write(self) -> None:
        """Write what is ticked and joined into the widgets that there are."""
        for name, box in list(self.boxes.items()):
            box.value = name in self._ticks.ticked
        for name, join in list(self.joins.items()):
            join.value = name in self._ticks.joined
        for key, box in list(self._groups.items()):
            box.value = self._ticks.holds(self._runs[key])

    # The rows -------------------------------------------------------------------------

    def rebuild(self, model: nn.Module, inspection: Inspection | None = None) -> None:
        """Make rows for what was found in a model; what stays, stays ticked."""
        layers = inspection.layers
        if not layers:
            raise ValueError(f"{inspection.model} calls no module that could be ticked")
        self._inspection = inspection
        self._ticks = Ticks(inspection, self._ticks)
        self.boxes, self.joins, self._kept = _Boxes(self), {}, {}
        self._rows, self._runs, self._groups, self._marks = {}, {}, {}, {}
        self._open, self._shown = set(), (Plan(), {}, {})
        name = inspection.parent(inspection.units[0])
        while name:  # what a unit lies in is unfolded
            self._open.add(name)
            name = inspection.parent(name)
        self._lay_out()

    def reveal(self, name: str) -> None:
        """Unfold all that a module lies in."""
        inspection, inner = self._inspection, name
        while inner:
            parent = inspection.parent(inner)
            for run in inspection.repeats(inspection.children(parent)):
                if inner in run and len(run) >= FOLDED:
                    self._open.add(f"{run[0]} …")
            self._open.add(parent)
            inner = parent
        self._lay_out()

    def _lay_out(self) -> None:
        rows = self._visible("", 0)
        self._keys = [key for key, _ in rows]
        for key, row in rows:
            if isinstance(row.children[1], widgets.Button):
                row.children[1].icon = self._icon(key)
        self.children = [row for _, row in rows]
        self.show_kept(*self._shown)

    def _visible(self, parent: str, level: int) -> list[tuple[str, widgets.HBox]]:
        """Make, or find, the rows inside a module that are not folded away."""
        inspection, rows = self._inspection, []
        for run in inspection.repeats(inspection.children(parent)):
            key = f"{run[0]} …"
            if len(run) >= FOLDED:
                rows.append((key, self._group_row(key, run, parent, level)))
                if key not in self._open:
                    continue
            inner = level + (len(run) >= FOLDED)
            for name in run:
                rows.append((name, self._module_row(name, parent, inner)))
                if name in self._open:
                    rows += self._visible(name, inner + 1)
        return rows

    def _module_row(self, name: str, parent: str, level: int) -> widgets.HBox:
        if name not in self._rows:
            join = self._make_join(name)
            label = name.removeprefix(f"{parent}.") if parent else name
            box = self._make_box(label, name in self._ticks.ticked)
            layer = self._inspection.layers[name]
            box.tooltip = f"{name}, {layer.kind}"
            box.observe(lambda change: self._flip(name, change.new), "value")
            dict.__setitem__(self.boxes, name, box)
            foldable = bool(self._inspection.children(name))
            self._marks[name] = self._mark([name])
            self._rows[name] = self._make_tree_row(name, join, box, foldable, level)
        return self._rows[name]

    def _group_row(
        self, key: str, run: list[str], parent: str, level: int
    ) -> widgets.HBox:
        if key not in self._rows:
            self._runs[key] = run
            first = run[0].removeprefix(f"{parent}.") if parent else run[0]
            label = f"{first} … {run[-1].rpartition('.')[2]}"
            box = self._make_box(label, self._ticks.holds(run))
            box.tooltip = f"all {len(run)}, each alone"
            box.observe(lambda change: self._flip_run(key, change.new), "value")
            self._groups[key], self._marks[key] = box, self._mark(run)
            self._rows[key] = self._make_tree_row(key, self._room(30), box, True, level)
        return self._rows[key]

    def _make_box(self, label: str, ticked: bool) -> widgets.Checkbox:
        return widgets.Checkbox(
            ticked,
            description=label,
            indent=False,
            layout=self._look(width="auto", flex="1 1 auto", min_width="0"),
            style=self._share(CheckboxStyle),
        )

    def _make_join(self, name: str) -> widgets.Widget:
        """Make a module's join with the one before it, or the room for one."""
        if name not in self._ticks.before:
            return self._room(30)
        join = Join(
            name,
            self._ticks.before[name],
            layout=self._look(width="30px", **JOIN_LOOK),
            style=self._share(ToggleButtonStyle),
        )
        join.value = name in self._ticks.joined
        join.observe(lambda change: self._flip_join(name, change.new), "value")
        self.joins[name] = join
        return join

    def _make_fold(self, key: str, margin: str) -> widgets.Button:
        fold = widgets.Button(
            icon=self._icon(key),
            tooltip=f"what is in {key}",
            layout=self._look(**JOIN_LOOK | {"width": "22px", "margin": margin}),
            style=self._share(ButtonStyle, button_color="transparent"),
        )
        fold.on_click(lambda _: self._fold(key))
        return fold

    def _make_tree_row(
        self, key: str, join: widgets.Widget, box, foldable: bool, level: int
    ) -> widgets.HBox:
        margin = f"3px 0 3px {INDENT * level}px"
        fold = self._make_fold(key, margin) if foldable else self._room(22, margin)
        kept = widgets.HTML(
            layout=self._look(margin="0 6px"), style=self._share(HTMLStyle)
        )
        self._kept[key] = kept
        return widgets.HBox([join, fold, box, kept], layout=self._row_look(False, "0"))

    def _room(self, pixels: int, margin: str = "0") -> widgets.Box:
        """Make the room for what a row lacks."""
        return widgets.Box(layout=self._look(width=f"{pixels}px", margin=margin))

    def _look(self, flex: str = "0 0 auto", **values: str) -> widgets.Layout:
        return self._share(widgets.Layout, flex=flex, **values)

    def _row_look(self, ticked: bool, margin: str) -> widgets.Layout:
        color = COLORS["recomputed"] if ticked else "transparent"
        return self._look(
            align_items="center",
            height="28px",
            border_left=f"4px solid {color}",
            margin=margin,
        )

    # What the reader does -------------------------------------------------------------

    def _icon(self, key: str) -> str:
        return "caret-down" if key in self._open else "caret-right"

    def _fold(self, key: str) -> None:
        self._open ^= {key}
        self._lay_out()

    # A widget that says what is known already was written here, not by the reader.

    def _flip(self, name: str, ticked: bool) -> None:
        if ticked != (name in self._ticks.ticked):
            self._ticks.tick(name, ticked)
            self._write()
            self._changed()

    def _flip_join(self, name: str, joined: bool) -> None:
        if joined != (name in self._ticks.joined):
            self._ticks.joined ^= {name}
            self._changed()

    def _flip_run(self, key: str, ticked: bool) -> None:
        run = self._runs[key]
        if ticked != self._ticks.holds(run):
            for name in run:
                self._ticks.tick(name, ticked)
            self._ticks.joined -= set(run)
            self._write()
            self._changed()

    # What is shown --------------------------------------------------------------------

    def kept(self, timeline: Timeline) -> dict[str, int]:
        """Count what each module keeps; here, with all that lies in it."""
        return kept_by_module(timeline)

    def show_kept(
        self, plan: Plan, now: dict[str, int], without: dict[str, int]
    ) -> None:
        """Show the bytes that each module keeps, and a bar along each segment."""
        self._shown = plan, now, without
        names, continued = set(plan.names), {n for s in plan.segments for n in s[1:]}
        for key, row in zip(self._keys, self.children, strict=True):
            run = self._runs.get(key, [key])
            margin = "0" if key in continued else "2px 0 0 0"
            row.layout = self._row_look(names.issuperset(run), margin)
            if key in self.joins:
                both = key in names and self._ticks.before[key] in names
                self.joins[key].disabled = not both
            folded = key not in self._open
            words = self._words_of_ticks(plan, run) if folded else ""
            self._kept[key].value = self._kept_text(key, run, words, now, without)

    def _words_of_ticks(self, plan: Plan, run: list[str]) -> str:
        """Say what of a plan lies folded away in a row."""
        count = sum(
            any(name == one or name.startswith(f"{one}.") for one in run)
            for name in plan.names
        )
        if not set(run).issubset(plan.names):
            return f"{count} ticked, " if count else ""
        segments = sum(segment[0] in run for segment in plan.segments)
        if segments == count or len(run) == 1:
            return ""
        return f"{segments} segment{'s' * (segments != 1)}, "

    def _kept_text(self, key: str, run: list[str], words: str, now, without) -> str:
        kept = sum(now.get(name, 0) for name in run)
        style = "font-variant-numeric:tabular-nums;white-space:nowrap"
        if kept != sum(without.get(name, 0) for name in run):
            style += f";color:{COLORS['recomputed']};font-weight:bold"
        return (
            f'{self._marks[key]}<span style="{style}">'
            f"{words or 'keeps '}{format_bytes(kept)}</span>"
        )

    def _mark(self, run: list[str]) -> str:
        """Mark a row whose box is not safe to tick, with the reason under the mouse."""
        hazards = self._inspection.hazards_of(Plan.alone(run))
        if not hazards:
            return ""
        reason = html.escape(str(hazards[0]))
        return f'<span role="img" title="{reason}" aria-label="{reason}">⚠ </span>'


class _Boxes(dict):
    """Boxes by name; one that is folded away is made when it is asked for."""

    def __init__(self, rows: ModuleRows) -> None:
        super().__init__()
        self._rows = rows

    def __missing__(self, name: str) -> widgets.Checkbox:
        if name not in self._rows._inspection.layers:
            raise KeyError(name)
        self._rows.reveal(name)
        return self[name]
