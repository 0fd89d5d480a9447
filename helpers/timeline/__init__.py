"""What one training step allocates and frees, in order, and what is alive when."""

from helpers.timeline.operators import (
    CATEGORIES,
    PHASES,
    Allocation,
    Observer,
    flops_of,
    local,
    map_tensors,
    same_for_same,
    state_tensors,
    tensors_in,
)
from helpers.timeline.record import Event, Peak, Timeline, record_timeline
from helpers.timeline.tracker import Tracker, counting

__all__ = [
    "CATEGORIES",
    "PHASES",
    "Allocation",
    "Event",
    "Observer",
    "Peak",
    "Timeline",
    "Tracker",
    "flops_of",
    "local",
    "map_tensors",
    "counting",
    "record_timeline",
    "same_for_same",
    "state_tensors",
    "tensors_in",
]
