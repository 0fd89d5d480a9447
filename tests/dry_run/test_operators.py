"""Predicted bytes are measured ones: operators, losses, layers and optimizers.

On a CPU to the byte, and each storage by itself; for CUDA all are predicted.
"""

import functools
import warnings
from itertools import zip_longest

import pytest
import torch
from torch import nn

from helpers.checkpointing import Undo
from helpers.dry_run import autocast as casts
from helpers.dry_run import kernels
from helpers.measure import StepReport, measure, predict
from tests.dry_run import operators as table
from tests.dry_run.operators import EVEN, ODD, Run, batch_of, before, target_of, total

BF16 = torch.bfloat16
LAYOUTS = {"image": torch.channels_last, "volume": torch.channels_last_3d}


@pytest.fixture(scope="module", autouse=True)
def kernels_stay():
    """Make the kernels of meta tensors once, and not anew for each prediction."""
    with Undo() as undo:
        kernels.shared(undo, "casts", casts._Installed)
        kernels.shared(undo, "kernels", kernels._registered)
        yield


def made(report: StepReport) -> list[tuple]:
    """List what a step allocates: phase, module, bytes; and by which operator."""
    told = [e.allocation for e in report.timeline.events if e.kind == "alloc"]
    return [((one.phase, one.module, one.bytes), one.op) for one in told]


def assert_predicted(
    model: nn.Module, batch: object, on_cuda: bool = True, **settings
) -> None:
    """Hold a prediction for a CPU against a measurement; make one for CUDA."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that are on their way out
        predicted = predict(model, batch, device="cpu", **settings)
        measured = measure(model, batch, device="cpu", repeats=0, warmup=1, **settings)
        if on_cuda:
            assert predict(model, batch, device="cuda", **settings).peak_bytes
    pairs = zip_longest(made(predicted), made(measured), fillvalue=(None, None))
    first = next((pair for pair in pairs if pair[0][0] != pair[1][0]), None)
    if first or predicted.peak_bytes != measured.peak_bytes:
        pytest.fail(
            f"predicted {predicted.peak_bytes:,}, measured {measured.peak_bytes:,}; "
            f"the first difference is {first}",
            pytrace=False,
        )


def test_the_table_is_long_enough():
    parts = table.LAYERS, table.FUNCTIONS, table.LOSSES, table.OPTIMIZERS
    assert sum(map(len, parts)) >= 200


@pytest.mark.parametrize("name", table.LAYERS)
def test_layers(name):
    kind, make = table.LAYERS[name]
    for parity, autocast in settings(name):
        x = batch_of(kind, parity)
        channels = x.shape[channels_at(kind)]
        model = nn.Sequential(before(kind, channels), make(channels))
        if kind not in LAYOUTS or parity == ODD:
            assert_predicted(model, x, autocast=autocast)
        if kind in LAYOUTS:
            x = x.contiguous(memory_format=LAYOUTS[kind])
            model = in_layout(model, LAYOUTS[kind])
            assert_predicted(model, x, autocast=autocast)


def settings(name: str) -> list[tuple[int, torch.dtype | None]]:
    """Try odd sizes in float32 and even ones in bf16, if a CPU has a kernel for it."""
    return [(ODD, None), (EVEN, None if name in table.NOT_IN_BF16 else BF16)]


def channels_at(kind: str) -> int:
    return 1 if kind in ("signal", "image", "volume") else -1


def in_layout(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    """Put weights that have as many axes as the layout into it."""
    axes = 4 if layout == torch.channels_last else 5
    for parameter in model.parameters():
        if parameter.dim() == axes:
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return model


@pytest.mark.parametrize("name", table.FUNCTIONS)
def test_functions(name):
    kind, function = table.FUNCTIONS[name]
    for parity, autocast in settings(name):
        x = batch_of(kind, parity)
        run = Run(lambda x: total(function(x.sigmoid())))
        model = nn.Sequential(before(kind, x.shape[channels_at(kind)]), run)
        assert_predicted(model, x, autocast=autocast)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", table.LOSSES)
def test_losses(name, reduction):
    function, target = table.LOSSES[name]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return function(output, target, reduction=reduction).sum()

    for parity, autocast in settings(name):
        x = batch_of("rows", parity)
        model, batch = before("rows", x.shape[1]), (x, target_of(target, x))
        on_cuda = name != "bce" or autocast is None  # where autocast refuses it
        assert_predicted(model, batch, on_cuda, loss=loss, autocast=autocast)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", table.OPTIMIZERS)
def test_optimizers(name, foreach):
    make = functools.partial(table.OPTIMIZERS[name], foreach=foreach)
    model = nn.Sequential(nn.Linear(13, 24), nn.ReLU(), nn.Linear(24, 7))
    for autocast in (None, BF16):
        assert_predicted(model, torch.randn(5, 13), optimizer=make, autocast=autocast)


@pytest.mark.parametrize("name", table.FUSED)
def test_fused_optimizers(name):
    make = functools.partial(table.FUSED[name], fused=True)
    model = nn.Sequential(nn.Linear(13, 24), nn.ReLU(), nn.Linear(24, 7))
    assert_predicted(model, torch.randn(5, 13), optimizer=make)
