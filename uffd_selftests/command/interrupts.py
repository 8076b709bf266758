# SPDX-License-Identifier: GPL-2.0-only
"""Signals that end a run in order: whatever it changed is put back, whatever it started is gone."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal ends the run; pytest cleans up as it does after Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")


class Signals:
    """While it is open, SIGINT, SIGTERM and SIGHUP raise Interrupted; a second one does not disturb the clean-up."""

    def __init__(self) -> None:
        self.number = 0
        """The signal that came first; 0 as long as none came."""
        self._old: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in ENDING:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it so
                    self._old[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self.number:
            self.interrupt(number)

    def interrupt(self, number: int) -> None:
        """End the run as if this signal had come."""
        self.number = number
        raise Interrupted(number)

    def close(self) -> None:
        """Put the old handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()
