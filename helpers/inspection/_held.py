"""What a value holds: an object's attributes, and lists and dicts that can be put back.

What belongs to the whole process, such as functions, classes and modules, is left out.
"""

import types

import torch
from torch import nn

from helpers.dry_run.put_back import refill

_WHOLE = (torch.Tensor, nn.Module, types.ModuleType, str, int, float, torch.Generator)


def is_whole(value: object) -> bool:
    """Say whether nobody looks into a value."""
    return isinstance(value, _WHOLE) or callable(value)


def vars_of(value: object) -> dict | None:
    """Take an object's attributes, those in slots too; None if it has none."""
    slots = getattr(type(value), "__slots__", ())
    named = {n: getattr(value, n) for n in slots if hasattr(value, n)} if slots else {}
    own = getattr(value, "__dict__", None)
    return {**named, **(own or {})} if named or own is not None else None


def copies_in(value: object, deep: int = 7) -> list[tuple]:
    """Copy the lists and dicts in a value, those of objects' attributes too."""
    if is_whole(value) or not deep:
        return []
    if not isinstance(value, list | dict | tuple):
        value = getattr(value, "__dict__", ())
    items = value.values() if isinstance(value, dict) else value
    inner = [copies_in(item, deep - 1) for item in items if item is not None]
    copies = [] if isinstance(value, tuple) or not value else [(value, value.copy())]
    return sum(inner, copies)


def put_back(copies: list[tuple]) -> None:
    """Put back those that have changed."""
    for value, before in copies:
        refill(value, before)
