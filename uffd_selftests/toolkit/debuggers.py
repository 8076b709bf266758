# SPDX-License-Identifier: GPL-2.0-only
"""Debuggers: memory of a process, reached from outside, through /proc/PID/mem and ptrace(2)."""

from __future__ import annotations

import ctypes
import os

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.errors import KernelError, errno_name

__all__ = ["through_proc", "through_ptrace"]

PTRACE_PEEKDATA, PTRACE_POKEDATA, PTRACE_DETACH = 2, 5, 17
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
WALL = 0x4000_0000


def through_proc(pid: int | str, address: int, length: int, data: bytes = b"") -> object:
    """Read or write memory through /proc/PID/mem; returns the result, or the errno's name."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        return os.pwrite(fd, data, address) if data else os.pread(fd, length, address)
    except OSError as error:
        return errno_name(error.errno or 0)
    finally:
        os.close(fd)


def through_ptrace(pid: int, address: int, new: int | None = None) -> object:
    """Read a word of a child process as its debugger, or write it; returns the result, or the errno's name."""
    word = ctypes.create_string_buffer(8)
    syscalls.call("ptrace", PTRACE_SEIZE, pid, 0, 0)
    syscalls.call("ptrace", PTRACE_INTERRUPT, pid, 0, 0)
    os.waitpid(pid, WALL)
    try:
        if new is None:
            syscalls.call("ptrace", PTRACE_PEEKDATA, pid, address, ctypes.addressof(word))
            return word.raw[:8]
        return syscalls.call("ptrace", PTRACE_POKEDATA, pid, address, new)
    except KernelError as error:
        return errno_name(error.errno or 0)
    finally:
        syscalls.call("ptrace", PTRACE_DETACH, pid, 0, 0)
