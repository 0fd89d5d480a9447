"""Plans: gradients stay bit-equal, the model stays itself, mistakes are explained."""

import contextlib
import copy
import dataclasses
import itertools
import random

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from helpers.checkpointing import Plan, checkpointed, follows, layer_names
from helpers.measure import predict, training_step
from helpers.models import MLP, DocsMLP
from helpers.timeline import record_timeline


class SmallDocsMLP(nn.Module):
    """The docs' MLP at a size for tests: one ReLU module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(12, 16)
        self.relu = nn.ReLU()
        self.layer2 = nn.Linear(16, 16)
        self.layer3 = nn.Linear(16, 5)

    def forward(self, x):
        return self.layer3(self.relu(self.layer2(self.relu(self.layer1(x)))))


class OwnForward(nn.Sequential):
    """A Sequential that is no chain: it adds its input to its output."""

    def forward(self, x):
        return x + super().forward(x)


class Stack(nn.Sequential):
    """A Sequential that is a chain, but is not made of its children."""

    def __init__(self, depth: int) -> None:
        super().__init__(*(MLP([12, 12, 12], "gelu") for _ in range(depth)))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])

    def forward(self, x):
        return self.layers[1](self.layers[0](x))


def shared_activation() -> nn.Sequential:
    """A chain in which one module comes twice."""
    gelu = nn.GELU()
    return nn.Sequential(nn.Linear(12, 16), gelu, nn.Linear(16, 16), gelu)


def nested() -> nn.Sequential:
    """A chain of chains: names with dots."""
    inside = MLP([16, 16, 16], "silu", dropout=0.3)
    return nn.Sequential(MLP([12, 16, 16, 16], "gelu"), nn.Tanh(), inside)


MODELS = {
    "docs": SmallDocsMLP,
    "relu": lambda: MLP([12, 16, 16, 16, 5]),
    "gelu": lambda: MLP([12, 16, 16, 16, 5], "gelu"),
    "silu dropout": lambda: MLP([12, 16, 16, 16, 5], "silu", dropout=0.5),
    "tanh dropout": lambda: MLP([12, 16, 16, 16, 5], "tanh", dropout=0.1),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5)
    ),
}


PLANS = [
    Plan(),
    Plan.alone(["layer1", "layer3"]),
    Plan((("layer1", "layer2"), ("layer3", "layer4"))),
    Plan((("layer1.0", "layer1.1"), ("layer2", "layer3"), ("layer4",))),
]


def gradients(model, plan=Plan(), x=None, *, seed=0, **options) -> list[torch.Tensor]:
    """Run one step's forward and backward under a plan; the same data every time."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 12, generator=generator) if x is None else x
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with checkpointed(model, plan, **options):
        model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor], plan) -> None:
    assert len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected)), f"other gradients under {plan}"


def all_alone(names: list[str]) -> list[Plan]:
    ticks = itertools.product((False, True), repeat=len(names))
    return [Plan.alone(itertools.compress(names, row)) for row in ticks]


def some_segments(names: list[str], seed: int) -> Plan:
    """Cut a chain at random places, and checkpoint a random part of the pieces."""
    rng = random.Random(seed)
    cuts = [i for i in range(1, len(names)) if rng.random() < 0.5]
    pieces = [names[a:b] for a, b in zip([0, *cuts], [*cuts, len(names)], strict=True)]
    return Plan([piece for piece in pieces if rng.random() < 0.7])


# Plans


def test_a_plan_is_a_value():
    plan = Plan((("a", "b"), ("c",)))
    assert plan == Plan([["a", "b"], ["c"]]) != Plan((("a",), ("b",), ("c",)))
    assert {plan: 1}[Plan([("a", "b"), ("c",)])] == 1
    assert Plan() == Plan(()) == Plan([]) and not Plan().names
    assert plan.names == ("a", "b", "c")
    assert str(plan) == "a+b, c" and str(Plan()) == "no checkpointing"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.segments = ()


def test_alone_makes_a_segment_each():
    assert Plan.alone(["a", "b"]).segments == (("a",), ("b",))
    assert Plan.alone(name for name in "ab").segments == (("a",), ("b",))
    assert Plan.alone([]) == Plan()


