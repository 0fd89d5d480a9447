"""What inspection says of a plan, held against running the step with it and without."""

import contextvars
import copy
import dataclasses
import itertools
import random
from collections import deque, namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from helpers.checkpointing import Plan, checkpointed
from helpers.inspection import inspect_model
from helpers.measure import predict

X = torch.linspace(-1, 1, 24).reshape(3, 8)
PAIR = namedtuple("PAIR", "y others")
MODE = {"now": 1.0}
SCALE = contextvars.ContextVar("scale", default=1.0)


class Does(nn.Module):
    """A Linear and a function of it, what it is given, and what else it holds."""

    def __init__(self, function, **held) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.function = [function]
        for name, value in held.items():
            if name.startswith("buffer"):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.function[0](self, *args, **kwargs)


class Around(nn.Module):
    """Calls its one module as a function says; by default between two Linears."""

    def __init__(self, module: nn.Module, call=None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.module = module
        self.call = [call or (lambda model, x: model.module(x))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.call[0](self, self.first(x)).tanh())


# Modules that hold or change something ------------------------------------------------


def neuron(m, x):
    y = m.linear(x)
    m.v = 0.9 * m.v + y.detach().mean(0)
    return torch.tanh(y - m.v)


def buffered(m, x):
    y = m.linear(x)
    m.buffer_v = 0.9 * m.buffer_v.to(y.device) + y.detach().mean(0)
    return torch.tanh(y * m.buffer_v)


def replaced_data(m, x):
    m.buffer_v.data = m.buffer_v.data + 1
    return torch.tanh(m.linear(x) * m.buffer_v)


def out_into(m, x):
    torch.mul(m.buffer_v, 2, out=m.buffer_v)
    return torch.tanh(m.linear(x) * m.buffer_v.clone())


def average_only(m, x):
    y = m.linear(x)
    with torch.no_grad():
        m.buffer_v.lerp_(y.mean(0), 0.1)
    return torch.tanh(y).exp()


def counts(m, x):
    m.times += 1
    return torch.tanh(m.linear(x)).exp()


def scales_by_count(m, x):
    m.times += 1
    return torch.tanh(m.linear(x) * x.new_full((8,), m.times))


def remembers(m, x):
    m.last = torch.tanh(m.linear(x))
    return m.last.exp()


def grows(m, x):
    m.seen.append(x.shape[0])
    return torch.tanh(m.linear(x)).exp()


def first_time(m, x):
    y = m.linear(x)
    if not m.started:
        m.started = True
        y = y * 2
    return torch.tanh(y).exp()


def lazily(m, x):
    if m.table is None:
        m.table = torch.arange(8.0, device=x.device)
    return torch.tanh(m.linear(x) * m.table).exp()


def counter_object(m, x):
    m.clock.now += 1
    return torch.tanh(m.linear(x) * x.new_full((8,), m.clock.now)).exp()


def takes_next(m, x):
    return torch.tanh(m.linear(x) * x.new_full((8,), next(m.numbers))).exp()


def draws_python(m, x):
    return torch.tanh(m.linear(x) * random.random()).exp()


def draws_numpy(m, x):
    return torch.tanh(m.linear(x) + float(np.random.rand())).exp()


def draws_torch(m, x):
    y = m.linear(x)
    return torch.tanh(y + torch.randn_like(y)).exp()


def sets_global(m, x):
    MODE["now"] += 1.0
    return torch.tanh(m.linear(x) * x.new_full((8,), MODE["now"])).exp()


def makes_constants(m, x):
    scale = torch.tensor([2.0] * 8, device=x.device)
    return torch.tanh(m.linear(x) * scale + torch.tensor(0.5, device=x.device)).exp()


def makes_empty(m, x):
    y = torch.cat([torch.tensor([], device=x.device), m.linear(x)], dim=-1)
    return torch.tanh(y * x).exp()


def linear(m, x):
    return torch.tanh(m.linear(x)).exp()


def curve(m, x):
    return torch.tanh(x).exp() + m.linear.bias


class Clock:
    now = 0

    def __init__(self):
        self.now = 0


def old(normed):
    return nn.Sequential(normed(nn.Linear(8, 8)), nn.Tanh())


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


def parametrized():
    module = nn.Linear(8, 8)
    parametrize.register_parametrization(module, "weight", Symmetric())
    return nn.Sequential(module, nn.Tanh())


ALONE = {
    "tensor attribute": lambda: Does(neuron, v=torch.zeros(8)),
    "rebound buffer": lambda: Does(buffered, buffer_v=torch.ones(8)),
    "buffer's data": lambda: Does(replaced_data, buffer_v=torch.ones(8)),
    "out=": lambda: Does(out_into, buffer_v=torch.ones(8)),
    "average": lambda: Does(average_only, buffer_v=torch.zeros(8)),
    "count": lambda: Does(counts, times=0),
    "scale by count": lambda: Does(scales_by_count, times=0),
    "last output": lambda: Does(remembers, last=None),
    "growing list": lambda: Does(grows, seen=[]),
    "growing deque": lambda: Does(grows, seen=deque([1])),
    "first time": lambda: Does(first_time, started=False),
    "lazy table": lambda: Does(lazily, table=None),
    "an object's count": lambda: Does(counter_object, clock=Clock()),
    "an iterator": lambda: Does(takes_next, numbers=itertools.count(1)),
    "python": lambda: Does(draws_python),
    "numpy": lambda: Does(draws_numpy),
    "torch": lambda: Does(draws_torch),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh()),
    "a global": lambda: Does(sets_global),
    "constants": lambda: Does(makes_constants),
    "an empty tensor": lambda: Does(makes_empty),
    "plain": lambda: Does(linear),
    "batch norm": lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
    "batch norm, eval": lambda: nn.Sequential(
        nn.Linear(8, 8), nn.BatchNorm1d(8)
    ).eval(),
    "batch norm, no stats": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "spectral norm": lambda: old(parametrizations.spectral_norm),
    "old spectral norm": lambda: old(nn.utils.spectral_norm),
    "weight norm": lambda: old(parametrizations.weight_norm),
    "orthogonal": lambda: old(parametrizations.orthogonal),
    "parametrized": parametrized,
}


