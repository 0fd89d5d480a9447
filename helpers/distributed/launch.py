"""The same functions on several processes, each a rank, started by torchrun."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from helpers.distributed._script import script
from helpers.measure import StepReport

ROOT = Path(__file__).resolve().parents[2]


class RankError(RuntimeError):
    """A rank failed; says which one, where and why."""


def run(
    *functions: Callable[[], object],
    ranks: int = 2,
    device: str | None = None,
    timeout_s: float = 120,
) -> list[list]:
    """Call functions on every rank, one after the other, by one start of torchrun.

    Args:
        functions: called without arguments, see ``helpers.script`` for what they may
            refer to. They return what JSON can hold, or StepReports.
        device: "cpu" or "cuda"; default: a GPU for each rank where there are enough of
            them, else the CPU. It is the default device of each rank's tensors.
        timeout_s: when all processes are ended, in seconds.

    Returns:
        For each function a list: what it returned on rank 0, on rank 1, and so on.

    Raises:
        RankError: if a function raises or a process ends.
        TimeoutError: if the ranks are not done in time.
        ValueError: if this is no number of ranks, no device, or no such function.
    """
    n_gpus = torch.cuda.device_count()
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks is a whole number from 1 up, not {ranks!r}")
    device = device or ("cuda" if 1 < ranks <= n_gpus else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is 'cpu' or 'cuda', not {device!r}")
    if device == "cuda" and ranks > n_gpus:
        raise ValueError(f"{ranks} ranks need a GPU each, and {n_gpus} can be seen")
    names = [function.__name__ for function in functions]
    lines = [
        script(*functions),
        "",
        'if __name__ == "__main__":',
        "    from helpers.distributed import work",
        "",
        f"    work({', '.join([*names, f'device={device!r}'])})",
    ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder, "ranks.py")
        file.write_text("\n".join(lines) + "\n")
        with _torchrun(file, ranks) as torchrun:
            try:
                torchrun.wait(timeout_s)
            except subprocess.TimeoutExpired:
                where = _places(_records(folder, ranks), names)
                raise TimeoutError(
                    f"the ranks were ended, as they were not done after {timeout_s:g} "
                    f"s: {where}"
                ) from None
        records = _records(folder, ranks)
        if any(len(record["results"]) < len(names) for record in records):
            raise RankError(_reason(folder, records, names))
    return [
        list(each)
        for each in zip(*(record["results"] for record in records), strict=True)
    ]


@contextlib.contextmanager
def _torchrun(file: Path, ranks: int) -> Iterator[subprocess.Popen]:
    """Start torchrun, and leave no process behind, whatever happens inside.

    The ranks wait for the end of their standard input, and end with it: also when this
    process is killed, and nobody is left to end them.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    paths = [str(ROOT), os.environ.get("PYTHONPATH")]
    settings = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with open(file.with_name("log"), "wb") as log:
        process = subprocess.Popen(
            [*torchrun, f"--nproc-per-node={ranks}", str(file)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=file.parent,
            env=os.environ | settings,
            start_new_session=True,  # an interrupt is this process's to handle
        )
        try:
            yield process
        finally:
            process.stdin.close()
            process.terminate()  # torchrun passes it on, and waits for its ranks
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def work(*functions: Callable[[], object], device: str) -> None:
    """Be one rank: call the functions and write down what each returns."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    record = {"results": [], "error": "", "time": 0.0}

    def note() -> None:
        record["time"] = time.time()
        file = Path(f"rank{os.environ['RANK']}.json")
        file.with_suffix(".new").write_text(json.dumps(record))
        file.with_suffix(".new").replace(file)

    note()
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.set_default_device(device)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        for function in functions:
            result = json.dumps(function(), default=_encoded)
            record["results"].append(json.loads(result))
            note()
    except Exception as error:
        record["error"] = f"{type(error).__name__}: {error}"
        note()
        sys.exit(1)
    dist.destroy_process_group()
    os._exit(0)  # Python's own end may abort, if a thread of gloo's still needs it


def _end_with_parent() -> None:
    while os.read(0, 1):  # sys.stdin would be locked when Python ends
        pass
    os._exit(1)


def _encoded(value: object) -> object:
    if isinstance(value, StepReport):
        return {"StepReport": value.to_dict()}
    raise TypeError(
        f"JSON cannot hold a {type(value).__name__}; return numbers or texts"
    )


def _decoded(values: dict) -> object:
    if values.keys() == {"StepReport"}:
        return StepReport.from_dict(values["StepReport"])
    return values


def _records(folder: str, ranks: int) -> list[dict]:
    """Read what each rank has written down; nothing of one that has not begun."""
    files = [Path(folder, f"rank{rank}.json") for rank in range(ranks)]
    return [
        json.loads(file.read_text(), object_hook=_decoded)
        if file.exists()
        else {"results": [], "error": "", "time": 0.0}
        for file in files
    ]


def _place(record: dict, names: list[str]) -> str:
    done = len(record["results"])
    if not record["time"]:
        return "at its start"
    return f"in {names[done]}" if done < len(names) else "at its end"


def _places(records: list[dict], names: list[str]) -> str:
    """Say where each rank is, for one sentence."""
    places = [_place(record, names) for record in records]
    return ", ".join(f"rank {rank} {place}" for rank, place in enumerate(places))


def _reason(folder: str, records: list[dict], names: list[str]) -> str:
    """Say in one sentence which rank failed first, where, and why."""
    # A process that was killed says nothing, but torchrun knows how it ended.
    log = Path(folder, "log").read_text(errors="replace")
    ended = re.findall(r"rank +: (\d+) .*\n.*exitcode +: (-?\d+)", log)
    for rank, code in {(int(rank), int(code)) for rank, code in ended}:
        if not records[rank]["error"] and code != -signal.SIGTERM:
            place = _place(records[rank], names)
            return f"rank {rank} ended {place}, with exit code {code}"
    failed = [rank for rank, record in enumerate(records) if record["error"]]
    if not failed:
        words = "; ".join(re.findall(r"^[\w.]*Error: .+", log, re.MULTILINE)[:1])
        places = _places(records, names)
        return f"not all was done when the processes ended: {places} {words}".rstrip()
    rank = min(failed, key=lambda rank: records[rank]["time"])
    reason = records[rank]["error"].strip().splitlines()[0]
    return f"rank {rank} failed {_place(records[rank], names)}: {reason}"
