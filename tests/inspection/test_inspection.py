"""What is inside a model: what can be ticked, what it keeps, and what is not safe."""

import copy
import random
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.checkpointing import Plan, checkpointed
from helpers.inspection import inspect_model, kept_by_module
from helpers.measure import measure, predict
from helpers.models import MLP, DocsMLP
from helpers.models.architectures import GPT, Encoder, ResNet, UNet
from tests.oracles import counted_flops

X = torch.randn(3, 8)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(500, shape)


def small_gpt(**options) -> GPT:
    return GPT(width=32, vocabulary=500, **options)


class Around(nn.Module):
    """A model with one module to look at between two Linears."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.module = module
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.module(self.first(x)))


class Does(nn.Module):
    """Runs a function of itself and x."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def hazards_of(module: nn.Module) -> dict[str, str]:
    """Map names to kinds of hazard, in a model around this module."""
    found = inspect_model(Around(module), X).hazards
    assert all(repr(hazard.name) in str(hazard) for hazard in found)
    return {hazard.name: hazard.kind for hazard in found}


# What can be ticked ------------------------------------------------------------------


def test_what_can_be_ticked_is_what_was_called():
    inspection = inspect_model(small_gpt(blocks=2), ids(2, 8))
    names = [name for name, _ in small_gpt(blocks=2).named_modules()]
    assert list(inspection.layers) == [n for n in names if n not in ("", "blocks")]
    assert inspection.layers["blocks.1.dropout"].calls == 2
    assert inspection.layers["blocks.1"].kind == "Block"

    model = Around(nn.GELU())
    model.spare = nn.Linear(8, 8)
    assert list(inspect_model(model, X).layers) == ["first", "module", "last"]


def test_every_layer_that_is_listed_can_be_checkpointed():
    for model, batch in ((small_gpt(blocks=2), ids(2, 8)), (UNet(2, 4), image(2, 8))):
        for name in inspect_model(model, batch).layers:
            plan = Plan.alone([name])
            assert predict(model, batch, plan).peak_bytes


def image(rows: int, size: int) -> torch.Tensor:
    return torch.randn(rows, 3, size, size)


def test_kept_bytes_by_hand():
    """GELU keeps its input and its output, a Linear its input."""
    layers = inspect_model(MLP([64, 64, 64, 64], "gelu"), torch.ones(256, 64)).layers
    tensor_bytes = 256 * 64 * 4
    assert layers["layer1"].kept_bytes == 2 * tensor_bytes
    assert (
        layers["layer1.0"].kept_bytes == layers["layer1.1"].kept_bytes == tensor_bytes
    )
    assert layers["layer3"].kept_bytes == tensor_bytes  # the output, for the loss


def test_kept_bytes_of_modules_add_up_to_those_of_the_step():
    model, batch = small_gpt(), ids(2, 24)
    report = predict(model, batch)
    kept = kept_by_module(report.timeline)
    top = sum(n_bytes for name, n_bytes in kept.items() if name.count(".") == 0)
    assert (
        top
        == sum(report.timeline.kept_bytes().values())
        - (report.timeline.kept_bytes()[""])
    )
    inside = [n for name, n in kept.items() if name.rpartition(".")[0] == "blocks.0"]
    assert sum(inside) == kept["blocks.0"] - 2 * 2 * 24 * 32 * 4  # two sums of x + …


def test_flops_are_those_that_pytorch_counts():
    model, x = ResNet((1, 1), 4), image(2, 8)
    layers = inspect_model(model, x).layers
    expected = counted_flops(lambda: model(x))
    top = [name for name in layers if "." not in name]
    assert sum(layers[name].forward_flops for name in top) == expected
    block = model.layers[0]
    flops = counted_flops(lambda: block(torch.randn(2, 4, 8, 8)))
    assert layers["layers.0"].forward_flops == flops


def test_the_report_is_predicts():
    model, batch = small_gpt(), ids(2, 24)
    for device in ("cpu", "cuda"):
        inspection = inspect_model(model, batch, device=device)
        assert inspection.report == predict(model, batch, device=device)


def test_seven_billion_parameters_are_inspected_without_data():
    before, started = resident_bytes(), time.process_time()
    sizes = {"blocks": 32, "width": 4096, "heads": 32, "vocabulary": 32000}
    x = torch.empty(1, 4096, dtype=torch.long, device="meta")
    inspection = inspect_model(lambda: GPT(**sizes, context=4096), x)
    assert len(inspection.layers) == 32 * 11 + 4
    assert inspection.chain == tuple(f"blocks.{i}" for i in range(32))
    assert resident_bytes() - before < 2**30
    assert time.process_time() - started < 60  # it hangs on nothing


