"""The lab's buttons: shortcuts for plans, and what is folded away."""

from collections.abc import Callable, Mapping

import ipywidgets as widgets

from helpers.checkpointing import Plan
from helpers.controls._look import WIDE


class Shortcuts(widgets.VBox):
    """Buttons that set boxes and joins at once, and the size of a piece.

    Args:
        pieces: makes a plan of segments of so many layers; of all for None.
        apply: called with the plan of the button that is clicked.
    """

    def __init__(
        self, pieces: Callable[[int | None], Plan], apply: Callable[[Plan], None]
    ) -> None:
        look = {"description": "of", "layout": {"width": "84px", "margin": "1px"}}
        look["tooltip"] = "layers in a piece"
        self.piece = widgets.BoundedIntText(2, min=1, max=999, **look)
        self.piece.style.description_width = "24px"
        plans = {"none": Plan}
        plans["each alone"] = lambda: pieces(1)
        plans["all joined"] = lambda: pieces(None)
        plans["pieces"] = lambda: pieces(self.piece.value)
        self.buttons: dict[str, widgets.Button] = {}
        for text, plan in plans.items():
            look = {"width": "60px" if text == "none" else "76px"}
            look |= {"margin": "1px", "padding": "0"}
            button = widgets.Button(description=text, layout=look)
            button.on_click(lambda _, plan=plan: apply(plan()))
            self.buttons[text] = button
        *first, last = self.buttons.values()
        rows = [widgets.HBox(first), widgets.HBox([last, self.piece])]
        super().__init__(rows, layout={"margin": "4px 0"})


def buttons(work: Mapping[str, Callable[[], None]]) -> widgets.VBox:
    """Make a button for each work, below each other."""
    made = []
    for text, do in work.items():
        made.append(widgets.Button(description=text, layout=WIDE))
        made[-1].on_click(lambda _, do=do: do())
    return widgets.VBox(made)


def folded(pages: Mapping[str, widgets.Widget]) -> widgets.VBox:
    """Fold away what is not always needed; keys unfold it, unlike an Accordion."""
    parts = []
    for title, page in pages.items():
        shown = widgets.ToggleButton(description=title, layout=WIDE)
        shown.observe(lambda change, page=page: _unfold(page, **change), "value")
        _unfold(page, shown, False)
        parts += [shown, page]
    return widgets.VBox(parts, layout={"margin": "4px 0"})


def _unfold(
    page: widgets.Widget, owner: widgets.ToggleButton, new: bool, **_: object
) -> None:
    page.layout.display = "" if new else "none"
    owner.icon = f"caret-{'down' if new else 'right'}"
