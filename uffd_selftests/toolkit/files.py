# SPDX-License-Identifier: GPL-2.0-only
"""Files to map that are neither shared memory nor huge pages: userfaultfd serves them in part or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uffd_selftests.abi.errors import KernelError
from uffd_selftests.abi.syscalls import mount_nowhere
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.memory import MAP_SHARED, Range, map_memory, unmap

__all__ = ["plain_file", "limited_file", "stored_bytes", "free_bytes"]

# Their files are shared memory, huge pages, or may be those of such a file system below.
_NOT_PLAIN = ("tmpfs", "devtmpfs", "rootfs", "hugetlbfs", "overlay")


@contextmanager
def plain_file(length: int) -> Iterator[int]:
    """Yield the descriptor of a nameless file of ``length`` zero bytes, on a disk if there is one, else in ramfs.

    Skip where neither can be had.
    """
    fd = _file_on_disk(length)
    if fd < 0:
        fd = _file_in_ramfs(length)
    try:
        yield fd
    finally:
        os.close(fd)


def _file_on_disk(length: int) -> int:
    for folder in (tempfile.gettempdir(), "/var/tmp", os.getcwd(), Path(__file__).parent):
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                os.ftruncate(file.fileno(), length)
                if _filesystem_of(file.fileno()) not in _NOT_PLAIN and _can_be_mapped(file.fileno(), length):
                    return os.dup(file.fileno())
        except OSError:  # no such folder, no room, no permission
            pass
    return -1


def _file_in_ramfs(length: int) -> int:
    try:
        mount = mount_nowhere("ramfs")
    except KernelError as error:
        raise Skip(f"only tmpfs here, where TMPDIR should be on a disk; {error}: run as root") from None
    try:
        fd = os.open("file", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)
    os.ftruncate(fd, length)
    return fd


def _filesystem_of(fd: int) -> str:
    """Return the type of the file system that an open file is on."""
    fdinfo = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    mount = next(line.split()[1] for line in fdinfo if line.startswith("mnt_id:"))
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if line.split()[0] == mount:
            return line.partition(" - ")[2].split()[0]
    return ""


def _can_be_mapped(fd: int, length: int) -> bool:
    """Whether a shared mapping can be had: some network file systems have none."""
    try:
        unmap(Range(map_memory(length, flags=MAP_SHARED, fd=fd), length))
    except KernelError:
        return False
    return True


@contextmanager
def limited_file(filesystem: str, room: int, length: int) -> Iterator[int]:
    """Yield a file of ``length`` bytes, none stored yet, in a file system of its own with ``room`` bytes (EPERM)."""
    root = mount_nowhere(filesystem, size=str(room))
    try:
        fd = os.open("file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=root)
    finally:
        os.close(root)
    try:
        os.ftruncate(fd, length)
        yield fd
    finally:
        os.close(fd)


def stored_bytes(fd: int) -> int:
    """Return how many bytes a file takes."""
    return os.fstat(fd).st_blocks * 512


def free_bytes(fd: int) -> int:
    """Return how much room the file system of a file has left."""
    facts = os.statvfs(fd)
    return facts.f_bfree * facts.f_bsize
