"""Where autograd is at its edges, checkpointing by hand gives and refuses as torch's.

Each case is run with both; equal to the bit, or an error of the same type.
"""

import warnings

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.utils.checkpoint as theirs
from torch import func, nn
from torch.autograd.functional import jacobian
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from helpers import from_scratch

X = torch.linspace(0.1, 1, 6).view(2, 3)


def f(x):
    return (x.sin() * x.exp()).cos()


def leaf():
    return X.clone().requires_grad_()


def gradient(function, x=None):
    """Make a case of a function that is checkpointed whole."""

    def case(checkpoint):
        start = leaf() if x is None else x.detach().clone().requires_grad_()
        start.grad = None
        checkpoint(function, start).abs().sum().backward()
        return start.grad

    return case


# Transforms --------------------------------------------------------------------------


def parameters():
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    return model, {name: torch.randn_like(p) for name, p in model.named_parameters()}


def ensemble(checkpoint):
    weights = torch.linspace(0, 1, 18).view(2, 3, 3)
    one = func.vmap(lambda w, x: checkpoint(lambda y: f(y @ w), x), (0, None))
    return one(weights, X)


def dropout_by_rows(checkpoint):
    torch.manual_seed(0)
    rows = func.vmap(lambda x: checkpoint(nn.functional.dropout, x), randomness="same")
    return rows(X)


def vmap_then_backward(checkpoint):
    x = leaf()
    return torch.autograd.grad(func.vmap(lambda a: checkpoint(f, a))(x).sum(), x)[0]


def jvp_then_backward(checkpoint):
    x = leaf()
    _, tangent = func.jvp(lambda a: checkpoint(f, a), (x,), (X,))
    return torch.autograd.grad(tangent.sum(), x)[0]


def other_parameters(checkpoint):
    model, others = parameters()
    others = {name: p.requires_grad_() for name, p in others.items()}
    call = checkpoint(lambda x: func.functional_call(model, others, (x,)), X)
    return torch.autograd.grad(call.square().sum(), others["weight"])[0]


TRANSFORMS = {
    "vmap": lambda c: func.vmap(lambda a: c(f, a))(X),
    "vmap of vmap": lambda c: func.vmap(func.vmap(lambda a: c(f, a)))(X),
    "vmap, then backward": vmap_then_backward,
    "ensemble": ensemble,
    "dropout by rows": dropout_by_rows,
    "jvp": lambda c: func.jvp(lambda a: c(f, a), (X,), (X,))[1],
    "jvp, then backward": jvp_then_backward,
    "jacfwd": lambda c: func.jacfwd(lambda a: c(f, a))(X),
    "jacrev": lambda c: func.jacrev(lambda a: c(f, a))(X),
    "grad": lambda c: func.grad(lambda a: c(f, a).sum())(X),
    "vjp": lambda c: func.vjp(lambda a: c(f, a), X)[1](X)[0],
    "hessian": lambda c: func.hessian(lambda a: c(f, a).sum())(X),
    "vmap of grad": lambda c: func.vmap(func.grad(lambda a: c(f, a).sum()))(X),
    "linearize": lambda c: func.linearize(lambda a: c(f, a), X)[1](X),
    "functionalize": lambda c: func.functionalize(lambda a: c(f, a))(X),
    "jacobian": lambda c: jacobian(lambda a: c(f, a), X),
    "jacobian by vmap": lambda c: jacobian(lambda a: c(f, a), X, vectorize=True),
    "jacobian forward": lambda c: jacobian(
        lambda a: c(f, a), X, vectorize=True, strategy="forward-mode"
    ),
    "functional_call": other_parameters,
}


# Forward mode ------------------------------------------------------------------------


def tangent(checkpoint):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(X, X.flip(0))
        return forward_ad.unpack_dual(checkpoint(f, x)).tangent


def tangent_of_weight(checkpoint):
    with forward_ad.dual_level():
        w = forward_ad.make_dual(torch.ones(3, 3), torch.eye(3))
        return forward_ad.unpack_dual(checkpoint(lambda x: f(x @ w), X)).tangent


def gradient_of_tangent(checkpoint):
    x = leaf()
    with forward_ad.dual_level():
        out = checkpoint(f, forward_ad.make_dual(x, X.flip(0)))
        return torch.autograd.grad(forward_ad.unpack_dual(out).tangent.sum(), x)[0]


# What a segment holds ----------------------------------------------------------------


class OnContext(torch.autograd.Function):
    """Keeps a tensor as an attribute, where no hook sees it."""

    @staticmethod
    def forward(ctx, x):
        ctx.y = x.exp()
        return x * ctx.y

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.y * 2


class Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return gradient * y * x


