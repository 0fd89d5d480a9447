"""Checkpointing by hand does what torch's own does, in values, work and bytes.

``checkpoint`` is a fixture: most tests run with torch's function too, so that what they
ask for is what it does.
"""

import contextlib
import copy
import gc
import inspect
import warnings
import weakref
from functools import partial

import pytest
import torch
import torch.utils.checkpoint as theirs
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointError

from helpers import checkpointing, from_scratch
from helpers.checkpointing import Plan
from helpers.measure import measure, predict, training_step
from helpers.models import MLP, DocsMLP, uniform_mlp
from helpers.timeline import record_timeline
from tests.oracles import counted_flops

TORCHS = theirs.checkpoint  # before any test puts another in its place
BOTH = pytest.mark.parametrize("use_reentrant", [False, True])


@pytest.fixture(params=["torch", "from_scratch"])
def checkpoint(request):
    return {"torch": TORCHS, "from_scratch": from_scratch.checkpoint}[request.param]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small steps wait for each other on a busy machine with many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 4, requires_grad=True)


class Counted:
    """A function that counts its runs."""

    def __init__(self, function):
        self.function, self.runs = function, 0

    def __call__(self, *args, **kwargs):
        self.runs += 1
        return self.function(*args, **kwargs)


class First:
    """One function in the first run, another one in every later run."""

    def __init__(self, first, later):
        self.functions = iter([first])
        self.later = later

    def __call__(self, x):
        return next(self.functions, self.later)(x)


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def waves(x):
    """Two operators that save what is inside, and one that saves nothing."""
    return x.sin().exp().clone()


def gradients(function, *tensors):
    return torch.autograd.grad(function(), tensors)


# What it is called with, and what it returns


def test_every_option_of_torchs_is_accepted():
    ours = inspect.signature(from_scratch.checkpoint).parameters
    for name, option in inspect.signature(TORCHS).parameters.items():
        assert ours[name].kind == option.kind
        if name != "use_reentrant":  # torch's warns where it is left out
            assert ours[name].default == option.default
    assert ours["use_reentrant"].default is False


@BOTH
@pytest.mark.parametrize("preserve_rng_state", [True, False])
def test_gradients_are_the_plain_ones_and_it_runs_twice(
    checkpoint, x, use_reentrant, preserve_rng_state
):
    layer = nn.Linear(4, 4)
    function = Counted(lambda x: torch.relu(layer(x)) * x)
    function(x).sum().backward()
    expected = [x.grad, layer.weight.grad, layer.bias.grad]
    x.grad = layer.weight.grad = layer.bias.grad = None
    function.runs = 0
    settings = {"use_reentrant": use_reentrant}
    checkpoint(
        function, x, preserve_rng_state=preserve_rng_state, **settings
    ).sum().backward()
    found = [x.grad, layer.weight.grad, layer.bias.grad]
    assert all(map(torch.equal, found, expected))
    assert function.runs == 2


@BOTH
def test_arguments_that_are_no_tensors(checkpoint, x, use_reentrant):
    def function(factor, x, name, nothing, options):
        assert (name, nothing, options) == ("name", None, {"power": 2})
        return factor * x.exp() ** options["power"]

    def run():
        args = (3, x, "name", None, {"power": 2})
        return checkpoint(function, *args, use_reentrant=use_reentrant).sum()

    run().backward()
    assert torch.equal(x.grad, gradients(lambda: (3 * x.exp() ** 2).sum(), x)[0])


def test_keyword_arguments(checkpoint, x):
    scale = torch.tensor(2.0, requires_grad=True)

    def function(x, *, scale, shift=0):
        return (x.exp() * scale + shift).sin().sum()

    found = gradients(
        lambda: checkpoint(function, x, scale=scale, shift=1, use_reentrant=False),
        x,
        scale,
    )
    expected = gradients(lambda: function(x, scale=scale, shift=1), x, scale)
    assert all(map(torch.equal, found, expected))


def test_no_arguments_at_all(checkpoint, x):
    function = Counted(lambda: x.sin().exp().sum())
    found = gradients(lambda: checkpoint(function, use_reentrant=False), x)
    assert torch.equal(*found, *gradients(function, x))
    assert function.runs == 3


