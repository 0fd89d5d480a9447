"""Work in small steps that a notebook's kernel does while no cell is running."""

import asyncio
import contextlib
from collections.abc import Callable, Generator

PAUSE_S = 0.001  # in which the event loop delivers clicks


class IdleWork:
    """Runs one generator at a time, a step for each turn of the event loop.

    Args:
        guard: calls what it is given, and deals with its errors.
    """

    def __init__(self, guard: Callable[[Callable[[], None]], None]) -> None:
        self._guard = guard
        self._steps: Generator | None = None
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:  # no notebook: nothing is ever idle
            self.loop = None

    @property
    def active(self) -> bool:
        """Whether there is work that is not finished."""
        return self._steps is not None

    def start(self, steps: Generator, delay_s: float = PAUSE_S) -> None:
        """Drop other work, and begin with this after a while; now without a loop."""
        if self.loop is None:
            return self.run(steps)
        self.stop()
        self._steps = steps
        self._timer = self.loop.call_later(delay_s, self._guard, self._go_on)

    def run(self, steps: Generator) -> None:
        """Drop other work, and do all of this now; errors reach the caller."""
        self.stop()
        with contextlib.closing(steps):
            for _ in steps:
                pass

    def stop(self) -> None:
        """Drop the work; its ``finally`` clauses run."""
        if self.active:
            self._timer.cancel()
            self._steps.close()
            self._steps = None

    def _go_on(self) -> None:
        """Do a step, and come back for the next one."""
        try:
            next(self._steps)
            self._timer = self.loop.call_later(PAUSE_S, self._guard, self._go_on)
        except StopIteration:
            self._steps = None
