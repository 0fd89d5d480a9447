"""Kernels' scratch: sized as PyTorch's own code sizes it, and told apart from tensors.

The expected sizes are what ``setReduceConfig`` gives, taken from the header that
PyTorch 2.13 installs (2.11's is the same) and compiled against its TensorIterator, with
both buffers rounded up to 512 B.
"""

import dataclasses
import itertools
import time

import pytest
import torch
from torch import nn

from helpers.allocator import H100, Gpu, on_gpu, this_gpu
from helpers.allocator.cards import named
from helpers.allocator.scratch import requests_of
from helpers.checkpointing import Plan
from helpers.measure import measure, predict
from helpers.models import GPT, DocsMLP, uniform_mlp
from helpers.units import round_to_block

SMALL = Gpu(40, 1024)  # a T4's
MIB = 2**20
SUM, MEAN = torch.ops.aten.sum.dim_IntList, torch.ops.aten.mean.dim
LAYERS = ["layer1", "layer2", "layer3"]

ORACLE = [  # shape, axes summed over, type, bytes on an H100, bytes on a T4
    ((8192, 1024), (0,), "float32", 67_109_376, 20_972_032),
    ((8192, 1024), (0,), "bfloat16", 67_109_376, 20_972_032),
    ((8192, 1024), (0,), "float64", 134_218_240, 41_943_552),
    ((65536, 1024), (0,), "float32", 138_412_544, 33_554_944),
    ((1048576, 1024), (0,), "float32", 268_435_968, 268_435_968),
    ((2048, 4096), (0,), "float32", 67_109_376, 20_972_032),
    ((8192, 4096), (0,), "float32", 138_412_544, 20_972_032),
    ((2048, 1024), (0,), "float32", 16_777_728, 16_777_728),
    ((1024, 1024), (0,), "float32", 8_389_120, 8_389_120),
    ((32, 1024), (0,), "float32", 0, 0),
    ((4096, 777), (0,), "float32", 1_591_808, 398_336),
    ((4096, 778), (0,), "bfloat16", 6_373_888, 2_589_696),
    ((8192, 10), (0,), "float32", 0, 0),
    ((8192, 10), (0, 1), "float32", 0, 0),
    ((65536, 10), (0, 1), "float32", 1024, 1024),
    ((1, 4194304), (1,), "float32", 2560, 1024),
    ((3, 70000, 5), (1,), "float32", 33_792, 19_968),
    ((16, 1024, 768), (0, 1), "float32", 100_663_808, 21_234_176),
    ((16, 1024, 768), (2,), "float32", 0, 0),
    ((4, 64, 56, 56), (0, 2, 3), "float32", 0, 0),
]
STRIDED = [  # shape, strides, offset, axes, bytes on an H100
    ((8192, 1024), (1, 8192), 0, (0,), 0),
    ((8192, 1024), (0, 0), 0, (0,), 2_228_736),
    ((8192, 1024), (1025, 1), 0, (0,), 2_228_736),
    ((8192, 1024), (2048, 1), 2, (0,), 16_777_728),
    ((64, 256, 128), (1, 64, 16384), 0, (1,), 0),
]


def scratch_bytes(func, args: tuple, gpu: Gpu) -> int:
    return sum(map(round_to_block, requests_of(func, args, {}, gpu)))


def rows_of(rows: int, width: int = 1024) -> torch.Tensor:
    return torch.empty(rows, width, device="meta")


@pytest.mark.parametrize("func", [SUM, MEAN], ids=str)
@pytest.mark.parametrize(("shape", "dims", "dtype", "on_h100", "on_t4"), ORACLE)
def test_a_sum_takes_what_pytorchs_own_code_takes(
    func, shape, dims, dtype, on_h100, on_t4
):
    x = torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
    assert scratch_bytes(func, (x, list(dims), True), H100) == on_h100
    from_behind = [dim - x.dim() for dim in dims]
    assert scratch_bytes(func, (x, from_behind), SMALL) == on_t4


@pytest.mark.parametrize(("shape", "strides", "offset", "dims", "expected"), STRIDED)
def test_strides_and_offsets_count(shape, strides, offset, dims, expected):
    x = torch.empty(0, device="meta").set_(
        torch.empty(2**25, device="meta").untyped_storage(), offset, shape, strides
    )
    assert scratch_bytes(SUM, (x, list(dims)), H100) == expected


