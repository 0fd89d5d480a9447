"""The allocator's count is as predicted: to the byte, by a loop that is run by hand.

On a GPU, or under PyTorch's own CUDA code on a card that is not there (README.md).
"""

import os
import random
import subprocess
import sys

import pytest
import torch

from helpers.allocator.blocks import CachingAllocator
from helpers.checkpointing import Undo
from helpers.measure import predict
from tests.nocard.by_hand import allocator_of, fresh
from tests.nocard.cases import GROUPS, Case
from tests.nocard.table import example, hold

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; none is available"
    ),
]


@pytest.fixture(autouse=True)
def without_cudnn():
    """Its workspaces are its own choice; and attention has other kernels."""
    with Undo() as undo:
        undo.callback(torch.backends.cuda.enable_cudnn_sdp, True)
        torch.backends.cuda.enable_cudnn_sdp(False)
        undo.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@pytest.mark.parametrize("group", GROUPS)
def test_a_loop_by_hand_is_counted_as_predicted(group, capsys):
    errors, count, examples = [], 0, []
    for case in GROUPS[group]():
        for plan in case.plans:
            count += 1
            counted = allocator_of(case, plan)
            examples += example(case, plan, counted)
            if error := difference(case, plan, counted):
                errors.append(f"{case}, {plan}: {error}")
    with capsys.disabled():
        equal = f"{count - len(errors)} of {count} cases equal"
        print(f"\n{torch.cuda.get_device_name()}, {group}: {equal}")
    assert not errors, "\n".join(errors)
    hold(group, count, count - len(errors), examples)


def difference(case: Case, plan, counted: dict[str, int]) -> dict[str, int]:
    """Tell by how many bytes what is counted differs from what is predicted."""
    with torch.device("meta"):
        model, batch = case.make_model(), case.make_batch()
    predicted = predict(model, batch, plan, **case.settings)
    if predicted.unknown:  # a convolution takes scratch before its last output
        del counted["reserved_peak_bytes"]
    both = {name: (n, getattr(predicted, name)) for name, n in counted.items()}
    return {name: n - expected for name, (n, expected) in both.items() if n != expected}


def test_blocks_are_cut_and_joined_as_pytorch_does():
    fresh()
    start, ours, chosen = torch.cuda.memory_allocated(), CachingAllocator(), []
    chance = random.Random(0)
    for _ in range(2000):
        if chosen and chance.random() < 0.48:
            address, block = chosen.pop(chance.randrange(len(chosen)))
            torch.cuda.caching_allocator_delete(address)
            ours.free(block)
        else:
            n_bytes = round(2 ** chance.uniform(0, 25.5))
            address = torch.cuda.caching_allocator_alloc(n_bytes)
            chosen.append((address, ours.allocate(n_bytes)))
        if chance.random() < 0.01:
            torch.cuda.empty_cache()
            ours.empty_cache()
        assert torch.cuda.memory_allocated() - start == ours.allocated_bytes
        assert start or torch.cuda.memory_reserved() == ours.reserved_bytes
    for address, _ in chosen:
        torch.cuda.caching_allocator_delete(address)


WORKSPACE = """
import torch
from helpers.allocator import this_gpu
from helpers.allocator.replay import workspace_bytes
x = torch.ones(64, 64, device="cuda")
y = x @ x
print(torch.cuda.memory_allocated() - 2 * x.nbytes == workspace_bytes(this_gpu()))
"""


@pytest.mark.parametrize("config", ["", ":4096:8", ":16:8:128:2"])
def test_cublas_is_given_the_workspace_that_is_predicted(config):
    """PyTorch reads the variable once in a process."""
    variables = os.environ | ({"CUBLAS_WORKSPACE_CONFIG": config} if config else {})
    command = [sys.executable, "-c", WORKSPACE]
    run = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert run.stdout.split() == ["True"], run.stderr
