"""Models, names and options of every kind: right, or refused in one sentence."""

import copy
import io
import itertools
import logging
import pickle
import random
import types

import pytest
import torch
from torch import nn

from helpers.checkpointing import Plan, PlanFault, checkpointed, refuse_opaque
from helpers.models import MLP

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    widths = nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)
    return nn.Sequential(*widths)


class Listed(nn.Module):
    def __init__(self, kind=nn.ModuleList) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = kind(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def gradients(model, plan=Plan(), x=X) -> list[torch.Tensor]:
    model.zero_grad()
    with checkpointed(model, plan):
        model(x).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def same(found, expected) -> bool:
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def has_plan(model) -> bool:
    return any("forward" in vars(module) for module in model.modules())


ALONE, PIECES = Plan.alone(["2"]), Plan((("0", "1"), ("2",)))
JOINED = Plan((("layers.0", "layers.1", "layers.2"),))
PLANNED = [(chain, ALONE), (chain, PIECES), (Listed, JOINED)]


# Copies ------------------------------------------------------------------------------


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved])
@pytest.mark.parametrize(("make", "plan"), PLANNED)
def test_a_copy_made_in_a_block_keeps_the_plan_and_runs_its_own_layers(
    make, plan, copied
):
    model, right = make(), make()
    with checkpointed(model, plan):
        made = copied(model)
    assert has_plan(made) and not has_plan(model)
    for one in (made, right):
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.mul_(2)
    assert same(gradients(made), gradients(right))
    assert same(gradients(copied(made)), gradients(right))
    assert not has_plan(copied(model)), "made after the block"


def replica(model):
    """Do what DataParallel does for a GPU; with other weights, to tell them apart."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, other in made.items():
        for name, child in module._modules.items():
            setattr(other, name, made[child])
        for name, parameter in module._parameters.items():
            setattr(other, name, parameter.detach() * 2)
    return made[model]


@pytest.mark.parametrize(("make", "plan"), PLANNED)
def test_replicas_do_not_run_the_models_own_layers(make, plan):
    model = make()
    with checkpointed(model, plan):
        with pytest.raises(PlanFault, match="nn.DataParallel's replicas"):
            replica(model)(X)
        if "forward" in vars(model):
            with pytest.raises(PlanFault, match="other shallow copies"):
                copy.copy(model)(X)
        nn.DataParallel(model)(X)  # without a GPU it makes none
    replica(model)(X)
    exec(plan.code(model), {"model": model})
    with pytest.raises(AssertionError, match="use DistributedDataParallel"):
        replica(model)


# Blocks in any order -----------------------------------------------------------------


@pytest.mark.parametrize("plans", itertools.permutations([ALONE, PIECES, ALONE], 2))
@pytest.mark.parametrize("first_out", [0, 1])
def test_blocks_may_end_in_any_order(plans, first_out):
    model = chain()
    expected = gradients(model)
    blocks = [checkpointed(model, plan) for plan in plans]
    for block in blocks:
        block.__enter__()
        assert same(gradients(model), expected)
    for block in (blocks[first_out], blocks[1 - first_out]):
        assert has_plan(model)
        block.__exit__(None, None, None)
        assert same(gradients(model), expected)
    assert not has_plan(model)


def test_a_forward_of_ones_own_comes_back_in_any_order():
    model = chain()
    own = model[2].forward = types.MethodType(lambda self, x: x * 2, model[2])
    one, other = checkpointed(model, ALONE), checkpointed(model, ALONE)
    for block in (one, other):
        block.__enter__()
    for block in (one, other):
        block.__exit__(None, None, None)
    assert model[2].forward is own


@pytest.mark.parametrize("plan", [JOINED, Plan.alone(["layers.1"])])
def test_two_plans_do_not_share_the_layers_of_a_list(plan):
    model = Listed()
    expected = gradients(model)
    with checkpointed(model, JOINED):
        with pytest.raises(PlanFault, match="undo the other plan first"):
            with checkpointed(model, plan):
                pass
        assert same(gradients(model), expected)
    assert not has_plan(model)


# Printed code ------------------------------------------------------------------------

NASTY = [
    'b"], [open("PWN","w")], ["',
    "it's",
    "both'\"",
    '"""',
    "two\nlines",
    "back\\slash",
    "\\",
    "tab\t\0nul",
    "sep\u2028\u2029",
    "{braces}{}",
    "%s # no comment",
    "ünïcode 層 😀",
    "\ud800",
    "forward",  # which a child may be called where it is not an attribute
    "0",
    " ",
]


