"""Situations that people report of checkpointing, each by a small input of our own."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from helpers.checkpointing import Plan
from helpers.inspection import inspect_model
from helpers.measure import measure, predict, verify
from tests.cases.agreement import assert_agreement, untouched

CPU = {"device": "cpu"}
ALONE = Plan.alone(["0"])


@pytest.fixture(autouse=True)
def same_numbers():
    torch.manual_seed(0)


def assert_told(model, batch, plan, **how) -> None:
    """A plan that leaves another step is found by verify, and told by inspection."""
    with untouched(model, batch, how):
        assert not verify(model, batch, plan, **CPU, **how).same
        hazards = inspect_model(model, batch, **CPU, **how).hazards_of(plan)
    assert any(hazard.is_wrong for hazard in hazards)


def assert_measured(model, batch, *plans, match="measure it", **how) -> None:
    """What looks at values is measured and verified; a prediction says why not."""
    for plan in (Plan(), *plans):
        with untouched(model, batch, how):
            with pytest.raises(ValueError, match=match) as told:
                predict(model, batch, plan, **CPU, **how)
            assert measure(model, batch, plan, repeats=0, **CPU, **how).peak_bytes
            assert verify(model, batch, plan, **CPU, **how).same
        assert "\n" not in str(told.value)


class Writes(nn.Module):  # pytorch#178568
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, held):
        held["feat"] = torch.tanh(self.linear(held["feat"]))
        return held


class DictNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[Writes() for _ in range(3)])
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.layers({"feat": x})["feat"])


def test_layers_that_write_into_a_dict():
    assert_agreement(DictNet(), torch.randn(32, 16))
    assert_told(DictNet(), torch.randn(32, 16), Plan.alone(["layers.1"]))


@pytest.mark.parametrize("end", ["parametrization", "hook"])
def test_spectral_norm(end):  # pytorch#66363
    norm = nn.utils.spectral_norm
    if end == "parametrization":
        norm = nn.utils.parametrizations.spectral_norm
    first, last = norm(nn.Linear(16, 32)), nn.Linear(32, 1)
    model, x = nn.Sequential(first, nn.ReLU(), last), torch.randn(64, 16)
    assert_agreement(model, x)
    if end == "hook":  # it runs before the layer's forward, and so only once
        assert_agreement(model, x, ALONE)
    else:
        assert_told(model, x, ALONE)


def test_a_hook_that_changes_a_buffer_inside_a_joined_segment():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(16, 32)), nn.ReLU())
    assert_told(model, torch.randn(64, 16), Plan((("0", "1"),)))


HOOKS = {
    "of weight_norm": lambda layer: nn.utils.weight_norm(layer),
    "on the output": lambda layer: layer.register_forward_hook(lambda *a: a[2] * 2),
    "on the input": lambda layer: layer.register_forward_pre_hook(
        lambda _, args: (args[0].sin(),)
    ),
}


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_changes_nothing_is_no_hazard(hook, place):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.GELU())
    HOOKS[hook](model[place])
    x, plan = torch.randn(64, 16), Plan((("0", "1", "2"),))
    assert_agreement(model, x, plan)
    assert inspect_model(model, x, **CPU).hazards_of(plan) == []


class Neuron(nn.Module):  # spikingjelly#629
    def __init__(self, how: str):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        if how == "buffer":
            self.register_buffer("v", torch.zeros(16))
        else:
            self.v = torch.zeros(16)

    def forward(self, x):
        y = self.linear(x)
        self.v = 0.9 * self.v + y.detach().mean(0)
        return torch.tanh(y - self.v)


@pytest.mark.parametrize("how", ["buffer", "attribute"])
def test_state_of_a_neuron(how):
    model, x = nn.Sequential(Neuron(how), nn.Linear(16, 2)), torch.randn(32, 16)
    assert_agreement(model, x)
    assert_told(model, x, ALONE)


class Casting(nn.Module):  # Wan2.2#353
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.relu(self.linear(x)).float()


def test_a_block_with_its_own_autocast():
    model = nn.Sequential(Casting(), Casting(), nn.Linear(16, 2))
    assert_agreement(model, torch.randn(64, 16), ALONE, Plan((("0", "1"),)))


def test_channels_last():  # pytorch#48439
    norms = nn.BatchNorm2d(8).eval(), nn.GroupNorm(2, 8)
    convs = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    layers = convs[0], norms[0], nn.ReLU(), convs[1], norms[1], nn.Flatten()
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 10, 10).contiguous(memory_format=torch.channels_last)
    assert_agreement(model, x, ALONE, Plan((("3", "4"),)))


@pytest.mark.parametrize("norm", [nn.InstanceNorm1d, nn.InstanceNorm2d])
def test_in_place_after_instance_norm(norm):  # pytorch#26546
    conv = nn.Conv1d if norm is nn.InstanceNorm1d else nn.Conv2d
    x = torch.randn(4, 3, *[8] * (1 + (conv is nn.Conv2d)))
    model = nn.Sequential(conv(3, 8, 3), norm(8), nn.ReLU(inplace=True), conv(8, 2, 3))
    assert_agreement(model, x, ALONE, Plan((("0", "1", "2"),)))


class Words(nn.Module):  # pytorch#47439
    def __init__(self, kind: type = nn.GRU):
        super().__init__()
        self.words, self.rnn = nn.Embedding(50, 16), kind(16, 32, batch_first=True)
        self.out = nn.Linear(32, 3)

    def forward(self, ids, lengths):
        packed = pack_padded_sequence(self.words(ids), lengths, batch_first=True)
        padded, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.out(padded)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("as_list", [False, True])
def test_packed_sequences_are_named_where_bytes_are_not_known(kind, as_list):
    lengths = [10, 7, 5, 2] if as_list else torch.tensor([10, 7, 5, 2])
    model, batch = Words(kind), {"ids": torch.randint(50, (4, 10)), "lengths": lengths}
    predicted = predict(model, batch, **CPU)
    assert "packed sequences" in predicted.unknown
    measured = measure(model, batch, **CPU, repeats=0)
    assert abs(predicted.peak_bytes - measured.peak_bytes) < 0.05 * measured.peak_bytes
    for plan in (Plan.alone(["words"]), Plan.alone(["out"])):
        assert verify(model, batch, plan, **CPU).same


class Experts(nn.Module):  # pytorch#171355
    def __init__(self, how: str):
        super().__init__()
        self.how, self.router = how, nn.Linear(16, 4)
        self.w = nn.Parameter(torch.randn(4, 16, 16) / 4)

    def forward(self, x):
        score, expert = self.router(x).softmax(-1).max(-1)
        if self.how == "all":
            picked = nn.functional.one_hot(expert, 4).to(x.dtype)
            return torch.einsum("be,bi,eio->bo", picked * score[:, None], x, self.w)
        if self.how == "grouped":
            order = expert.argsort()
            ends = (expert[:, None] == torch.arange(4)).sum(0).cumsum(0).int()
            return torch._grouped_mm(x[order], self.w, offs=ends) * score[order, None]
        rows = [(expert == k).nonzero()[:, 0] for k in range(4)]
        return sum(
            torch.zeros_like(x).index_add(0, r, x[r] @ self.w[k] * score[r, None])
            for k, r in enumerate(rows)
        )


def experts(how: str) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), Experts(how), nn.Linear(16, 2))


def test_experts_by_nonzero():
    assert_measured(experts("nonzero"), torch.randn(32, 16), ALONE, Plan.alone(["1"]))


def test_experts_by_grouped_mm():
    assert_agreement(experts("grouped"), torch.randn(32, 16), ALONE, Plan.alone(["1"]))


def test_experts_that_all_run():
    assert_agreement(experts("all"), torch.randn(32, 16), ALONE, Plan.alone(["1"]))


@pytest.mark.parametrize("end", ["parametrization", "hook"])
def test_weight_norm(end):  # pytorch#102981
    norm = nn.utils.weight_norm
    if end == "parametrization":
        norm = nn.utils.parametrizations.weight_norm
    layers = norm(nn.Linear(16, 32)), nn.ReLU(), norm(nn.Linear(32, 2))
    assert_agreement(nn.Sequential(*layers), torch.randn(64, 16), ALONE)


class Graph(nn.Module):  # pytorch#41128
    def __init__(self):
        super().__init__()
        self.linear, self.out = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x, adjacency):
        return self.out(torch.relu(torch.sparse.mm(adjacency, self.linear(x))))


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_adjacency(layout):
    adjacency = getattr((torch.rand(30, 30) < 0.2).float(), layout)()
    batch = {"x": torch.randn(30, 16), "adjacency": adjacency}
    assert_measured(Graph(), batch, Plan.alone(["linear"]))


def test_sparse_gradients_of_an_embedding():
    model = nn.Sequential(nn.Embedding(100, 16, sparse=True), nn.Linear(16, 2))
    assert_measured(model, torch.randint(100, (4, 5)), Plan.alone(["1"]))
    how = {"optimizer": torch.optim.SGD}
    assert_measured(model, torch.randint(100, (4, 5)), Plan.alone(["1"]), **how)


@dataclass
class Out:  # pytorch#124725
    loss: torch.Tensor
    hidden: torch.Tensor


class Returns(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x):
        hidden = torch.relu(self.body(x))
        return Out(self.head(hidden).square().mean(), hidden)


def test_a_dataclass_output():
    model, x, plan = Returns(), torch.randn(64, 16), Plan.alone(["body"])
    for run in (predict, measure, inspect_model):
        with untouched(model, x), pytest.raises(ValueError, match="give a loss.*loss"):
            run(model, x, **CPU)
    assert_agreement(model, x, plan, loss=lambda out: out.loss)


class Middle(Returns):
    """A block in the middle hands its dataclass on."""

    def __init__(self):
        super().__init__()
        self.block, self.last = Returns(), nn.Linear(16, 2)

    def forward(self, x):
        out = self.block(x)
        return self.last(out.hidden).mean() + out.loss


def test_a_dataclass_inside():
    assert_agreement(Middle(), torch.randn(64, 16), Plan.alone(["block"]))


class Decoder(nn.Module):  # transformers#11353
    """Hands on a bias that the first layer makes, and the others are given."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer(first) for first in (True, False, False))

    def forward(self, x, mask=None):
        bias = kept = None
        for layer in self.layers:
            x, kept, bias = layer(x, bias, mask)
        return x, kept


