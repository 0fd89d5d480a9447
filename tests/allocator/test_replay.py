"""A step's requests replayed: blocks as PyTorch cuts them, workspaces, what is kept."""

import pickle

import pytest
import torch
from torch import nn

from helpers.allocator import on_gpu
from helpers.allocator.blocks import CachingAllocator
from helpers.allocator.cards import CARDS, named
from helpers.allocator.replay import workspace_bytes
from helpers.measure import StepReport, predict
from helpers.models import DocsMLP, uniform_mlp

MIB = 2**20


def taken(*sizes: int) -> tuple[int, int]:
    """Take some blocks; tell what is in use, and what was taken from the GPU."""
    allocator = CachingAllocator()
    for size in sizes:
        allocator.allocate(size)
    return allocator.allocated_bytes, allocator.reserved_bytes


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1,), (512, 2 * MIB)),
        ((MIB,), (MIB, 2 * MIB)),
        ((MIB + 1,), (MIB + 512, 20 * MIB)),
        ((10 * MIB,), (10 * MIB, 10 * MIB)),
        ((19 * MIB,), (20 * MIB, 20 * MIB)),  # 1 MiB is not cut off
        ((19 * MIB - 1024,), (19 * MIB - 1024, 20 * MIB)),
        ((5 * MIB,) * 4, (20 * MIB, 20 * MIB)),
        ((MIB, MIB - 512, 512), (2 * MIB, 2 * MIB)),  # small ones are cut at 512 B
        ((4_000_256,) * 5, (20 * MIB, 20 * MIB)),  # the fifth gets all that is left
    ],
)
def test_blocks(sizes, expected):
    assert taken(*sizes) == expected


def test_the_smallest_that_fits_is_used_again_and_neighbours_are_joined():
    allocator = CachingAllocator()
    blocks = [allocator.allocate(size * MIB) for size in (4, 6, 2, 8)]
    for block in blocks[:3]:
        allocator.free(block)
    assert allocator.allocate(12 * MIB).address == 0
    assert allocator.reserved_bytes == allocator.most_reserved_bytes == 20 * MIB
    allocator.free(blocks[3])
    allocator.empty_cache()
    assert allocator.reserved_bytes == 20 * MIB, "twelve of it are in use"


@pytest.mark.parametrize(
    ("config", "gpu", "expected"),
    [
        ("", "A100", 8_519_680),
        ("", "RTX 5090", 8_519_680),
        ("", "H100", 32 * MIB),
        (":4096:2:16:8", "H100", 8_519_680),
        (":16:8", "T4", 128 * 1024),
    ],
)
def test_the_workspace(config, gpu, expected, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", config)
    assert workspace_bytes(named(gpu)) == expected


def of(model=DocsMLP, width: int = 1024, **settings) -> StepReport:
    return predict(model, torch.empty(8192, width, device="meta"), **settings)


def test_forward_and_backward_have_a_workspace_each():
    report = of(gpu="A100")
    assert report.workspace_bytes == 2 * 8_519_680
    assert report.reserved_peak_bytes >= (
        report.allocator_peak_bytes + report.workspace_bytes
    )


def test_without_products_there_is_none():
    report = of(lambda: nn.LayerNorm(1024), gpu="A100")
    assert report.workspace_bytes == 0 < report.reserved_peak_bytes


def test_the_card_decides():
    peaks = {name: of(gpu=name).allocator_peak_bytes for name in ("T4", "A100", "H100")}
    assert len({of(gpu=name).peak_bytes for name in peaks}) == 1
    assert peaks["T4"] < peaks["A100"] == peaks["H100"]
    assert of(gpu="rtx4090") == of(gpu="RTX 4090")
    with on_gpu("T4"):
        assert of().allocator_peak_bytes == peaks["T4"]


def test_an_unknown_card_is_told_the_names_of_others():
    with pytest.raises(ValueError, match="gpu is one of T4, .*, not 'H9000'"):
        of(gpu="H9000")
    assert all(gpu.threads in (1024, 1536, 2048) for gpu in CARDS.values())


def test_numbers_are_counted_when_they_are_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "helpers.allocator.replay.counted",
        lambda *args: calls.append(args) or {"allocator_peak_bytes": 7},
    )
    report = of()
    assert report.peak_bytes and not calls
    assert report.allocator_peak_bytes == report.allocator_peak_bytes == 7
    assert len(calls) == 1


def test_they_survive_a_trip_by_dict_and_by_pickle():
    report = of(lambda: uniform_mlp(4, 1000), 1000, optimizer=torch.optim.AdamW)
    copies = StepReport.from_dict(report.to_dict()), pickle.loads(pickle.dumps(report))
    for copy in copies:
        assert copy == report and copy.reserved_peak_bytes == report.reserved_peak_bytes


def test_on_a_cpu_the_allocator_counts_tensors():
    report = of(device="cpu")
    assert report.allocator_peak_bytes == report.peak_bytes
    assert report.workspace_bytes == report.reserved_peak_bytes == 0