def test_nested_inputs_and_outputs(checkpoint, x):
    def function(batch):
        y = batch["x"][0].exp()
        return {"sum": y.sum(), "parts": [y.sin(), (y.cos(), "text", None)]}

    def run(call):
        out = call({"x": [x]})
        assert out["parts"][1][1:] == ("text", None)
        return out["sum"] + out["parts"][0].sum() + out["parts"][1][0].sum()

    found = gradients(
        lambda: run(partial(checkpoint, function, use_reentrant=False)), x
    )
    assert torch.equal(*found, *gradients(lambda: run(function), x))


@BOTH
def test_several_outputs_with_and_without_gradients(checkpoint, x, use_reentrant):
    def function(x):
        return x.exp(), 7, x.detach().sin(), None, x.sin() * x

    first, seven, detached, none, last = checkpoint(
        function, x, use_reentrant=use_reentrant
    )
    assert seven == 7 and none is None and torch.equal(detached, x.detach().sin())
    (first.sum() + last.sum()).backward()
    expected = gradients(lambda: x.exp().sum() + (x.sin() * x).sum(), x)
    assert torch.allclose(x.grad, *expected)


def test_an_output_that_is_an_input(checkpoint, x):
    out, same = checkpoint(lambda x: (x.exp(), x), x, use_reentrant=True)
    (out.sum() + same.sum()).backward()
    assert torch.allclose(x.grad, x.exp() + 1)


def test_backward_sees_the_very_tensor_that_was_passed(checkpoint, x):
    seen = []

    class Note(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, mask):
            ctx.save_for_backward(mask)
            return x * mask

        @staticmethod
        def backward(ctx, gradient):
            seen.extend(ctx.saved_tensors)
            return gradient, None

    mask = torch.ones(3, 4)
    checkpoint(Note.apply, x, mask, use_reentrant=False).sum().backward()
    assert seen[0] is mask


@pytest.mark.parametrize(
    "settings",
    [
        {"use_reentrant": True, "unknown": 1},
        {"use_reentrant": True, "context_fn": lambda: None},
        {"use_reentrant": True, "debug": True},
        {"use_reentrant": False, "determinism_check": "all"},
        {"use_reentrant": False, "debug": True, "context_fn": lambda: None},
    ],
)
def test_options_that_do_not_fit_raise_and_run_nothing(checkpoint, x, settings):
    function = Counted(waves)
    with pytest.raises(ValueError, match="."):
        checkpoint(function, x, **settings)
    assert function.runs == 0


