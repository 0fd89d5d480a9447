"""What all panels look like: widths, and the line that says what was found."""

import html

import ipywidgets as widgets

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


def wide(pixels: int, **layout: str) -> widgets.Layout:
    """Make a layout of a width in pixels."""
    return widgets.Layout(width=f"{pixels}px", **layout)


def status(text: str, note: str = "", wrong: bool = False) -> str:
    """Write a line that screen readers announce when it changes."""
    color = "#B00020" if wrong else "inherit"
    if note:
        note = f'<br><span style="opacity:.75">{html.escape(note)}</span>'
    return (
        f'<div role="status" aria-live="polite" style="color:{color};'
        f'font-size:14px;line-height:1.4">{html.escape(text)}{note}</div>'
    )
