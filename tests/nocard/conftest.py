"""Thousands of collections, each of which need not look at what was there before."""

import gc

import pytest
import torch

from helpers.measure import predict


@pytest.fixture(scope="module", autouse=True)
def little_to_collect():
    """Load what a prediction loads, and leave it all to no collector."""
    x = torch.empty(3, 3, device="meta")
    assert predict(lambda: torch.nn.Linear(3, 3), x).allocator_peak_bytes
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
