# SPDX-License-Identifier: GPL-2.0-only
"""System V shared memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.errors import KernelError
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.memory import Range
from uffd_selftests.toolkit.threads import waiting_threads

__all__ = ["IPC_CREAT", "IPC_RMID", "SHM_HUGETLB", "sysv_segment"]

IPC_CREAT, IPC_RMID, SHM_HUGETLB = 0o1000, 0, 0o4000


@contextmanager
def sysv_segment(length: int, flags: int = 0) -> Iterator[Range]:
    """Have a new System V shared memory segment attached; Skip where there can be none."""
    try:
        key = syscalls.call("shmget", 0, length, IPC_CREAT | 0o600 | flags)
    except KernelError as error:
        raise Skip(f"{error}: needs CONFIG_SYSVIPC, room in kernel.shmall, and for huge pages CAP_IPC_LOCK") from None
    try:
        start = syscalls.call("shmat", key, 0, 0)
    finally:
        syscalls.call("shmctl", key, IPC_RMID, 0)
    try:
        yield Range(start, length)
    finally:
        if not any(thread.is_alive() for thread in waiting_threads):  # else one may sleep there, as its case has failed
            syscalls.call("shmdt", start)
