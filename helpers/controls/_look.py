"""What all panels look like: what is set, and the line that says what was found."""

import html

import ipywidgets as widgets

from helpers.models import ACTIVATIONS

BESIDE = {"flex_flow": "row wrap"}  # the picture goes below where there is no room
ROOMY = {"flex": "100 1 560px", "min_width": "0"}  # what gets the rest of a row
WIDE = {"width": "216px"}  # of what stands in a row of its own


def control(name: str, value: object) -> widgets.Widget:
    """Make what a size of the model is changed with.

    Not IntText, which leaves out what is no digit: 1e9 would be 19, and 3.7 be 37.
    """
    look = {"value": value, "description": name, "tooltip": name, "layout": WIDE}
    if value in ACTIVATIONS:
        made = widgets.Dropdown(options=list(ACTIVATIONS), **look)
    else:
        made = widgets.FloatText(step=0.1 if isinstance(value, float) else 1, **look)
    made.style.description_width = "76px"
    return made


def taken(value: object, before: object) -> object:
    """Take a control's value as the kind of number that it was before, if it is one."""
    whole = isinstance(before, int) and isinstance(value, float) and value % 1 == 0
    return int(value) if whole and abs(value) < 2**53 else value


def sentence(error: BaseException) -> str:
    """Say an error in one sentence, with its kind where it is none of ours."""
    first, *_ = str(error).splitlines() or [""]
    if first and isinstance(error, RuntimeError | ValueError | MemoryError):
        return first
    return f"{type(error).__name__}: {first}".removesuffix(": ")


def status(text: str, note: str = "", wrong: bool = False) -> str:
    """Write a line that screen readers announce when it changes."""
    kind = ' class="wrong"' if wrong else ""
    note = f'<div class="more">{html.escape(note)}</div>' if note else ""
    said = f"<div{kind}>{html.escape(text)}</div>{note}"
    return f'<div role="status" aria-live="polite">{said}</div>'


def progress(number: int, total: int) -> str:
    """Draw which step runs of how many; it is not announced at each of them."""
    bar = f'<progress aria-label="measuring" value="{number - 1}" max="{total}">'
    return f"{bar}</progress> step {number} of {total}"