def test_a_sum_over_everything_names_no_axis():
    x, everything = rows_of(65536, 10), torch.ops.aten.sum.default
    assert scratch_bytes(everything, (x,), H100) == 1024
    assert scratch_bytes(SUM, (x, None), H100) == 1024
    assert scratch_bytes(SUM, (x, []), H100) == 1024


@pytest.mark.parametrize("strides", [(1024, 1), (1, 10**9), (0, 0), (0, 1)])
@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_a_sum_of_any_size_is_sized(strides, dims):
    """It is halved for 32 bits a thousand times, of which most are alike."""
    storage = torch.empty(10**9, 1024, device="meta").untyped_storage()
    x = torch.empty(0, device="meta").set_(storage, 0, (10**9, 1024), strides)
    begin = time.perf_counter()
    assert scratch_bytes(SUM, (x, list(dims)), H100) >= 0
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_prediction_takes_no_longer_for_a_larger_batch(device):
    for rows in (8192, 10**9, 10**12):
        begin = time.perf_counter()
        report = predict(DocsMLP, rows_of(rows), device=device)
        assert report.allocator_peak_bytes > rows * 1024 * 4 * 4
        assert time.perf_counter() - begin < 10  # a thousandth of it, as a rule


def test_nor_for_more_tokens():
    ids = torch.empty(1, 10**7, dtype=torch.long, device="meta")
    begin = time.perf_counter()
    report = predict(lambda: GPT(context=10**7), ids, autocast=torch.bfloat16)
    assert report.allocator_peak_bytes > report.peak_bytes > 10**11
    assert time.perf_counter() - begin < 10


def test_other_operators_and_empty_tensors_take_nothing():
    x = rows_of(8192)
    assert scratch_bytes(torch.ops.aten.relu.default, (x,), H100) == 0
    assert scratch_bytes(SUM, (x[:0], [0]), H100) == 0


def test_what_is_true_is_copied_to_int64_and_then_added_up():
    """As PyTorch's own CUDA code asks for it: 67,108,864, 134,217,728 and 32 bytes."""
    x = rows_of(8192) > 0
    copy, parts, semaphores = x.numel() * 8, x.numel() * 16, 512
    assert scratch_bytes(SUM, (x, [0]), H100) == copy + parts + semaphores


SORTS = [  # ids, their type, the card, and what a sort, a search and a scan ask for
    (8192, "int64", "H100", (139_775, 1279, 1279)),
    (1_000_000, "int64", "H100", (16_229_887, 4351, 18_943)),
    (1_000_000, "int64", "A100", (16_273_919, 13_055, 18_943)),
    (1_000_000, "int64", "T4", (16_371_199, 51_199, 18_943)),
    (1_000_000, "int32", "H100", (8_164_351, 3327, 5119)),
    (1_000_000, "int32", "A100", (8_164_351, 6911, 5119)),
    (1_000_000, "int32", "T4", (8_093_695, 23_807, 5119)),
]


@pytest.mark.parametrize(("count", "dtype", "card", "expected"), SORTS)
def test_ids_are_sorted_in_what_cub_asks_for(count, dtype, card, expected):
    """As PyTorch's own CUDA code asked for it, on cards that were not there."""
    ids = torch.empty(count, dtype=getattr(torch, dtype), device="meta")
    args = torch.empty(count, 1, device="meta"), ids, 2**20, -1, False
    func = torch.ops.aten.embedding_dense_backward.default
    asked = requests_of(func, args, {}, named(card))
    freed = [n for n, after in itertools.pairwise(asked) if after == -n < 0]
    assert tuple(freed) == expected


def test_few_rows_are_added_at_once():
    ids = torch.empty(8192, dtype=torch.long, device="meta")
    func = torch.ops.aten.embedding_dense_backward.default
    for rows, n_bytes in ((9, 828 * 8), (500, 1319 * 512 * 4)):
        args = torch.empty(8192, 512, device="meta"), ids, rows, -1, False
        assert requests_of(func, args, {}, H100)[-1] == n_bytes


# In a step


def without_biases() -> nn.Module:
    return nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(3)))


