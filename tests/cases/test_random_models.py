"""Random models under random plans: predicted as measured, and gradients as without."""

import copy
import random

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.inspection import inspect_model
from helpers.measure import measure, measured, predict, verify
from tests.cases.agreement import counts, untouched

D = 8


class Grown(nn.Module):
    """What all parts of a random model have: a name for each child, and a forward."""

    def __init__(self, *children: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(children)

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class Residual(Grown):
    def forward(self, x):
        return x + super().forward(x)


class Looped(Grown):
    def forward(self, x):
        return super().forward(super().forward(x))


class Gated(Grown):
    def forward(self, x):
        first, *others = [part(x) for part in self.parts]
        return first * torch.stack([one.sigmoid() for one in [x, *others]]).mean(0)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, D // 2)).unbind(-3)
        q, k, v = (one.transpose(0, 1) for one in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(0, 1).flatten(-2))


class Pictures(nn.Module):
    """Convolutions on rows that are read as small pictures."""

    def __init__(self, norm: nn.Module, last: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 2, 3, padding=1), norm, last

    def forward(self, x):
        y = x.reshape(-1, 2, 2, 2)
        if self.last:
            y = y.contiguous(memory_format=torch.channels_last)
        return self.norm(self.conv(y)).reshape(x.shape)


class Pair(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x):
        return self.one(x), self.other(x)


class Named(Pair):
    def forward(self, x):
        return dict(zip(("loss_of_one", "rest"), super().forward(x), strict=True))


class Maker:
    """Makes a model by a seed; its printed modules are its code."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.shared: list[nn.Module] = []

    def leaf(self) -> nn.Module:
        pick, chance = self.rng.choice, self.rng.random
        kinds = [
            lambda: nn.Linear(D, D, bias=chance() < 0.7),
            lambda: nn.Linear(D, D),
            lambda: pick([nn.ReLU, nn.SiLU, nn.ELU])(inplace=chance() < 0.15),
            lambda: pick([nn.GELU, nn.Tanh, nn.Softplus, nn.Identity])(),
            lambda: nn.Dropout(0.25, inplace=chance() < 0.1),
            lambda: nn.LayerNorm(D),
            lambda: nn.BatchNorm1d(D),
            Attention,
            lambda: Pictures(
                pick([nn.BatchNorm2d(2), nn.GroupNorm(2, 2), nn.InstanceNorm2d(2)]),
                chance() < 0.5,
            ),
        ]
        if self.shared and chance() < 0.15:
            return pick(self.shared)
        made = pick(kinds)()
        if isinstance(made, nn.BatchNorm1d | nn.Dropout) and chance() < 0.4:
            made.eval()
        if chance() < 0.15:
            made.requires_grad_(False)
        if isinstance(made, nn.Linear):
            self.shared.append(made)
        return made

    def body(self, depth: int) -> nn.Module:
        children = [
            self.body(depth - 1) if depth and self.rng.random() < 0.35 else self.leaf()
            for _ in range(self.rng.randint(1, 4))
        ]
        kinds = [nn.Sequential, nn.Sequential, Grown, Residual, Looped, Gated]
        return self.rng.choice(kinds)(*children)

    def model(self) -> nn.Module:
        body = nn.Sequential(nn.Linear(D, D), self.body(2), self.body(1))
        ends = [
            lambda: nn.Linear(D, 3),
            lambda: Pair(nn.Linear(D, 3), nn.Linear(D, 1)),
            lambda: Named(nn.Linear(D, 3), nn.Linear(D, 1)),
        ]
        return nn.Sequential(*body, self.rng.choice(ends)())

    def plan(self, model: nn.Module) -> Plan:
        """Take modules, and runs of a Sequential's or a list's children."""
        found: list[tuple[str, ...]] = []
        lists = nn.Sequential, nn.ModuleList
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            if isinstance(module, lists) and self.rng.random() < 0.5:
                keys = [*module._modules]
                start = self.rng.randrange(len(keys))
                length = self.rng.choice([1, 1, 2, 3])
                owner = model.get_submodule(name.rpartition(".")[0])
                if isinstance(owner, Gated | Looped):  # its list is no chain
                    length = 1
                found.append(tuple(prefix + k for k in keys[start : start + length]))
        return Plan(tuple(found[:1] + self._apart(found)))

    @staticmethod
    def _apart(found: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        kept = list(found[:1])
        for segment in found[1:]:
            inside = any(
                f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
                for other in kept
                for a in other
                for b in segment
            )
            if not inside:
                kept.append(segment)
        return kept[1:]


def runs(model: nn.Module, x: torch.Tensor) -> bool:
    """Say whether a model trains without any plan."""
    try:
        out = copy.deepcopy(model)(x.clone())
        outs = out.values() if isinstance(out, dict) else out
        sum(one.sum() for one in outs).backward()
    except RuntimeError:  # an activation in place on what is needed, say
        return False
    return True


def wrong(model: nn.Module, x: torch.Tensor, plan: Plan, **how) -> str:
    """Say what is wrong with a model under a plan; nothing, or "refused" if it is so
    in one sentence by all.
    """
    with untouched(model, x):
        told = []
        for run in (predict, measure, verify):
            more = {"repeats": 0, "warmup": 1} if run is measure else {}
            try:
                told.append(run(model, x, plan, **how, **more))
            except ValueError as error:
                told.append(str(error))
    predicted, measured, verified = told
    refusals = [one for one in told if isinstance(one, str)]
    if len(refusals) == 3 and "\n" not in "".join(refusals):
        return "refused"
    if refusals:
        return f"refused by some: {told}"
    if counts(predicted) != counts(measured):
        return f"predicted {counts(predicted)}\nmeasured {counts(measured)}"
    if not verified.reproducible:
        return "it does not equal itself"
    if not verified.same:
        hazards = inspect_model(model, x, **how).hazards_of(plan)
        if not any(hazard.is_wrong for hazard in hazards):
            return f"inspection does not say that {verified}"
    return ""


def one(seed: int) -> tuple[str, str]:
    """Try a model; say what is wrong, and what it is."""
    maker = Maker(seed)
    torch.manual_seed(seed)
    model = maker.model()
    x, plan = torch.randn(maker.rng.choice([16, 48, 80]), D), maker.plan(model)
    optimizer = maker.rng.choice([None, torch.optim.SGD, torch.optim.AdamW])
    if not runs(model, x):
        return "does not run", ""
    told = wrong(model, x, plan, optimizer=optimizer, device="cpu")
    return told, f"seed {seed}, {plan!r}, {optimizer}, {tuple(x.shape)}, {model}"


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("start", [0, 310])
def test_three_hundred_random_models(start, monkeypatch):
    # A measurement predicts first whether there is room; that takes time here.
    monkeypatch.setattr(measured, "_needed_bytes", lambda *given: (0, 0))
    found = [one(seed) for seed in range(start, start + 310)]
    ran = [(told, code) for told, code in found if told != "does not run"]
    refused = sum(told == "refused" for told, _ in ran)
    bad = [f"{told}\n{code}" for told, code in ran if told not in ("", "refused")]
    assert not bad, "\n\n".join(bad)
    assert len(ran) >= 300 and refused < 0.05 * len(ran)
