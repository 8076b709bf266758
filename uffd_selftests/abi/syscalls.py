# SPDX-License-Identifier: GPL-2.0-only
"""System calls by name, for those that the standard library lacks or makes with the interpreter's lock held."""

from __future__ import annotations

import ctypes
import functools
import os

from uffd_selftests.abi.errors import checked
from uffd_selftests.abi.native import lib

_UNIFORM = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "pidfd_open": 434,
    "close_range": 436,
    "process_madvise": 440,
    "memfd_secret": 447,
    "map_shadow_stack": 453,
    "mseal": 462,
}
"""Those newer than the headers of some systems (include/uapi/asm-generic/unistd.h): from 424 on (Linux 5.1) a system
call has the same number everywhere."""

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6


@functools.cache
def number(name: str) -> int:
    """Return the number of a system call in programs like this one; KeyError of one that is not known."""
    if name in _UNIFORM:
        return number("userfaultfd") // 1000 * 1000 + _UNIFORM[name]  # MIPS begins to count at 4000, 5000 or 6000
    if (found := int(lib.uffd_syscall_number(name.encode()))) < 0:
        raise KeyError(name)
    return found


def call(name: str, *arguments: int) -> int:
    """Make a system call without the interpreter's lock; KernelError when it fails. Pointers are addresses."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0][:6]
    signed = [value - (1 << 64) if value >= 1 << 63 else value for value in padded]
    text = f"{name}({', '.join(f'{value:#x}' for value in arguments)})"
    return checked(lib.uffd_syscall(number(name), *signed), text)


def prctl(option: int, *arguments: int) -> int:
    """prctl(2)."""
    return call("prctl", option, *arguments)


def read_into(fd: int, address: int, length: int) -> int:
    """read(2) straight into memory that may fault: the kernel writes there (copy_to_user)."""
    return call("read", fd, address, length)


def write_from(fd: int, address: int, length: int) -> int:
    """write(2) straight from memory that may fault: the kernel reads there (copy_from_user)."""
    return call("write", fd, address, length)


def _vm_transfer(name: str, pid: int, address: int, buffer: ctypes.Array[ctypes.c_char]) -> int:
    local = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), len(buffer))
    remote = (ctypes.c_uint64 * 2)(address, len(buffer))
    return call(name, pid, ctypes.addressof(local), 1, ctypes.addressof(remote), 1, 0)


def process_vm_readv(pid: int, address: int, length: int) -> bytes:
    """process_vm_readv(2) of one range: the kernel reads it through get_user_pages, on behalf of this thread."""
    buffer = ctypes.create_string_buffer(length)
    count = _vm_transfer("process_vm_readv", pid, address, buffer)
    return buffer.raw[:count]


def process_vm_writev(pid: int, address: int, data: bytes) -> int:
    """process_vm_writev(2) of one range."""
    buffer = ctypes.create_string_buffer(data, len(data))
    return _vm_transfer("process_vm_writev", pid, address, buffer)


def mount_nowhere(filesystem: str, **options: str) -> int:
    """Mount a file system with these options and attach it nowhere; it goes away with the descriptor of its root.

    EPERM without CAP_SYS_ADMIN.
    """

    def text(value: str) -> ctypes.Array[ctypes.c_char]:
        return ctypes.create_string_buffer(value.encode())

    name = text(filesystem)
    context = call("fsopen", ctypes.addressof(name), FSOPEN_CLOEXEC)
    try:
        for option, value in options.items():
            key, setting = text(option), text(value)
            call("fsconfig", context, FSCONFIG_SET_STRING, ctypes.addressof(key), ctypes.addressof(setting), 0)
        call("fsconfig", context, FSCONFIG_CMD_CREATE, 0, 0, 0)
        return call("fsmount", context, FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