@pytest.mark.parametrize(
    ("ticked", "segments"),
    [
        ([], ()),
        (["layer2"], (("layer2",),)),
        (["layer1", "layer2", "layer4"], (("layer1", "layer2"), ("layer4",))),
        (["layer4", "layer2", "layer1"], (("layer1", "layer2"), ("layer4",))),
        (["layer1", "layer3"], (("layer1",), ("layer3",))),
        (["layer1.0", "layer1.1"], (("layer1.0", "layer1.1"),)),
        (["layer1.1", "layer2.0"], (("layer1.1",), ("layer2.0",))),
    ],
)
def test_grouped_joins_neighbours_of_one_chain(ticked, segments):
    assert Plan.grouped(MODELS["relu"](), ticked).segments == segments


def test_grouped_joins_nothing_where_there_is_no_chain():
    names = ["layer1", "layer2", "layer3"]
    assert Plan.grouped(DocsMLP(), names) == Plan.alone(names)
    inside = nn.Sequential(OwnForward(nn.Linear(4, 4), nn.ReLU()))
    assert Plan.grouped(inside, ["0.0", "0.1"]) == Plan.alone(["0.0", "0.1"])


def test_layers_to_tick_are_the_children_with_parameters():
    assert layer_names(DocsMLP()) == ["layer1", "layer2", "layer3"]
    assert layer_names(nested()) == ["0", "2"]


def test_follows_means_the_next_child_of_one_chain():
    model = nested()
    assert follows(model, "0", "1") and follows(model, "0.layer1", "0.layer2")
    assert not follows(model, "0", "2")
    assert not follows(model, "1", "0")
    assert not follows(model, "0.layer3", "1")
    assert not follows(model, "0.layer3", "2.layer1")
    assert not follows(DocsMLP(), "layer1", "relu")


# Gradients


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_bit_equal_under_every_set_of_boxes(name):
    model = MODELS[name]()
    expected = gradients(model)
    plans = all_alone(layer_names(model))
    assert len(plans) == 2 ** len(layer_names(model)) >= 8
    for plan in plans:
        assert_equal(gradients(model, plan), expected, plan)


@pytest.mark.parametrize("name", ["relu", "silu dropout"])
@pytest.mark.parametrize("options", [{}, {"early_stop": False}])
def test_gradients_are_bit_equal_in_random_segments(name, options):
    model = MODELS[name]()
    model.insert(4, MLP([5, 9, 8, 7], "tanh", dropout=0.2))
    names = [child for child, _ in model.named_children()]
    expected = gradients(model)
    plans = {some_segments(names, seed) for seed in range(25)}
    assert any(len(segment) > 2 for plan in plans for segment in plan.segments)
    for plan in plans:
        assert_equal(gradients(model, plan, **options), expected, plan)


@pytest.mark.parametrize("name", ["gelu", "tanh dropout"])
def test_reentrant_gradients_are_bit_equal_where_the_input_requires_grad(name):
    model, x = MODELS[name](), torch.randn(7, 12, requires_grad=True)
    names, expected = layer_names(model), gradients(model, x=x)
    grad_of_x = x.grad
    for plan in [*all_alone(names), *(some_segments(names, seed) for seed in range(9))]:
        x.grad = None
        found = gradients(model, plan, x, use_reentrant=True)
        assert_equal([*found, x.grad], [*expected, grad_of_x], plan)


@pytest.mark.parametrize(
    "segments",
    [
        (("0.layer1", "0.layer2"), ("2.layer1",)),
        (("0.layer2", "0.layer3"), ("1", "2")),
        (("0",), ("2.layer1.0", "2.layer1.1", "2.layer1.2"), ("2.layer2",)),
        (("0", "1", "2"),),
    ],
)
def test_gradients_are_bit_equal_in_nested_chains(segments):
    model = nested()
    expected = gradients(model)
    assert_equal(gradients(model, Plan(segments)), expected, segments)


@pytest.mark.parametrize("segments", [(("0", "1"),), (("1", "2", "3"),), (("2", "3"),)])
def test_a_module_that_comes_twice_in_a_chain_runs_twice(segments):
    model, x = shared_activation(), torch.randn(7, 12)
    output, expected = model(x), gradients(model)
    with checkpointed(model, Plan(segments)):
        assert torch.equal(model(x), output)
    assert_equal(gradients(model, Plan(segments)), expected, segments)


# What the options do


def recompute_flops(model, plan, **options) -> int:
    step = training_step(model, torch.randn(7, 12))
    with checkpointed(model, plan, **options):
        return record_timeline(step, model).flops["recompute"]


