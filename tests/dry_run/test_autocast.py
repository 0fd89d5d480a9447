"""Autocast in a dry run: the casts, and so the bytes, of a step under autocast."""

import itertools
import re
import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.checkpointing import Plan
from helpers.dry_run import as_on, autocast
from helpers.measure import measure, measure_plans, predict, training_step
from helpers.models import MLP, DocsMLP

BF16 = torch.bfloat16
LAYERS = ["layer1", "layer2", "layer3", "layer4"]
PLANS = [
    Plan(),
    Plan.alone(["layer1"]),
    Plan.alone(LAYERS),
    Plan((("layer1",), ("layer2", "layer3"))),
    Plan((tuple(LAYERS),)),
]


def numbers(report) -> dict:
    """Take what must be the same in a prediction and in a measurement."""
    names = ["peak_bytes", "after_forward_bytes", "baseline_bytes", "categories"]
    names += ["forward_flops", "recompute_flops"]
    return {name: getattr(report, name) for name in names}


def assert_predicted(model, batch, plans, **settings) -> None:
    settings |= {"autocast": BF16, "device": "cpu"}
    reports = measure_plans(model, batch, plans, repeats=0, warmup=1, **settings)
    for plan, measured in zip(plans, reports, strict=True):
        assert numbers(predict(model, batch, plan, **settings)) == numbers(measured)


# Predicted is measured


@pytest.mark.parametrize(
    ("activation", "dropout", "optimizer"),
    [
        ("relu", 0, None),
        ("gelu", 0, torch.optim.AdamW),
        ("gelu", 0.1, None),
        ("silu", 0.1, torch.optim.AdamW),
        ("tanh", 0, None),
    ],
)
def test_mlps(activation, dropout, optimizer):
    x, target = torch.randn(130, 64), torch.randint(10, (130,))
    model = MLP([64, 96, 80, 72, 10], activation, dropout)
    assert_predicted(model, x, PLANS, optimizer=optimizer)
    assert_predicted(model, (x, target), PLANS[:2], optimizer=optimizer)


def test_the_docs_mlp_with_all_its_boxes():
    ticks = itertools.product((False, True), repeat=3)
    plans = [Plan.alone(itertools.compress(LAYERS[:3], row)) for row in ticks]
    assert_predicted(DocsMLP(), torch.randn(32, 1024), plans)


class Block(nn.Module):
    """Products, norms, attention and a convolution: a bit of every list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)
        self.layer2 = nn.Sequential(nn.Conv1d(7, 5, 3), nn.GroupNorm(1, 5), nn.PReLU())
        self.layer3 = nn.Linear(64, 8)

    def forward(self, x):
        x = self.layer2(self.layer1(x))
        x = torch.cat([x, x.exp().softmax(-1)], -1)[..., :60]
        return self.layer3(F.pad(x, (0, 4))).mean(1)


def test_other_operators():
    plans = [Plan(), Plan.alone(["layer1"]), Plan.alone(["layer1", "layer2", "layer3"])]
    x, target = torch.randn(6, 7, 32), torch.randint(8, (6,))
    assert_predicted(Block(), x, plans)
    assert_predicted(Block(), (x, target), plans)


class Twice(nn.Module):
    """Uses one weight twice: cast once in a block, and once more in recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 48)
        self.last = nn.Linear(48, 4)

    def forward(self, x):
        return self.last(self.layer(self.layer(x).relu()))


def test_a_weight_that_is_used_twice():
    assert_predicted(Twice(), torch.randn(20, 48), [Plan(), Plan.alone(["layer"])])


@pytest.mark.parametrize("options", [{"early_stop": False}, {"use_reentrant": True}])
def test_other_ways_to_checkpoint(options):
    x = torch.randn(40, 64, requires_grad=True)
    assert_predicted(MLP([64] * 4 + [10], "gelu", 0.1), x, PLANS, **options)


def test_activations_shrink_and_weights_do_not():
    model, x = MLP([64] * 5 + [10], "gelu"), torch.randn(4096, 64)
    full, half = predict(model, x), predict(model, x, autocast=BF16)
    assert half.categories["activation"] < 0.6 * full.categories["activation"]
    assert half.categories["parameter"] == full.categories["parameter"]
    assert half.forward_flops == full.forward_flops


# By hand, for CUDA


def test_two_layers_by_hand():
    """x and the first product are cast and kept; the second weight's cast is kept."""
    model = nn.Sequential(
        nn.Linear(64, 128, bias=False), nn.Linear(128, 32, bias=False)
    )
    report = predict(model, torch.empty(256, 64), autocast=BF16)
    weights, x = 4 * (64 * 128 + 128 * 32), 4 * 256 * 64
    kept = 2 * 256 * 64 + 2 * 256 * 128 + 2 * 128 * 32
    output, loss = 2 * 256 * 32, 512
    assert report.baseline_bytes == weights + x
    assert report.after_forward_bytes == weights + x + kept + output + loss


# The lists


