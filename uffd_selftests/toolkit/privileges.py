# SPDX-License-Identifier: GPL-2.0-only
"""Privileges, for a child that gives them up, and the setting that does without."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from uffd_selftests.abi import syscalls
from uffd_selftests.machine.settings import Sysctl
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.processes import Channel, Child

__all__ = [
    "NOBODY",
    "become_nobody",
    "drop_capability",
    "enter_user_namespace",
    "run_as",
    "without_cap_sys_ptrace",
    "UNPRIVILEGED_USERFAULTFD",
    "unprivileged_userfaultfd",
]


NOBODY = 65534
"""User and group id without any privilege."""


def become_nobody() -> None:
    """Give up every privilege, for good; the process stays inspectable through its /proc files."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)


def drop_capability(name: str) -> None:
    """Take one capability ("cap_sys_ptrace") out of the effective, permitted and inheritable sets (capset(2))."""
    number = {"cap_sys_ptrace": 19, "cap_sys_admin": 21, "cap_ipc_lock": 14}[name]
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0))  # _LINUX_CAPABILITY_VERSION_3, this process
    data = ctypes.create_string_buffer(24)
    syscalls.call("capget", ctypes.addressof(header), ctypes.addressof(data))
    words = list(struct.unpack("=6I", data.raw[:24]))
    for i in range(3):
        words[3 * (number // 32) + i] &= ~(1 << number % 32)
    data = ctypes.create_string_buffer(struct.pack("=6I", *words))
    syscalls.call("capset", ctypes.addressof(header), ctypes.addressof(data))


def enter_user_namespace() -> None:
    """Move this single-threaded process into a user namespace of its own, as its root, with every capability there."""
    uid, gid = os.geteuid(), os.getegid()
    syscalls.call("unshare", syscalls.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def run_as(prepare: Callable[[], None], life: Callable[[], object]) -> None:
    """Run ``life`` in a child process that has prepared itself, by giving up privileges usually, and wait for its end.

    Skip where the preparation is not permitted.
    """

    def target(channel: Channel) -> None:
        try:
            prepare()
        except OSError as error:
            channel.send(str(error))
            return
        channel.send()
        life()

    with Child(target) as child:
        if reason := child.receive():
            raise Skip(f"{reason}: run as root, outside of a container")


def without_cap_sys_ptrace() -> None:
    """Give up CAP_SYS_PTRACE and keep the rest; for run_as()."""
    drop_capability("cap_sys_ptrace")


UNPRIVILEGED_USERFAULTFD = Path("/proc/sys/vm/unprivileged_userfaultfd")


@contextmanager
def unprivileged_userfaultfd(value: int) -> Iterator[None]:
    """Have vm.unprivileged_userfaultfd at this value, for all that use this function; Skip where that cannot be."""
    with ExitStack() as stack:
        try:
            stack.enter_context(Sysctl(UNPRIVILEGED_USERFAULTFD, value))
        except FileNotFoundError:
            raise Skip("no vm.unprivileged_userfaultfd (Linux 5.2)") from None
        except OSError:
            if UNPRIVILEGED_USERFAULTFD.read_text().strip() != str(value):
                raise Skip(f"vm.unprivileged_userfaultfd is not {value}: set it, or run as root") from None
        yield
