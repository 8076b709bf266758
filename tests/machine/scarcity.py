# SPDX-License-Identifier: GPL-2.0-only
"""Whether memory can be made short on this machine."""

from __future__ import annotations

import os

import pytest

from uffd_selftests.machine.cgroup import MemoryGroup
from uffd_selftests.machine.swap import Swap


def lack() -> str | None:
    """Return why there is no soak here."""
    if os.geteuid():
        return "changes the machine: run as root"
    try:
        with Swap(1 << 20), MemoryGroup():
            return None
    except OSError as error:
        return str(error)


needs_soak = pytest.mark.skipif(bool(why := lack()), reason=f"no soak here: {why}")
