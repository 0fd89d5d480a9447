"""Draw a text again from its pixels: shaping and filling glyphs takes far longer.

Most texts of a picture that is redrawn at each flip are the ones of the flip before.
"""

import functools

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

MARGIN = 4  # pixels around a text, for glyphs that reach over their box


class TextMemoryRenderer(RendererAgg):
    """Agg's renderer, but each text is made once, and placed on whole pixels."""

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None) -> None:
        """Draw level text from memory, and the rest as Agg does."""
        if ismath or angle:
            super().draw_text(gc, x, y, s, prop, angle, ismath, mtext)
            return
        pixels, descent = _pixels(s, prop.copy(), tuple(gc.get_rgb()), self.dpi)
        bottom = round(self.height - y) - descent - MARGIN
        self.draw_image(gc, round(x) - MARGIN, bottom, pixels[::-1])


@functools.lru_cache(maxsize=2000)
def _pixels(
    text: str, font: FontProperties, rgba: tuple, dpi: float
) -> tuple[np.ndarray, int]:
    """Draw a text on nothing.

    Returns:
        (height, width, 4) bytes of RGBA, and how far it reaches below its baseline.
    """
    size = RendererAgg(1, 1, dpi).get_text_width_height_descent(text, font, False)
    width, height, descent = np.ceil(size).astype(int).tolist()
    alone = RendererAgg(width + 2 * MARGIN, height + 2 * MARGIN, dpi)
    pen = alone.new_gc()
    pen.set_foreground(rgba, isRGBA=True)
    alone.draw_text(pen, MARGIN, MARGIN + height - descent, text, font, 0)
    return np.asarray(alone.buffer_rgba()).copy(), descent


class TextMemoryCanvas(FigureCanvasAgg):
    """A canvas whose renderer remembers its texts."""

    def __init__(self, figure: Figure) -> None:
        super().__init__(figure)
        self.renderer = TextMemoryRenderer(*figure.bbox.size, figure.dpi)

    def get_renderer(self) -> TextMemoryRenderer:
        """Return the one renderer: the figure keeps its size."""
        return self.renderer
