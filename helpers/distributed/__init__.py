"""The same functions on several processes, and what one rank's training step needs."""

from helpers import lazily
from helpers.distributed.launch import RankError, run
from helpers.timeline import local

# Importing FSDP2 takes a second, and not every rank needs it.
_HOMES = {"Collectives": "rank_step", "measure_step": "rank_step"}
__all__ = ["RankError", "local", "run", *_HOMES]
__getattr__ = lazily(__name__, _HOMES)