def resident_bytes() -> int:
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_the_tree_folds_what_repeats():
    inspection = inspect_model(small_gpt(blocks=6), ids(2, 8))
    rows = inspection.tree().splitlines()
    assert len(rows) == 6  # a head, two embeddings, the blocks, norm and head
    assert rows[3].split()[:6] == ["blocks.0", "…", "5", "6", "×", "Block"]
    deeper = inspection.tree(levels=2).splitlines()
    assert len(deeper) == 6 + 5 and deeper[4].startswith("  norm1")
    assert str(inspection) == inspection.tree()
    other = small_gpt(blocks=6)
    other.blocks[2].mlp = nn.Linear(32, 32)
    rows = inspect_model(other, ids(2, 8)).tree().splitlines()
    assert [row.split()[0] for row in rows[3:6]] == ["blocks.0", "blocks.2", "blocks.3"]


# Chains ------------------------------------------------------------------------------


def test_chains_in_sequentials_and_lists():
    inspection = inspect_model(small_gpt(blocks=2), ids(2, 8))
    mlp = tuple(f"blocks.0.mlp.{i}" for i in range(3))
    assert set(inspection.chains) >= {("blocks.0", "blocks.1"), mlp}
    assert inspection.chain == ("blocks.0", "blocks.1") and not inspection.breaks
    layers = tuple(f"layers.{i}" for i in range(6))
    assert inspect_model(ResNet(channels=4), image(2, 8)).chain == layers
    names = ("layer1", "layer2", "layer3")
    assert inspect_model(MLP([8, 8, 8, 4]), X).chain == names


def test_every_chain_can_be_one_segment():
    for model, batch in (
        (small_gpt(blocks=2), ids(2, 8)),
        (UNet(2, 4), image(2, 8)),
        (MLP([8, 8, 4]), X),
    ):
        for chain in inspect_model(model, batch).chains:
            report = predict(model, batch, Plan((chain,)))
            assert report.plan.names == chain


def test_lists_that_are_no_chain_say_where_they_break():
    assert inspect_model(UNet(), image(2, 16)).breaks["down"] == (
        "'down.1' is not fed what 'down.0' returns"
    )
    mask = torch.ones(2, 8, dtype=torch.long)
    batch = {"input_ids": ids(2, 8), "attention_mask": mask}
    assert inspect_model(Encoder(), batch).breaks == {
        "layers": "'layers.0' does not return a tensor"
    }


def test_layers_called_twice_or_out_of_order_are_no_chain():
    class Model(nn.Module):
        def __init__(self, order):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.order = order

        def forward(self, x):
            for place in self.order:
                x = self.layers[place](x)
            return x

    assert inspect_model(Model([0, 1, 2]), X).chains == (
        ("layers.0", "layers.1", "layers.2"),
    )
    assert inspect_model(Model([1, 2, 0]), X).chains == (("layers.1", "layers.2"),)
    assert not inspect_model(Model([0, 1, 0, 1, 2, 2]), X).chains


def test_no_chain_at_all_is_said():
    inspection = inspect_model(DocsMLP(), torch.ones(2, 1024))
    with pytest.raises(ValueError, match="DocsMLP is not a chain"):
        _ = inspection.chain


# Hazards -----------------------------------------------------------------------------


def test_a_plain_model_has_no_hazards():
    assert not inspect_model(small_gpt(dropout=0.1), ids(2, 8)).hazards
    assert not inspect_model(UNet(2, 4), image(2, 8)).hazards


def test_batch_norm_counts_twice_when_training():
    assert hazards_of(nn.BatchNorm1d(8)) == {"module": "statistics"}
    assert not hazards_of(nn.BatchNorm1d(8).eval())
    assert not hazards_of(nn.BatchNorm1d(8, track_running_stats=False))
    model = Around(nn.BatchNorm1d(8))
    with checkpointed(model, Plan.alone(["module"])):
        model(X).sum().backward()
    assert model.module.num_batches_tracked == 2


def count(module, x):
    module.seen.add_(1)
    return (x + module.seen).exp()


def test_a_buffer_that_forward_changes_is_found():
    module = Does(count)
    module.register_buffer("seen", torch.zeros(8))
    assert hazards_of(module) == {"module": "statistics"}


