"""Replay a step's requests through the caching allocator, from an empty one on.

A step depends on those before it: what they left in the cache is used again. So three
are replayed, as in a loop that is run three times, and the last is counted. cuBLAS's
workspaces come out of the same allocator: one for the thread that runs forward and one
for backward's, each made with the first product there, and kept.
"""

import os
import re
from collections.abc import Sequence

from helpers.allocator.blocks import Block, CachingAllocator
from helpers.allocator.scratch import APART, OUTPUT, WORKSPACE, Gpu
from helpers.timeline import Allocation, Event, Timeline

MIB = 2**20


def workspace_bytes(gpu: Gpu) -> int:
    """Tell how large a workspace cuBLAS is given; cuBLASLt uses the same.

    Source: ``parseChosenWorkspaceSize`` in aten/src/ATen/cuda/CublasHandlePool.cpp.
    """
    config = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    if chosen := re.findall(":([0-9]+):([0-9]+)", config):  # KiB, and how many times
        return sum(int(size) * 1024 * int(count) for size, count in chosen)
    return 32 * MIB if gpu.capability == (9, 0) else 8 * MIB + 128 * 1024


def counted(steps: Sequence[Timeline], gpu: Gpu) -> dict[str, int]:
    """Count what the allocator says of the last of some steps, as a report's fields.

    Args:
        steps: the first, and one like all that follow, if it is another.
    """
    replay = Replay(workspace_bytes(gpu))
    first, last = steps[0], steps[-1]
    for step in (first, last):
        replay.run(step)
    replay.begin(last)
    counts, workspaces = replay.allocator, replay.workspaces.values()
    held_bytes = sum(block.size for block in workspaces)
    lasting = [one for one in last.before if one.category != "gradient"]
    unsplit_bytes = sum(replay.blocks[one].size - one.bytes for one in lasting)
    counts.most_allocated_bytes = counts.allocated_bytes
    replay.go_on(last)
    return {
        "allocator_peak_bytes": counts.most_allocated_bytes
        - held_bytes
        - unsplit_bytes,
        "workspace_bytes": held_bytes,
        "reserved_peak_bytes": counts.most_reserved_bytes,
    }


class Replay:
    """A process that runs one step after another."""

    def __init__(self, workspace: int) -> None:
        self.allocator = CachingAllocator()
        self.workspace = workspace
        self.workspaces: dict[bool, Block] = {}  # whether it is backward's thread's
        self.blocks: dict[Allocation, Block] = {}  # of what is alive

    def run(self, step: Timeline) -> None:
        self.begin(step)
        self.go_on(step)

    def begin(self, step: Timeline) -> None:
        """Take what is there before a step from what the last one left."""
        left: dict[tuple, list[Block]] = {}
        for one, block in self.blocks.items():
            left.setdefault((one.category, one.bytes), []).append(block)
        self.blocks = {}
        for one in step.before:
            same = left.get((one.category, one.bytes))
            self.blocks[one] = (
                same.pop(0) if same else self.allocator.allocate(one.bytes)
            )
        for block in (block for blocks in left.values() for block in blocks):
            self.allocator.free(block)

    def go_on(self, step: Timeline) -> None:
        """Allocate and free what a step does, in its order."""
        events, number, taken = step.events, 0, []
        past = len(events) + 1
        requests = iter((*step.scratch, (past, past, False, ())))
        first, place, *wanted = next(requests)
        while True:
            while place <= number:
                self._take(*wanted, taken)
                while taken:
                    self.allocator.free(taken.pop()[1])
                first, place, *wanted = next(requests)
            if number == first and OUTPUT in wanted[1]:
                middle = wanted[1].index(OUTPUT)
                self._take(wanted[0], wanted[1][:middle], taken)
                wanted[1] = wanted[1][middle:]
            if number == len(events):
                return
            kind, one, phase, _ = events[number]
            number += 1
            if kind == "free":
                self.allocator.free(self.blocks.pop(one))
            elif (place, wanted[1]) != (number, (APART,)) and _is_in_place(
                one, phase, events[number : number + 2]
            ):
                self.blocks[one] = self.blocks.pop(events[number].allocation)
                number += 1
            else:
                self.blocks[one] = self.allocator.allocate(one.bytes)

    def _take(
        self, in_backward: bool, requests: Sequence[int], taken: list[tuple[int, Block]]
    ) -> None:
        """Take what an operator needs for itself, and note what is to be given back."""
        for n_bytes in requests:
            if n_bytes in (APART, OUTPUT):
                pass
            elif n_bytes == WORKSPACE:
                if in_backward not in self.workspaces:
                    block = self.allocator.allocate(self.workspace)
                    self.workspaces[in_backward] = block
            elif n_bytes > 0:
                taken.append((n_bytes, self.allocator.allocate(n_bytes)))
            else:
                place = max(i for i, (size, _) in enumerate(taken) if size == -n_bytes)
                self.allocator.free(taken.pop(place)[1])


def _is_in_place(one: Allocation, phase: str, following: list[Event]) -> bool:
    """Say whether something is added to another where that lies.

    The engine does so with gradients that nobody else has, attention with its mask, and
    a product with its bias; but not where the step is watched. Source: ``accumulate``
    in torch/csrc/autograd/input_buffer.cpp, ``areAnyTensorSubclassLike`` in
    FunctionsManual.cpp beside it, and ``linear`` in aten/src/ATen/native/Linear.cpp.
    """
    if not following:
        return False
    kind, other, *_ = following[0]
    if kind != "free" or other.bytes != one.bytes:
        return False
    if one.op in _INTO_ZEROS and phase == "backward":
        return other.op in ("new_zeros", "zeros", "zeros_like")
    before_softmax = following[-1].allocation.op == "_safe_softmax"
    is_sum = one.op == "add" and (phase == "backward" or before_softmax)
    return is_sum or one.op == "add_"


# Gradients that PyTorch writes into zeros, where nobody watches.
_INTO_ZEROS = {"scatter", "scatter_add", "index_put", "index_add", "index_fill"}
_INTO_ZEROS |= {"masked_scatter"}
