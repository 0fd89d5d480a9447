"""What one training step allocates and frees, in order, and what is alive when."""

from helpers.timeline.record import Event, Peak, Timeline, record_timeline
from helpers.timeline.tracker import (
    CATEGORIES,
    PHASES,
    Allocation,
    Tracker,
    state_tensors,
    tensors_in,
)

__all__ = [
    "CATEGORIES",
    "PHASES",
    "Allocation",
    "Event",
    "Peak",
    "Timeline",
    "Tracker",
    "record_timeline",
    "state_tensors",
    "tensors_in",
]
