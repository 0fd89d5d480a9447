"""The chain's arithmetic against dry runs: every plan of real models, to the byte."""

import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.checkpointing import Plan, checkpointed
from helpers.measure import measure, predict
from helpers.models import MLP, DocsMLP, uniform_mlp
from helpers.models.architectures import GPT, Block, Encoder, ResNet, UNet
from helpers.planner import (
    Chain,
    InfeasibleBudget,
    best_plan,
    front_for,
    least_peak_bytes,
    pareto,
    plan_for,
    profile,
)
from tests.planner.chains import every_plan

BATCH = 8


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def some_plans(chain: Chain, count: int) -> list[Plan]:
    """Make plans by chance; the longest run that the chain allows is among them."""
    chance, plans = random.Random(0), []
    whole = [(0, chain.reach[0])] if chain.reach[0] >= 0 else []
    for _ in range(count):
        segments, place = [], 0
        while place < len(chain):
            last = min(chain.reach[place], place + chance.choice([0, 0, 1, 2, 3, 5]))
            if chance.random() < 0.4 or last < place:
                place += 1
            else:
                segments.append((place, last))
                place = last + 1
        plans.append(chain.plan(segments))
    return [*plans, chain.plan(whole)]


def check(model, batch, count: int = 0, parent: str | None = None, **settings) -> Chain:
    """Hold the arithmetic against a dry run, for every plan or for some by chance."""
    chain = profile(model, batch, parent=parent, **settings)
    if count:
        plans = some_plans(chain, count)
    else:
        pieces = every_plan(chain)
        plans = [chain.plan([p[:2] for p in plan if p[2]]) for plan in pieces]
    for plan in plans:
        report = predict(model, batch, plan, **settings)
        assert chain.peak_bytes(plan) == report.peak_bytes, plan
        assert chain.recompute_cost(plan) == report.recompute_flops, plan
    return chain


def mlp(widths: list[int], *args) -> nn.Sequential:
    with torch.device("meta"):
        return MLP(widths, *args)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_plan_of_an_mlp(activation, dropout):
    widths = [256, 8, 1000, 64]
    x, target = meta(512, 256), meta(512, dtype=torch.long)
    check(mlp(widths, activation, dropout), x)
    check(mlp(widths[::-1], activation, dropout), (meta(512, 64), target))


def test_every_plan_of_six_layers():
    widths = [1000, 2048, 256, 64, 1000, 2048, 256]
    check(mlp(widths, "silu", 0.1), meta(300, 1000))


@pytest.mark.parametrize("widths", [[2048, 256, 2048], [10] * 4, [8, 8, 4000]])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.SGD, torch.optim.AdamW, partial(torch.optim.AdamW, fused=True)],
)
def test_with_an_optimizer(widths, device, optimizer):
    batch = meta(32, widths[0])
    model = mlp(widths, "gelu", 0.1)
    chain = check(model, batch, device=device, optimizer=optimizer)
    state = predict(model, batch, optimizer=optimizer, device=device).baseline_bytes
    assert chain.static_bytes == state


def test_the_optimizers_own_peak_can_be_the_highest():
    chain = profile(mlp([1000] * 4), meta(4, 1000), optimizer=torch.optim.AdamW)
    assert pareto(chain) == [(chain.other_peak_bytes, 0, Plan())]


@pytest.mark.parametrize(("depth", "activation"), [(10, "gelu"), (15, "relu")])
def test_plans_of_deep_mlps(depth, activation):
    chance = random.Random(depth)
    widths = [chance.choice([8, 64, 256, 1000]) for _ in range(depth + 1)]
    check(mlp(widths, activation, 0.1), meta(512, widths[0]), count=25)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_convolutions(inplace, norm):
    layers, channels = [], 3
    for wider in (16, 32, 32):
        layers += [nn.Conv2d(channels, wider, 3, padding=1, device="meta")]
        layers += [nn.BatchNorm2d(wider, device="meta")] * norm
        layers += [nn.ReLU(inplace=inplace)]
        channels = wider
    layers += [nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3)]
    layers += [nn.Linear(32 * 64, 10, device="meta")]
    batch = meta(BATCH, 3, 16, 16), meta(BATCH, dtype=torch.long)
    chain = check(nn.Sequential(*layers), batch, count=40)
    # What changes its input in place would find it changed when it is run again.
    starts = [stage.starts for stage in chain.stages]
    assert starts.count(False) == 3 * inplace
    plans = [plan for _, _, plan in pareto(chain)]
    peaks = [predict(nn.Sequential(*layers), batch, p).peak_bytes for p in plans]
    assert peaks == [point[0] for point in pareto(chain)]