@BOTH
def test_an_exception_in_the_function_passes_through(checkpoint, x, use_reentrant):
    def function(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        checkpoint(function, x, use_reentrant=use_reentrant)
    if checkpoint is not TORCHS:  # whose hooks may outlive it in torch 2.11
        assert torch.equal((x * x).grad_fn._saved_self, x)


# How it goes through backward


def test_backward_twice_recomputes_twice(checkpoint, x):
    function = Counted(waves)
    out = checkpoint(function, x, use_reentrant=False).sum()
    out.backward(retain_graph=True)
    once = x.grad.clone()
    assert function.runs == 2
    out.backward()
    assert function.runs == 3
    assert torch.equal(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="a second time"):
        out.backward()


def test_reentrant_backward_twice(checkpoint, x):
    out = checkpoint(waves, x, use_reentrant=True).sum()
    out.backward(retain_graph=True)
    once = x.grad.clone()
    out.backward()
    assert torch.equal(x.grad, 2 * once)


def test_grad_works_without_reentrant_and_raises_with_it(checkpoint, x):
    found = gradients(lambda: checkpoint(waves, x, use_reentrant=False).sum(), x)
    assert torch.equal(*found, *gradients(lambda: waves(x).sum(), x))
    out = checkpoint(waves, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="incompatible with .grad()"):
        torch.autograd.grad(out, x)
    out = checkpoint(waves, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError, match="incompatible"):
        out.backward(inputs=[x])
    checkpoint(waves, x, use_reentrant=True).sum().backward()  # and it is valid again
    assert torch.equal(x.grad, *found)


def test_second_derivatives(checkpoint, x):
    def second(function):
        (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    found = second(lambda x: checkpoint(waves, x, use_reentrant=False))
    assert torch.allclose(found, second(waves))


def test_one_output_at_a_time(checkpoint, x):
    function = Counted(lambda x: (x.sin().exp(), x.cos().exp()))
    first, second = checkpoint(function, x, use_reentrant=False)
    first.sum().backward(retain_graph=True)
    second.sum().backward()
    assert function.runs == 3
    whole = gradients(lambda: x.sin().exp().sum() + x.cos().exp().sum(), x)
    assert torch.allclose(x.grad, *whole)


@pytest.mark.skipif(not hasattr(theirs, "GraphExecGroup"), reason="an older torch")
def test_one_recomputation_for_two_passes_in_a_group(checkpoint, x):
    function = Counted(lambda x: (y := x.sin().exp(), y.cos().exp()))
    y, z = checkpoint(function, x, use_reentrant=False)
    with theirs.GraphExecGroup():
        (down,) = torch.autograd.grad(z.sum(), y)
        torch.autograd.grad(y, x, down)
    assert function.runs == 2
    out = checkpoint(waves, x, use_reentrant=False).sum()
    with theirs.GraphExecGroup():
        out.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="two backward calls that overlap"):
            out.backward()


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("retain_graph", [True, False])
def test_a_backward_inside_the_function(checkpoint, x, early_stop, retain_graph):
    def function(x):
        y = x.sin().exp()
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=retain_graph)
        return x.cos() * slope + (y if retain_graph else 0)

    settings = {"use_reentrant": False, "early_stop": early_stop}
    found = gradients(lambda: checkpoint(function, x, **settings).sum(), x)
    assert torch.allclose(*found, *gradients(lambda: function(x).sum(), x))


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_gradient_of_a_gradient_within_checkpoints(checkpoint, early_stop):
    c = partial(checkpoint, use_reentrant=False, early_stop=early_stop)

    def slope(function):
        def gradient(x):
            with torch.enable_grad():
                return torch.autograd.grad(function(x), x, create_graph=True)[0]

        return gradient

    x = torch.tensor(0.7, requires_grad=True)
    expected = slope(slope(waves))(x)
    for function in (
        slope(lambda x: c(slope(waves), x)),
        lambda x: c(slope(slope(lambda x: c(waves, x))), x),
        slope(lambda x: c(slope(lambda x: c(waves, x)), x)),
    ):
        assert torch.allclose(function(x), expected)


def test_a_saved_tensor_may_be_read_once_in_a_pass(checkpoint, x):
    class ReadTwice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.exp())
            return x.exp()

        @staticmethod
        def backward(ctx, gradient):
            once, again = ctx.saved_tensors, ctx.saved_tensors
            return gradient * once[0] * again[0]

    out = checkpoint(lambda x: ReadTwice.apply(x.sin()), x, use_reentrant=False)
    with pytest.raises(CheckpointError, match="already unpacked once"):
        out.sum().backward()


def test_a_look_at_a_saved_tensor_outside_of_backward(checkpoint, x):
    function = Counted(torch.exp)
    out = checkpoint(function, x, use_reentrant=False)
    for runs in (2, 3):
        assert torch.equal(out.grad_fn._saved_result, x.exp())
        assert function.runs == runs


def test_a_hook_of_a_parameter_used_inside_and_outside_runs_once(checkpoint, x):
    weight, calls = torch.randn(3, 4, requires_grad=True), []
    weight.register_hook(calls.append)
    out = checkpoint(lambda x: weight * x, weight * x, use_reentrant=False)
    out.sum().backward()
    assert len(calls) == 1


# Where no gradient is asked for


def test_without_gradients_it_is_a_plain_call(checkpoint, x):
    function, contexts = Counted(waves), (Operators(), Operators())
    with torch.no_grad():
        out = checkpoint(function, x, use_reentrant=False, context_fn=lambda: contexts)
    assert not out.requires_grad and function.runs == 1
    assert not contexts[0].names and not contexts[1].names


def test_inputs_without_gradients(checkpoint):
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.weight.grad is not None
    layer.zero_grad()
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        out = checkpoint(layer, x, use_reentrant=True)
    assert not out.requires_grad and layer.weight.grad is None


@BOTH
def test_a_function_that_detaches(checkpoint, x, use_reentrant):
    out = checkpoint(lambda x: x.detach().exp(), x, use_reentrant=use_reentrant)
    loss = (out + x).sum()
    if use_reentrant:
        with pytest.raises(RuntimeError, match="none of output has requires_grad"):
            loss.backward()
    else:
        loss.backward()
        assert torch.equal(x.grad, torch.ones(3, 4))


