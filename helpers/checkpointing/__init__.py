"""Which layers are checkpointed, and how that is applied to a model."""

import torch
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from helpers import lazily
from helpers.checkpointing.apply import Undo, checkpointed, refuse_opaque
from helpers.checkpointing.plan import (
    Plan,
    PlanFault,
    follows,
    layer_names,
    listed_after,
    segments_of,
)

if TorchVersion(torch.__version__) < (2, 13):
    from helpers.checkpointing.torch_2_11 import checkpoint

__all__ = [
    "Plan",
    "PlanFault",
    "Undo",
    "checkpoint",
    "checkpointed",
    "follows",
    "layer_names",
    "listed_after",
    "marks",
    "refuse_opaque",
    "segments_of",
]
__getattr__ = lazily(__name__, {"marks": "_lists"})