class Tuples(nn.Module):
    """Takes what a tuple holds, and hands on another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, given):
        x, n = given if isinstance(given, tuple) else (given, 1)
        return self.linear(x), n + 1


class First(nn.Module):
    def forward(self, given):
        return given[0] * given[1]


class Stack(nn.Sequential):
    """A chain that is not made of its children."""

    def __init__(self, depth: int) -> None:
        super().__init__(*(nn.Linear(8, 8) for _ in range(depth)))


class Arguments(nn.Module):
    """Feeds a list's layers, each with the same other arguments."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.ModuleList(Scaled() for _ in range(3)))

    def forward(self, x):
        for layer in self._modules[self.name]:
            x = layer(x, 2.0, shift=0.5)
        return x


class Scaled(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x, scale, *, shift):
        return super().forward(x * scale + shift)


def random_model(rng: random.Random) -> tuple[nn.Module, Plan]:
    """Make a chain or a list of nasty names, and a plan of its segments."""
    names = [name for name in NASTY if name != "forward"]
    rng.shuffle(names)
    if rng.random() < 0.3:
        model, first = Arguments(names[0]), names[0]
        return model, Plan(((f"{first}.0", f"{first}.1"), (f"{first}.2",)))
    if rng.random() < 0.3:
        return nn.Sequential(Stack(3), Stack(3)), Plan((("0.1", "0.2"), ("1",)))
    model, parent = nn.Sequential(), ""
    kinds = [Tuples, Tuples, First] + [lambda: nn.Linear(8, 8), nn.Tanh] * 2
    for name, kind in zip(names, kinds, strict=False):
        model.add_module(name, kind())
    chosen, inside = list(model._modules), model
    if rng.random() < 0.5:
        parent, model = names[-1], nn.Sequential()
        model.add_module(parent, inside)
    cut = rng.randrange(1, len(chosen))
    pieces = [chosen[:cut], chosen[cut : cut + 1], chosen[cut + 1 :]]
    dotted = [[f"{parent}.{name}" if parent else name for name in p] for p in pieces]
    return model, Plan([piece for piece in dotted if piece and rng.random() < 0.8])


@pytest.mark.parametrize("seed", range(60))
def test_printed_code_runs_and_does_the_same_whatever_the_names(
    seed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    model, plan = random_model(random.Random(seed))
    expected = gradients(model)
    assert same(gradients(model, plan), expected)
    made = copy.deepcopy(model)
    code = plan.code(made)
    exec(code, {"model": made})
    assert same(gradients(made), expected)
    assert not list(tmp_path.iterdir()), "a name was run"
    assert all(line.isprintable() for line in code.split("\n"))


def test_names_as_one_reads_them_where_they_are_plain():
    code = JOINED.code(Listed())
    assert '["layers.0", "layers.1", "layers.2"]' in code
    assert "Right where the model feeds each layer" in code


# Kinds of models ---------------------------------------------------------------------


class Called(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x * 2)


def own_forward():
    model = chain()
    forward = model[2].forward
    model[2].forward = lambda x: 2 * forward(x)
    return model


def quantisation_aware():
    model = chain()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model.train())


def compiled(model=None):
    return torch.compile(model or chain(), backend="eager")


def compiled_in_place():
    model = chain()
    model.compile(backend="eager")
    return model


def quantised():
    return torch.ao.quantization.quantize_dynamic(chain(), {nn.Linear})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "prefix", "joins"),
    [
        (lambda: torch.fx.symbolic_trace(chain()), "", False),
        (quantisation_aware, "", True),
        (lambda: Called(*chain()), "", True),
        (own_forward, "", True),
        (compiled, "_orig_mod.", True),
        (compiled_in_place, "", True),
        (lambda: nn.DataParallel(chain()), "module.", True),
    ],
)
def test_gradients_are_the_plain_ones(make, prefix, joins):
    model = make()
    expected = gradients(model)
    assert same(gradients(model, Plan.alone([f"{prefix}2"])), expected)
    plan = Plan(((f"{prefix}0", f"{prefix}1"),))
    if joins:
        assert same(gradients(model, plan), expected)
    else:
        with pytest.raises(ValueError, match="does not follow"):
            gradients(model, plan)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: torch.jit.script(chain()), "2"),
        (lambda: torch.jit.trace(chain(), X), "2"),
        (lambda: nn.Sequential(nn.Tanh(), torch.jit.script(chain())), "1.2"),
        (lambda: nn.Sequential(nn.Tanh(), torch.jit.script(chain())), "1"),
    ],
)
def test_what_torchscript_compiled_takes_no_plan(make, name):
    with pytest.raises(PlanFault, match=f"'{name}' is compiled by TorchScript"):
        with checkpointed(make(), Plan.alone([name])):
            pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "plan"), PLANNED)