# What is restored


@BOTH
def test_dropout_drops_the_same_again(checkpoint, x, use_reentrant):
    dropout = nn.Dropout(0.5)

    def run(call):
        x.grad = None
        torch.manual_seed(1)
        out = dropout(call(lambda x: dropout(x.exp()).sin(), dropout(x)))
        out.sum().backward()
        return x.grad, torch.rand(3)

    found = run(partial(checkpoint, use_reentrant=use_reentrant))
    expected = run(lambda function, x: function(x))
    assert all(map(torch.equal, found, expected))  # gradients, and the numbers after
    without = partial(checkpoint, use_reentrant=use_reentrant, preserve_rng_state=False)
    assert not torch.equal(run(without)[0], expected[0])


@BOTH
@pytest.mark.parametrize("inside, outside", [(True, False), (False, True)])
def test_autocast_is_as_it_was(checkpoint, x, use_reentrant, inside, outside):
    layer, dtypes = nn.Linear(4, 4), []

    def function(x):
        y = layer(x)
        dtypes.append(y.dtype)
        return y.exp()

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
        out = checkpoint(function, x, use_reentrant=use_reentrant).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        out.backward()
    assert dtypes == [torch.bfloat16 if inside else torch.float32] * 2


def test_the_default_device_is_as_it_was():
    x, devices = torch.randn(3, device="meta", requires_grad=True), []

    def function(x):
        devices.append(torch.ones(1).device.type)
        return x.exp().sin()

    with torch.device("meta"):
        out = from_scratch.checkpoint(function, x)
    out.sum().backward()
    assert devices == ["meta", "meta"]


def test_a_step_on_meta_tensors_leaves_the_random_numbers_alone():
    x = torch.empty(3, device="meta", requires_grad=True)
    out = from_scratch.checkpoint(waves, x).sum()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    out.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_contexts_go_around_each_run(checkpoint, x):
    first, second = Operators(), Operators()
    out = checkpoint(waves, x, use_reentrant=False, context_fn=lambda: (first, second))
    assert first.names == ["sin", "exp", "clone"] and not second.names
    out.sum().backward()
    assert [n for n in second.names if n != "detach"] == ["sin", "exp"]


def test_selective_checkpointing(checkpoint):
    x, weight = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8)
    kept = partial(
        theirs.create_selective_checkpoint_contexts, [torch.ops.aten.mm.default]
    )

    def run(**settings):
        def function(x):
            return (x.cos() @ weight).sin() @ weight

        out = checkpoint(function, x, use_reentrant=False, **settings)
        return counted_flops(lambda: out.exp().sum().backward())

    assert run() - run(context_fn=kept) == 2 * 8**3


def test_a_context_that_swallows_exceptions_is_told(checkpoint, x):
    def function(x):
        raise ValueError

    contexts = contextlib.suppress(ValueError), contextlib.nullcontext()
    with pytest.raises((RuntimeError, ValueError)) as caught:
        checkpoint(function, x, use_reentrant=False, context_fn=lambda: contexts)
    if checkpoint is not TORCHS:  # torch 2.11 fails otherwise
        assert "suppressed" in str(caught.value)


def test_hooks_around_it_get_its_inputs(checkpoint, x):
    seen = []

    def note(tensor):
        seen.append(tensor.shape)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        checkpoint(waves, x, use_reentrant=False)
    # torch 2.11 saves an empty tensor as well.
    assert [shape for shape in seen if shape.numel()] == [x.shape]
    with save_on_cpu():
        out = checkpoint(waves, x, use_reentrant=False)
    assert torch.equal(*gradients(out.sum, x), *gradients(lambda: waves(x).sum(), x))


@BOTH
def test_an_input_changed_in_between_is_refused(checkpoint, x, use_reentrant):
    y = x * 1
    out = checkpoint(waves, y, use_reentrant=use_reentrant)
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# Early stop and nesting


