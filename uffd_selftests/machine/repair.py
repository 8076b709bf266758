# SPDX-License-Identifier: GPL-2.0-only
"""What runs that were killed left changed, put back.

Whoever imports this has all kinds of changes registered with the journal.
"""

from __future__ import annotations

from uffd_selftests.machine import cgroup, hugepages, settings, swap
from uffd_selftests.machine.journal import Journal, say

__all__ = ["others", "repair"]

KINDS = (cgroup, hugepages, settings, swap)
"""The modules that register kinds of changes."""


def repair() -> list[str]:
    """Undo what killed runs left changed, say so on stderr and return what was said.

    Does nothing without the privilege to do it.
    """
    try:
        with Journal.open(create=False) as journal:
            notices = journal.repair()
    except OSError:
        return []
    say(notices)
    return notices


def others() -> bool:
    """Whether another run that is alive has something changed on this machine now."""
    try:
        with Journal.open(create=False) as journal:
            return journal.others()
    except OSError:
        return False
