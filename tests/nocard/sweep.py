"""The operators, layers, losses and optimizers of tests/dry_run, each as a case."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import nn

from helpers.checkpointing import Plan
from tests.dry_run import operators as table
from tests.dry_run.operators import (
    EVEN,
    LARGE,
    ODD,
    SIZES,
    Run,
    batch_of,
    target_of,
    total,
)
from tests.nocard.cases import Case

BF16 = torch.bfloat16
LAYOUTS = {"image": torch.channels_last, "volume": torch.channels_last_3d}
# What is not pretended on a card that is not there: a library's own choice, as it is
# named where it is not known.
IN_LIBRARIES = {
    "linear algebra": """logdet slogdet det solve inv cholesky qr svdvals svd eigvalsh
      pinv""".split(),
    "FFT": "rfft fft2 irfft stft".split(),
}
OTHERS = [name for names in IN_LIBRARIES.values() for name in names]


class Scaled(nn.Module):
    """Has a weight for each channel, and leaves an image's layout as it is."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        sizes = [1] * (len(SIZES[kind][0]) - 1)
        sizes[0 if kind in ("signal", "image", "volume") else -1] = channels
        self.weight = nn.Parameter(torch.ones(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def channels_of(kind: str, parity: int) -> int:
    return SIZES[kind][parity][1 if kind in ("signal", "image", "volume") else -1]


def before(kind: str, parity: int) -> nn.Module:
    """Make a layer with weights, so that there is a gradient to come back to."""
    channels = channels_of(kind, parity)
    if kind == "ids":
        return nn.Identity()
    plain = kind in ("rows", "square", "words")
    return nn.Linear(channels, channels) if plain else Scaled(kind, channels)


def settings() -> list[tuple[int, torch.dtype | None]]:
    sizes = [(ODD, None), (EVEN, None), (LARGE, None)]
    return [*sizes, (EVEN, BF16), (LARGE, BF16)]


def case(name: str, model: Callable, batch: Callable, **settings) -> Case:
    return Case(name, model, batch, [Plan()], settings)


def layers(names: list[str]) -> Iterator[Case]:
    for name in names:
        kind, make = table.LAYERS[name]
        for parity, autocast in settings():
            layouts = [torch.contiguous_format]
            if kind in LAYOUTS and "onv" not in name:
                layouts.append(LAYOUTS[kind])
            for layout in layouts:

                def model(kind=kind, make=make, parity=parity) -> nn.Module:
                    layer = make(channels_of(kind, parity))
                    return nn.Sequential(before(kind, parity), layer)

                def batch(kind=kind, parity=parity, layout=layout) -> torch.Tensor:
                    if kind not in LAYOUTS:
                        return batch_of(kind, parity)
                    # As a copy in the layout, there would be room before it.
                    sizes = SIZES[kind][parity]
                    return torch.empty(sizes, memory_format=layout).normal_()

                told = f"{name} {parity} {autocast} {layout}"
                yield case(told, model, batch, autocast=autocast)


def functions(names: list[str]) -> Iterator[Case]:
    for name in names:
        kind, function = table.FUNCTIONS[name]
        for parity, autocast in settings():

            def model(kind=kind, function=function, parity=parity) -> nn.Module:
                run = Run(lambda x: total(function(x.sigmoid())))
                return nn.Sequential(before(kind, parity), run)

            batch = functools.partial(batch_of, kind, parity)
            yield case(f"{name} {parity} {autocast}", model, batch, autocast=autocast)


def turned(x: torch.Tensor) -> torch.Tensor:
    """Let a tensor lie column by column."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def turned_inputs(names: list[str]) -> Iterator[Case]:
    """Give layers and functions what lies neither row by row nor channels last."""
    for name in names:
        if name in table.LAYERS:
            kind, make = table.LAYERS[name]
        else:
            kind, function = table.FUNCTIONS[name]
            make = functools.partial(_called, function)
        for parity in (ODD, EVEN):

            def model(kind=kind, make=make, parity=parity) -> nn.Module:
                layer = make(channels_of(kind, parity))
                return nn.Sequential(before(kind, parity), Run(turned), layer)

            batch = functools.partial(batch_of, kind, parity)
            yield case(f"{name} {parity} turned", model, batch)


def _called(function: Callable, channels: int) -> nn.Module:
    return Run(lambda x: total(function(x.sigmoid())))


def losses(names: list[str]) -> Iterator[Case]:
    for name in names:
        function, target = table.LOSSES[name]
        for reduction in ("mean", "sum", "none"):
            for parity, autocast in settings():

                def loss(x, y, function=function, reduction=reduction):
                    return function(x, y, reduction=reduction).sum()

                def batch(parity=parity, target=target) -> tuple:
                    x = batch_of("rows", parity)
                    return x, target_of(target, x)

                yield case(
                    f"{name} {reduction} {parity} {autocast}",
                    functools.partial(before, "rows", parity),
                    batch,
                    loss=loss,
                    autocast=autocast,
                )


def optimizers(names: list[str]) -> Iterator[Case]:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(13, 24), nn.ReLU(), nn.Linear(24, 7))

    batch = functools.partial(torch.randn, 5, 13)
    for name in names:
        make = table.OPTIMIZERS.get(name) or table.FUSED[name]
        ways = [{"foreach": False}, {"foreach": True}, {}]
        ways += [{"fused": True}] if name in table.FUSED else []
        for how in ways:
            for autocast in (None, BF16):
                optimizer = functools.partial(make, **how)
                told = f"{name} {how} {autocast}"
                yield case(told, model, batch, optimizer=optimizer, autocast=autocast)