def nodes(output: torch.Tensor) -> set[str]:
    """Name the autograd nodes behind an output."""
    found, behind = set(), [output.grad_fn]
    while behind:
        node = behind.pop()
        found.add(node.name())
        behind += [before for before, _ in node.next_functions if before]
    return found


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_use_reentrant_is_passed_on(use_reentrant):
    model, x = MODELS["relu"](), torch.randn(7, 12, requires_grad=True)
    with checkpointed(model, PLANS[2], use_reentrant=use_reentrant):
        assert ("CheckpointFunctionBackward" in nodes(model(x))) == use_reentrant


def test_preserve_rng_state_is_passed_on():
    model = MODELS["silu dropout"]()
    unlike = gradients(model, PLANS[2], preserve_rng_state=False)
    assert not torch.equal(unlike[0], gradients(model)[0])  # another mask


def test_early_stop_is_passed_on():
    model, plan = MODELS["relu"](), Plan.alone(["layer4"])
    assert recompute_flops(model, plan) == 0  # a Linear saves nothing but its input
    product = 2 * 7 * 16 * 5  # rows × inputs × outputs
    assert recompute_flops(model, plan, early_stop=False) == product
    assert recompute_flops(model, plan, use_reentrant=True) == product


def test_context_fn_is_passed_on():
    model, entered = MODELS["relu"](), []

    @contextlib.contextmanager
    def noted(name: str):
        entered.append(name)
        yield

    plan = Plan((("layer1", "layer2"),))
    gradients(model, plan, context_fn=lambda: (noted("forward"), noted("recompute")))
    assert entered == ["forward", "recompute"]


# The model stays itself


def anatomy(model: nn.Module) -> list:
    """All that must not change: objects by identity, names, modes and attributes."""
    modules = [
        (name, id(module), type(module), module.training, sorted(vars(module)))
        for name, module in model.named_modules()
    ]
    hooks = [list(module._forward_hooks.items()) for module in model.modules()]
    tensors = [(name, id(p)) for name, p in model.named_parameters()]
    return [modules, hooks, tensors, list(model.state_dict())]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_inside_and_after_the_model_is_the_same_model(plan):
    model = MODELS["tanh dropout"]()
    model.layer2.eval()
    model.layer1.register_forward_hook(lambda *args: None)
    before, forwards = anatomy(model), [m.forward for m in model.modules()]
    with checkpointed(model, plan) as inside:
        assert inside is model
        modules, *others = anatomy(model)
        assert others == before[1:]
        assert [row[:4] for row in modules] == [row[:4] for row in before[0]]
        assert ([m.forward for m in model.modules()] != forwards) == bool(plan.names)
    assert anatomy(model) == before
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("plan", PLANS[1:], ids=str)
def test_an_exception_inside_undoes_the_plan(plan, error):
    model = MODELS["relu"]()
    before = anatomy(model)
    with pytest.raises(error), checkpointed(model, plan):
        model(torch.randn(7, 12))
        raise error
    assert anatomy(model) == before


def test_an_exception_in_the_model_undoes_the_plan():
    model = MODELS["relu"]()
    before = anatomy(model)
    with pytest.raises(RuntimeError, match="shapes"):
        with checkpointed(model, PLANS[2]):
            model(torch.randn(7, 13))
    assert anatomy(model) == before


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_forward_that_failed_leaves_no_hooks_while_its_error_is_kept(use_reentrant):
    model, plan = MLP([8, 8, 8], "gelu"), Plan.alone(["layer1", "layer2"])
    wrong, x = torch.ones(2, 7, requires_grad=True), torch.ones(2, 8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as kept:
        with checkpointed(model, plan, use_reentrant=use_reentrant):
            model(wrong)
    y = model.layer1(x)
    saved = y.grad_fn._saved_self
    assert saved.shape == (2, 8), "as without hooks"
    y.sum().backward()
    assert kept.value is not None


def test_a_plan_can_be_compiled():
    model, x = MLP([8, 8, 8], "gelu"), torch.randn(4, 8)
    expected = model(x)
    with checkpointed(model, Plan.alone(["layer1", "layer2"])):
        found = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)


def test_a_forward_of_ones_own_is_put_back():
    model = MODELS["relu"]()

    def twice(x, forward=model.layer1.forward):
        return 2 * forward(x)

    model.layer1.forward = twice
    expected = gradients(model)
    assert_equal(gradients(model, PLANS[1]), expected, "a forward of one's own")
    assert model.layer1.forward is twice