class Layer(nn.Module):
    def __init__(self, first: bool):
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.bias = nn.Embedding(16, 16) if first else None

    def forward(self, x, bias, mask):
        if bias is None:
            bias = self.bias(torch.arange(16, device=x.device))
        if mask is not None:
            bias = bias * mask
        return torch.relu(self.linear(x)) @ bias, None, bias


@pytest.mark.parametrize("name", ["layers.0", "layers.1", "layers.2"])
def test_none_outputs_and_a_bias_that_is_handed_on(name):
    assert_agreement(Decoder(), torch.randn(32, 16), Plan.alone([name]))


def test_none_outputs_in_a_joined_segment():
    plan = Plan((("layers.0", "layers.1"),))
    for run in (predict, measure, verify):
        with pytest.raises(ValueError, match="cannot share a segment"):
            run(Decoder(), torch.randn(32, 16), plan, **CPU)


@pytest.mark.parametrize("times", [1, 2])
def test_two_forwards_and_mixed_precision(times):  # pytorch#153354, on one process
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2))

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sum(model(batch).float().square().mean() for _ in range(times))
        loss.backward()
        optimizer.step()

    how = {"step": step, "optimizer": torch.optim.AdamW}
    assert_agreement(model, torch.randn(64, 16), Plan((("0", "1"),)), **how)


