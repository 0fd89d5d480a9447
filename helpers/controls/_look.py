"""What all panels look like: what is set, and the line that says what was found."""

import html

import ipywidgets as widgets

from helpers.models import ACTIVATIONS

# The glyph of an icon is its button's name, before the title, unless it is told to be
# silent; so a screen reader says what the title says.
GLYPHS = {"link": "f0c1", "clock-o": "f017"}
GLYPHS |= {"caret-right": "f0da", "caret-down": "f0d7"}
SILENT_ICONS = "".join(
    f".layer-lab .fa-{icon}::before {{content: '\\{glyph}' / ''}}\n"
    for icon, glyph in GLYPHS.items()
)
WIDE = {"width": "216px"}  # of what stands in a row of its own


def control(name: str, value: object) -> widgets.Widget:
    """Make what a size of the model is changed with."""
    look = {"value": value, "description": name, "layout": WIDE}
    if value in ACTIVATIONS:
        made = widgets.Dropdown(options=list(ACTIVATIONS), **look)
    elif isinstance(value, float):
        made = widgets.FloatText(step=0.1, **look)
    else:
        made = widgets.IntText(**look)
    made.style.description_width = "76px"
    return made


def sentence(error: BaseException) -> str:
    """Say an error in one sentence, with its kind where it is none of ours."""
    first, *_ = str(error).splitlines() or [""]
    if first and isinstance(error, RuntimeError | ValueError | MemoryError):
        return first
    return f"{type(error).__name__}: {first}".removesuffix(": ")


def status(text: str, note: str = "", wrong: bool = False) -> str:
    """Write a line that screen readers announce when it changes."""
    color = "#B00020" if wrong else "inherit"
    if note:
        note = f'<br><span style="opacity:.75">{html.escape(note)}</span>'
    return (
        f'<div role="status" aria-live="polite" style="color:{color};'
        f'font-size:14px;line-height:1.4">{html.escape(text)}{note}</div>'
    )
