# SPDX-License-Identifier: GPL-2.0-only
"""Memory that the kernel takes for broken, or about to break, and that is declared sound again afterwards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from uffd_selftests.abi.errors import errno_name
from uffd_selftests.abi.uapi import PM_PFN_MASK
from uffd_selftests.machine.debugfs import open_debugfs
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.memory import Range
from uffd_selftests.toolkit.pagemap import Pagemap

__all__ = ["declared_sound"]


@contextmanager
def declared_sound(page: Range) -> Iterator[int]:
    """Declare the memory that is behind a page now sound again when the block has ended; yields its frame number.

    Nobody may use it any more by then.  Skip without CONFIG_HWPOISON_INJECT; needs CAP_SYS_ADMIN.
    """
    try:
        undo = open_debugfs("hwpoison/unpoison-pfn", os.O_WRONLY)
    except OSError as error:
        name = errno_name(error.errno or 0)
        raise Skip(f"debugfs hwpoison/unpoison-pfn: {name}: CONFIG_HWPOISON_INJECT: modprobe hwpoison-inject") from None
    pfn = Pagemap.entry(page.start) & PM_PFN_MASK
    try:
        yield pfn
    finally:
        os.write(undo, f"{pfn:#x}".encode())
        os.close(undo)
