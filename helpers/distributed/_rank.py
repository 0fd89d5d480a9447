"""One rank, as torchrun starts it: calls the functions it is sent, notes what returns.

Its folder has the functions, pickled, and gets what they return: rank0.json, …
"""

import json
import os
import pickle
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from helpers.measure import StepReport
from helpers.measure.kept import write_whole


def work(device: str) -> None:
    """Call each function, and note what it returns, or how it fails."""
    rank = int(os.environ["RANK"])
    noted = {"results": [], "error": "", "done": False}

    def note(place: str, **found) -> None:
        noted.update(found, place=place, time=time.time())
        write_whole(Path(f"rank{rank}.json"), json.dumps(noted))

    try:
        note("at its start")
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device(device)
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=Path("ranks").resolve().as_uri(),
            rank=rank,
            world_size=int(os.environ["WORLD_SIZE"]),
        )
        for function in pickle.loads(Path("functions").read_bytes()):
            note(f"in {getattr(function, '__name__', function)}")
            result = json.dumps(function(), default=_encoded)
            noted["results"].append(json.loads(result))
        note("at its end", done=True)
    except Exception as error:
        note(noted["place"], error=f"{type(error).__name__}: {error}")
        sys.exit(1)
    dist.destroy_process_group()
    os._exit(0)  # Python's own end may abort, if a thread of gloo's still needs it


def _encoded(value: object) -> object:
    if isinstance(value, StepReport):
        return {"StepReport": value.to_dict()}
    raise TypeError(
        f"JSON cannot hold a {type(value).__name__}; return numbers or texts"
    )


def _end_with_parent() -> None:
    while os.read(0, 1):  # sys.stdin would be locked when Python ends
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(sys.argv[1])
