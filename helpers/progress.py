"""A progress bar that shows while something runs, and of which nothing stays."""

import sys
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that Jupyter has no widgets: a plain bar will do
    from tqdm.auto import tqdm


def progress_bar(total: int, unit: str, shown: bool = True) -> tqdm:
    """Make a bar, to be used in a ``with`` block; its ``update`` counts on.

    In a notebook that runs without a reader, to be committed or tested, there is none:
    its first state would stay in the file.
    """
    return tqdm(total=total, unit=unit, leave=False, disable=not (shown and _watched()))


def _watched() -> bool:
    """Tell whether a reader is there: only then can a notebook's cell ask for input."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    kernel = getattr(shell, "kernel", None)
    if kernel is None:
        return True
    return kernel.get_parent("shell").get("content", {}).get("allow_stdin", True)
