"""Which layers are checkpointed, and how that is applied to a model."""

from helpers.checkpointing.torch_2_11 import checkpoint  # isort: skip
from helpers.checkpointing._contexts import ContextFault, policy_failed
from helpers.checkpointing._lists import NoSegment, marks, refuse_handed_on
from helpers.checkpointing.apply import checkpointed
from helpers.checkpointing.plan import (
    Plan,
    follows,
    layer_names,
    listed_after,
    segments_of,
)

__all__ = [
    "ContextFault",
    "NoSegment",
    "Plan",
    "checkpoint",
    "checkpointed",
    "follows",
    "layer_names",
    "listed_after",
    "marks",
    "policy_failed",
    "refuse_handed_on",
    "segments_of",
]