def test_a_biass_gradient_is_on_top_of_the_tensors():
    """By hand, in layer2's backward, where the buffer is twice an activation."""
    with on_gpu(H100):
        report = predict(DocsMLP, rows_of(8192))
    activation, weight = 8192 * 1024 * 4, 1024 * 1024 * 4
    parameters = 2 * (weight + 4096) + 10 * 1024 * 4 + 512
    gradients = weight + 4096 + 10 * 1024 * 4 + 512
    output_and_loss = 8192 * 10 * 4 + 512 + 512  # and the loss's gradient
    x_relu_and_their_gradients = 4 * activation
    tensors = parameters + gradients + output_and_loss + x_relu_and_their_gradients
    assert report.allocator_peak_bytes == tensors + 2 * activation + 512
    assert report.peak_bytes == 176_580_608
    assert report.scratch_bytes == report.allocator_peak_bytes - 176_580_608
    measured = dataclasses.replace(report, source="measured")
    assert "scratch of kernels 36.0 MiB on top" in repr(measured)


def test_without_biases_there_is_none():
    with on_gpu(H100):
        report = predict(
            without_biases(), rows_of(8192), loss=lambda y: y.square().sum()
        )
    assert report.scratch_bytes == 0
    assert report.allocator_peak_bytes == report.peak_bytes
    assert "scratch" not in repr(dataclasses.replace(report, source="measured"))


def test_the_gradient_of_a_sum_is_one_number_and_products_copy_it():
    report = predict(without_biases(), rows_of(8192))
    weight, activation = 1024 * 1024 * 4, 8192 * 1024 * 4
    weights_and_a_gradient, loss_and_its_gradient = 4 * weight, 2 * 512
    x_outputs_a_gradient_and_the_copy = (1 + 3 + 1 + 1) * activation
    assert report.allocator_peak_bytes == (
        weights_and_a_gradient
        + loss_and_its_gradient
        + x_outputs_a_gradient_and_the_copy
    )


@pytest.mark.parametrize(
    ("size", "stride", "copies"),
    [
        ((8, 128), (128, 1), 0),  # by rows
        ((8, 128), (1, 8), 0),  # by columns
        ((8, 128), (130, 1), 0),  # rows of a wider matrix
        ((8, 128), (256, 2), 1),
        ((8, 128), (0, 0), 1),
        ((8, 128), (0, 1), 1),
        ((8, 128), (1, 0), 1),
        ((1, 128), (7, 1), 0),
        ((1, 128), (7, 2), 1),
        ((8, 1), (2, 1), 0),
        ((8, 1), (1, 99), 0),
    ],
)
def test_a_matrix_that_cublas_cannot_read_is_copied(size, stride, copies):
    x = torch.empty_strided(size, stride, device="meta")
    y = torch.empty(size[1], 4, device="meta")
    for func, args in (
        (torch.ops.aten.mm.default, (x, y)),
        (torch.ops.aten.addmm.default, (torch.empty(4, device="meta"), x, y)),
        (torch.ops.aten.mm.default, (y.t(), x.t())),
    ):
        expected = copies * -(-x.numel() * 4 // 512) * 512
        assert scratch_bytes(func, args, H100) == expected


def test_it_depends_on_the_gpu_and_the_plan():
    found = {}
    for gpu in (H100, SMALL):
        for plan in (Plan(), Plan((tuple(LAYERS),))):
            with on_gpu(gpu):
                report = predict(
                    lambda: uniform_mlp(3, 1024, "gelu"), rows_of(8192), plan
                )
            found[gpu, plan] = report.scratch_bytes
    assert len(set(found.values())) > 1
    assert all(found[H100, plan] >= found[SMALL, plan] for _, plan in found)


def test_a_cpus_step_has_none():
    x = torch.randn(2048, 1024)
    for report in (predict(DocsMLP, x, device="cpu"), measure(DocsMLP(), x, repeats=0)):
        assert report.allocator_peak_bytes == report.peak_bytes


def test_a_gpu_is_chosen_inside_a_block_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_gpu() == H100
    with pytest.raises(RuntimeError), on_gpu(SMALL):
        assert this_gpu() == SMALL
        raise RuntimeError
    assert this_gpu() == H100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("shape", "dims", "dtype"), [case[:3] for case in ORACLE])
def test_a_real_gpus_sum_takes_as_much(shape, dims, dtype):
    x = torch.zeros(shape, dtype=getattr(torch, dtype), device="cuda")
    out = x.sum(dims, keepdim=True)
    torch.cuda.empty_cache()  # so that no block is larger than asked for
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.sum(x, dims, keepdim=True, out=out)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    taken, expected = peak - before, scratch_bytes(SUM, (x, list(dims)), this_gpu())
    assert expected - 1024 <= taken <= expected  # which is in whole blocks
