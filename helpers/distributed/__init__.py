"""The same functions on several processes, and what one rank's training step needs."""

from helpers.distributed.launch import RankError, run
from helpers.distributed.rank_step import Collectives, measure_step
from helpers.timeline import local

__all__ = ["Collectives", "RankError", "local", "measure_step", "run"]