def test_layers_that_are_skipped():  # transformers#30113, on one process
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            for place, layer in enumerate(self.layers):
                if place != 1:
                    x = torch.relu(layer(x))
            return x

    model, x = Skips(), torch.randn(64, 16)
    assert_agreement(model, x, Plan.alone(["layers.0", "layers.1"]))


@pytest.fixture(scope="module")
def alone_in_a_group():
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_skipped_layers_under_ddp(alone_in_a_group):  # transformers#30113
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

        def forward(self, x):
            return self.layers[2](torch.relu(self.layers[0](x)))

    shared = nn.parallel.DistributedDataParallel
    model, x = shared(Skips(), find_unused_parameters=True), torch.randn(64, 16)
    plan = Plan.alone(["module.layers.0"])
    assert_measured(model, x, plan, match="give its .module")


def test_fully_sharded_with_mixed_precision(alone_in_a_group):  # pytorch#153354
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def step(model, batch, optimizer):
        optimizer.zero_grad()
        sum(model(batch).float().square().mean() for _ in range(2)).backward()
        optimizer.step()

    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2))
    how = {"mesh": init_device_mesh("cpu", (1,))}
    how["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model[0], **how)
    fully_shard(model, **how)
    x, how = torch.randn(64, 16), {"step": step, "optimizer": torch.optim.SGD}
    with pytest.raises(ValueError, match="sharded by fully_shard"):
        predict(model, x, ALONE, **CPU, **how)
    assert measure(model, x, ALONE, repeats=0, **how).peak_bytes
    verified = verify(model, x, ALONE, **how)
    assert verified.same and set(verified.gradients) == set()
