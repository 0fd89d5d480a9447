"""A check prints one line: not attempted, correct or what is wrong; it never raises."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

from helpers import checks
from helpers.checkpointing import Plan, checkpointed
from helpers.checks import check_bytes, check_gradients, check_number, check_plan
from helpers.measure import memory_limit
from helpers.models import uniform_mlp

X = torch.randn(4, 1024)


def four_layers():
    return uniform_mlp(depth=4)


def small():
    return uniform_mlp(depth=2, width=8, dropout=0.5)


@pytest.fixture(autouse=True)
def nothing_was_tried_before(monkeypatch):
    monkeypatch.setattr(checks, "_tries", Counter())


@pytest.fixture
def printed(capsys):
    """Return what was printed, which has to be one line."""

    def read():
        (line,) = capsys.readouterr().out.splitlines()
        return line

    return read


@pytest.mark.parametrize("nothing", [None, ...])
@pytest.mark.parametrize(
    "check",
    [
        lambda answer: check_number(answer, 5),
        lambda answer: check_bytes(answer, 512),
        lambda answer: check_plan(answer, four_layers, X, at_most_bytes=1),
        lambda answer: check_gradients(answer, small, X[:, :8]),
    ],
)
def test_nothing_was_tried(check, nothing, printed):
    check(nothing)
    assert printed() == "not attempted"


@pytest.mark.parametrize(
    "answer, expected, line",
    [
        (5, 5, "correct: 5 layers"),
        (5.0, 5, "correct: 5 layers"),
        (torch.ones(3).mean().item(), 1, "correct: 1 layers"),
        (1999, 2000, "not yet: yours 1,999 layers, too low"),
        (1.9999, 2.0, "correct: 2.0 layers"),
        (1.9, 2.0, "not yet: yours 1.9 layers, too low"),
        (float("nan"), 2, "not yet: yours nan layers"),
        (-(10**400), 2.0, "not yet: yours -inf layers, too low"),
        (6, 5, "not yet: yours 6 layers, too high; the output counts too"),
        ("5", 5, "not yet: this is a str; a number is asked for"),
        (True, 1, "not yet: this is a bool; a number is asked for"),
        (torch.tensor(5), 5, "not yet: this is a Tensor; a number is asked for"),
    ],
)
def test_a_number(answer, expected, line, printed):
    check_number(answer, expected, unit="layers", hints={6: "the output counts too"})
    assert printed() == line


@pytest.mark.parametrize(
    "answer, ending",
    [
        (41_984, "correct: 41,984 B (41.0 KiB)"),
        (10_496, "; a float32 number takes 4 bytes"),
        (41, "; that is KiB; give bytes"),
        (41.98, "; that is kB; give bytes"),
        (41_960, "; each tensor is rounded up to whole blocks of 512 B"),
        (512, "yours 512 B, too low"),
        (1024, "; the bias alone"),
        (40, "yours 40 B, too low"),
        (float("inf"), "yours inf B (inf GiB), too high"),
        (10**400, "yours inf B (inf GiB), too high"),
        ([41_984], "this is a list; a number is asked for"),
    ],
)
def test_bytes(answer, ending, printed):
    check_bytes(answer, 41_984, hints={1024: "the bias alone"})
    assert printed().endswith(ending)


@pytest.mark.parametrize(
    "check, right, wrong",
    [
        (partial(check_number, expected=4321, unit="rows"), "4,321", (1, 9999, 2)),
        (partial(check_number, expected=0.4321), "0.4321", (0.1, 0.9, 0.1)),
        (partial(check_bytes, expected_bytes=41_984), "41,984", (10_496, 41, 512)),
        (partial(check_bytes, expected_bytes=5120, hints={1: "a"}), "5,120", (1, 1, 1)),
    ],
)
def test_the_answer_comes_at_the_third_wrong_number(check, right, wrong, printed):
    for no_number in ("1", None, ..., [1]):
        check(no_number)
        assert right not in printed()
    *first, third = wrong
    for answer in first:
        check(answer)
        line = printed()
        assert line.startswith("not yet: yours") and right not in line
    check_bytes(1, 777)  # another exercise has tries of its own
    assert "777" not in printed()
    check(third)
    assert f"expected {right}" in printed()


@pytest.mark.parametrize(
    "plan, limits, line",
    [
        (
            Plan.alone(["layer1"]),
            {"at_most_bytes": 2**30},
            "correct: peak 32.1 MiB, target at most 1.00 GiB",
        ),
        (
            Plan(),
            {"at_most_bytes": 2**20, "at_most_recompute_flops": 0},
            "not yet: peak 32.1 MiB, target at most 1.0 MiB, 31.1 MiB too much; "
            "recompute 0 FLOP, target at most 0 FLOP",
        ),
        (
            Plan((("layer1", "layer2"),)),
            {"at_most_bytes": 2**30, "at_most_recompute_flops": 0},
            "not yet: peak 32.1 MiB, target at most 1.00 GiB; "
            "recompute 16.8 MFLOP, target at most 0 FLOP, 16.8 MFLOP too much",
        ),
        (
            Plan.alone(["layer9"]),
            {"at_most_bytes": 2**30},
            "not yet: no layer named 'layer9'; this model has: "
            "layer1, layer2, layer3, layer4, layer5",
        ),
        (
            ["layer1"],
            {"at_most_bytes": 2**30},
            "not yet: this is a list; a Plan is asked for, such as "
            'Plan.alone(["layer1"]) or Plan((("layer1", "layer2"),))',
        ),
    ],
)
def test_a_plan(plan, limits, line, printed):
    check_plan(plan, four_layers, X, **limits)
    assert printed() == line


def test_a_plan_of_a_step_with_a_policy(printed):
    contexts = torch.utils.checkpoint.create_selective_checkpoint_contexts
    saved = lambda: contexts([torch.ops.aten.addmm.default])  # noqa: E731
    how = {"at_most_bytes": 2**30, "at_most_recompute_flops": 0}
    plan = Plan((("layer1", "layer2"),))
    check_plan(plan, four_layers, X, context_fn=saved, **how)
    assert printed().startswith("correct: ")


def with_checkpoint(model, x):
    with checkpointed(model, Plan.alone(["layer1", "layer2"])):
        model(x).sum().backward()


def twice(model, x):
    with_checkpoint(model, x)
    with_checkpoint(model, x)


def detached(model, x):
    model.layer3(model.layer2(model.layer1(x)).detach()).sum().backward()


def wrapped(model, x):
    model.layer1 = nn.Sequential(model.layer1)
    model(x).sum().backward()


def moved(model, x):
    model.to("meta")(x.to("meta")).sum().backward()


def switched_off(model, x):
    torch.set_grad_enabled(False)


SAME = "correct: all gradients equal the plain model's, bit for bit"
NONE = "not yet: no parameter has a gradient; did backward() run?"


@pytest.mark.parametrize(
    "function, line",
    [
        (with_checkpoint, SAME),
        (lambda model, x: ..., "not attempted"),
        (lambda model, x: model(x), NONE),
        (lambda model, x: model(x).backward(), "not yet: RuntimeError: grad can be"),
        (lambda model: None, "not yet: TypeError: "),
        (wrapped, SAME),
        (moved, NONE),
        (switched_off, NONE),
        (twice, "not yet: the gradient of layer1.0.weight differs"),
        (detached, "not yet: layer1.0.weight has no gradient, and in the plain"),
    ],
)
def test_gradients(function, line, printed):
    model = small()
    before = torch.random.get_rng_state()
    check_gradients(function, model, X[:, :8])
    assert printed().startswith(line)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_of_a_batch_with_a_target(printed):
    def train(model, x, target):
        nn.functional.cross_entropy(model(x), target).backward()

    check_gradients(train, small, (X[:, :8], torch.tensor([0, 1, 2, 3])))
    assert printed() == SAME


def plainly(model, x):
    model(x).sum().backward()


def by_checkpoint(model, x):
    x = torch.utils.checkpoint.checkpoint(model.layer1, x, use_reentrant=False)
    model[1:](x).sum().backward()


def test_what_has_to_run_again_is_counted(printed):
    again = {"layer1.0": (2, "is layer1 in a segment?"), "layer2.0": (1, "only it")}
    for train, said in (
        (by_checkpoint, SAME),
        (plainly, "not yet: is layer1 in a segment?"),
        (twice, "not yet: the gradient of layer1.0.weight differs"),
    ):
        check_gradients(train, small, X[:, :8], runs=again)
        assert printed().startswith(said)


LIMIT_BYTES = 330_000
FITS, NO_ROOM = torch.randn(1024, 8), torch.randn(40_000, 8)
REFUSED_AND_AGAIN = {"layer1.0": (3, "is it refused first, and in pairs then?")}


def trying(*plans, limit_bytes=LIMIT_BYTES):
    """Make a training function that goes on with the next plan where one is refused."""

    def train(model, x):
        for plan in plans:
            try:
                with memory_limit(limit_bytes, "cpu"), checkpointed(model, plan):
                    return plainly(model, x)
            except torch.OutOfMemoryError:
                pass
        return None

    return train


def with_no_limit_at_last(model, x):
    trying(Plan())(model, x)
    with checkpointed(model, PAIRS):
        plainly(model, x)


PAIRS = Plan((("layer1", "layer2"), ("layer3", "layer4")))


def eight():
    return uniform_mlp(depth=4, width=8, activation="gelu")


@pytest.mark.parametrize(
    "train, said",
    [
        (trying(Plan(), PAIRS), SAME),
        (plainly, "not yet: is it refused first"),
        (trying(PAIRS), "not yet: is it refused first"),
        (trying(Plan(), PAIRS, limit_bytes=2**30), "not yet: is it refused first"),
        (trying(Plan()), NONE),
        (with_no_limit_at_last, "not yet: 40,000 rows went through: where is the"),
    ],
)
def test_a_limit_and_a_retry_are_both_asked_for(train, said, printed):
    how = {"runs": REFUSED_AND_AGAIN, "too_large": NO_ROOM}
    check_gradients(train, eight, FITS, **how)
    assert printed().startswith(said)
