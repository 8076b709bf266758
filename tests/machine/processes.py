# SPDX-License-Identifier: GPL-2.0-only
"""Processes that may do less than the one that runs the tests."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import traceback
from typing import TYPE_CHECKING

import pytest

from uffd_selftests.abi.syscalls import number
from uffd_selftests.machine.debugfs import DEBUGFS
from uffd_selftests.machine.facts import Facts, probe
from uffd_selftests.machine.settings import Sysctl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives up privileges that it must have first: run as root")

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_REC_PRIVATE = 1 << 14 | 1 << 18
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, PR_SET_THP_DISABLE = 38, 22, 41
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW = 0x80000000, 0x50000, 0x7FFF0000

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int) -> None:
    """Raise OSError for a C function that returned -1."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def as_nobody() -> None:
    """Become an ordinary user."""
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def without_thp() -> None:
    """Switch transparent huge pages off for this process."""
    check(libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0))


def in_user_namespace() -> None:
    """Become root of a user namespace, as in a rootless container."""
    check(libc.unshare(CLONE_NEWUSER))


def with_debugfs_mounted() -> None:
    """Mount debugfs at its usual place, in a mount namespace of this process."""
    check(libc.unshare(CLONE_NEWNS))
    check(libc.mount(None, b"/", None, MS_REC_PRIVATE, None))
    check(libc.mount(b"debugfs", bytes(DEBUGFS), b"debugfs", 0, None))


def with_seccomp(
    error: int | None, call: str = "userfaultfd", argument: tuple[int, int] | None = None
) -> Callable[[], None]:
    """Return a function that installs a filter which answers a system call with an errno, or, if None, kills for it.

    Argument: only where the argument of this number has this value (its lower 32 bits).
    """
    answer = SECCOMP_RET_KILL_PROCESS if error is None else SECCOMP_RET_ERRNO | error
    place = argument[0] if argument else 0
    value = [(0x20, 0, 0, 16 + 8 * place), (0x15, 0, 1, argument[1])] if argument else []

    def install() -> None:
        program = b"".join(
            struct.pack("=HBBI", *instruction)
            for instruction in (
                (0x20, 0, 0, 0),  # load the system call's number
                (0x15, 0, 1 + len(value), number(call)),
                *value,
                (0x06, 0, 0, answer),
                (0x06, 0, 0, SECCOMP_RET_ALLOW),
            )
        )
        code = ctypes.create_string_buffer(program, len(program))
        filter_program = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_program, 0, 0))

    return install


@contextlib.contextmanager
def unprivileged_userfaultfd(value: int) -> Iterator[None]:
    """Set vm.unprivileged_userfaultfd; skips where that is not possible."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(Sysctl("/proc/sys/vm/unprivileged_userfaultfd", value))
        except OSError as error:
            pytest.skip(str(error))
        yield


def probe_after(*preparations: Callable[[], None]) -> Facts:
    """Return what a process finds that was prepared with these functions; skips when they are not possible here."""
    answer, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for prepare in preparations:
                try:
                    prepare()
                except OSError as error:
                    os.write(tell, json.dumps({"impossible": f"{prepare.__name__}: {error}"}).encode())
                    os._exit(0)
            os.write(tell, json.dumps(probe().to_dict()).encode())
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(tell)
    with open(answer) as pipe:
        plain = json.loads(pipe.read())
    os.waitpid(child, 0)
    if "impossible" in plain:
        pytest.skip(plain["impossible"])
    return Facts.from_dict(plain)
