"""A row for each module that can be ticked: join, box, and the bytes that it keeps.

A flat model is a tree of depth one. A row's widgets are made when it is first shown, so
that a model of hundreds of modules opens at once; ``Ticks`` has what is ticked.
"""

import functools
import html
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import ipywidgets as widgets

from helpers.checkpointing import Plan
from helpers.controls.ticks import Ticks
from helpers.plots import COLORS
from helpers.units import format_bytes

FOLDED = 8  # so many alike and more are one row at first
LONGEST, PIECE = 64, 50  # where more would be unfolded at once, so many are a row
INDENT = 14  # pixels a level
BUTTON = {"height": "22px", "padding": "0"}
Bytes = dict[str, int]  # that modules keep, by their names


@dataclass(frozen=True)
class Node:
    """What a row is of: a module, or a run of modules alike."""

    key: str  # the module's name, or the first one's and "…"
    names: tuple[str, ...]
    label: str
    about: str
    level: int
    before: str | None  # the module that it can be joined to
    foldable: bool
    mark: str  # where its box is not safe to tick


class Shared:
    """Makes each layout and style once, for all rows.

    Each is a message to the browser, and where too many come at once some are lost.
    """

    def __init__(self) -> None:
        of_its_size = functools.partial(widgets.Layout, flex="0 0 auto")
        self.layout = functools.cache(of_its_size)
        self._styles: dict[type, widgets.Widget] = {}

    def make(self, kind: type[widgets.Widget], **values: object) -> widgets.Widget:
        """Make a widget in the style of the first one of its kind."""
        widget = kind(**values | {"style": self._styles.get(kind, {})})
        self._styles.setdefault(kind, widget.style)
        return widget


class Row(widgets.HBox):
    """The widgets of a node: box, kept, and a join and a fold, or None without."""

    def __init__(self, node: Node, share: Shared, tree: bool) -> None:
        self.node, self._share = node, share
        self.join = self._make_join() if node.before else None
        self.fold = None
        parts = [self.join or widgets.Box(layout=share.layout(width="30px"))]
        if tree:
            parts.append(self._make_fold())
        room = share.layout(width="auto", flex="1 1 auto", min_width="0")
        look = {"description": node.label, "tooltip": node.about, "layout": room}
        self.box = share.make(widgets.Checkbox, indent=False, **look)
        self.kept = share.make(widgets.HTML, layout=share.layout(margin="0 6px"))
        super().__init__([*parts, self.box, self.kept], layout=self._bar())

    def _make_join(self) -> widgets.ToggleButton:
        look = self._share.layout(width="30px", margin="3px 0", **BUTTON)
        join = self._share.make(widgets.ToggleButton, icon="link", layout=look)
        join.observe(self._name_join, "value")
        self._name_join({"owner": join})
        return join

    def _name_join(self, change: dict) -> None:
        """Say what a click on the join does."""
        join = change["owner"]
        words = ("part", "from") if join.value else ("join", "to")
        join.tooltip = f"{words[0]} {self.node.key} {words[1]} {self.node.before}"

    def _make_fold(self) -> widgets.Widget:
        margin = f"3px 0 3px {INDENT * self.node.level}px"
        if not self.node.foldable:
            return widgets.Box(layout=self._share.layout(width="22px", margin=margin))
        look = self._share.layout(width="22px", margin=margin, **BUTTON)
        self.fold = self._share.make(widgets.Button, layout=look)
        self.fold.style.button_color = "transparent"
        self.fold.tooltip = f"what is in {self.node.key}"
        return self.fold

    def _bar(self, ticked: bool = False, continued: bool = False) -> widgets.Layout:
        color = COLORS["recomputed"] if ticked else "transparent"
        return self._share.layout(
            align_items="center",
            height="28px",
            border_left=f"4px solid {color}",
            margin="0" if continued else "2px 0 0 0",
        )

    def tick(self, ticked: bool, inside: int) -> None:
        """Tick the box, or draw a dash in it if some modules inside are ticked."""
        part = inside > 0 and not ticked
        (self.box.add_class if part else self.box.remove_class)("part")
        said = f"; {inside} module{'s' * (inside != 1)} ticked inside" * part
        self.box.value, self.box.tooltip = ticked, self.node.about + said

    def show(self, plan: Plan, words: str, changed: bool) -> None:
        """Show a bar if it is in a plan, and what it keeps."""
        names, key = set(plan.names), self.node.key
        continued = key in names and not any(s[0] == key for s in plan.segments)
        self.layout = self._bar(names.issuperset(self.node.names), continued)
        kind = "kept changed" if changed else "kept"
        self.kept.value = f'{self.node.mark}<span class="{kind}">{words}</span>'


