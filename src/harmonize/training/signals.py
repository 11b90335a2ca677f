"""Being asked to stop: SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C end a run at the next optimiser step, which is saved."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from harmonize.functional.distributed import world_size

GRACE = 20
"""Seconds after which a run that has not come to the end of its step stops without saving."""

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))


class Interrupted(BaseException):
    """The run was asked to stop. As ``KeyboardInterrupt`` no ``Exception``, so that nothing takes it for a failure.

    Attributes:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """Handlers that note a signal, for whoever can save the run, and stop it at once where nothing is to be saved.

    Attributes:
        forward: Passes a signal on to the processes that this one has started.
        received: The signal that was noted; 0: none.
        between_steps: Whether a signal stops the run at once: while it validates, all finished steps are saved.
    """

    def __init__(self) -> None:
        self.received = 0
        self.between_steps = True
        self.forward: Callable[[int], Any] | None = None
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals over, from the main thread; again does no harm."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in STOPPING:
            before = signal.signal(signum, self._handle)
            if before != self._handle:
                self._before.setdefault(signum, before)

    def restore(self) -> None:
        """Give them back."""
        if threading.current_thread() is not threading.main_thread():
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        while self._before:
            signum, before = self._before.popitem()
            signal.signal(signum, before if before is not None else signal.SIG_DFL)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:  # a second Ctrl-C
            raise KeyboardInterrupt
        first, self.received = not self.received, self.received or signum
        if first and self.forward is not None and signum != signal.SIGINT:  # a terminal sends Ctrl-C to all of them
            self.forward(signum)
        if self.between_steps:
            raise Interrupted(self.received)
        if first:
            if signum == signal.SIGINT:
                print("harmonize: finishing the step and saving; Ctrl-C again stops at once.", file=sys.stderr)
            signal.signal(signal.SIGALRM, self._too_late)
            signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _too_late(self, signum: int, frame: FrameType | None) -> None:
        raise Interrupted(self.received)


class Agreement:
    """Lets all ranks learn the largest of their whole numbers, one call later, without anyone waiting for it."""

    def __init__(self) -> None:
        self._group: Any = None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def largest(self, value: int) -> int:
        """The largest value that any rank gave in the call before; with one rank that of this call."""
        if world_size() == 1:
            return value
        found = self.finish()
        if self._group is None:  # numbers of the host: NCCL would need the device, and a wait for it
            self._group = dist.new_group(backend="gloo")
        number = torch.tensor([value])
        self._pending = dist.all_reduce(number, dist.ReduceOp.MAX, self._group, async_op=True), number
        return found

    def finish(self) -> int:
        """What the call before has found; 0 if there was none."""
        if self._pending is None:
            return 0
        work, number = self._pending
        self._pending = None
        work.wait()
        return int(number)


def exit_code(signum: int) -> int:
    """What a shell shows for a process that a signal ended.

    >>> exit_code(15)
    143
    """
    return 128 + signum
