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


def folded(
    step: widgets.Widget, along: Mapping[str, Callable[[], None]]
) -> widgets.Accordion:
    """Fold away what is not always needed: the step, and what can be taken along."""
    buttons = []
    for text, work in along.items():
        buttons.append(widgets.Button(description=text, layout=WIDE))
        buttons[-1].on_click(lambda _, work=work: work())
    pages, titles = [step, widgets.VBox(buttons)], ["Step and card", "Take it along"]
    made = widgets.Accordion(pages, titles=titles, selected_index=None)
    return made.add_class("layer-lab-folded")