def test_plans_nest_and_are_undone_last_in_first_out():
    model = MODELS["silu dropout"]()
    expected, before = gradients(model), anatomy(model)
    with checkpointed(model, Plan((("layer1", "layer2"),))):
        outer = anatomy(model)
        forward = model.forward
        inner = Plan.alone(["layer2", "layer4"])
        assert_equal(gradients(model, inner), expected, "nested plans")
        assert anatomy(model) == outer
        assert model.forward is forward
    assert anatomy(model) == before


def test_a_replaced_forward_is_not_lost_without_a_word():
    model = MODELS["relu"]()
    with checkpointed(model, Plan((("layer1", "layer2"),))):
        with pytest.raises(ValueError, match="replaced already.*layer1, layer2"):
            with checkpointed(model, Plan((("layer3", "layer4"),))):
                pass
    with checkpointed(model, Plan((("layer3", "layer4"),))):
        pass


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_hooks_fire_and_act(plan):
    model = MODELS["gelu"]()
    fired = []
    for name in ("layer1", "layer2.0", "layer4"):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda m, args, output, n=name: fired.append(n))
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        module.register_full_backward_hook(lambda m, *grads, n=name: fired.append(n))
    model.layer3.register_forward_hook(lambda m, args, output: output + 1)
    x = torch.randn(7, 12, requires_grad=True)
    expected = gradients(model, x=x)
    plain = fired.copy()
    assert sorted(plain) == sorted(["layer1", "layer2.0", "layer4"] * 2)
    fired.clear()
    assert_equal(gradients(model, plan, x), expected, plan)
    # A hook inside a segment fires again when the segment is recomputed.
    assert all(fired.count(name) >= 2 for name in plain)


# Mistakes


@pytest.mark.parametrize(
    ("model", "segments", "words"),
    [
        ("relu", (("layer9",),), ["'layer9'"]),
        ("relu", (("layer1", "layer9"),), ["'layer9'"]),
        ("relu", (("",),), ["no layer named ''"]),
        ("relu", (("layer1.7",),), ["'layer1.7'"]),
        ("relu", (("layer1", "layer1"),), ["'layer1'", "twice"]),
        ("relu", (("layer1",), ("layer1", "layer2")), ["'layer1'", "twice"]),
        ("relu", (("layer1",), ("layer1.0",)), ["'layer1.0'", "inside 'layer1'"]),
        ("relu", (("layer1.0",), ("layer1", "layer2")), ["inside 'layer1'"]),
        ("relu", (("layer1", "layer3"),), ["'layer3' does not follow 'layer1'"]),
        ("relu", (("layer2", "layer1"),), ["'layer1' does not follow 'layer2'"]),
        ("relu", (("layer1.1", "layer2.0"),), ["'layer2.0' does not follow"]),
        ("docs", (("layer1", "layer2"),), ["'layer2' does not follow", "Sequential"]),
        ("docs", (("layer1", "relu"),), ["'relu' does not follow", "Sequential"]),
    ],
)
def test_a_plan_that_does_not_fit_names_the_layers_that_are_there(
    model, segments, words
):
    model = MODELS[model]()
    before = anatomy(model)
    with pytest.raises(ValueError) as raised, checkpointed(model, Plan(segments)):
        pass
    message = str(raised.value)
    assert all(word in message for word in words), message
    if "twice" not in message and "inside" not in message:
        assert ", ".join(layer_names(model)) in message
    with pytest.raises(ValueError):
        Plan(segments).code(model)
    assert anatomy(model) == before


def test_a_sequential_with_a_forward_of_its_own_is_no_chain():
    model = nn.Sequential(OwnForward(nn.Linear(12, 12), nn.ReLU()), nn.Linear(12, 5))
    with pytest.raises(ValueError, match="'0.1' does not follow '0.0'"):
        Plan((("0.0", "0.1"),)).code(model)
    expected = gradients(model)
    for segments in ((("0", "1"),), (("0",),), (("0.0",), ("0.1",))):
        assert_equal(gradients(model, Plan(segments)), expected, segments)


def test_a_list_of_modules_has_no_forward_to_checkpoint():
    model = Listed()
    with pytest.raises(ValueError, match=r"ModuleList.*: layers\.0, layers\.1"):
        Plan.alone(["layers"]).code(model)
    expected = gradients(model)
    inside = Plan.alone(["layers.0", "layers.1"])
    assert_equal(gradients(model, inside), expected, inside)


