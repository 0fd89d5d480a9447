"""Units: what a reader sees of a number."""

import math

import pytest
import torch

from helpers.units import (
    format_bytes,
    format_change,
    format_flops,
    format_ms,
    parse_bytes,
    round_to_block,
)

MIB = 2**20


@pytest.mark.parametrize(
    ("n_bytes", "rounded"),
    [(0, 0), (1, 512), (4, 512), (511, 512), (512, 512), (513, 1024), (40_960, 40_960)],
)
def test_blocks_are_whole_512_bytes(n_bytes, rounded):
    assert round_to_block(n_bytes) == rounded


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (1023, "1,023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (403_097_600, "384.4 MiB"),
        (17_141_248, "16.3 MiB"),
        (1000 * MIB, "1,000.0 MiB"),
        (MIB - 1, "1.0 MiB"),  # and not 1,024.0 KiB
        (1024 * MIB - 1, "1.00 GiB"),
        (2**40, "1,024.00 GiB"),  # there is no larger unit
        (-3 * MIB, "−3.0 MiB"),
        (-5, "−5 B"),
    ],
)
def test_bytes_are_in_binary_units(n_bytes, text):
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(2048, "+2.0 KiB"), (-2048, "−2.0 KiB"), (0, "0 B")]
)
def test_signed_bytes_carry_a_sign_unless_zero(n_bytes, text):
    assert format_bytes(n_bytes, signed=True) == text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0.4211, "0.421 ms"),
        (12.34, "12.3 ms"),
        (99.97, "100 ms"),
        (384.4, "384 ms"),
        (999.4, "999 ms"),
        (999.7, "1.00 s"),
        (1254, "1.25 s"),
    ],
)
def test_milliseconds(milliseconds, text):
    assert format_ms(milliseconds) == text


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (0, "0 FLOP"),
        (640, "640 FLOP"),
        (1_300_000, "1.3 MFLOP"),
        (999_960, "1.0 MFLOP"),
        (2_210_000_000, "2.2 GFLOP"),
        (7 * 10**15, "7,000.0 TFLOP"),
    ],
)
def test_flops_are_in_decimal_units(flops, text):
    assert format_flops(flops) == text


@pytest.mark.parametrize(
    ("after", "before", "text"),
    [(109, 100, "+9 %"), (69, 100, "−31 %"), (100.4, 100, "±0 %"), (99.6, 100, "±0 %")],
)
def test_changes_are_whole_per_cent(after, before, text):
    assert format_change(after, before) == text


@pytest.mark.parametrize(
    ("written", "n_bytes"),
    [
        (512, 512),
        (8e9, 8 * 10**9),
        (torch.tensor(7), 7),
        ("8 GiB", 8 * 2**30),
        ("512MiB", 512 * 2**20),
        ("1.5 GB", 1_500_000_000),
        (" .5 kib ", 512),
        ("64 B", 64),
        ("1 TB", 10**12),
    ],
)
def test_bytes_are_read_as_they_are_written(written, n_bytes):
    assert parse_bytes(written) == n_bytes


@pytest.mark.parametrize(
    "written",
    ["8 apples", "GiB", "8", "", "-1 GiB", "nan GiB", "1e3 MB", "8 GiB of it", None]
    + [True, 0, -1, 0.5, 2**60, 2**70, math.nan, math.inf, [8], torch.tensor(0.5)],
)
def test_what_is_no_size_of_a_memory(written):
    with pytest.raises(ValueError) as error:
        parse_bytes(written)
    assert str(error.value) == (
        "memory is a whole number of bytes above 0, below 1 EiB, or a text such "
        f'as "8 GiB", "512 MiB" or "1.5 GB", not {written!r}'
    )
