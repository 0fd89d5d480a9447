"""Bytes, milliseconds and FLOPs as people read them, formatted in one place."""

import contextlib
import operator
import re

BLOCK_BYTES = 512  # the CUDA caching allocator hands out multiples of this


def round_to_block(n_bytes: int) -> int:
    """Round up to the block that PyTorch's CUDA caching allocator hands out.

    Source: ``kMinBlockSize`` in c10/cuda/CUDACachingAllocator.
    """
    return -(-n_bytes // BLOCK_BYTES) * BLOCK_BYTES


def format_bytes(n_bytes: int, signed: bool = False) -> str:
    """Format bytes in binary units: 512 B, 1.5 KiB, 384.4 MiB, 1.21 GiB."""
    sign = "−" if n_bytes < 0 else "+" if signed and n_bytes > 0 else ""
    value = abs(n_bytes)
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if round(value / size, 4) >= 1:  # 1,023.96 MiB is written as 1.00 GiB
            digits = 2 if unit == "GiB" else 1
            return f"{sign}{value / size:,.{digits}f} {unit}"
    return f"{sign}{value:,} B"


_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(value: int | str) -> int:
    """Read bytes as people write them: 512, "8 GiB", "512 MiB", "1.5 GB".

    Raises:
        ValueError: for anything else, and for what is no size of a memory.
    """
    n_bytes: float | None = None
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?|\.\d+)\s*([A-Za-z]+)\s*", value)
        if found and found[2].upper() in _UNITS:
            n_bytes = int(float(found[1]) * _UNITS[found[2].upper()])
    elif isinstance(value, float) and value.is_integer():
        n_bytes = int(value)
    elif not isinstance(value, bool):
        with contextlib.suppress(TypeError):
            n_bytes = operator.index(value)
    if n_bytes is None or not 0 < n_bytes < 2**60:
        raise ValueError(
            "memory is a whole number of bytes above 0, below 1 EiB, or a text such "
            f'as "8 GiB", "512 MiB" or "1.5 GB", not {value!r}'
        )
    return n_bytes


def format_ms(milliseconds: float) -> str:
    """Format a duration: 0.42 ms, 12.3 ms, 1.25 s."""
    if round(milliseconds) >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.3g} ms" if milliseconds < 100 else f"{milliseconds:.0f} ms"


def format_flops(flops: int) -> str:
    """Format floating-point operations: 640 FLOP, 1.3 MFLOP, 2.2 GFLOP."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if round(flops / size, 4) >= 1:
            return f"{flops / size:,.1f} {unit}FLOP"
    return f"{flops} FLOP"


def format_change(after: float, before: float) -> str:
    """Format a relative change in whole per cent: +9 %, −31 %, ±0 %."""
    percent = round(100 * (after / before - 1))
    return f"{percent:+d} %".replace("-", "−") if percent else "±0 %"
