"""``python -m helpers.recording`` (``make record``): measure on this machine's GPU.

It takes some minutes, can be stopped at any moment, and goes on where it was.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.torch_version import TorchVersion

from helpers.checkpointing.torch_2_11 import OLDEST


def main(arguments: list[str] | None = None) -> None:
    """Record this machine's GPU, or end with one sentence if that cannot be done."""
    parser = argparse.ArgumentParser("python -m helpers.recording", description=__doc__)
    here = Path(__file__).parent
    parser.add_argument("--folder", type=Path, default=here, help="where to write")
    folder = parser.parse_args(arguments).folder
    if TorchVersion(torch.__version__) < OLDEST:
        sys.exit(
            f"torch {torch.__version__} is too old to record with: predictions are "
            "those of torch 2.11 or newer"
        )
    if not torch.cuda.is_available():
        sys.exit(
            "this PyTorch sees no CUDA device, and a recording is what a GPU measured: "
            "run this on a machine with one"
        )
    from helpers.recording.record import run  # which no older torch can import

    run(folder)


if __name__ == "__main__":
    main()
