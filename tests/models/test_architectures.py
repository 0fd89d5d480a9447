"""The models to try: their predictions are what a CPU measures, for every plan."""

import copy
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.checkpointing import Plan, checkpointed
from helpers.dry_run import as_on
from helpers.measure import measure, predict, training_step
from helpers.models import (
    GPT,
    MLP,
    Encoder,
    ResNet,
    UNet,
    timm_model,
    transformers_model,
)
from tests.oracles import memtracker_peak_bytes


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(500, shape)


def small_gpt(**options) -> GPT:
    return GPT(width=32, vocabulary=500, **options)


def keywords() -> dict[str, torch.Tensor]:
    mask = torch.ones(4, 24, dtype=torch.long)
    mask[1, 18:] = 0
    return {"input_ids": ids(4, 24), "attention_mask": mask}


PARTS = {
    "GPT": [f"blocks.{i}" for i in range(4)] + ["head", "blocks.0.mlp", "tokens"],
    "ResNet": ["stem", *(f"layers.{i}" for i in range(6)), "layers.2.shortcut", "head"],
    "UNet": ["stem", "down.0", "down.1", "grow.0", "up.0", "up.1", "head"],
    "Encoder": [f"layers.{i}" for i in range(3)] + ["tokens", "layers.1.mlp"],
}
MAKE = {
    "GPT": lambda: (small_gpt(), ids(2, 24)),
    "GPT, tied, a target": lambda: (small_gpt(tied=True), (ids(2, 24), ids(2, 24))),
    "GPT, dropout": lambda: (small_gpt(dropout=0.1), (ids(2, 24), ids(2, 24))),
    "ResNet": lambda: (ResNet(channels=8), (torch.randn(4, 3, 16, 16), ids(4) % 10)),
    "UNet": lambda: (UNet(channels=8), torch.randn(2, 3, 16, 16)),
    "Encoder": lambda: (Encoder(), keywords()),
    "Encoder, a target": lambda: (Encoder(), (keywords(), ids(4) % 2)),
}
PIECES = {
    "GPT": [
        Plan((("blocks.0", "blocks.1"), ("blocks.2", "blocks.3"))),
        Plan((tuple(f"blocks.{i}" for i in range(4)),)),
        Plan((("blocks.1", "blocks.2"), ("blocks.0.mlp.0", "blocks.0.mlp.1"))),
    ],
    "ResNet": [
        Plan((("layers.0", "layers.1"), ("layers.2", "layers.3", "layers.4"))),
        Plan((("stem.0", "stem.1", "stem.2"), ("layers.5",))),
    ],
    "UNet": [Plan((("stem.0", "stem.1"), ("up.1.3", "up.1.4", "up.1.5")))],
    "Encoder": [Plan((("layers.1.mlp.1", "layers.1.mlp.2"),))],
}


def plans_of(name: str) -> list[Plan]:
    kind = name.partition(",")[0]
    parts = PARTS[kind]
    siblings = [part for part in parts if part.count(".") == 1 and ".mlp" not in part]
    alone = [Plan.alone([part]) for part in parts]
    return [Plan(), *alone, Plan.alone(siblings), *PIECES[kind]]


@pytest.mark.parametrize("name", MAKE)
def test_predicted_is_measured_to_the_byte(name):
    model, batch = MAKE[name]()
    for plan in plans_of(name):
        measured = measure(model, batch, plan, repeats=0, warmup=1)
        predicted = predict(model, batch, plan, device="cpu")
        assert predicted.peak_bytes == measured.peak_bytes, plan
        assert predicted.after_forward_bytes == measured.after_forward_bytes, plan
        assert predicted.categories == measured.categories, plan
        assert predicted.forward_flops == measured.forward_flops, plan
        assert predicted.recompute_flops == measured.recompute_flops, plan


@pytest.mark.parametrize("name", ["GPT", "ResNet", "Encoder, a target"])
def test_predicted_is_measured_with_an_optimizer(name):
    model, batch = MAKE[name]()
    settings = {"optimizer": torch.optim.AdamW}
    for plan in plans_of(name)[:2]:
        measured = measure(model, batch, plan, repeats=0, warmup=1, **settings)
        predicted = predict(model, batch, plan, device="cpu", **settings)
        assert predicted.peak_bytes == measured.peak_bytes


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (GPT(), ids(4, 64)),
        (ResNet(), torch.randn(8, 3, 32, 32)),
        (UNet(), torch.randn(4, 3, 32, 32)),
    ],
    ids=["GPT", "ResNet", "UNet"],
)
def test_pytorchs_own_tracker_counts_the_same(model, x):
    """Which does not round to blocks: some hundred tensors of up to 511 B less."""
    peak_bytes = memtracker_peak_bytes(training_step(model, x), model, x)
    predicted = predict(model, x, device="cpu")
    assert 0 <= predicted.peak_bytes - peak_bytes < 0.01 * peak_bytes


