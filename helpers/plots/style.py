"""How figures look in a notebook, and how they are saved in it.

The inline backend's PNGs at twice the size take some 60 kB each. The workbook's
pictures have few colours, so a palette shows the same in a quarter of that.
"""

import io

import matplotlib.pyplot as plt
from IPython import get_ipython
from matplotlib.figure import Figure
from PIL import Image

from helpers.plots._axes import STYLE

SCALE, COLORS = 2, 64  # device pixels for each CSS pixel; colours of the palette


def use_style() -> None:
    """Use the workbook's style, and in a notebook its sharp and small pictures."""
    plt.style.use(STYLE)
    shell = get_ipython()
    if shell is not None:
        plt.switch_backend(plt.get_backend())  # sets the formatter replaced below
        formatter = shell.display_formatter.formatters["image/png"]
        formatter.for_type(Figure, figure_png)


def figure_png(figure: Figure) -> tuple[bytes, dict[str, int]]:
    """Draw a figure as PNG with a palette.

    Returns:
        The file's bytes, and its size in CSS pixels as a notebook's metadata has it.
    """
    drawn, small = io.BytesIO(), io.BytesIO()
    dpi = SCALE * figure.dpi
    figure.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight")
    image = Image.open(drawn).convert("RGB")
    image.quantize(COLORS, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        small, "png", optimize=True
    )
    width, height = (side // SCALE for side in image.size)
    return small.getvalue(), {"width": width, "height": height}
