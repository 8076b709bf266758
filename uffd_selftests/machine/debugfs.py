# SPDX-License-Identifier: GPL-2.0-only
"""Files of debugfs, mounted or not."""

from __future__ import annotations

import os
from pathlib import Path

from uffd_selftests.abi.syscalls import mount_nowhere

DEBUGFS = Path("/sys/kernel/debug")


def open_debugfs(path: str, flags: int) -> int:
    """Open a file of debugfs, mounted or not, and return its descriptor.

    Where debugfs is not mounted at its usual place, a mount is made that is attached nowhere and goes away with the
    descriptor. Raises OSError: ENOENT when there is no such file, EACCES or EPERM without the privilege, ENODEV when
    the kernel has no debugfs.
    """
    flags |= os.O_CLOEXEC
    if DEBUGFS.is_mount():
        return os.open(DEBUGFS / path, flags)
    mount = mount_nowhere("debugfs")
    try:
        return os.open(path, flags, dir_fd=mount)
    finally:
        os.close(mount)
