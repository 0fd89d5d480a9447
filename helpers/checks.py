"""Check a reader's answers: each check prints one line, and never raises."""

import contextlib
import copy
import math
import numbers
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from helpers.checkpointing import Plan
from helpers.measure import predict, random_numbers_kept, training_step
from helpers.units import BLOCK_BYTES, format_bytes, format_flops

_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_tries: Counter[tuple] = Counter()  # wrong numbers so far; the third is told the answer


def check_number(
    answer: object,
    expected: float,
    *,
    unit: str = "",
    hints: Mapping[float, str] | None = None,
) -> None:
    """Print whether a number is right: exact where an int is expected, else to 0.1 %.

    Args:
        hints: what to say to a wrong number, by that number.
    """
    unit = unit and f" {unit}"
    _check(answer, expected, lambda value: f"{value:,}{unit}", hints)


def check_bytes(
    answer: object, expected_bytes: int, *, hints: Mapping[float, str] | None = None
) -> None:
    """Print whether a number of bytes is right, and which usual slip it shows."""
    _check(answer, expected_bytes, _bytes_in_words, hints, _byte_slip)


def check_plan(
    plan: object,
    model_or_factory: nn.Module | Callable[[], nn.Module],
    batch: object,
    *,
    at_most_bytes: int,
    at_most_recompute_flops: int | None = None,
    **how: object,
) -> None:
    """Predict a plan's step and print its peak, and its recompute where asked, beside
    the targets.

    Args:
        model_or_factory, batch, how: as in ``predict``.
    """
    if _not_attempted(plan):
        return
    if not isinstance(plan, Plan):
        print(
            f"not yet: this is a {type(plan).__name__}; a Plan is asked for, such as "
            'Plan.alone(["layer1"]) or Plan((("layer1", "layer2"),))'
        )
        return
    try:
        report = predict(model_or_factory, batch, plan, **how)
    except Exception as error:
        print(f"not yet: {_first_line(error)}")
        return
    parts = [_against(report.peak_bytes, at_most_bytes, "peak", format_bytes)]
    if at_most_recompute_flops is not None:
        flops = report.recompute_flops, at_most_recompute_flops
        parts.append(_against(*flops, "recompute", format_flops))
    verdict = "correct" if all(fits for fits, _ in parts) else "not yet"
    print(f"{verdict}: {'; '.join(words for _, words in parts)}")


def check_gradients(
    function: Callable[..., object],
    model_or_factory: nn.Module | Callable[[], nn.Module],
    batch: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    *,
    runs: Mapping[str, tuple[int, str]] | None = None,
    too_large: torch.Tensor | None = None,
) -> None:
    """Print whether a training function leaves the plain model's gradients, each bit.

    Args:
        function: called with a model and ``x``, or with a model, ``x`` and the target;
            runs forward, loss and backward. It is given a copy of the model.
        batch: as in ``predict``, whose default loss the right gradients are of; both
            steps draw the same random numbers.
        runs: how often modules are called in it, and what to say where they are not.
        too_large: a batch that has no room, and that must not be trained on.
    """
    if _not_attempted(function):
        return
    is_made, counts = isinstance(model_or_factory, nn.Module), Counter()
    model = copy.deepcopy(model_or_factory) if is_made else model_or_factory()
    model.zero_grad(set_to_none=True)
    plain, other = copy.deepcopy(model), copy.deepcopy(model)
    weights = dict(model.named_parameters())  # the function may rename them
    for name in runs or ():
        note = partial(lambda name, *_: counts.update([name]), name)
        model.get_submodule(name).register_forward_pre_hook(note)
    with random_numbers_kept(), torch.enable_grad():
        torch.manual_seed(0)
        training_step(plain, batch)()
        torch.manual_seed(0)
        told = _said_of(function, model, batch) or _compare_gradients(plain, weights)
        wrong = [why for name, (n, why) in (runs or {}).items() if counts[name] != n]
        if not wrong and too_large is not None and _trains(function, other, too_large):
            wrong = [f"{len(too_large):,} rows went through: where is the limit?"]
    print(f"not yet: {wrong[0]}" if wrong and told.startswith("correct") else told)