@pytest.mark.parametrize("both", [lambda x: (x, x), lambda x: (x[:, :-1], x[:, 1:])])
def test_a_tensor_that_comes_twice_or_in_part_counts_as_what_it_is(both):
    model, batch = small_gpt(), both(ids(4, 24))
    measured = measure(model, batch, repeats=0, warmup=1)
    assert predict(model, batch, device="cpu").peak_bytes == measured.peak_bytes


@pytest.mark.parametrize("name", MAKE)
def test_code_as_printed_leaves_the_plain_models_gradients(name):
    model, batch = MAKE[name]()
    for plan in plans_of(name)[-2:]:
        gradients = []
        for way in ("plain", "checkpointed", "pasted"):
            copied = copy.deepcopy(model)
            torch.manual_seed(0)
            if way == "pasted":
                exec(plan.code(copied), {"model": copied})
            with checkpointed(copied, plan if way == "checkpointed" else Plan()):
                training_step(copied, batch)()
            gradients.append([p.grad for p in copied.parameters()])
        for other in gradients[1:]:
            for plain, same in zip(gradients[0], other, strict=True):
                assert torch.equal(plain, same)


def test_classes_may_come_last_or_second():
    scores, target = torch.randn(2, 7, 5, requires_grad=True), ids(2, 7) % 5
    losses = []
    for output in (scores, scores.transpose(1, 2)):
        model = nn.Identity()
        model.forward = lambda x, output=output: output
        step = training_step(model, (torch.ones(1), target))
        scores.grad = None
        step()
        losses.append(scores.grad.clone())
    torch.testing.assert_close(*losses)


def test_seven_billion_parameters_are_made_without_data():
    with torch.device("meta"):
        model = GPT(blocks=32, width=4096, heads=32, vocabulary=32000, context=4096)
    assert 6.5e9 < sum(p.numel() for p in model.parameters()) < 7.5e9


# Joined in a module list -------------------------------------------------------------


def test_neighbours_that_do_not_feed_each_other_are_refused():
    model, x = UNet(), torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match="'down.0' returns for more than the next"):
        predict(model, x, Plan((("down.0", "down.1"),)))
    assert "forward" not in vars(model.down[0])


def test_neighbours_that_return_tuples_are_refused():
    plan = Plan((("layers.0", "layers.1"),))
    with pytest.raises(ValueError, match="'layers.0' returns a tuple and not a tensor"):
        predict(Encoder(), keywords(), plan)


def test_neighbours_with_hooks_are_refused():
    model, x = GPT(), ids(2, 8)
    model.blocks[1].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="'blocks.1' has a forward hook"):
        predict(model, x, Plan((("blocks.0", "blocks.1"),)))


def test_other_arguments_for_a_neighbour_are_refused():
    class Layer(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x) * scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Layer(4, 4) for _ in range(3))
            self.same = True

        def forward(self, x):
            for place, layer in enumerate(self.layers):
                x = layer(x, 2.0 if self.same else float(place))
            return x

    model, plan = Model(), Plan((("layers.0", "layers.1", "layers.2"),))
    assert predict(model, torch.ones(3, 4), plan).recompute_flops
    model.same = False
    with pytest.raises(ValueError, match="'layers.1' is not fed what 'layers.0'"):
        predict(model, torch.ones(3, 4), plan)


class Tapped(nn.Module):
    """A list of layers whose outputs are kept beside the chain."""

    def __init__(self, use) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP([8, 8], "gelu") for _ in range(3))
        self.use = use

    def forward(self, x):
        found = []
        for layer in self.layers:
            x = layer(x)
            found.append(x)
        return self.use(x, found)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, found: x + found[1],
        lambda x, found: found[1] + x,
        lambda x, found: torch.cat(found, 1),
        lambda x, found: torch.add(x, other=found[1]),
        lambda x, found: torch.maximum(x, found[1]),
        lambda x, found: found[1][0].sum() + x.sum(),
        lambda x, found: (x, found[1]),
        lambda x, found: found[1].register_hook(print) and x,
        lambda x, found: {"out": x, "hidden": found[1:]},
    ],
)
def test_what_is_inside_a_segment_cannot_be_used_outside(use):
    """Or the segment's output would come instead, and gradients would be others."""
    model, x = Tapped(use), torch.ones(3, 8)
    plan = Plan((("layers.0", "layers.1", "layers.2"),))
    for run in (predict, partial(measure, repeats=0)):
        with pytest.raises(
            ValueError, match="^the model uses what 'layers..' returns for more than"
        ):
            run(model, x, plan)
    alone = Plan.alone(["layers.0", "layers.1", "layers.2"])
    assert predict(model, x, alone, device="cpu").peak_bytes > 0


