"""All that a step could change in a model, and in torch, copied and compared."""

import torch
from torch import nn


def state_of(model: nn.Module) -> dict:
    """Copy all that a step could change."""
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "gradients": [p.grad for p in model.parameters()],
        "gradient values": [
            None if p.grad is None else p.grad.clone() for p in model.parameters()
        ],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [list(module._forward_hooks) for module in model.modules()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
        "wants": [p.requires_grad for p in model.parameters()],
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name == "tensors":
            assert found[name].keys() == value.keys()
            assert all(torch.equal(found[name][key], value[key]) for key in value)
        elif name == "gradients":
            assert all(a is b for a, b in zip(found[name], value, strict=True))
        elif name == "gradient values":
            pairs = zip(found[name], value, strict=True)
            assert all(a is b or torch.equal(a, b) for a, b in pairs)
        elif name == "random":
            assert torch.equal(found[name], value), "the generator has moved"
        else:
            assert found[name] == value, name
