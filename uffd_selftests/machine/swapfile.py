# SPDX-License-Identifier: GPL-2.0-only
"""What mkswap(8), swapon(8) and swapoff(8) do, for devices: where the suite runs, there may be no programs."""

from __future__ import annotations

import ctypes
import os
import struct
from typing import TYPE_CHECKING

from uffd_selftests.abi.errors import KernelError

if TYPE_CHECKING:
    from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

MAGIC = b"SWAPSPACE2"
BOOT_BYTES = 1024
"""What the header leaves free at its beginning (union swap_header of include/linux/swap.h)."""
VERSION = 1
PREFER = 0x8000
"""The flags' lower bits are a priority (swapon(2))."""


def swap_header(size: int, page: int) -> bytes:
    """Return the first page of a swap device of size bytes, with pages of so many bytes."""
    numbers = struct.pack("=3I", VERSION, size // page - 1, 0)
    return (bytes(BOOT_BYTES) + numbers).ljust(page - len(MAGIC), b"\0") + MAGIC


def make_swap(device: Path | str) -> None:
    """Make a device one to swap to; what was on it is lost. Raises OSError."""
    page = os.sysconf("SC_PAGE_SIZE")
    with open(device, "r+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(swap_header(size, page))
        os.fsync(file.fileno())


def swap_on(device: Path | str, priority: int | None = None) -> None:
    """Let the kernel swap to a device, before those of lower priority; raises KernelError."""
    _call("swapon", device, 0 if priority is None else PREFER | priority)


def swap_off(device: Path | str) -> None:
    """Let the kernel read back all that is on a device, and use it no more; raises KernelError."""
    _call("swapoff", device)


def _call(name: str, device: Path | str, *flags: int) -> None:
    if getattr(_libc, name)(os.fsencode(device), *flags):
        raise KernelError(ctypes.get_errno(), f"{name}({device})")
