# SPDX-License-Identifier: GPL-2.0-only
"""Pages that somebody holds in place (CONFIG_GUP_TEST)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from uffd_selftests.abi.errors import checked
from uffd_selftests.abi.native import ffi, lib
from uffd_selftests.machine.debugfs import open_debugfs
from uffd_selftests.toolkit.memory import Range

__all__ = ["pinned"]


_PIN_LONGTERM_TEST_START = 0x4018_6707  # _IOW('g', 7, struct pin_longterm_test) of mm/gup_test.h
_PIN_LONGTERM_TEST_STOP = 0x6708


@contextmanager
def pinned(where: Range) -> Iterator[None]:
    """Hold a read-only long-term pin of the range, through CONFIG_GUP_TEST's debugfs file."""
    fd = open_debugfs("gup_test", os.O_RDWR | os.O_CLOEXEC)
    try:
        arg = ffi.from_buffer(struct.pack("=QQI4x", where.start, where.len, 0))
        address = int(ffi.cast("uintptr_t", arg))
        checked(lib.uffd_ioctl(fd, _PIN_LONGTERM_TEST_START, address), f"PIN_LONGTERM_TEST_START({where})")
        try:
            yield
        finally:
            checked(lib.uffd_ioctl(fd, _PIN_LONGTERM_TEST_STOP, 0), "PIN_LONGTERM_TEST_STOP")
    finally:
        os.close(fd)