def test_what_is_kept_and_not_used_does_no_harm():
    model, x = Tapped(lambda x, found: x), torch.randn(3, 8)
    plan = Plan((("layers.0", "layers.1"),))
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    with checkpointed(model, plan):
        model(x).sum().backward()
    assert all(map(torch.equal, [p.grad for p in model.parameters()], expected))
    report = measure(model, x, plan, repeats=0)
    assert report.peak_bytes == predict(model, x, plan, device="cpu").peak_bytes


# The kernels of attention ------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Lists the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators_of_attention(device, target, dtype=torch.float32, size=32, **options):
    shape = {"device": device, "dtype": dtype, "requires_grad": True}
    query, key = (torch.randn(2, 4, 16, size, **shape) for _ in range(2))
    if options.get("attn_mask"):
        mask = torch.ones(16, 16, dtype=torch.bool, device=device)
        options["attn_mask"] = mask.tril()
    with as_on(target), Operators() as operators:
        F.scaled_dot_product_attention(query, key, key, **options).sum().backward()
    return operators.names


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": True},
        {"dropout_p": 0.1},
        {"scale": 0.3},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64, "size": 20},
    ],
    ids=str,
)
def test_attention_on_meta_runs_the_operators_of_a_cpu(options):
    real = operators_of_attention("cpu", "cpu", **options)
    assert operators_of_attention("meta", "cpu", **options) == real


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({"is_causal": True}, "efficient"),
        ({"attn_mask": True}, "efficient"),
        ({"dropout_p": 0.1}, "efficient"),
        ({"size": 30}, None),
        ({"dtype": torch.float64}, None),
        ({"dtype": torch.bfloat16, "is_causal": True}, "flash"),
        ({"dtype": torch.bfloat16, "dropout_p": 0.1}, "flash"),
        ({"dtype": torch.float16, "size": 30}, "flash"),
        ({"dtype": torch.bfloat16, "attn_mask": True}, "efficient"),
        ({"dtype": torch.bfloat16, "size": 320}, "efficient"),
    ],
    ids=str,
)
def test_attention_for_cuda_is_the_fused_one_where_cuda_has_one(options, kernel):
    names = operators_of_attention("meta", "cuda", **options)
    fused = f"_scaled_dot_product_{kernel}_attention"
    expected = {fused, f"{fused}_backward"} if kernel else {"bmm"}
    found = {n for n in names if "scaled_dot" in n} or {"bmm"} & set(names)
    assert found == expected


def test_attention_is_counted_alike_for_both_devices():
    """4·B·H·L²·D FLOPs forward, however fused."""
    model, x = GPT(blocks=1), ids(2, 64)
    flops = {predict(model, x, device=d).forward_flops for d in ("cpu", "cuda")}
    products = 2 * 2 * 64 * (12 * 128**2 + 128 * 1000)
    assert flops == {products + 4 * 2 * 64 * 64 * 128}


@pytest.mark.parametrize("make", [transformers_model, timm_model])
def test_a_package_that_is_missing_is_named(make, monkeypatch):
    package = make.__name__.partition("_")[0]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"^this model .* pip install {package}$"):
        make()


def test_another_librarys_model_is_made_by_name():
    pytest.importorskip("transformers")
    model, batch = transformers_model("GPT2")
    predicted = predict(model, batch, device="cpu")
    assert predicted.peak_bytes == measure(model, batch, repeats=0).peak_bytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_predicted_is_measured_on_a_gpu(name, dtype):
    """Attention there runs kernels that no CPU has."""
    model, batch = MAKE[name]()
    model = model.to("cuda", dtype)
    x = batch[0] if isinstance(batch, tuple) else batch
    if isinstance(x, torch.Tensor) and x.is_floating_point():
        x = x.to(dtype)
    for plan in plans_of(name)[:3]:
        measured = measure(model, x, plan, repeats=0, warmup=1)
        assert predict(model, x, plan).peak_bytes == measured.peak_bytes, plan
