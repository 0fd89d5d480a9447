"""Work in small steps that a notebook's kernel does while no cell is running."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from typing import ClassVar

PAUSE_S = 0.001  # in which the event loop delivers clicks


class IdleWork:
    """Runs one generator at a time, a step for each turn of the event loop.

    Args:
        guard: calls what it is given, and deals with its errors.
        interrupted: called without arguments when an interrupt has ended the work.
    """

    _started: ClassVar[set["IdleWork"]] = set()  # of all panels
    _busy: ClassVar[bool] = False

    def __init__(
        self,
        guard: Callable[[Callable[[], None]], None],
        interrupted: Callable[[], None],
    ) -> None:
        self._guard, self._interrupted = guard, interrupted
        self._steps: Generator | None = None
        self._asked = False  # to end
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
        self._steps, self._asked = steps, False
        self._started.add(self)
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
            self._end()

    def _end(self) -> None:
        self._steps = None
        self._started.discard(self)
        self._listen()

    def _go_on(self) -> None:
        """Do a step, and come back for the next one."""
        try:
            if not self._asked:
                next(self._steps)
        except StopIteration:
            return self._end()
        except KeyboardInterrupt:
            self._asked = True
        if self._asked:
            self.stop()
            self._interrupted()
        else:
            self._timer = self.loop.call_later(PAUSE_S, self._guard, self._go_on)

    @classmethod
    @contextlib.contextmanager
    def interruptible(cls) -> Iterator[None]:
        """Let Kernel → Interrupt end what is done in here, and all that is started.

        Where no cell runs, the kernel ignores it; who else listens to it goes on.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        was_busy, cls._busy = cls._busy, True
        cls._listen()
        try:
            yield
        finally:
            cls._busy = was_busy
            cls._listen()

    @classmethod
    def _listen(cls) -> None:
        """Hear interrupts in the place of nobody, as long as there is work."""
        if threading.current_thread() is threading.main_thread():
            now, other = signal.SIG_IGN, cls._hear
            if not (cls._busy or cls._started):
                now, other = other, now
            if signal.getsignal(signal.SIGINT) == now:
                signal.signal(signal.SIGINT, other)

    @classmethod
    def _hear(cls, *_: object) -> None:
        """End the step that runs, once; between steps, or if it is lost, the next."""
        asked_before = any(work._asked for work in cls._started)
        for work in cls._started:
            work._asked = True
        if cls._busy and not asked_before:
            raise KeyboardInterrupt