IN_PLACE = {
    "relu": nn.ReLU(inplace=True),
    "add": Does(lambda module, x: x.add_(1).sigmoid().exp()),
    "inside": nn.Sequential(nn.SiLU(inplace=True), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_input_changed_in_place_is_found_and_would_stop_backward(name):
    assert hazards_of(IN_PLACE[name])["module"] == "in place"
    model = Around(IN_PLACE[name])
    with checkpointed(model, Plan.alone(["module"])):
        loss = model(X).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_an_input_changed_afterwards_is_found():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.last = Does(lambda module, x: (x + 1).exp())

        def forward(self, x):
            x = self.first(x)
            y = self.last(x)
            x.mul_(2)
            return y + x

    model = Model()
    (hazard,) = inspect_model(model, X).hazards
    assert (hazard.name, hazard.kind) == ("last", "in place")
    model(X).sum().backward()
    with checkpointed(model, Plan.alone(["last"])):
        loss = model(X).sum()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_in_place_on_what_a_module_made_itself_is_safe():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
    assert hazards_of(module) == {"module.1": "in place"}


DRAWS = {
    "python": lambda module, x: (x * random.random()).exp(),
    "numpy": lambda module, x: (x * float(np.random.rand())).exp(),
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_outside_torch_are_found(name):
    assert hazards_of(Does(DRAWS[name])) == {"module": "randomness"}
    around = nn.Sequential(nn.Linear(8, 8), Does(DRAWS[name]))
    assert hazards_of(around) == {"module.1": "randomness"}


@pytest.mark.parametrize(
    "generator", [random.Random(0), np.random.default_rng(0), torch.Generator()]
)
def test_a_generator_of_its_own_is_found(generator):
    module = Does(lambda module, x: x)
    module.rng = generator
    assert hazards_of(module) == {"module": "randomness"}


def test_torchs_own_random_numbers_are_safe():
    assert not hazards_of(nn.Dropout(0.5))


def test_hooks_state_and_sharing_are_found():
    hooked = nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *args: None)
    assert hazards_of(hooked) == {"module": "hook"}

    def counting(module, x):
        module.times += 1
        return x.exp()

    module = Does(counting)
    module.times = 0
    assert hazards_of(module) == {"module": "state"}

    model = Around(nn.GELU())
    model.again = model.module
    (hazard,) = inspect_model(model, X).hazards
    assert hazard.kind == "shared"
    assert str(hazard).startswith("'module' and 'again' are one module")


def test_recurrent_layers_are_predicted_low_and_it_is_said():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    model, x = Model(), torch.randn(4, 16, 8)
    inspection = inspect_model(model, x)
    assert [h.kind for h in inspection.hazards] == ["prediction"]
    assert "'rnn' is recurrent" in inspection.warnings()[0]
    assert not inspection.hazards_of(Plan.alone(["rnn"]))
    measured = measure(model, x, repeats=0, warmup=1)
    assert predict(model, x, device="cpu").peak_bytes <= measured.peak_bytes


def test_hazards_of_a_plan_are_those_in_its_segments():
    inspection = inspect_model(ResNet((1,), 4), image(2, 8))
    names = {h.name for h in inspection.hazards_of(Plan.alone(["layers.0"]))}
    assert names == {"layers.0.norm1", "layers.0.norm2"}
    (hazard,) = inspection.hazards_of(Plan.alone(["stem.2"]))
    assert (hazard.name, hazard.kind) == ("stem.2", "in place")
    assert not inspection.hazards_of(Plan.alone(["head"]))


def test_warnings_name_each_kind_once():
    inspection = inspect_model(ResNet((1,), 4), image(2, 8))
    statistics, in_place = inspection.warnings()
    assert statistics.startswith("'stem.1' updates its running statistics")
    assert statistics.endswith("(and 2 more like it)")
    assert in_place.startswith("'stem.2' changes its input in place (relu_)")


# Bad input ---------------------------------------------------------------------------


def fails(module, x):
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.ReLU(), "ReLU has no parameters"),
        (
            Around(Does(lambda m, x: x if x.max().item() > 0 else -x)),
            "'module' looks at values",
        ),
        (Around(Does(lambda m, x: x[x > 0])), "'module' looks at values"),
        (
            Around(Does(lambda m, x: x.detach())).requires_grad_(False),
            "anything that requires a gradient",
        ),
        (Around(Does(fails)), "at layer 'module': KeyError: 'weights'"),
        (
            Around(nn.Linear(4, 4)),
            r"\(3, 8\) does not fit this model at layer 'module'",
        ),
        (Around(nn.Linear(8, 8).double()), "'module': it multiplies float32 and"),
    ],
    ids=["bare", "item", "nonzero", "no grad", "fails", "shape", "type"],
)
def test_bad_input_is_one_sentence_that_names_the_module(model, words):
    with pytest.raises(ValueError, match=words) as caught:
        inspect_model(model, X)
    assert "\n" not in str(caught.value)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_model_and_all_random_numbers_are_as_they_were():
    def everything(module, x):
        module.times += 1
        return x * random.random() * float(np.random.rand())

    module = Does(everything)
    module.times = 0
    model = Around(nn.Sequential(nn.BatchNorm1d(8), module))
    model(X).sum().backward()
    module.times = 0
    before = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    for target in (model, copy.deepcopy(model).to("meta")):
        inspect_model(target, X)
        assert target.module[1].times == 0
        assert not any(m._forward_hooks for m in target.modules())
    assert all(torch.equal(before[0][n], v) for n, v in model.state_dict().items())
    assert all(p.grad is g for p, g in zip(model.parameters(), before[1], strict=True))
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_a_measurement_of_a_model_that_looks_at_values_still_works():
    model = Around(Does(lambda module, x: x * x.max().item()))
    assert measure(model, X, repeats=0).peak_bytes


def test_a_functional_model_is_fine():
    model = Around(Does(lambda module, x: F.gelu(x)))
    assert list(inspect_model(model, X).layers) == ["first", "module", "last"]
