# SPDX-License-Identifier: GPL-2.0-only
"""The kernel's own opinion: what it logged, how it tainted itself, what it lost since somebody last asked.

Sources: /dev/kmsg (Documentation/ABI/testing/dev-kmsg) and /proc/sys/kernel/tainted
(Documentation/admin-guide/tainted-kernels.rst).
"""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path

from uffd_selftests.harness import proc
from uffd_selftests.machine.facts import KMSG
from uffd_selftests.machine.hugepages import HugepageCounts, hugepages

TAINTED = "/proc/sys/kernel/tainted"

TAINTS = "PFSRMBUDAWCIOELKXTNJ"
"""The letters of the taint flags, lowest bit first."""
DEFECT_TAINTS = "MBDWL"
"""Flags that come from a defect: machine check, bad page, oops, warning, lockup. The others come from modules."""

RULES = Path(__file__).with_name("health_patterns.txt")

MAX_COMPLAINT_LINES = 20

NOTE = "uffd-selftests: case "
"""What stands before the name of a case that begins, in the kernel's log."""

PAGES_BACK_SECONDS = 2.0
"""How long huge pages may take to come back after their process is gone: the kernel can free them in the background."""


class Patterns:
    """The rules that tell a complaint from ordinary talk in the kernel log."""

    def __init__(self, text: str) -> None:
        rules: dict[str, list[str]] = {"complaint": [], "harmless": []}
        section = ""
        for line in map(str.strip, text.splitlines()):
            if line.startswith("[") and line.endswith("]") and line[1:-1] in rules:
                section = line[1:-1]
            elif line and not line.startswith("#"):
                rules[section].append(line)
        if not rules["complaint"]:
            raise ValueError("no patterns for complaints: every log would look clean")
        self._complaint = re.compile("|".join(f"(?:{rule})" for rule in rules["complaint"]))
        self._harmless = re.compile("|".join(f"(?:{rule})" for rule in rules["harmless"]) or "(?!)")

    @classmethod
    def load(cls) -> Patterns:
        """Return the rules that come with the package."""
        return cls(RULES.read_text())

    def complains(self, text: str) -> bool:
        """Whether one record of the log is a complaint."""
        return bool(self._complaint.search(text)) and not self._harmless.search(text)


class HugepageUse:
    """Watches how many pages of a huge page pool are taken, from its making on."""

    def __init__(self, size: int) -> None:
        self._size = size
        counts = self._counts()
        self.available = counts.available
        """How many pages nobody had or was promised at first."""
        self._before = _taken(counts)

    def _counts(self) -> HugepageCounts:
        return hugepages(self._size) if self._size else HugepageCounts(0, 0, 0, 0)

    def lost(self) -> list[str]:
        """Say how many more pages are taken than at first, although no process has any."""
        until = time.monotonic() + PAGES_BACK_SECONDS
        while True:
            used, reserved = (now - before for now, before in zip(_taken(self._counts()), self._before, strict=True))
            if (used <= 0 and reserved <= 0) or proc.hugetlb_users():  # somebody else on this machine
                return []
            if time.monotonic() > until:
                break
            time.sleep(0.01)
        lines = {"huge pages not given back": used, "huge pages still reserved": reserved}
        return [f"{count} {what}" for what, count in lines.items() if count > 0]


def _taken(counts: HugepageCounts) -> tuple[int, int]:
    """Return how many pages are in use and how many are promised; the size of the pool does not matter."""
    return counts.total - counts.free, counts.reserved


class KernelLog:
    """The records of the kernel's log from its making on."""

    def __init__(self) -> None:
        self.unreadable = ""
        """Why the log cannot be read; empty when it can."""
        self._fd = -1
        try:
            self._fd = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError as error:
            self.unreadable = f"{KMSG}: {errno.errorcode.get(error.errno or 0, error)}"

    def read(self) -> list[str]:
        """Return the records that came since the last call, as ``[seconds] text``."""
        records: list[str] = []
        while self._fd >= 0:
            try:
                records.append(_plain(os.read(self._fd, 1 << 14)))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.EPIPE:
                    self.unreadable = f"{KMSG}: {errno.errorcode.get(error.errno or 0, error)}"
                    self.close()
                # With EPIPE, records were overwritten before they could be read; the next read goes on behind the gap.
        return records

    def close(self) -> None:
        """Stop reading."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class KernelHealth:
    """Watches the log and the taint flags from its making on."""

    def __init__(self) -> None:
        self.records: list[str] = []
        """What the kernel logged since then, as ``[seconds] text``."""
        self._patterns = Patterns.load()
        self._taints = self.taints()
        self._log = KernelLog()
        self._unjudged: list[str] = []

    @property
    def unreadable(self) -> str:
        """Why the log cannot be read; empty when it can."""
        return self._log.unreadable

    @staticmethod
    def taints() -> str:
        """Return the letters of the taint flags that are set; empty when none is or they cannot be read."""
        try:
            with open(TAINTED, "rb", buffering=0) as file:
                mask = int(file.read())
        except OSError:
            return ""
        return "".join(letter for bit, letter in enumerate(TAINTS) if mask >> bit & 1)

    def listen(self) -> bool:
        """Take what the kernel has said since; whether it said anything, or nobody can know."""
        fresh = self._log.read()
        self.records += fresh
        self._unjudged += fresh
        return bool(self.unreadable) or any(NOTE not in record for record in fresh)

    def complaints(self) -> list[str]:
        """Return lines about everything that went wrong in the kernel since the last call."""
        self.listen()
        fresh, self._unjudged = self._unjudged, []
        first = next((i for i, record in enumerate(fresh) if self._patterns.complains(record.partition("] ")[2])), None)
        # What follows the first complaint is its register dump and call trace.
        lines = [] if first is None else [f"kernel log: {record}" for record in fresh[first:][:MAX_COMPLAINT_LINES]]
        taints = self.taints()
        if new := [letter for letter in taints if letter not in self._taints and letter in DEFECT_TAINTS]:
            lines.append(f"the kernel is tainted now: {''.join(new)}")
        self._taints = taints
        return lines

    def close(self) -> None:
        """Stop watching."""
        self._log.close()


def _plain(record: bytes) -> str:
    """Turn ``priority,sequence,microseconds,flags;text`` and continuation lines into what dmesg shows."""
    head, _, text = record.decode(errors="replace").partition(";")
    microseconds = int(head.split(",")[2])
    return f"[{microseconds / 1e6:12.6f}] {text.splitlines()[0] if text else ''}"