class Rows(widgets.VBox):
    """Boxes and joins for what can be ticked; they show ``ticks``, and change them.

    Args:
        changed: called without arguments when the reader flips something.
        tree: whether there is room for folds and for long names.

    Attributes:
        boxes: a checkbox for each module, by name; ``boxes["a.b"]`` makes the row if it
            is folded away.
        joins: a toggle for each module that can share a segment with the one before.
    """

    def __init__(self, ticks: Ticks, changed: Callable[[], None], tree: bool) -> None:
        super().__init__(layout=widgets.Layout(width="auto"))
        self.add_class("layer-lab-tree" if tree else "layer-lab-list")
        self.ticks, self._changed, self._tree = ticks, changed, tree
        self._share = Shared()
        self.boxes: dict[str, widgets.Checkbox] = {}
        self.joins: dict[str, widgets.ToggleButton] = {}
        self._rows: dict[str, Row] = {}  # all that have been made, by their keys

    def rebuild(self) -> None:
        """Make rows for another model; one that stays is not taken from the mouse."""
        self._old, self._rows = self._rows, {}
        if len(self.ticks.inspection.layers) > LONGEST:
            self._tree = True
            self.add_class("layer-lab-tree")
        self.boxes, self.joins = _Boxes(self), {}
        self._shown: tuple[Plan, Bytes, Bytes] = Plan(), {}, {}
        around = self.ticks.inspection.parent(self.ticks.inspection.units[0])
        self._open = {around}  # the keys of what is unfolded
        self.reveal(around)

    def reveal(self, name: str) -> None:
        """Unfold all that a module lies in."""
        while name:
            parent = self.ticks.inspection.parent(name)
            runs = self._runs(parent)
            self._open |= {parent} | {f"{run[0]} …" for run in runs if name in run}
            name = parent
        self._lay_out()

    def _lay_out(self) -> None:
        rows = self._visible("", 0)
        for row in rows:
            if row.fold:
                row.fold.icon = f"caret-{'down' if self._is_open(row) else 'right'}"
        self.write()
        self.children = rows  # as they are meant, since a click may come at once
        self.show_kept(*self._shown)

    def _runs(self, parent: str) -> list[list[str]]:
        """Cut what is inside a module into runs that are alike, and not too long."""
        names = self.ticks.inspection.children(parent)
        runs = self.ticks.inspection.repeats(names)
        runs = [names] if len(runs) > LONGEST else runs
        pieces = []
        for run in runs:
            size = PIECE if len(run) > LONGEST else len(run)
            pieces += [run[i : i + size] for i in range(0, len(run), size)]
        return pieces

    def _is_open(self, row: Row) -> bool:
        return row.node.key in self._open

    def _visible(self, parent: str, level: int) -> list[Row]:
        """Make, or find, the rows inside a module that are not folded away."""
        rows = []
        for run in self._runs(parent):
            inner = level
            if len(run) >= FOLDED:
                rows.append(self._row(run, parent, level))
                inner += 1
                if not self._is_open(rows[-1]):
                    continue
            for name in run:
                rows.append(self._row([name], parent, inner))
                if self._is_open(rows[-1]):
                    rows += self._visible(name, inner + 1)
        return rows

    def _row(self, names: list[str], parent: str, level: int) -> Row:
        key = names[0] if len(names) == 1 else f"{names[0]} …"
        if key not in self._rows:
            node, row = self._node(key, names, parent, level), self._old.get(key)
            if row is None or row.node != node:
                row = self._make_row(node)
            if len(names) == 1:
                self.boxes[key] = row.box
            if row.join:
                self.joins[key] = row.join
            self._rows[key] = row
        return self._rows[key]

    def _node(self, key: str, names: list[str], parent: str, level: int) -> Node:
        inspection, first, mark = self.ticks.inspection, names[0], ""
        if hazards := inspection.hazards_of(Plan.alone(names)):
            reason = html.escape(str(hazards[0]))
            mark = f'<span role="img" title="{reason}" aria-label="{reason}">⚠ </span>'
        label = first.removeprefix(f"{parent}.")
        about, before = f"{first}, {inspection.layers[first].kind}", None
        if len(names) > 1:
            stem = label.rstrip("0123456789")
            label += f" … {names[-1].removeprefix(f'{parent}.').removeprefix(stem)}"
            about = f"all {len(names)}, each alone"
        else:
            before = self.ticks.before.get(first)
        foldable = len(names) > 1 or bool(inspection.children(first))
        return Node(key, tuple(names), label, about, level, before, foldable, mark)

    def _make_row(self, node: Node) -> Row:
        row = Row(node, self._share, self._tree)
        row.box.observe(lambda change: self._flip(node.names, change.new), "value")
        if row.join:
            row.join.observe(lambda change: self._join(node.key, change.new), "value")
        if row.fold:
            row.fold.on_click(lambda _: self._fold(node.key))
        return row

    def write(self) -> None:
        """Write what is ticked and joined into the widgets that there are.

        A join is for two that are ticked, whatever is shown.
        """
        held = _held(self.ticks.ticked)
        for row in list(self._rows.values()):
            names, ticked = row.node.names, self.ticks.ticked
            row.tick(ticked.issuperset(names), sum(held[n] for n in names))
            if row.join:
                both = {row.node.key, row.node.before} <= self.ticks.ticked
                row.join.disabled = not both
                row.join.value = row.node.key in self.ticks.joined

    # What the reader does. A widget that says what is known already was written here.

    def _fold(self, key: str) -> None:
        self._open ^= {key}
        self._lay_out()

    def _flip(self, names: tuple[str, ...], ticked: bool) -> None:
        if ticked != self.ticks.ticked.issuperset(names):
            self.ticks.tick(names, ticked)
            self.write()
            self._changed()

    def _join(self, name: str, joined: bool) -> None:
        if joined != (name in self.ticks.joined):
            self.ticks.joined.symmetric_difference_update({name})
            self._changed()

    def show_kept(self, plan: Plan, now: Bytes, without: Bytes) -> None:
        """Show the bytes that each module keeps, and a bar along each segment.

        Args:
            plan: what is shown; the boxes may be ahead of it.
            now, without: bytes by module, under this plan and without checkpointing;
                empty where that is not known.
        """
        self._shown, held = (plan, now, without), _held(plan.names)
        for row in self.children:
            names = row.node.names
            kept, before = (sum(b.get(n, 0) for n in names) for b in (now, without))
            words = _inside(plan, names, sum(held[n] for n in names))
            known = f"{words or 'keeps '}{format_bytes(kept)}"
            text = known if without else words.removesuffix(", ")
            row.show(plan, text, kept != before)

    def as_text(self, plan: Plan) -> list[tuple[str, str, bool]]:
        """Give each row's name, its box, and whether it goes on with a segment."""
        begin, held = {segment[0] for segment in plan.segments}, _held(plan.names)
        texts = []
        for node in (row.node for row in self.children):
            part = "part" if any(held[name] for name in node.names) else "none"
            ticked = "all" if {*node.names} <= {*plan.names} else part
            goes_on = node.key in plan.names and node.key not in begin
            texts.append(("  " * node.level + node.label, ticked, goes_on))
        return texts


def _held(names: Iterable[str]) -> Counter[str]:
    """Count the names in each module, itself included."""
    parts = (name.split(".") for name in names)
    return Counter(".".join(p[:i]) for p in parts for i in range(1, len(p) + 1))


def _inside(plan: Plan, run: tuple[str, ...], count: int) -> str:
    """Say what of a plan lies in a row: so many modules."""
    if not set(run).issubset(plan.names):
        return f"{count} ticked, " if count else ""
    segments = sum(segment[0] in run for segment in plan.segments)
    if segments == count or len(run) == 1:
        return ""
    return f"{segments} segment{'s' * (segments != 1)}, "


class _Boxes(dict):
    """Boxes by name; one that is folded away is made when it is asked for."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self._rows = rows

    def __missing__(self, name: str) -> widgets.Checkbox:
        if name not in self._rows.ticks.inspection.layers:
            raise KeyError(name)
        self._rows.reveal(name)
        return self[name]
