"""Run a notebook's cells in this process, without Jupyter: notebook.py PATH.

Says which cells raise what, as JSON in the last line.
"""

import contextlib
import gc
import json
import os
import sys
import traceback
from pathlib import Path

os.environ["MPLBACKEND"] = "Agg"


def cells_of(path: Path) -> dict[int, str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return {
        place: "".join(cell["source"])
        for place, cell in enumerate(cells)
        if cell["cell_type"] == "code"
    }


def run(path: Path) -> dict[int, str]:
    """Run a notebook from top to bottom; return what its cells have raised."""
    import torch

    # It is not pretended on a card that is not there.
    torch.backends.cuda.enable_cudnn_sdp(False)
    names, raised = sys.modules["__main__"].__dict__, {}
    os.chdir(path.parent)
    for place, source in cells_of(path).items():
        try:
            exec(compile(source, f"cell {place}", "exec"), names)
        except Exception as error:
            traceback.print_exc()
            raised[place] = f"{type(error).__name__}: {error}"
        if not place > 1:  # what is imported need not be looked at in collections
            gc.collect()
            gc.freeze()
    return raised


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        found = run(Path(sys.argv[1]).resolve())
    print(json.dumps(found), flush=True)
    os._exit(0)  # Python's own end may abort, where values are rubbish