# Callers that change what a module is given, or sees ----------------------------------


def writes_dict(m, d):
    d["y"] = torch.tanh(m.linear(d["y"]))
    return d


def adds_key(m, d):
    d["z"] = torch.tanh(m.linear(d["y"]))
    return d


def in_dict(model, x):
    return model.module({"y": x})["y"]


def added_key(model, x):
    return model.module({"y": x})["z"]


def new_dict(m, d):
    return {**d, "y": torch.tanh(m.linear(d["y"]))}


def concatenates(m, features):
    return torch.tanh(m.linear(torch.stack(features).sum(0)))


def growing(model, x):
    features = [x]
    features.append(model.module(features))
    return torch.stack(features).sum(0)


def grown_copy(model, x):
    features = [x]
    features.append(model.module(list(features)))
    return torch.stack(features).sum(0)


def appends(m, features):
    features.append(torch.tanh(m.linear(features[-1])))
    return features[-1].exp()


@dataclasses.dataclass
class Held:
    y: torch.Tensor
    scale: float = 1.0


@dataclasses.dataclass(slots=True)
class Slotted:
    y: torch.Tensor


def in_object(m, held):
    held.y = torch.tanh(m.linear(held.y))
    return held.y.exp()


def reads_object(m, held):
    return torch.tanh(m.linear(held.y) * held.y.new_full((8,), held.scale)).exp()


def changed_object(model, x):
    held = Held(x)
    y = model.module(held)
    held.scale = 3.0
    return y


def mode_around(model, x):
    model.module.mode = 2.0
    y = model.module(x)
    model.module.mode = 1.0
    return y


def by_mode(m, x):
    return torch.tanh(m.linear(x) * x.new_full((8,), m.mode)).exp()


def by_constant(m, x):
    return torch.tanh(m.linear(x) * torch.tensor(m.mode, device=x.device)).exp()


def tensor_mode(model, x):
    model.module.mode = x.detach() * 2
    y = model.module(x)
    model.module.mode = None
    return y


def by_tensor(m, x):
    return torch.tanh(m.linear(x) * m.mode).exp()


def global_around(model, x):
    MODE["now"] = 2.0
    y = model.module(x)
    MODE["now"] = 1.0
    return y


def by_global(m, x):
    return torch.tanh(m.linear(x) * x.new_full((8,), MODE["now"])).exp()


def context_around(model, x):
    token = SCALE.set(2.0)
    y = model.module(x)
    SCALE.reset(token)
    return y


def by_context(m, x):
    return torch.tanh(m.linear(x) * x.new_full((8,), SCALE.get())).exp()


def eval_around(model, x):
    model.module.eval()
    y = model.module(x)
    model.module.train()
    return y


def by_training(m, x):
    return torch.tanh(m.linear(x) * (2.0 if m.training else x.detach())).exp()


def through_iterator(model, x):
    return model.module(iter([x, x * 2]))


def from_iterator(m, tensors):
    return torch.tanh(m.linear(sum(tensors))).exp()


class Cache:
    def __init__(self):
        self.layers = [[]]

    def update(self, y):
        self.layers[0].append(y)
        return torch.cat(self.layers[0], 0)