def test_transformer_blocks():
    with torch.device("meta"):
        blocks = nn.Sequential(*[Block(64, 4, p) for p in (0, 0, 0.1, 0.1)])
        ends = nn.Embedding(100, 64), nn.LayerNorm(64), nn.Linear(64, 100)
        model = nn.Sequential(ends[0], *blocks, *ends[1:])
    check(blocks, meta(4, 32, 64))
    check(model, meta(4, 32, dtype=torch.long), count=12)


def next_token_loss(scores: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(scores.flatten(0, 1), ids.flatten())


@pytest.mark.parametrize(("tied", "dropout"), [(False, 0.0), (True, 0.1)])
def test_decoder_whose_blocks_are_a_list(tied, dropout):
    with torch.device("meta"):
        model = GPT(blocks=3, width=64, tied=tied, dropout=dropout)
    batch = (meta(4, 32, dtype=torch.long),) * 2
    chain = check(model, batch, loss=next_token_loss, optimizer=torch.optim.AdamW)
    assert chain.names == ("(before)", "blocks.0", "blocks.1", "blocks.2")
    assert chain.reach == [-1, 3, 3, 3]


def test_chains_inside_other_models():
    pictures = meta(BATCH, 3, 16, 16)
    batch = pictures, meta(BATCH, dtype=torch.long)
    with torch.device("meta"):
        resnet, unet, encoder = ResNet(), UNet(), Encoder()
    check(resnet, batch, parent="stem")
    check(resnet, batch, count=20)
    check(unet, pictures, parent="up.1", count=20)
    ids = meta(4, 32, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids}
    check(encoder, batch, loss=lambda out: out[0].sum() + out[1].sum())


class Beside(nn.Module):
    """A chain whose layers return something more, which is dropped, kept or given on.

    Args:
        more: "saved" for backward by the layer itself, or "new".
        use: "none", "list": all of them are returned, "next": the others get the first.
    """

    def __init__(self, more: str, use: str, scores: int = 500) -> None:
        super().__init__()
        self.more, self.use = more, use
        self.stem, self.head = nn.Linear(64, 64), nn.Linear(64, scores)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        for layer in self.layers:
            layer.forward = partial(self.run_layer, layer.forward)

    def run_layer(self, linear, x, first=None) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.gelu(linear(x))
        hidden = hidden if first is None else hidden + first
        return x + hidden.sin(), hidden if self.more == "saved" else hidden.detach() * 2

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, found = self.stem(x), []
        for layer in self.layers:
            x, more = layer(x, *(found[:1] if self.use == "next" else ()))
            if self.use != "none":
                found.append(more.detach() if self.use == "next" else more)
        return self.head(x), *(found if self.use == "list" else ())


def differences(model, batch, parent: str, **settings) -> dict[Plan, int]:
    """Say by how much each plan's estimate is above its dry run."""
    chain = profile(model, batch, parent=parent, **settings)
    pieces = every_plan(chain)
    plans = [chain.plan([p[:2] for p in plan if p[2]]) for plan in pieces]
    peaks = [predict(model, batch, plan, **settings).peak_bytes for plan in plans]
    return {
        plan: chain.peak_bytes(plan) - peak
        for plan, peak in zip(plans, peaks, strict=True)
    }


@pytest.mark.parametrize(
    ("more", "use"),
    [("saved", "none"), ("new", "none"), ("saved", "list"), ("new", "list")],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_layers_that_return_something_more(more, use, device):
    model, batch = partial(Beside, more, use), meta(128, 64)
    found = differences(model, batch, "layers", device=device)
    assert set(found.values()) == {0}


@pytest.mark.parametrize("more", ["saved", "new"])
@pytest.mark.parametrize("scores", [1, 500])
def test_what_a_layer_gives_to_all_later_ones(more, scores):
    model, batch = partial(Beside, more, "next", scores), meta(128, 64)
    found = differences(model, batch, "layers")
    one = 128 * 64 * 4  # it may be counted as saved and as passing by
    assert min(found.values()) >= 0 and max(found.values()) <= 2 * one


@pytest.mark.parametrize("loss", [None, lambda out: out[0].sum() + out[1].sum()])
def test_no_plan_of_an_encoders_layers_is_estimated_too_low(loss):
    ids = meta(4, 32, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids}
    with torch.device("meta"):
        found = differences(Encoder(), batch, "layers", loss=loss)
    # Only checkpoints hold the mask (128 B, a block) until backward.
    assert {plan: more for plan, more in found.items() if more} == {Plan(): 512}


class Tapped(nn.Module):
    """All states are returned, as where heads sit on several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP([16, 64, 16], "gelu") for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        used = []
        for layer in self.layers:
            x = layer(x)
            used.append(x)
        return used[0] * used[1] + used[3]


def test_no_plan_joins_layers_whose_outputs_are_used_elsewhere():
    model, batch = Tapped(), torch.randn(32, 16)
    chain = profile(model, batch, parent="layers", device="cpu")
    assert chain.reach == [0, 1, 3, 3]
    model(batch).sum().backward()
    right = [parameter.grad for parameter in model.parameters()]
    for _, _, plan in pareto(chain):
        model.zero_grad()
        with checkpointed(model, plan):
            model(batch).sum().backward()
        found = [parameter.grad for parameter in model.parameters()]
        assert all(map(torch.equal, found, right)), plan
    check(model, batch, parent="layers", device="cpu")


def test_a_batch_that_requires_grad():
    batch = meta(64, 100).requires_grad_()
    check(mlp([100, 200, 50, 10], "gelu"), batch)


@pytest.mark.parametrize("frozen", ["layer1", "layer2", "layer3"])
def test_a_frozen_layer(frozen):
    model = mlp([100, 200, 50, 10], "gelu")
    model.get_submodule(frozen).requires_grad_(False)
    check(model, meta(64, 100))


def test_a_chain_that_backward_does_not_reach():
    with torch.device("meta"):
        model = ResNet().requires_grad_(False)
        model.head.requires_grad_(True)
    with pytest.raises(ValueError, match="backward does not reach 'layers.5'"):
        profile(model, meta(2, 3, 8, 8))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_no_plan_exceeds_its_budget_when_run(activation):
    with torch.device("meta"):
        model = uniform_mlp(8, 128, activation)
    batch = meta(256, 128)
    chain = profile(model, batch)
    least, most = least_peak_bytes(chain), chain.peak_bytes(Plan())
    for budget in range(least, most + 1, (most - least) // 12):
        report = predict(model, batch, best_plan(chain, budget))
        assert report.peak_bytes <= budget


def test_what_is_predicted_is_what_is_measured():
    model, batch = MLP([64, 256, 128, 32, 10], "gelu"), torch.randn(128, 64)
    for peak, cost, plan in pareto(profile(model, batch, device="cpu")):
        report = measure(model, batch, plan, repeats=0)
        assert (report.peak_bytes, report.recompute_flops) == (peak, cost)


def test_plan_for_is_confirmed_by_a_dry_run():
    model, batch = mlp([256] * 7, "gelu"), meta(512, 256)
    least = least_peak_bytes(profile(model, batch))
    report = plan_for(model, batch, least + 1_000_000, tensors=True)
    assert report.source == "predicted" and report.peak_bytes <= least + 1_000_000
    assert report.plan == best_plan(profile(model, batch), least + 1_000_000)
    with pytest.raises(InfeasibleBudget, match=f"{least:,} B"):
        plan_for(model, batch, least - 1, tensors=True)


@pytest.mark.parametrize(
    ("device", "optimizer"), [("cpu", None), ("cuda", torch.optim.AdamW)]
)
def test_plan_for_under_autocast(device, optimizer):
    """The chain does not know how long casts are kept; the dry run does."""
    settings = {"autocast": torch.bfloat16, "device": device, "optimizer": optimizer}
    with torch.device("meta"):
        model = nn.Sequential(*[Block(64, 4) for _ in range(4)])
    batch = meta(8, 64, 64)
    plain = predict(model, batch, **settings)
    chain = profile(model, batch, **settings)
    assert chain.stages != profile(model, batch, device=device).stages
    budget = (least_peak_bytes(chain) + plain.peak_bytes) // 2
    report = plan_for(model, batch, budget, tensors=True, **settings)
    assert report.peak_bytes <= budget < plain.peak_bytes
    assert report == predict(model, batch, report.plan, **settings)


def test_plan_for_goes_on_where_the_arithmetic_was_too_low(monkeypatch):
    model, batch = mlp([256] * 7, "gelu"), meta(512, 256)
    chain = profile(model, batch)
    shy = Chain(chain.stages, static_bytes=chain.static_bytes - 200_000)
    monkeypatch.setattr("helpers.planner.tree.profile", lambda *args, **settings: shy)
    budget = least_peak_bytes(chain) + 500_000
    assert plan_for(model, batch, budget, tensors=True).peak_bytes <= budget


def test_milliseconds_measured_on_the_device():
    model, batch = MLP([64, 256, 256, 10], "gelu"), torch.randn(512, 64)
    before = [parameter.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    chain = profile(model, batch, device="cpu", measured=True)
    assert chain.cost_unit == "ms"
    for stage in chain.stages:
        assert 0 <= stage.last_recompute_cost <= stage.recompute_cost < 1000
        assert stage.recompute_cost > 0
    flops = profile(model, batch, device="cpu")
    assert chain.peak_bytes(Plan()) == flops.peak_bytes(Plan())
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_milliseconds_of_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="CUDA was asked for"):
        profile(MLP([4, 4, 4]), torch.randn(2, 4), measured=True)


def test_a_profile_leaves_the_model_as_it_was():
    model = MLP([8, 16, 4], "gelu", 0.1)
    model.layer1[0].weight.grad = gradient = torch.ones(16, 8)
    profile(model, torch.randn(3, 8), optimizer=torch.optim.AdamW)
    assert model.layer1[0].weight.grad is gradient
    modules = list(model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert not any("forward" in vars(module) for module in modules)


class Shuffled(nn.Module):
    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for place in self.order:
            x = self.layers[place](x)
        return x


class Scaled(Shuffled):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) * 2
        return x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (DocsMLP(), "DocsMLP holds no chain"),
        (nn.Linear(4, 4), "Linear holds no chain"),
        (Shuffled([0, 2, 1]), "'layers.2' is called out of its turn"),
        (Shuffled([0, 1, 1, 2]), "'layers.1' is called twice"),
        (Shuffled([0, 1]), "'layers.2' is not called"),
        (Scaled([]), "'layers.1' is not fed what 'layers.0' returns"),
        (nn.Sequential(*[nn.Linear(4, 4)] * 2), "'1' is called out of its turn"),
    ],
)
def test_models_that_are_no_chain(model, message):
    with pytest.raises(ValueError, match=message):
        profile(model, torch.randn(2, 4))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_batch_that_does_not_fit():
    with pytest.raises(ValueError, match="does not fit this model at layer"):
        profile(MLP([8, 8, 8]), torch.randn(2, 9))


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(3, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU(True)),
        (nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 4, 1)),
        (nn.Conv2d(3, 4, 3), nn.Flatten(), nn.ReLU(True)),
        (nn.Conv2d(3, 4, 3), nn.Unflatten(1, (2, 2)), nn.Hardswish(True)),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_views_that_are_written_on(layers, device):
    model, batch = nn.Sequential(*layers), meta(2, 3, 8, 8)
    chain, plain = profile(model, batch, device=device), predict(model, batch)
    assert chain.peak_bytes(Plan()) == plain.peak_bytes
    front = front_for(model, batch, device=device)
    assert front[-1].peak_bytes <= plain.peak_bytes
    for report in front:
        assert report == plan_for(model, batch, report.needed_bytes, device=device)
