# SPDX-License-Identifier: GPL-2.0-only
"""System calls by name, for those that the standard library lacks or makes with the interpreter's lock held."""

from __future__ import annotations

import ctypes
import os

from uffd_selftests.abi.errors import checked
from uffd_selftests.abi.native import lib
from uffd_selftests.abi.uapi import NR_USERFAULTFD

_GENERIC = ("aarch64", "riscv64", "loongarch64")

# Name: number on x86-64, number in the generic table (scripts/syscall.tbl of the kernel).
_NUMBERS = {
    "brk": (12, 214),
    "capget": (125, 90),
    "capset": (126, 91),
    "clone": (56, 220),
    "close_range": (436, 436),
    "exit": (60, 93),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fallocate": (285, 47),
    "finit_module": (313, 273),
    "futex": (202, 98),
    "io_destroy": (207, 1),
    "io_getevents": (208, 4),
    "io_setup": (206, 0),
    "io_submit": (209, 2),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "madvise": (28, 233),
    "map_shadow_stack": (453, 453),
    "memfd_secret": (447, 447),
    "mincore": (27, 232),
    "mlock": (149, 228),
    "mlock2": (325, 284),
    "mlockall": (151, 230),
    "move_pages": (279, 239),
    "mremap": (25, 216),
    "mseal": (462, 462),
    "munlock": (150, 229),
    "munlockall": (152, 231),
    "pidfd_open": (434, 434),
    "pkey_alloc": (330, 289),
    "pkey_free": (331, 290),
    "pkey_mprotect": (329, 288),
    "prctl": (157, 167),
    "preadv2": (327, 286),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "read": (0, 63),
    "readv": (19, 65),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigtimedwait": (128, 137),
    "set_robust_list": (273, 99),
    "set_tid_address": (218, 96),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "shmdt": (67, 197),
    "shmget": (29, 194),
    "sigaltstack": (131, 132),
    "tgkill": (234, 131),
    "unshare": (272, 97),
    "vmsplice": (278, 75),
    "write": (1, 64),
}

UNIFORM = 424
"""From here on system calls have the same number on every architecture (pidfd_send_signal, Linux 5.1)."""

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_STRING = 1
FSCONFIG_CMD_CREATE = 6


def number(name: str) -> int:
    """Return the number of a system call; -1, which every kernel answers with ENOSYS, on an unlisted architecture."""
    x86_64, generic = _NUMBERS[name]
    if x86_64 == generic >= UNIFORM:
        return NR_USERFAULTFD // 1000 * 1000 + generic  # MIPS begins to count at 4000, 5000 or 6000
    machine = os.uname().machine
    if machine == "x86_64":
        return x86_64
    return generic if machine in _GENERIC else -1


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