@pytest.mark.parametrize(
    "option, blocks, runs",
    [
        (True, [], 1),
        (False, [], 2),
        (True, [False], 2),
        (False, [True], 1),
        (False, [False, True], 1),
    ],
)
def test_early_stop_leaves_out_what_nobody_needs(checkpoint, x, option, blocks, runs):
    last = Counted(torch.clone)  # which saves nothing
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(theirs.set_checkpoint_early_stop(block))
        out = checkpoint(
            lambda x: last(x.sin().exp()), x, use_reentrant=False, early_stop=option
        )
    out.sum().backward()
    assert last.runs == runs


def test_a_function_that_saves_nothing_is_not_run_again(checkpoint, x):
    function = Counted(torch.clone)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert function.runs == 1


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_nested_runs_and_gradients_are_torchs(depth, early_stop):
    def run(checkpoint):
        torch.manual_seed(0)
        x = torch.randn(3, 4, requires_grad=True)
        functions = [Counted(torch.sin)]
        for _ in range(depth):

            def nested(x, inner=functions[-1]):
                settings = {"use_reentrant": False, "early_stop": early_stop}
                x = checkpoint(inner, x.tanh(), **settings)
                return checkpoint(inner, x, **settings).cos()

            functions.append(Counted(nested))
        functions[-1](x).sum().backward()
        return [x.grad.tolist(), *(function.runs for function in functions)]

    assert run(from_scratch.checkpoint) == run(TORCHS)


@pytest.mark.parametrize("outer, inner", [(True, True), (True, False), (False, True)])
def test_reentrant_within_and_around(checkpoint, x, outer, inner):
    def function(x):
        return checkpoint(waves, x.cos(), use_reentrant=inner).sin()

    quiet = warnings.catch_warnings(action="ignore")  # no gradient in a first run
    with quiet:
        out = checkpoint(function, x, use_reentrant=outer)
    out.sum().backward()
    expected = gradients(lambda: waves(x.cos()).sin().sum(), x)
    assert torch.equal(x.grad, *expected)


# A second run that does not match


@pytest.mark.parametrize(
    "later, early_stop, sentence",
    [
        (lambda x: x.sin(), True, "A different number of tensors .*: 2 and 1"),
        (lambda x: x.sin().exp().sin(), False, "to save more tensors .* 2 of the orig"),
        (
            lambda x: x.sin()[:2].exp(),
            True,
            r"number 2 was float32 \(3, 4\) on cpu .* float32 \(2, 4\) on cpu",
        ),
        (
            lambda x: x.double().sin().exp(),
            True,
            r"number 1 was float32 \(3, 4\) on cpu and came back as float64 \(3, 4\)",
        ),
        (lambda x: x.to("meta").sin().exp(), True, r"came back as .* \(3, 4\) on meta"),
    ],
    ids=["fewer", "more", "shape", "dtype", "device"],
)
def test_what_does_not_match_is_named(later, early_stop, sentence, x):
    function = First(lambda x: x.sin().exp(), later)
    out = from_scratch.checkpoint(function, x, early_stop=early_stop)
    with pytest.raises(CheckpointError, match=sentence):
        out.sum().backward()
    theirs_too = TORCHS(
        First(lambda x: x.sin().exp(), later),
        x,
        use_reentrant=False,
        early_stop=early_stop,
    )
    with pytest.raises(CheckpointError):
        theirs_too.sum().backward()


def test_values_and_what_comes_after_the_end_are_not_compared(checkpoint, x):
    more = First(lambda x: x.sin().exp(), lambda x: x.sin().exp().sin())
    checkpoint(more, x, use_reentrant=False).sum().backward()
    expected = gradients(lambda: x.sin().exp().sum(), x)
    assert torch.equal(x.grad, *expected)
    values = First(lambda x: (2 * x).sin(), lambda x: (3 * x).sin())
    wrong = gradients(lambda: checkpoint(values, x, use_reentrant=False).sum(), x)
    assert torch.allclose(*wrong, 2 * (3 * x).cos())


def test_the_check_can_be_turned_off(checkpoint, x):
    strict = First(lambda x: x.exp(), lambda x: x.double().exp().float())
    out = checkpoint(strict, x, use_reentrant=False)
    with pytest.raises(CheckpointError, match="different metadata"):
        out.sum().backward()
    lax = First(lambda x: x.exp(), lambda x: x.double().exp())
    checkpoint(lax, x, use_reentrant=False, determinism_check="none").sum().backward()
    assert torch.allclose(x.grad, x.exp())


