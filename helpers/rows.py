"""A row for each layer: its checkbox, its join with the layer before, what it keeps."""

from collections.abc import Callable

import ipywidgets as widgets
from torch import nn

from helpers.checkpointing import Plan, follows, layer_names
from helpers.plots import COLORS
from helpers.units import format_bytes


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

    def rebuild(self, model: nn.Module) -> None:
        """Make the rows anew if the model has other layers; ticks stay."""
        names = layer_names(model)
        if not names:
            raise ValueError(
                "this model has no layers to tick: none of its children has parameters"
            )
        if names == list(self.boxes):
            return
        ticked = {name for name, box in self.boxes.items() if box.value}
        joined = {name for name, join in self.joins.items() if join.value}
        self.boxes.clear()
        self.joins.clear()
        rows = []
        for before, name in zip([None, *names], names, strict=False):
            box = widgets.Checkbox(name in ticked, description=name, indent=False)
            box.layout = wide(76)
            box.observe(self._flipped, "value")
            self.boxes[name] = box
            join: widgets.Widget = widgets.Box(layout=wide(30))
            if before and follows(model, before, name):
                join = self._make_join(before, name in joined)
                self.joins[name] = join
            kept = widgets.HTML(layout=widgets.Layout(margin="0 0 0 4px"))
            self._kept[name] = kept
            row = widgets.HBox([join, box, kept])
            row.layout = widgets.Layout(align_items="center", height="28px")
            rows.append(row)
        self.children = rows

    def _make_join(self, before: str, joined: bool) -> widgets.ToggleButton:
        join = widgets.ToggleButton(
            joined, icon="link", tooltip=f"one segment with {before}"
        )
        join.layout = wide(30, height="22px", padding="0", margin="3px 0")
        join.observe(self._flipped, "value")
        return join

    def _flipped(self, _: dict) -> None:
        if not self._quiet:
            self._changed()

    def show_kept(self, now: dict[str, int], without: dict[str, int]) -> None:
        """Show the bytes that each layer keeps, and a bar along each segment.

        Args:
            now, without: bytes by layer, under this plan and without checkpointing.
        """
        continued = {name for run in self.plan.segments for name in run[1:]}
        before_ticked = False
        for name, row in zip(self.boxes, self.children, strict=True):
            ticked = self.boxes[name].value
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


def wide(pixels: int, **layout: str) -> widgets.Layout:
    """Make a layout of a width in pixels."""
    return widgets.Layout(width=f"{pixels}px", **layout)
