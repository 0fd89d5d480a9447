"""Random models, batches and plans: both peaks are as predicted, to the byte.

On a GPU, or under PyTorch's own CUDA code on a card that is not there (README.md).
"""

import functools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.checkpointing import Plan, Undo
from tests.dry_run.operators import Run
from tests.nocard.by_hand import allocator_of
from tests.nocard.cases import Case
from tests.nocard.test_allocator import difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; none is available"
    ),
]
SEEDS = range(40)
OPTIMIZERS = [None, torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad]
OPTIMIZERS += [functools.partial(torch.optim.SGD, momentum=0.9)]


@pytest.fixture(autouse=True)
def without_cudnn():
    with Undo() as undo:
        undo.callback(torch.backends.cuda.enable_cudnn_sdp, True)
        torch.backends.cuda.enable_cudnn_sdp(False)
        undo.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def attend(qkv: nn.Module, x: torch.Tensor, heads: int, causal: bool) -> torch.Tensor:
    q, k, v = qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return y.transpose(1, 2).flatten(2)


def word_layer(r: random.Random, width: int, length: int) -> nn.Module:
    """One layer of words: batch, length, width."""
    heads = r.choice([n for n in (1, 2, 4) if width % n == 0])
    causal, inner = r.random() < 0.5, r.choice([width, 2 * width, 3 * width + 1])
    make = r.choice(["plain", "plain", "act", "act", "norm", "attend", "mlp", "mix"])
    if make == "plain":
        return nn.Linear(width, width, bias=r.random() < 0.7)
    if make == "act":
        kinds = nn.GELU, nn.SiLU, nn.Tanh, nn.Mish, nn.Softplus, nn.LogSigmoid
        return r.choice([*(kind() for kind in kinds), nn.ReLU(), nn.Dropout(0.1)])
    if make == "norm":
        return r.choice([nn.LayerNorm, nn.RMSNorm])(width)
    if make == "attend":
        qkv = nn.Linear(width, 3 * width)
        return Run(lambda own, x: x + attend(own, x, heads, causal), qkv)
    if make == "mix":  # over the words, which do not lie side by side
        over = nn.Linear(length, length)
        return Run(lambda own, x: x + own(x.transpose(1, 2)).transpose(1, 2), over)
    up, down = nn.Linear(width, inner), nn.Linear(inner, width)
    return Run(lambda up, down, x: x + down(F.gelu(up(x))), up, down)


def image_layer(r: random.Random, channels: int, length: int) -> nn.Module:
    kind = r.choice(["conv", "depth", "norm", "act", "pool", "group"])
    if kind in ("conv", "depth"):
        groups = channels if kind == "depth" else 1
        size, bias = r.choice([1, 3]), r.random() < 0.5
        how = {"padding": size // 2, "groups": groups, "bias": bias}
        return nn.Conv2d(channels, channels, size, **how)
    if kind == "act":
        return r.choice([nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.Dropout2d(0.2)])
    if kind == "pool":
        return r.choice([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1)])
    return nn.BatchNorm2d(channels) if kind == "norm" else nn.GroupNorm(1, channels)


def made(seed: int) -> Case:
    """Draw a chain, a batch, a plan and settings."""
    r = random.Random(seed)
    batch, length = r.choice([1, 3, 8]), r.choice([5, 64, 257, 1024])
    width, is_image = r.choice([8, 24, 33, 128, 384]), r.random() < 0.3
    count = r.randint(2, 7)
    shape, layer = (batch, length, width), word_layer
    if is_image:
        side = r.choice([7, 16, 33])
        shape, layer = (batch, width, side, side), image_layer
    layout = torch.channels_last if is_image and r.random() < 0.5 else None
    drawn, shares = r.getrandbits(32), r.random() < 0.2

    def model() -> nn.Sequential:
        again = random.Random(drawn)
        layers = [layer(again, width, length) for _ in range(count)]
        first = nn.Conv2d(width, width, 1) if is_image else nn.Linear(width, width)
        return nn.Sequential(first, *layers, *layers[:1] * shares)

    def x() -> torch.Tensor:
        how = {"memory_format": layout} if layout else {}
        return torch.empty(shape, **how).normal_()

    names = [str(place) for place in range(count + 1)]
    cuts = sorted(r.sample(range(count + 2), r.choice([2, 2, 4]) if count > 2 else 2))
    pieces = [names[a:b] for a, b in zip(cuts[::2], cuts[1::2], strict=True)]
    plan = Plan(tuple(tuple(piece) for piece in pieces if piece))
    settings = {"autocast": r.choice([None, torch.bfloat16])}
    settings["optimizer"] = r.choice(OPTIMIZERS)
    return Case(f"seed {seed}", model, x, [Plan(), plan], settings)


@pytest.mark.parametrize("part", range(4))
def test_both_peaks_are_as_predicted(part):
    wrong = []
    for seed in SEEDS[part::4]:
        case = made(seed)
        for plan in case.plans:
            if error := difference(case, plan, allocator_of(case, plan)):
                wrong.append(f"{case}, {plan}: {error}")
    assert not wrong, "\n".join(wrong)