def _said_of(function: Callable, model: nn.Module, batch: object) -> str | None:
    """Run a training function; say what is wrong if it does not come to its end."""
    try:
        returned = function(model, *(batch if isinstance(batch, tuple) else (batch,)))
    except Exception as error:
        return f"not yet: {type(error).__name__}: {_first_line(error)}"
    return "not attempted" if returned is ... else None


def _trains(function: Callable, model: nn.Module, x: torch.Tensor) -> bool:
    with contextlib.suppress(Exception):
        function(model, x)
        return all(parameter.grad is not None for parameter in model.parameters())
    return False


def _check(
    answer: object,
    expected: float,
    in_words: Callable[[float], str],
    hints: Mapping[float, str] | None,
    slip: Callable[[float, int], str] | None = None,
) -> None:
    if _not_attempted(answer):
        return
    if not isinstance(answer, numbers.Real) or isinstance(answer, bool):
        print(f"not yet: this is a {type(answer).__name__}; a number is asked for")
        return
    if abs(answer) > 1e18:  # which may be more than a float can hold
        answer = math.inf if answer > 0 else -math.inf
    answer = int(answer) if isinstance(answer, numbers.Integral) else float(answer)
    close = isinstance(expected, float) and math.isclose(answer, expected, rel_tol=1e-3)
    if answer == expected or close:
        print(f"correct: {in_words(expected)}")
        return
    exercise = in_words(expected), *(hints or ())
    _tries[exercise] += 1
    line = f"not yet: yours {in_words(answer)}"
    if _tries[exercise] > 2:
        line += f", expected {in_words(expected)}"
    elif answer == answer:  # which a nan is not
        line += f", too {'low' if answer < expected else 'high'}"
    hint = (hints or {}).get(answer) or (slip and slip(answer, expected))
    print(f"{line}; {hint}" if hint else line)


def _byte_slip(answer: float, expected_bytes: int) -> str:
    """Recognise the usual slips in counting bytes; nothing if it is none of them."""
    if math.isclose(4 * answer, expected_bytes, rel_tol=1e-3):
        return "a float32 number takes 4 bytes"
    for name, size in _UNITS.items():
        if round(expected_bytes / size, 1) == round(answer, 1) > 0:
            return f"that is {name}; give bytes"
    close = math.isclose(answer, expected_bytes, rel_tol=1e-2)
    if close and expected_bytes % BLOCK_BYTES == 0 and answer % BLOCK_BYTES:
        return f"each tensor is rounded up to whole blocks of {BLOCK_BYTES} B"
    return ""


def _bytes_in_words(n_bytes: float) -> str:
    exact = f"{n_bytes:,} B"
    return exact if abs(n_bytes) < 1024 else f"{exact} ({format_bytes(n_bytes)})"


def _compare_gradients(plain: nn.Module, weights: dict[str, nn.Parameter]) -> str:
    """Say whether two models' gradients are the same; name the first that is not."""
    gradients = {name: weight.grad for name, weight in weights.items()}
    if all(gradient is None for gradient in gradients.values()):
        return "not yet: no parameter has a gradient; did backward() run?"
    for name, parameter in plain.named_parameters():
        ours, right = gradients[name], parameter.grad
        if ours is None and right is not None:
            return f"not yet: {name} has no gradient, and in the plain model it has"
        if ours is not None and (right is None or not torch.equal(ours, right)):
            return f"not yet: the gradient of {name} differs from the plain model's"
    return "correct: all gradients equal the plain model's, bit for bit"


def _against(
    value: int, at_most: int, name: str, in_words: Callable
) -> tuple[bool, str]:
    """Hold a value against its limit: whether it fits, and the words for it."""
    words = f"{name} {in_words(value)}, target at most {in_words(at_most)}"
    if value > at_most:
        words += f", {in_words(value - at_most)} too much"
    return value <= at_most, words


def _not_attempted(answer: object) -> bool:
    """Say that nothing was tried, where nothing was."""
    if answer is not None and answer is not ...:
        return False
    print("not attempted")
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