def with_cache(model, x):
    cache = Cache()
    first = model.module(x, cache=cache)
    return first + model.module(first[:3], cache=cache)[:3]


def caching(m, x, cache):
    return torch.tanh(cache.update(m.linear(x)).sum(0) * x).exp()


def twice(model, x):
    return model.module(model.module(x))


def changed_data(model, x):
    h = x * 2
    y = model.module(h)
    h.data.mul_(3)
    return y


def changed_without_grad(model, x):
    h = x * 2
    y = model.module(h)
    with torch.no_grad():
        h.mul_(3)
    return y


def changed_buffer(model, x):
    y = model.module(x)
    with torch.no_grad():
        model.module.buffer_v.add_(1)
    return y


def by_buffer(m, x):
    return torch.tanh(m.linear(x) * m.buffer_v.clone()).exp()


def without_grad(model, x):
    with torch.no_grad():
        y = model.module(x)
    return x + y


def autocast_around(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = model.module(x)
    return y.float()


def named(model, x):
    return model.module(PAIR(x, {"scale": 2.0}))


def by_named(m, pair):
    return torch.tanh(m.linear(pair.y) * pair.others["scale"]).exp()


def weights_swapped(model, x):
    y = model.module(x)
    model.module.linear = model.other
    return y


CALLS = {
    "a dict, written": (in_dict, lambda: Does(writes_dict)),
    "a dict, with a new key": (added_key, lambda: Does(adds_key)),
    "a dict, made anew": (in_dict, lambda: Does(new_dict)),
    "a list that grows later": (growing, lambda: Does(concatenates)),
    "a copy of one": (grown_copy, lambda: Does(concatenates)),
    "a list, appended to": (lambda m, x: m.module([x]), lambda: Does(appends)),
    "an object, written": (lambda m, x: m.module(Held(x)), lambda: Does(in_object)),
    "an object with slots": (
        lambda m, x: m.module(Slotted(x)),
        lambda: Does(in_object),
    ),
    "an object, read": (lambda m, x: m.module(Held(x)), lambda: Does(reads_object)),
    "an object, changed later": (changed_object, lambda: Does(reads_object)),
    "a number set for forward": (mode_around, lambda: Does(by_mode, mode=1.0)),
    "a constant made of it": (mode_around, lambda: Does(by_constant, mode=1.0)),
    "a tensor set for forward": (tensor_mode, lambda: Does(by_tensor, mode=None)),
    "a global set for forward": (global_around, lambda: Does(by_global)),
    "a context variable": (context_around, lambda: Does(by_context)),
    "eval for forward": (eval_around, lambda: Does(by_training)),
    "an iterator": (through_iterator, lambda: Does(from_iterator)),
    "a cache": (with_cache, lambda: Does(caching)),
    "called twice": (twice, lambda: Does(linear)),
    "called twice, a neuron": (twice, lambda: Does(neuron, v=torch.zeros(8))),
    "called twice, normed": (twice, lambda: nn.utils.spectral_norm(nn.Linear(8, 8))),
    "data changed later": (changed_data, lambda: Does(linear)),
    "changed without grad": (changed_without_grad, lambda: Does(curve)),
    "a buffer changed later": (
        changed_buffer,
        lambda: Does(by_buffer, buffer_v=torch.ones(8)),
    ),
    "without grad": (without_grad, lambda: Does(neuron, v=torch.zeros(8))),
    "in autocast": (autocast_around, lambda: Does(linear)),
    "a named tuple": (named, lambda: Does(by_named)),
}


# The truth ----------------------------------------------------------------------------


def state_of(value, deep=6):
    """Describe what a value holds, tensors by their numbers."""
    if isinstance(value, torch.Tensor):
        return value.detach().tolist()
    if isinstance(value, nn.Module):
        return {name: state_of(vars(one)) for name, one in value.named_modules()}
    if isinstance(value, dict) and deep:
        skipped = ("_modules", "_parameters", "function", "call")
        items = {k: v for k, v in value.items() if k not in skipped}
        return {k: state_of(v, deep - 1) for k, v in items.items()}
    if isinstance(value, list | tuple | deque):
        return [state_of(item, deep - 1) for item in value]
    if isinstance(value, Clock):
        return value.now
    return value if isinstance(value, int | float | str) else None


def after_a_step(model: nn.Module, plan: Plan):
    """Take a step from the same state and random numbers: its gradients, the state."""
    model, MODE["now"] = copy.deepcopy(model), 1.0
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    with checkpointed(model, plan):
        model(X).sum().backward()
    return [p.grad.tolist() for p in model.parameters() if p.grad is not None], (
        state_of(model)
    )


def truth(model: nn.Module, plan: Plan) -> str:
    gradients, state = after_a_step(model, Plan())
    try:
        other_gradients, other_state = after_a_step(model, plan)
    except Exception:
        return "error"
    if other_gradients != gradients:
        return "gradients"
    return "" if other_state == state else "state"


def said(model: nn.Module, plan: Plan) -> set[str]:
    MODE["now"] = 1.0
    hazards = inspect_model(model, X, device="cpu").hazards_of(plan)
    assert all("\n" not in str(h) and str(h) for h in hazards)
    assert all(h.is_wrong == (h.effect in ("gradients", "state")) for h in hazards)
    return {h.effect for h in hazards} - {""}


def check(model: nn.Module, name: str) -> str:
    plan = Plan.alone([name])
    expected, found = truth(model, plan), said(model, plan)
    if expected in ("gradients", "error"):
        assert expected in found
    else:
        assert found == {expected} - {""}
    return expected


@pytest.mark.parametrize("name", ALONE)
def test_a_module_ticked_alone(name):
    torch.manual_seed(1)
    check(Around(ALONE[name]()), "module")


@pytest.mark.parametrize("name", CALLS)
def test_a_module_called_by_its_owner(name):
    torch.manual_seed(1)
    call, module = CALLS[name]
    check(Around(module(), call), "module")


@pytest.mark.parametrize("name", CALLS)
def test_the_owner_ticked(name):
    """What an owner sets around a call it sets again, when it is run again."""
    torch.manual_seed(1)
    call, module = CALLS[name]
    check(Around(Around(module(), call)), "module")


@pytest.mark.parametrize("name", ALONE)
def test_all_that_lies_in_a_module(name):
    """Each module in a model, ticked alone."""
    torch.manual_seed(1)
    model = Around(nn.Sequential(nn.Linear(8, 8), ALONE[name]()))
    for inner in inspect_model(model, X).layers:
        if inner.startswith("module"):
            check(model, inner)


def test_the_table_has_all_kinds():
    found = itertools.chain(
        (truth(Around(make()), Plan.alone(["module"])) for make in ALONE.values()),
        (truth(Around(m(), c), Plan.alone(["module"])) for c, m in CALLS.values()),
    )
    kinds = list(found)
    assert len(kinds) > 50
    assert all(kinds.count(kind) > 3 for kind in ("", "gradients", "state"))
    assert "error" in kinds


# Other steps, and models without a hazard --------------------------------------------


def accumulates(model, batch, optimizer):
    optimizer.zero_grad()
    for part in batch.chunk(2):
        model(part).exp().sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "how",
    [
        {"optimizer": torch.optim.AdamW},
        {"autocast": torch.bfloat16},
        {"step": accumulates, "optimizer": torch.optim.SGD},
    ],
)
def test_the_report_of_any_step_is_predicts(how):
    model, x = Around(ALONE["batch norm"]()), X.repeat(2, 1)
    found = inspect_model(model, x, device="cpu", **how)
    assert found.report == predict(model, x, device="cpu", **how)
    assert {(h.name, h.effect) for h in found.hazards} == {("module.1", "state")}


