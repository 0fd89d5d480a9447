"""Two runs are held against each other by number, shape, dtype and device."""

import pytest
import torch
from torch.utils.checkpoint import CheckpointError

from helpers.from_scratch._determinism import (
    check_same,
    description,
    operator_logs,
    saves_more,
)

NO_LOGS = (None, None)
SMALL, LARGE = (description(torch.empty(n)) for n in (2, 3))


def test_a_description_leaves_out_the_values():
    assert description(torch.zeros(2)) == description(torch.ones(2)) == SMALL
    assert description(torch.zeros(2, dtype=torch.int64)) != SMALL
    assert description(torch.zeros(2, device="meta")) != SMALL


@pytest.mark.parametrize("after", [[SMALL, LARGE], [None, LARGE], [None, None]])
def test_what_matches_or_is_not_needed_passes(after):
    check_same([SMALL, LARGE], after, True, NO_LOGS)


def test_only_the_number_counts_where_nothing_is_compared():
    check_same([SMALL, LARGE], [LARGE, SMALL], False, NO_LOGS)
    with pytest.raises(CheckpointError, match="2 and 1"):
        check_same([SMALL, LARGE], [SMALL], False, NO_LOGS)


def test_every_difference_is_named():
    with pytest.raises(CheckpointError) as caught:
        check_same([SMALL, SMALL, LARGE], [SMALL, LARGE, SMALL], True, NO_LOGS)
    assert str(caught.value).endswith(
        "number 2 was float32 (2,) on cpu and came back as float32 (3,) on cpu; "
        "number 3 was float32 (3,) on cpu and came back as float32 (2,) on cpu"
    )


def test_logs_of_operators_are_written_out():
    first, second = operator_logs()
    with first:
        torch.ones(2).sin()
    with second:
        torch.ones(2).cos()
    lines = str(saves_more(7, (first, second))).splitlines()
    assert "than the 7 of" in lines[0]
    assert lines[1] == "operators in forward: aten.ones.default, aten.sin.default"
    assert lines[2] == "operators in recomputation: aten.ones.default, aten.cos.default"