def listed(macro: str) -> set[str]:
    """Read the operators of one list out of PyTorch's own header."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    body = re.search(rf"define {macro}\(_\)((?:.*\\\n)*.*)\n", header.read_text())[1]
    return set(re.findall(r"_\((\w+)", body))


@pytest.mark.parametrize(
    ("macro", "found"),
    [
        ("AT_FORALL_LOWER_PRECISION_FP", autocast.LOWER),
        ("AT_FORALL_PROMOTE", autocast.WIDEST["cuda"]),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", autocast.RESULT["cuda"]),
    ],
)
def test_cudas_lists_are_pytorchs(macro, found):
    assert listed(macro) <= found
    # All else that a GPU casts is cast to float32; these are not on the header's lists.
    more = {"norm", "cudnn_convolution", "cudnn_convolution_transpose"}
    more |= {"_addmm_activation", "mkldnn_rnn_layer", "_native_multi_head_attention"}
    assert found - listed(macro) <= more
    assert found.isdisjoint(listed("AT_FORALL_FP32"))


def dtypes(device: str, *functions) -> list[torch.dtype]:
    x = torch.empty(4, 4, device="meta", dtype=BF16)
    with as_on(device, BF16), torch.autocast("cpu", dtype=BF16):
        return [function(x).dtype for function in functions]


def test_devices_differ():
    functions = (
        torch.sum,
        torch.exp,
        partial(torch.softmax, dim=0),
        partial(torch.softmax, dim=0, dtype=BF16),
        partial(F.layer_norm, normalized_shape=(4,)),
        lambda x: torch.cat([x, x.float()]),
        lambda x: torch.atan2(x, x.float()),
        lambda x: x.float() @ x.float(),
        lambda x: F.mse_loss(x, x),
        lambda x: x + x,
        torch.norm,
    )
    full = torch.float32
    assert dtypes("cpu", *functions) == [
        BF16, BF16, BF16, BF16, BF16, full, full, BF16, full, BF16, BF16,
    ]  # fmt: skip
    assert dtypes("cuda", *functions) == [
        full, full, full, BF16, full, full, full, BF16, full, BF16, full,
    ]  # fmt: skip


def test_the_cpus_casts_are_autocasts_own():
    real = torch.randn(4, 4, dtype=BF16)
    functions = [torch.sum, torch.exp, torch.norm, lambda x: F.mse_loss(x, x)]
    functions += [lambda x: torch.cat([x, x.float()]), lambda x: x.float() @ x.float()]
    with torch.autocast("cpu", dtype=BF16):
        expected = [function(real).dtype for function in functions]
    assert dtypes("cpu", *functions) == expected


# What it leaves


def test_meta_tensors_are_left_alone_outside():
    x = torch.empty(4, 4, device="meta")
    with torch.autocast("cpu", dtype=BF16):
        assert (x @ x).dtype == torch.float32
    with pytest.raises(KeyError), as_on("cuda", BF16):
        assert (x @ x).dtype == torch.float32
        with torch.autocast("cpu", dtype=BF16):
            assert (x @ x).dtype == BF16
            found: list[torch.dtype] = []
            thread = threading.Thread(target=lambda: found.append((x @ x).dtype))
            thread.start()
            thread.join()
            assert found == [torch.float32]
        raise KeyError
    assert not torch.is_autocast_enabled("ipu")
    with torch.autocast("cpu", dtype=BF16):
        assert (x @ x).dtype == torch.float32
        assert (torch.ones(4, 4) @ torch.ones(4, 4)).dtype == BF16


class CastsKept(TorchDispatchMode):
    """Counts the casts to lower precision that somebody still refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.storages.append(weakref.ref(out.untyped_storage()))
        return out

    @property
    def alive(self) -> int:
        return sum(storage() is not None for storage in self.storages)


def test_another_threads_autocast_does_not_end_this_ones_casts():
    weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    casts = CastsKept()
    with as_on("cuda", BF16), torch.autocast("cpu", dtype=BF16):
        with casts:
            weight @ weight
        assert casts.alive == 1

        def other() -> None:
            with torch.autocast("cpu", dtype=BF16):
                torch.ones(2, 2) @ torch.ones(2, 2)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert casts.alive == 1
    assert casts.alive == 0, "the outermost block was left"


def test_a_prediction_without_autocast_is_as_before():
    model, x = MLP([64] * 3), torch.randn(8, 64)
    before = predict(model, x)
    predict(model, x, autocast=BF16)
    assert numbers(predict(model, x)) == numbers(before)


def test_a_measured_step_trains_in_full_precision_and_is_put_back():
    model, x = MLP([64] * 3), torch.randn(8, 64)
    report = measure(model, x, autocast=BF16, repeats=2)
    assert report.step_ms > 0 and not torch.is_autocast_enabled("cpu")
    training_step(model, x, autocast=BF16)()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, "bfloat16", True])
def test_what_is_no_lower_precision_is_refused(dtype):
    for run in (partial(predict, device="cpu"), measure):
        with pytest.raises(ValueError, match="autocast is torch.bfloat16, torch.float"):
            run(MLP([8, 8]), torch.randn(2, 8), autocast=dtype)
