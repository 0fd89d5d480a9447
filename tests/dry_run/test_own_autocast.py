"""Autocast that is the model's own, or around the step, under any name of a device."""

import pytest
import torch
from torch import nn
from torch.amp import custom_bwd, custom_fwd
from torch.nn import functional as F

from helpers.checkpointing import Plan
from helpers.dry_run import as_on
from helpers.measure import measure, predict
from tests.dry_run.test_operators import made

BF16 = torch.bfloat16


def block(kind: str | None, **how) -> nn.Sequential:
    """Make two layers that enter autocast themselves; on their input's device."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)

        def forward(self, x):
            x = torch.relu(self.a(x))
            with torch.autocast(kind or x.device.type, **how):
                return torch.relu(self.b(x.float())).float()

    return nn.Sequential(Block(), Block(), nn.Linear(24, 2))


def assert_predicted(model: nn.Module, plan: Plan = Plan(), **settings) -> None:
    x = torch.randn(64, 24)
    predicted = predict(model, x, plan, device="cpu", **settings)
    measured = measure(model, x, plan, device="cpu", repeats=0, **settings)
    assert made(predicted) == made(measured)
    assert predicted.peak_bytes == measured.peak_bytes


@pytest.mark.parametrize("plan", [Plan(), Plan.alone(["0"]), Plan((("0", "1"),))])
@pytest.mark.parametrize("kind", ["cpu", None])
@pytest.mark.parametrize(
    "how", [{"dtype": BF16}, {"dtype": torch.float16}, {"enabled": False}, {}]
)
def test_a_blocks_own(kind, how, plan):
    for autocast in (None, BF16):
        assert_predicted(block(kind, **how), plan, autocast=autocast)
    with torch.autocast("cpu", BF16):
        assert_predicted(block(kind, **how), plan)


def test_made_outside_and_as_a_decorator():
    class Block(nn.Linear):
        @torch.autocast("cpu", dtype=BF16)
        def forward(self, x):
            return super().forward(x)

    assert_predicted(nn.Sequential(nn.Linear(24, 24), Block(24, 24)))


class Double(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    @custom_bwd(device_type="cpu")
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient @ x.T @ x


def test_custom_functions():
    class Block(nn.Linear):
        def forward(self, x):
            return Double.apply(super().forward(x))

    for autocast in (None, BF16):
        assert_predicted(nn.Sequential(Block(24, 24)), autocast=autocast)


def test_on_cuda_the_names_of_the_device_are_one_switch():
    x = torch.randn(64, 24)
    off, on = (
        {
            predict(block(kind, **how), x, autocast=autocast).peak_bytes
            for kind in ("cuda", "cpu", None)
        }
        for how, autocast in (({"enabled": False}, BF16), ({"dtype": BF16}, None))
    )
    plain = predict(block("cuda", enabled=False), x).peak_bytes
    whole = predict(block("cuda", dtype=BF16), x, autocast=BF16).peak_bytes
    assert len(off) == len(on) == 1 and len({plain, whole, *off, *on}) == 4


def test_on_a_cpu_cudas_autocast_is_nothing():
    with pytest.warns(UserWarning, match="CUDA is not available"):
        report = predict(block("cuda", dtype=BF16), torch.randn(64, 24), device="cpu")
    plain = predict(block("cpu", enabled=False), torch.randn(64, 24), device="cpu")
    assert report.peak_bytes == plain.peak_bytes


@pytest.mark.parametrize(("kind", "lower"), [("cuda", torch.float16), ("cpu", BF16)])
def test_the_default_is_the_devices(kind, lower):
    x = torch.empty(4, 4, device="meta")
    with as_on(kind):
        with torch.autocast(kind):
            assert (x @ x).dtype == torch.get_autocast_dtype(kind) == lower
            assert torch.is_autocast_enabled("meta")
        assert not torch.is_autocast_enabled("meta") and (x @ x).dtype == torch.float32


def test_cross_entropys_parts_are_on_cudas_list():
    """CUDA's autocast does not know the loss, but what it is made of."""
    logits = torch.empty(8, 4, device="meta", dtype=BF16, requires_grad=True)
    target = torch.empty(8, device="meta", dtype=torch.long)
    for kind in ("cuda", "cpu"):
        with as_on(kind), torch.autocast(kind, BF16):
            loss = F.cross_entropy(logits, target)
            saved = loss.grad_fn._saved_self  # what nll_loss reads
        assert loss.dtype == saved.dtype == torch.float32
        summed = F.cross_entropy(logits, target, label_smoothing=0.1)
        assert summed.dtype == BF16


def test_what_torch_calls_is_as_before():
    names = "is_autocast_enabled set_autocast_enabled get_autocast_dtype".split()
    before = [getattr(torch, name) for name in names], torch.autocast.__init__
    predict(block("cuda", dtype=BF16), torch.randn(64, 24))
    assert ([getattr(torch, name) for name in names], torch.autocast.__init__) == before
    assert not torch._C._dispatch_tls_is_dispatch_key_included("AutocastIPU")