def test_what_cannot_be_looked_at_is_said():
    """PyTorch's transforms allow no hooks on saved tensors, and so no checkpoint."""

    def transforms(m, x):
        return m.linear(x) * torch.func.grad(lambda y: y.tanh().sum())(x)

    (hazard,) = inspect_model(Around(Does(transforms)), X).hazards
    assert hazard.kind == "unknown" and str(hazard).endswith("; verify it")


@pytest.mark.parametrize("name", ["BERT", "GPT2", "Llama", "T5", "ViT"])
def test_models_of_transformers_have_no_hazard(name):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(1, 50, (2, 8))
    kinds = {"BERT": "BertModel", "GPT2": "GPT2LMHeadModel", "Llama": "LlamaModel"}
    kinds |= {"T5": "T5ForConditionalGeneration", "ViT": "ViTModel"}
    kind = getattr(transformers, kinds[name])
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"intermediate_size": 64, "vocab_size": 50}
    size |= {"image_size": 32, "patch_size": 8} if name == "ViT" else {}
    if name == "T5":
        size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        size |= {"vocab_size": 50, "decoder_start_token_id": 0}
    model = kind(kind.config_class(**size)).train()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch |= {"use_cache": False} if name in ("GPT2", "Llama", "T5") else {}
    batch |= {"labels": ids} if name == "T5" else {}
    if name == "ViT":
        batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    found = inspect_model(model, batch, device="cpu")
    assert len(found.layers) > 20 and not found.hazards