@pytest.mark.parametrize(
    "segments", [("layer1", "layer2"), "layer1", (("layer1",), ())]
)
def test_what_is_no_tuple_of_segments_says_so(segments):
    with pytest.raises(ValueError, match="segment"):
        Plan(segments)


# The snippet


def pasted(model: nn.Module, plan: Plan) -> nn.Module:
    """Run the plan's snippet, as printed, on a copy of the model."""
    model = copy.deepcopy(model)
    exec(plan.code(model), {"model": model})
    return model


SNIPPETS = [
    ("docs", Plan.alone(["layer1", "layer3"])),
    ("gelu", Plan()),
    ("gelu", Plan.alone(["layer2"])),
    ("gelu", Plan((("layer1", "layer2"),))),
    ("gelu", Plan((("layer1",), ("layer2", "layer3", "layer4")))),
    ("silu dropout", Plan((("layer1", "layer2"), ("layer3", "layer4")))),
    ("silu dropout", Plan((("layer2.0", "layer2.1"), ("layer3", "layer4")))),
    (nested, Plan((("0.layer2", "0.layer3"), ("2.layer1",)))),
    (nested, Plan((("0.layer1", "0.layer2"), ("2.layer1", "2.layer2")))),
    (nested, Plan((("0.layer1", "0.layer2"), ("1", "2")))),
    (shared_activation, Plan((("1", "2", "3"),))),
    (lambda: nn.Sequential(Stack(3), nn.Tanh()), Plan((("0.1", "0.2"),))),
    (lambda: Stack(5), Plan((("0", "1"), ("3",)))),
]


@pytest.mark.parametrize(("model", "plan"), SNIPPETS)
def test_the_snippet_does_what_the_plan_does(model, plan, monkeypatch):
    model, calls = MODELS.get(model, model)(), []

    def counted(*arguments, **options):
        calls.append(options)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", counted)
    by_hand = pasted(model, plan)
    assert_equal(gradients(by_hand), gradients(model), plan)
    assert calls == [{"use_reentrant": False}] * len(plan.segments)

    x = torch.randn(96, 12)
    with checkpointed(model, plan):
        inside = record_timeline(training_step(model, x), model, batch=x)
    outside = record_timeline(training_step(by_hand, x), by_hand, batch=x)
    assert outside.peak_bytes == inside.peak_bytes
    assert outside.after_forward_bytes == inside.after_forward_bytes
    assert outside.flops == inside.flops
    assert predict(by_hand, x, device="cpu").peak_bytes == inside.peak_bytes


def test_the_snippet_needs_torch_alone():
    for model, plan in SNIPPETS:
        code = plan.code(MODELS.get(model, model)())
        compile(code, "snippet", "exec")
        assert "helpers" not in code
        assert code.count("use_reentrant=False") == code.count("checkpoint(") + bool(
            "for name in" in code
        )


def test_the_snippet_as_it_reads():
    plan = Plan((("layer1",), ("layer2", "layer3")))
    assert plan.code(MODELS["relu"]()) == (
        "from functools import partial\n"
        "from types import MethodType\n"
        "\n"
        "import torch\n"
        "from torch.utils.checkpoint import checkpoint\n"
        "\n"
        "for name in ['layer1']:\n"
        "    layer = model.get_submodule(name)\n"
        "    layer.forward = partial(\n"
        "        checkpoint, layer.forward, use_reentrant=False\n"
        "    )\n"
        "\n"
        "\n"
        "def forward(self, x):\n"
        "    x = self[0:1](x)\n"
        "    x = checkpoint(self[1:3], x, use_reentrant=False)\n"
        "    x = self[3:4](x)\n"
        "    return x\n"
        "\n"
        "\n"
        "model.forward = MethodType(forward, model)\n"
        "\n"
        "model._replicate_for_data_parallel = partial(\n"
        '    torch._assert, False, "use DistributedDataParallel, not nn.DataParallel"\n'
        ")"
    )


def test_a_plan_is_what_a_careful_reader_would_write():
    model, x = MODELS["silu dropout"](), torch.randn(7, 12)
    expected = gradients(model, Plan((("layer1", "layer2"), ("layer3",))), x)
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    h = checkpoint(lambda t: model.layer2(model.layer1(t)), x, use_reentrant=False)
    h = checkpoint(model.layer3, h, use_reentrant=False)
    model.layer4(h).square().sum().backward()
    assert_equal([p.grad for p in model.parameters()], expected, "by hand")
