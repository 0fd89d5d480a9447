"""The same functions on several processes, and what one rank's training step needs."""

from helpers.distributed.launch import RankError, run
from helpers.distributed.rank_step import Collectives, local, measure_step

__all__ = ["Collectives", "RankError", "local", "measure_step", "run"]
