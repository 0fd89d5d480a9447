"""Models of torchvision and timm: predicted is measured, and the printed code is right.

They run in the environment of ``make test-cuda``. torchvision's wheels are built beside
PyTorch's CUDA build, and do not load beside a CPU's.
"""

import copy

import pytest
import torch

from helpers import Plan, inspect_model, plan_for, predict, verify
from helpers.measure import measure
from helpers.recording.published import models

try:
    import timm
    import torchvision
except (
    ImportError,
    RuntimeError,
) as error:  # "operator torchvision::nms does not exist"
    pytest.skip(f"needs torchvision and timm: {error}", allow_module_level=True)

TORCHVISION = ["resnet18", "densenet121"]
TIMM = ["vit_tiny_patch16_224", "efficientnet_b0", "convnext_atto", "resnet26d"]
TIMM += ["mobilenetv3_small_100", "mixer_s32_224"]


def made(name: str) -> tuple[torch.nn.Module, tuple]:
    torch.manual_seed(0)
    size = 224 if name.startswith("mixer") else 64
    if name in TORCHVISION:
        model = torchvision.models.get_model(name, num_classes=10)
    else:
        fixed = {"img_size": size} if name.startswith("vit") else {}
        model = timm.create_model(name, pretrained=False, num_classes=10, **fixed)
    return model, (torch.randn(2, 3, size, size), torch.randint(10, (2,)))


def plans_of(model: torch.nn.Module, batch: tuple) -> list[Plan]:
    """Nothing, each unit that computes, and the planner's for a half."""
    found = inspect_model(model, batch, device="cpu")
    names = [name for name in found.units if found.layers[name].forward_flops]
    return [Plan(), Plan.alone(names)]


@pytest.mark.parametrize("name", TORCHVISION + TIMM)
def test_predicted_is_measured_and_gradients_are_as_without(name):
    model, batch = made(name)
    for plan in plans_of(model, batch):
        dry = predict(model, batch, plan, device="cpu")
        report = measure(model, batch, plan, repeats=0)
        assert dry.peak_bytes == report.peak_bytes, plan
        assert dry.recompute_flops == report.recompute_flops, plan
        assert not verify(model, batch, plan).gradients, plan


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_budget_is_kept_and_the_printed_code_runs(name):
    model, batch = made(name)
    least, most = (
        predict(model, batch, p, device="cpu") for p in plans_of(model, batch)
    )
    budget = (least.peak_bytes + most.peak_bytes) // 2
    plan = plan_for(model, batch, max(budget, 1), device="cpu").plan
    assert measure(model, batch, plan, repeats=0).peak_bytes <= budget
    other = copy.deepcopy(model)
    exec(plan.code(other), {"model": other})
    for one in (model, other):
        torch.nn.functional.cross_entropy(one(batch[0]), batch[1]).backward()
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "ours"),
    [("resnet50", models.resnet), ("densenet121", models.densenet)]
    + [("vit_l_16", models.ViT)],
)
def test_what_published_figures_are_held_against_is_torchvisions(name, ours):
    """Their sources measured torchvision's models, and ours need the same tensors.

    In which blocks they lie depends on the order of a layer's inner steps.
    """
    batch = torch.empty(4, 3, 224, 224, device="meta"), torch.zeros(4, dtype=torch.long)
    with torch.device("meta"):
        reports = [
            predict(make(), batch, optimizer=torch.optim.AdamW)
            for make in (getattr(torchvision.models, name), ours)
        ]
    theirs, ours = ((r.peak_bytes, r.forward_flops) for r in reports)
    assert ours == theirs