def test_torchscript_does_not_compile_what_has_a_plan(make, plan):
    model = make()
    with checkpointed(model, plan):
        for compiles in (torch.jit.script, lambda model: torch.jit.trace(model, X)):
            with pytest.raises(PlanFault, match="script or trace it outside"):
                compiles(model)
    assert torch.equal(torch.jit.script(model)(X), model(X))


@pytest.mark.parametrize("plan", [ALONE, PIECES])
def test_an_exported_or_fx_traced_model_with_a_plan(plan):
    model = chain()
    with checkpointed(model, plan):
        exported = torch.export.export(model, (X,)).module()
        assert torch.equal(exported(X), model(X))
        assert torch.equal(torch.fx.symbolic_trace(model)(X), model(X))


def test_a_joined_list_is_not_compiled():
    logging.disable(logging.ERROR)
    model = Listed()
    try:
        with checkpointed(model, JOINED), pytest.raises(Exception) as raised:
            torch.compile(model, backend="eager", fullgraph=True)(X)
    finally:
        logging.disable(logging.NOTSET)
    assert "checkpoint each alone" in str(raised.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "words", "with_data"),
    [
        (compiled, "the model is compiled", True),
        (compiled_in_place, "the model is compiled", True),
        (lambda: nn.Sequential(compiled()), "'0' is compiled", True),
        (lambda: torch.jit.script(chain()), "the model is compiled by Torch", False),
        (lambda: nn.Sequential(torch.jit.trace(chain(), X)), "'0' is compiled", False),
        (quantised, "'0' is quantised", False),
    ],
)
def test_what_no_step_can_look_into_is_refused(make, words, with_data):
    model = make()
    with pytest.raises(PlanFault, match=words):
        refuse_opaque(model)
    if with_data:
        with pytest.raises(PlanFault, match=words):
            refuse_opaque(model, has_data=True)
    else:
        refuse_opaque(model, has_data=True)


@pytest.mark.filterwarnings("ignore")
def test_what_is_shared_or_sharded_is_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(PlanFault, match=r"give its \.module"):
            refuse_opaque(nn.parallel.DistributedDataParallel(chain()))
        model = chain()
        fully_shard(model[2], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(PlanFault, match="'2' is sharded"):
            refuse_opaque(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_other_models_are_looked_into():
    exported = torch.export.export(chain(), (X,)).module()
    for model in (
        *(chain(), Listed(), MLP([8, 8]), quantisation_aware(), own_forward()),
        *(torch.fx.symbolic_trace(chain()), exported, nn.DataParallel(chain())),
    ):
        refuse_opaque(model)


# Wrong input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "segments", [None, 3, "layer1", ("a", "b"), ((1,),), [["a", None]], (None,), ((),)]
)
def test_what_is_no_plan_says_what_one_is(segments):
    with pytest.raises(
        ValueError, match="a plan is a tuple of segments|needs at least"
    ):
        Plan(segments)


@pytest.mark.parametrize("names", [None, "layer1", [None], [b"0"], 3])
def test_what_are_no_names_says_so(names):
    for make in (Plan.alone, lambda names: Plan.grouped(chain(), names)):
        with pytest.raises(ValueError, match="a plan is a tuple of segments, each a"):
            make(names)


@pytest.mark.parametrize(
    ("plan", "options", "words"),
    [
        (None, {}, "plan=None is no plan"),
        ((("0", "1"),), {}, "is no plan"),
        (Plan(), {"use_reentrant": None}, "use_reentrant is True or False, not None"),
        (
            Plan(),
            {"preserve_rng_state": 1},
            "preserve_rng_state is True or False, not 1",
        ),
        (Plan(), {"early_stop": "no"}, "early_stop is True or False, not 'no'"),
    ],
)
def test_wrong_options_are_told(plan, options, words):
    model = chain()
    with pytest.raises(PlanFault, match=words):
        with checkpointed(model, plan, **options):
            pass
    assert not has_plan(model)


def test_what_is_no_model_says_so():
    for model in (None, chain, "model"):
        with pytest.raises(PlanFault, match="a plan is for an nn.Module"):
            with checkpointed(model, Plan()):
                pass
    with pytest.raises(TypeError, match="unexpected keyword argument 'reentrant'"):
        checkpointed(chain(), Plan(), reentrant=True)


def test_a_plan_itself_is_pickled():
    assert pickle.loads(pickle.dumps(PIECES)) == PIECES