class ReadsTwice(Saves):
    @staticmethod
    def backward(ctx, gradient):
        return ctx.saved_tensors[0] * ctx.saved_tensors[1] * gradient


def own_hooks(x):
    with saved_tensors_hooks(lambda t: t.double(), lambda t: t.float()):
        return f(x)


def hooks_on_a_part(x):
    y = x.sin()
    with save_on_cpu():
        y = y.exp()
    return y.cos()


def hooks_around(checkpoint):
    x = leaf()
    with save_on_cpu():
        y = checkpoint(f, x)
    return torch.autograd.grad(y.sum(), x)[0]


def complex_weights(checkpoint):
    x, w = leaf(), torch.ones(3, 3, dtype=torch.cfloat, requires_grad=True)

    def waves(x):
        parts = torch.view_as_complex(torch.view_as_real(w) * 2).sum()
        return torch.fft.irfft(torch.fft.fft(x) @ w * w.conj().sum() + parts)

    found = torch.autograd.grad(checkpoint(waves, x).sum(), (x, w))
    return torch.cat([part.abs().flatten() for part in found])


def refers_to_its_output(checkpoint):
    box = []

    def keep(x):
        box.append(f(x))
        return box[-1]

    x = leaf()
    return torch.autograd.grad(checkpoint(keep, x).sum(), x)[0]


def passes(*retain):
    def case(checkpoint):
        x = leaf()
        loss = checkpoint(f, x).sum()
        for keep in retain:
            loss.backward(retain_graph=keep)
        return x.grad

    return case


def second_derivative(checkpoint):
    x = leaf()
    (first,) = torch.autograd.grad(checkpoint(f, x).sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def in_anomaly_mode(function):
    def case(checkpoint):
        with warnings.catch_warnings(action="ignore"):
            with torch.autograd.detect_anomaly():
                return gradient(function)(checkpoint)

    return case


def nested(depth):
    def case(checkpoint):
        def deep(x, left=depth):
            if not left:
                return f(x)
            return checkpoint(lambda y: deep(y, left - 1) * 1.01, x)

        return gradient(lambda x: deep(x))(lambda function, x: function(x))

    return case


def many(checkpoint):
    def chain(x):
        for _ in range(5000):
            x = checkpoint(torch.sin, x)
        return x

    return gradient(chain)(lambda function, x: function(x))


CASES = TRANSFORMS | {
    "tangent": tangent,
    "tangent of a weight": tangent_of_weight,
    "gradient of a tangent": gradient_of_tangent,
    "a tensor on ctx": gradient(OnContext.apply),
    "a tensor on ctx, last": gradient(lambda x: OnContext.apply(x.sin())),
    "a Function last": gradient(lambda x: Saves.apply(x.sin())),
    "a Function first": gradient(lambda x: Saves.apply(x).sin()),
    "saved tensors read twice": gradient(ReadsTwice.apply),
    "hooks inside": gradient(own_hooks),
    "hooks on a part": gradient(hooks_on_a_part),
    "hooks around": hooks_around,
    "complex weights": complex_weights,
    "complex input": gradient(f, X.to(torch.cfloat)),
    "refers to its output": refers_to_its_output,
    "backward twice": passes(True, False),
    "backward twice, not kept": passes(False, False),
    "second derivative": second_derivative,
    "in place": gradient(lambda x: x.exp().relu_().mul_(2).sin_()),
    "in place on the input": gradient(lambda x: x.mul_(2).sin()),
    "anomaly mode": in_anomaly_mode(f),
    "anomaly found": in_anomaly_mode(lambda x: (x * 0).sqrt() * 0),
    "nested": nested(12),
    "5,000": many,
}


def outcome(case, checkpoint, use_reentrant):
    try:
        return case(lambda *args: checkpoint(*args, use_reentrant=use_reentrant))
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_the_same_result_or_the_same_kind_of_error(name, use_reentrant):
    torchs, ours = (
        outcome(CASES[name], checkpoint, use_reentrant)
        for checkpoint in (theirs.checkpoint, from_scratch.checkpoint)
    )
    if isinstance(torchs, Exception):
        assert type(ours) is type(torchs), f"{ours!r} is not {torchs!r}"
        assert len(str(ours).split()) > 3
    elif torchs is None:  # a tangent that is lost
        assert ours is None
    else:
        assert isinstance(ours, torch.Tensor), repr(ours)
        assert torch.equal(ours, torchs)


@pytest.mark.filterwarnings("ignore")
def test_most_cases_have_a_result():
    found = [outcome(case, theirs.checkpoint, False) for case in CASES.values()]
    assert sum(isinstance(one, torch.Tensor) for one in found) > 0.6 * len(CASES)
