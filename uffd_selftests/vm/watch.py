# SPDX-License-Identifier: GPL-2.0-only
"""What can be learned from a guest's two streams: the suite's KTAP, and the console with all the rest."""

from __future__ import annotations

import re
from collections import deque

from uffd_selftests.harness.reporter import NOTE

ALIVE = re.compile(r"Linux version ")
"""The first thing any kernel says: the virtual machine works."""
PANIC = re.compile(r"Kernel panic - not syncing: (.*)")
RESULT = re.compile(r"(?P<ok>(?:not )?ok) (?P<number>\d+) (?P<name>[^#]*?)(?: # (?P<directive>\w+) ?(?P<reason>.*))?$")
PLAN = re.compile(r"1\.\.(\d+)")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")

OWN = "uffd-selftests: "
TAIL = 200
"""How many of the console's last lines are remembered, at most back to the beginning of the case."""
SHOWN = 25
"""How many of them a diagnostic shows."""


class Lines:
    """Cuts a stream into lines as they become complete."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[str]:
        """Return the lines that this chunk completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return [CONTROL.sub("", line.decode(errors="replace").rstrip("\r")) for line in lines]


class Watch:
    """Remembers what a guest said so far."""

    def __init__(self) -> None:
        self.alive = False
        """The kernel said something."""
        self.spoke = False
        """The suite began."""
        self.panic = ""
        """What the kernel died of."""
        self.planned = 0
        self.results: list[re.Match[str]] = []
        self.totals = ""
        """The counts of all results, when the suite came to its end."""
        self.messages: list[str] = []
        """What the suite said for people."""
        self._case = ""
        self._tail: deque[str] = deque(maxlen=TAIL)

    @property
    def running(self) -> str:
        """The case that had begun and has no result; empty between cases."""
        return "" if self.results and self.results[-1]["name"] == self._case else self._case

    def console(self, line: str) -> bool:
        """Take a line of the console; returns whether it is a sign of progress."""
        _, note, case = line.partition(NOTE)
        if note:
            self._case = case
            self._tail.clear()  # what was said before has been looked at, and would only mislead
            return True
        if line.strip():
            self._tail.append(line)
        if line.startswith(OWN):
            self.messages.append(line.removeprefix(OWN))
        self.alive = self.alive or bool(ALIVE.search(line))
        panic = PANIC.search(line)
        if panic and not self.panic:
            self.panic = panic[1].strip()
        return False

    def ktap(self, line: str) -> None:
        """Take a line of the suite's KTAP."""
        self.spoke = self.alive = True
        if match := RESULT.match(line):
            self.results.append(match)
        elif match := PLAN.match(line):
            self.planned = int(match[1])
        elif line.startswith("# Totals: "):
            self.totals = line.removeprefix("# Totals: ")

    def last_words(self) -> list[str]:
        """Return the console's end, from the beginning of its last complaint if that is near."""
        lines = list(self._tail)
        begin = next((i for i, line in enumerate(lines) if re.search(r"(BUG|Oops|WARNING|Kernel panic).*:", line)), 0)
        return lines[max(begin, 0) :][:SHOWN] if begin else lines[-SHOWN:]
