"""Steps of which PyTorch's own CUDA code tells the bytes: models, batches, plans."""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from helpers.checkpointing import Plan
from helpers.measure import training_step
from helpers.models import GPT, MLP, DocsMLP, Encoder, ResNet, UNet, uniform_mlp

ADAMW = torch.optim.AdamW
MOMENTUM = functools.partial(torch.optim.SGD, momentum=0.9)


@dataclass
class Case:
    """One model's step, under several plans."""

    name: str
    make_model: Callable
    make_batch: Callable
    plans: list[Plan]
    settings: dict = field(default_factory=dict)  # of ``predict``

    def __str__(self) -> str:
        return self.name

    def on_device(self) -> tuple:
        """Make model, batch and optimizer there, and a step of them."""
        with torch.device("cuda"):
            model, batch = self.make_model(), self.make_batch()
        settings = {"optimizer": None, **self.settings}
        make = settings.pop("optimizer")
        made = make(model.parameters()) if make else None
        step = training_step(model, batch, optimizer=made, **settings)
        return model, batch, made, step


def layers(count: int) -> list[str]:
    return [f"layer{place}" for place in range(1, count + 1)]


def plans_of(names: list[str], *sizes: int) -> list[Plan]:
    """None, each alone, and pieces of so many."""
    pieces = [[names[i : i + n] for i in range(0, len(names), n)] for n in sizes]
    pieces = [Plan(tuple(map(tuple, several))) for several in pieces]
    return list(dict.fromkeys([Plan(), Plan.alone(names), *pieces]))


def docs() -> Iterator[Case]:
    boxes = itertools.product((False, True), repeat=3)
    plans = [Plan.alone(itertools.compress(layers(3), row)) for row in boxes]
    for rows in (32, 8192, 65536):
        make = functools.partial(torch.randn, rows, 1024)
        yield Case(f"DocsMLP {rows}", DocsMLP, make, plans)


def mlps() -> Iterator[Case]:
    """Round sizes and odd ones."""
    kinds = itertools.product(("relu", "gelu", "silu", "tanh"), (0.0, 0.1))
    sizes = [(8192, 1024), (1000, 1000), (7, 33)]
    for (kind, dropout), (rows, width) in itertools.product(kinds, sizes):
        yield Case(
            f"{kind} {dropout} {rows}x{width}",
            functools.partial(uniform_mlp, 6, width, kind, dropout),
            functools.partial(torch.randn, rows, width),
            plans_of(layers(6), 6, 2),
        )
    widths = [520, 1024, 776, 512, 10]
    for autocast, optimizer in itertools.product((None, torch.bfloat16), (None, ADAMW)):
        yield Case(
            f"{widths} {autocast} {optimizer}",
            functools.partial(MLP, widths, "gelu", 0.1),
            lambda: (torch.randn(2048, 520), torch.randint(10, (2048,))),
            plans_of(layers(4), 2),
            {"autocast": autocast, "optimizer": optimizer},
        )


OPTIMIZERS = {
    "SGD": torch.optim.SGD,
    "momentum": MOMENTUM,
    "Adam": torch.optim.Adam,
    "AdamW": ADAMW,
    "AdamW fused": functools.partial(ADAMW, fused=True),
    "AdamW for-loop": functools.partial(ADAMW, foreach=False),
    "AMSGrad": functools.partial(torch.optim.Adam, amsgrad=True),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Adamax": torch.optim.Adamax,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "ASGD": torch.optim.ASGD,
    "Rprop": torch.optim.Rprop,
}


def optimizers() -> Iterator[Case]:
    for (name, optimizer), autocast in itertools.product(
        OPTIMIZERS.items(), (None, torch.bfloat16)
    ):
        yield Case(
            f"{name} {autocast}",
            functools.partial(MLP, [520, 1024, 776, 1024, 10], "gelu", 0.1),
            functools.partial(torch.randn, 2000, 520),
            plans_of(layers(4), 2),
            {"optimizer": optimizer, "autocast": autocast},
        )


def token_loss(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def gpts() -> Iterator[Case]:
    large = {"width": 512, "heads": 8, "context": 1024, "vocabulary": 8000}
    for (options, shape), dropout, autocast, optimizer in itertools.product(
        [({}, (8, 128)), (large, (8, 1024))],
        (0.0, 0.1),
        (None, torch.bfloat16),
        (None, ADAMW),
    ):
        ids = functools.partial(torch.randint, 100, shape)
        yield Case(
            f"GPT {shape} {dropout} {autocast} {optimizer}",
            functools.partial(GPT, dropout=dropout, **options),
            lambda ids=ids: (ids(), ids()),
            plans_of([f"blocks.{i}" for i in range(4)], 2),
            {"loss": token_loss, "optimizer": optimizer, "autocast": autocast},
        )


def first_loss(output: tuple, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output[0], target)


def encoders() -> Iterator[Case]:
    for rows, length, autocast, optimizer in itertools.product(
        (4, 32), (16, 100), (None, torch.bfloat16), (None, ADAMW)
    ):

        def batch(rows: int = rows, length: int = length) -> tuple:
            x = {"input_ids": torch.randint(500, (rows, length))}
            x["attention_mask"] = torch.ones(rows, length, dtype=torch.long)
            return x, torch.randint(2, (rows,))

        yield Case(
            f"Encoder {rows}x{length} {autocast} {optimizer}",
            Encoder,
            batch,
            plans_of([f"layers.{i}" for i in range(3)]),
            {"loss": first_loss, "optimizer": optimizer, "autocast": autocast},
        )


def pictures() -> Iterator[Case]:
    """Without cuDNN, whose workspace is its own choice."""
    names = [f"layers.{i}" for i in range(6)], ["stem", "down.0", "down.1", "up.0"]
    for rows, optimizer in itertools.product((4, 64), (None, ADAMW)):
        x = functools.partial(torch.randn, rows, 3, 32, 32)
        for model, parts in zip((ResNet, UNet), names, strict=True):
            yield Case(
                f"{model.__name__} {rows} {optimizer}",
                model,
                x,
                plans_of(parts),
                {"optimizer": optimizer},
            )


GROUPS = {
    "docs": docs,
    "mlps": mlps,
    "optimizers": optimizers,
    "gpts": gpts,
    "encoders": encoders,
    "pictures": pictures,
}
