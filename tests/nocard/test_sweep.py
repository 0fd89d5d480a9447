"""Operators, layers, losses and optimizers, alone: both peaks are as predicted.

On a GPU, or under PyTorch's own CUDA code on a card that is not there (README.md).
"""

import itertools
import warnings
from collections.abc import Callable

import pytest
import torch

from helpers.checkpointing import Plan, Undo
from helpers.dry_run import autocast as casts
from helpers.dry_run import kernels
from helpers.measure import StepReport, predict
from helpers.timeline import Timeline, record_timeline
from tests.dry_run import operators as table
from tests.nocard import sweep
from tests.nocard.by_hand import allocator_of
from tests.nocard.cases import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; none is available"
    ),
]
# Cases, each by the beginning of its name, that cannot be equal.
NOT_KNOWN = {
    "index_put 0 turned": "a copy of 512 B more, of indices that are few",
    "index_put 1 turned": "the same",
    "cumprod": "its backward is another one where there is a zero",
    "prod": "its backward is another one where there is a zero",
    "complex 1 torch.bfloat16": "CUDA refuses it",
    "complex 2 torch.bfloat16": "CUDA refuses it",
    "matrix_exp": "how many powers it takes depends on the values",
    "renorm": "on meta tensors PyTorch's own backward adds up in float64",
    "affine_grid 1 torch.bfloat16": "its product is in bfloat16, if unwatched",
    "affine_grid 2 torch.bfloat16": "its product is in bfloat16, if unwatched",
    "mode 2": "it is too large for the kernel",
    "kron 2": "it is too large for the kernel",
}
# cuDNN chooses what these keep for backward, and their workspace.
RECURRENT = "LSTM LSTM_projected LSTM_both GRU RNN RNN_relu".split()
NOT_PRETENDED = {*sweep.OTHERS, *RECURRENT}


@pytest.fixture(scope="module", autouse=True)
def kept():
    """Make the kernels of meta tensors once; cuDNN's attention is not pretended."""
    with Undo() as undo:
        undo.callback(torch.backends.cuda.enable_cudnn_sdp, True)
        torch.backends.cuda.enable_cudnn_sdp(False)
        kernels.shared(undo, "casts", casts._Installed)
        kernels.shared(undo, "kernels", kernels._registered)
        yield


def in_parts(names: dict, parts: int) -> list[list[str]]:
    names = [name for name in names if name not in NOT_PRETENDED]
    return [names[part::parts] for part in range(parts)]


@pytest.mark.parametrize("names", in_parts(table.LAYERS, 4), ids=range(4))
def test_layers(names):
    assert_predicted(sweep.layers, names)


@pytest.mark.parametrize("names", in_parts(table.FUNCTIONS, 4), ids=range(4))
def test_functions(names):
    assert_predicted(sweep.functions, names)


def test_inputs_that_lie_column_by_column():
    tables = table.LAYERS | table.FUNCTIONS
    names = [name for name, (kind, _) in tables.items() if kind != "ids"]
    names = [name for name in names if name not in {*NOT_PRETENDED, "Bilinear"}]
    assert_predicted(sweep.turned_inputs, names)


def test_losses():
    assert_predicted(sweep.losses, [*table.LOSSES])


def test_optimizers():
    assert_predicted(sweep.optimizers, [*table.OPTIMIZERS])


def assert_predicted(cases: Callable, names: list[str]) -> None:
    """Hold each case's tensors and blocks against its prediction."""
    wrong, count = [], 0
    for case in cases(names):
        if any(case.name.startswith(name) for name in NOT_KNOWN):
            continue
        is_equal, told = compared(case)
        count += 1
        if not is_equal:
            wrong.append(f"{case}: {told}")
    print(f"{torch.cuda.get_device_name()}: {count - len(wrong)} of {count} equal")
    assert not wrong, "\n".join(wrong)


def compared(case: Case) -> tuple[bool, str]:
    # Convolutions without cuDNN, whose workspace is its own choice.
    with torch.backends.cudnn.flags(enabled="onv" not in case.name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that are on their way out
            try:
                predicted = prediction(case)
            except ValueError as error:
                return refused(case), str(error)
            if predicted.allocator_peak_bytes > 2**33:
                return True, "it has no room on every card"
            blocks, timeline = allocator_of(case, Plan()), watched(case)
    expected = predicted.peak_bytes, predicted.allocator_peak_bytes
    counted = timeline.peak_bytes, blocks["allocator_peak_bytes"]
    told = f"predicted {expected}, counted {counted}"
    return expected == counted, f"{told}; {difference(predicted.timeline, timeline)}"


def prediction(case: Case) -> StepReport:
    with torch.device("meta"):
        model, batch = case.make_model(), case.make_batch()
    return predict(model, batch, **case.settings)


def refused(case: Case) -> bool:
    """Say whether CUDA refuses a step as well."""
    try:
        watched(case)
    except ValueError:
        return True
    return False


def watched(case: Case) -> Timeline:
    """Record the second step of a case on the device."""
    model, batch, optimizer, step = case.on_device()
    step()
    return record_timeline(step, model, batch=batch, optimizer=optimizer)


def difference(predicted: Timeline, timeline: Timeline) -> str:
    """Tell the first storage that is made by another operator, or larger, or not."""
    rows = [
        [
            (event.phase, event.allocation.op, event.allocation.bytes)
            for event in one.events
            if event.kind == "alloc"
        ]
        for one in (predicted, timeline)
    ]
    pairs = itertools.zip_longest(*rows)
    first = next((pair for pair in pairs if pair[0] != pair[1]), None)
    return f"the first difference is {first}" if first else "the tensors are the same"


@pytest.mark.parametrize("library", sweep.IN_LIBRARIES)
def test_what_a_library_takes_is_named(library):
    for case in sweep.functions(sweep.IN_LIBRARIES[library]):
        if case.settings["autocast"] is None:
            assert library in prediction(case).unknown, case.name


@pytest.mark.parametrize("name", ["prod", "cumprod", "matrix_exp", "renorm"])
def test_what_values_decide_is_named(name):
    for case in sweep.functions([name]):
        assert name in prediction(case).unknown, case.name


def test_recurrent_layers_are_named():
    for case in sweep.layers(RECURRENT):
        assert prediction(case).unknown in (("LSTM",), ("GRU",), ("RNN",)), case.name