def test_a_different_number_of_outputs_in_reentrant(x):
    function = First(lambda x: (x.sin(), x.cos()), lambda x: (x.sin(),))
    first, second = from_scratch.checkpoint(function, x, use_reentrant=True)
    with pytest.raises(CheckpointError, match="2 outputs .* and 1 in recomputation"):
        (first + second).sum().backward()


@pytest.mark.parametrize("by", ["option", "block"])
def test_debug_names_the_operators(x, by):
    function = First(lambda x: x.sin().exp(), lambda x: x.cos())
    block = theirs.set_checkpoint_debug_enabled(True if by == "block" else None)
    with block:
        out = from_scratch.checkpoint(function, x, debug=by == "option")
    with pytest.raises(CheckpointError) as caught:
        out.sum().backward()
    lines = str(caught.value).splitlines()
    assert "aten.sin.default, aten.exp.default" in lines[1]
    assert "aten.cos.default" in lines[2] and "aten.sin" not in lines[2]


# Memory


@BOTH
def test_nothing_is_kept_by_a_cycle(checkpoint, use_reentrant):
    def dead(use):
        """Say whether all that is made inside is gone, without the collector."""
        inside = []

        def function(x):
            y = x.exp()
            inside.append(weakref.ref(y))
            return y.sin().exp()

        x = torch.randn(3, requires_grad=True)
        middle = x * 2
        inside.append(weakref.ref(middle))
        out = checkpoint(function, middle, use_reentrant=use_reentrant)
        del middle
        use(out.sum())
        del out
        return [ref() is None for ref in inside]

    gc.collect()
    gc.disable()
    try:
        assert all(dead(lambda out: None))
        assert all(dead(lambda out: out.backward()))
        assert all(dead(lambda out: out.backward(retain_graph=True)))
    finally:
        gc.enable()


def test_what_is_recomputed_is_dropped_once_used(checkpoint):
    """With retain_graph, too: else a second backward would find the first's tensors."""
    alive, inside = [], []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            alive.append(sum(storage() is not None for storage in inside))
            return gradient

    def function(x):
        for _ in range(3):
            x = Look.apply(x).exp()
            inside.append(weakref.ref(x.untyped_storage()))
        return x * 1  # so that the output is none of them

    x = torch.randn(3, requires_grad=True)
    out = checkpoint(function, x, use_reentrant=False).sum()
    inside.clear()
    out.backward(retain_graph=True)
    assert alive == [2, 1, 0]


def test_what_nobody_will_ask_for_goes_with_its_part_of_the_graph(checkpoint, x):
    inside = []

    def function(x):
        inside.append(x.cos())
        return x.sin().exp(), inside[-1].sin()

    first, second = checkpoint(function, x, use_reentrant=False)
    inside.clear()
    first.sum().backward(retain_graph=True)  # brings back what is for second, too
    waiting = weakref.ref(inside.pop().untyped_storage())
    assert waiting() is not None
    del second
    assert waiting() is None


OPTIONS = [
    {},
    {"early_stop": False},
    {"use_reentrant": True},
    {"preserve_rng_state": False},
]
PLANS = [
    Plan.alone(["layer1", "layer2", "layer3", "layer4"]),
    Plan((("layer1", "layer2"), ("layer3", "layer4"))),
    Plan((("layer2", "layer3", "layer4"),)),
    Plan((("layer1", "layer2", "layer3", "layer4", "layer5"),)),
]
CHAINS = {
    "relu": partial(uniform_mlp, 4, 64, "relu"),
    "gelu": partial(uniform_mlp, 4, 64, "gelu"),
    "dropout": partial(uniform_mlp, 4, 64, "silu", 0.1),
    "shrinking": partial(MLP, [64, 48, 96, 20, 33, 10], "tanh"),
}


def convolutions():
    """Make layers with buffers that forward changes, and an operator in place."""
    return nn.Sequential(
        *(
            nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            )
            for _ in range(3)
        )
    )


def transformer():
    layer = partial(nn.TransformerEncoderLayer, 32, 4, 64, batch_first=True)
    return nn.Sequential(*(layer() for _ in range(3)))


