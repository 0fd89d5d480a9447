"""The same functions on several processes, each a rank, started by torchrun.

cloudpickle sends them: what a module has goes by its name, and what a notebook defines
as it is, with all that it refers to.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cloudpickle
import torch

from helpers.measure import StepReport


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
        functions: called without arguments, with a copy of all that they refer to.
            They return what JSON can hold, or StepReports.
        device: "cpu" or "cuda"; default: a GPU for each rank where there are enough of
            them, else the CPU. It is the default device of each rank's tensors.
        timeout_s: when all processes are ended, in seconds.

    Returns:
        For each function a list: what it returned on rank 0, on rank 1, and so on.

    Raises:
        RankError: if a function raises or a process ends.
        TimeoutError: if the ranks are not done in time.
        ValueError: if this is no number of ranks, no device, or cannot be sent.
    """
    device, sent = _device(ranks, device), _pickled(functions)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, "functions").write_bytes(sent)
        with _torchrun(folder, ranks, device) as torchrun:
            try:
                torchrun.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise TimeoutError(
                    f"the ranks were ended, as they were not done after {timeout_s:g} "
                    f"s: {_places(_noted(folder, ranks))}"
                ) from None
        noted = _noted(folder, ranks)
        if not all(rank["done"] for rank in noted):
            log = Path(folder, "log").read_text(errors="replace")
            raise RankError(_reason(noted, log))
    results = [rank["results"] for rank in noted]
    return [list(each) for each in zip(*results, strict=True)]


def _device(ranks: int, device: str | None) -> str:
    """Choose the ranks' device, or say what is wrong."""
    n_gpus = torch.cuda.device_count()
    if not isinstance(ranks, int) or ranks < 1:
        raise ValueError(f"ranks is a whole number from 1 up, not {ranks!r}")
    device = device or ("cuda" if 1 < ranks <= n_gpus else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is 'cpu' or 'cuda', not {device!r}")
    if device == "cuda" and ranks > n_gpus:
        raise ValueError(f"{ranks} ranks need a GPU each, and {n_gpus} can be seen")
    return device


def _pickled(functions: Sequence[Callable]) -> bytes:
    """Pickle functions together, as they may share what they refer to."""
    for function in functions:
        try:
            cloudpickle.dumps(function)
        except Exception as error:  # of any kind: what is pickled may raise its own
            name = getattr(function, "__name__", function)
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{name} refers to what cannot be sent to another process, so make it "
                f"inside {name}: {reason}"
            ) from None
    return cloudpickle.dumps(functions)


@contextlib.contextmanager
def _torchrun(folder: str, ranks: int, device: str) -> Iterator[subprocess.Popen]:
    """Start torchrun, and leave no process behind, whatever happens inside.

    The ranks wait for the end of their standard input, and end with it: also when this
    process is killed, and nobody is left to end them. They meet in files and talk over
    the loopback, since torchrun's own store would listen to the whole network.
    """
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    settings = {
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    settings |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}  # for FSDP2
    command = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1"]
    command += ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]
    command += [f"--rdzv-endpoint={folder}/torchrun", f"--nproc-per-node={ranks}"]
    command += [f"--log-dir={folder}", "-m", "helpers.distributed._rank", device]
    with open(Path(folder, "log"), "wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd=folder,
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


def _noted(folder: str, ranks: int) -> list[dict]:
    """Read what each rank has noted; nothing of one that has not begun."""
    nothing = {"results": [], "error": "", "done": False, "place": "at its start"}
    files = [Path(folder, f"rank{rank}.json") for rank in range(ranks)]
    return [
        json.loads(file.read_text(), object_hook=_decoded) if file.exists() else nothing
        for file in files
    ]


def _decoded(values: dict) -> object:
    if values.keys() == {"StepReport"}:
        return StepReport.from_dict(values["StepReport"])
    return values


def _places(noted: list[dict]) -> str:
    return ", ".join(f"rank {n} {rank['place']}" for n, rank in enumerate(noted))


def _reason(noted: list[dict], log: str) -> str:
    """Say in one sentence which rank failed first, where, and why."""
    # A process that was killed says nothing, but torchrun knows how it ended.
    ended = re.findall(r"rank +: (\d+) .*\n.*exitcode +: (-?\d+)", log)
    for number, code in ended:
        rank = noted[int(number)]
        if not rank["error"] and int(code) != -signal.SIGTERM:
            return f"rank {number} ended {rank['place']}, with exit code {code}"
    failed = [(rank["time"], n) for n, rank in enumerate(noted) if rank["error"]]
    if not failed:
        words = "".join(re.findall(r"^[\w.]*Error: .+", log, re.MULTILINE)[:1])
        places = _places(noted)
        return f"not all was done when the processes ended: {places} {words}".rstrip()
    number = min(failed)[1]
    reason = noted[number]["error"].splitlines()[0]
    return f"rank {number} failed {noted[number]['place']}: {reason}"