MODELS = [
    *((factory, plan, (32, 64)) for factory in CHAINS.values() for plan in PLANS),
    (DocsMLP, Plan.alone(["layer1", "layer2", "layer3"]), (32, 1024)),
    (DocsMLP, Plan.alone(["layer2"]), (32, 1024)),
    (convolutions, Plan((("0", "1"), ("2",))), (8, 4, 16, 16)),
    (transformer, Plan((("0",), ("1", "2"))), (4, 16, 32)),
]


def by_torch_and_by_hand(monkeypatch, report):
    """Report with torch's function, then with ours in its place."""
    found = [report()]
    monkeypatch.setattr(checkpointing, "checkpoint", from_scratch.checkpoint)
    return [*found, report()]


def levels(timeline):
    """List the bytes alive after each event; those of no bytes left out."""
    return [e.level_bytes for e in timeline.events if e.allocation.bytes]


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("factory, plan, shape", MODELS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_predicted_bytes_and_flops_are_torchs(
    monkeypatch, factory, plan, shape, options, device
):
    x = torch.empty(shape, device="meta")
    x.requires_grad_(options.get("use_reentrant", False))
    torchs, ours = by_torch_and_by_hand(
        monkeypatch, lambda: predict(factory, x, plan, device=device, **options)
    )
    assert ours == torchs  # peak, after forward, categories, FLOPs
    assert levels(ours.timeline) == levels(torchs.timeline)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("factory, plan, shape", [*MODELS[::6], *MODELS[-2:]])
def test_measured_bytes_and_flops_are_torchs(
    monkeypatch, factory, plan, shape, options
):
    x = torch.randn(shape, requires_grad=True)
    model = factory()
    torchs, ours = by_torch_and_by_hand(
        monkeypatch, lambda: measure(model, x, plan, repeats=0, device="cpu", **options)
    )
    assert ours == torchs
    assert levels(ours.timeline) == levels(torchs.timeline)


@pytest.mark.parametrize("early_stop", [True, False])
def test_nested_bytes_are_torchs(early_stop):
    def timeline(checkpoint):
        model = uniform_mlp(6, 32).to("meta")
        x = torch.empty(64, 32, device="meta")
        call = partial(checkpoint, use_reentrant=False, early_stop=early_stop)

        def forward(x):
            for i in (0, 2, 4):
                x = call(model[i + 1], call(model[i], x))
            return x

        def step():
            model.zero_grad()
            call(lambda x: model[6](call(forward, x)), x).sum().backward()

        return record_timeline(step, model)

    torchs, ours = timeline(TORCHS), timeline(from_scratch.checkpoint)
    assert levels(ours) == levels(torchs)
    assert ours.flops == torchs.flops


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("dropout", [0, 0.1])
def test_gradients_under_a_plan_are_the_plain_ones(monkeypatch, plan, dropout):
    monkeypatch.setattr(checkpointing, "checkpoint", from_scratch.checkpoint)
    model, x = uniform_mlp(4, 16, dropout=dropout), torch.randn(8, 16)
    plain = copy.deepcopy(model)
    torch.manual_seed(0)
    training_step(plain, x)()
    torch.manual_seed(0)
    with checkpointing.checkpointed(model, plan):
        training_step(model, x)()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_a_compiled_function_goes_around_it(x):
    layer = nn.Linear(4, 4)

    def function(x):
        return from_scratch.checkpoint(lambda x: layer(x).relu().sin(), x * 2).sum()

    function(x).backward()
    expected, x.grad = x.grad, None
    torch.compile(function, backend="aot_eager")(x).backward()
    assert torch.allclose(x.grad, expected)


@pytest.mark.gpu
@BOTH
def test_on_a_gpu_dropout_autocast_and_bytes(monkeypatch, use_reentrant):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = uniform_mlp(4, 256, dropout=0.1).cuda()
    x = torch.randn(512, 256, device="cuda", requires_grad=True)
    plain = copy.deepcopy(model)
    plan, options = PLANS[1], {"use_reentrant": use_reentrant}
    torchs, ours = by_torch_and_by_hand(
        monkeypatch, lambda: measure(model, x, plan, repeats=0, **options)
    )
    assert ours == torchs
    for trained in (plain, model):
        torch.manual_seed(0)
        chosen = plan if trained is model else Plan()
        with checkpointing.checkpointed(trained, chosen, **options):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                loss = trained(x).float().sum()
            loss.backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)
