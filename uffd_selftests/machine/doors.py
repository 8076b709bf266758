# SPDX-License-Identifier: GPL-2.0-only
"""The ways to a userfaultfd, each tried as far as its first read; and who beside the kernel may shut them."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.uapi import (
    UFFD_API,
    UFFD_USER_MODE_ONLY,
    UFFDIO_API,
    USERFAULTFD_IOC_NEW,
    Feature,
    uffdio_api,
)

DEVICE = "/dev/userfaultfd"
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
SECURITYFS = Path("/sys/kernel/security")
SELINUXFS = Path("/sys/fs/selinux")
MESSAGE = 32
"""Bytes of a struct uffd_msg."""

WAYS = ("syscall", "device", "syscall-user-mode-only")
"""The ways to a userfaultfd, best first."""
STEPS = ("", "UFFDIO_API", "read(2)")
"""What can be refused on each way: the descriptor itself, and what it is asked for first."""

GVISOR = ("4.4.0", "#1 SMP Sun Jan 10 15:06:54 PST 2016")
"""What gVisor says of itself in uname(2), whatever the host's kernel is (pkg/sentry/kernel/version.go)."""


def open_userfaultfd(way: str) -> int:
    """Open a userfaultfd; OSError."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    if way == "syscall":
        return syscalls.call("userfaultfd", flags)
    if way == "syscall-user-mode-only":
        return syscalls.call("userfaultfd", flags | UFFD_USER_MODE_ONLY)
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(device, USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


def shake_hands(uffd: int, features: Feature) -> Feature:
    """Enable features on a fresh descriptor, for each takes one UFFDIO_API only, and return what is offered."""
    request = uffdio_api(api=UFFD_API, features=int(features))
    fcntl.ioctl(uffd, UFFDIO_API, request)
    return Feature(request.features)


def refusal(way: str) -> tuple[str, str] | None:
    """Try a way; return which of STEPS was refused, and the errno's name, or that of the signal which it brought.

    A seccomp filter may kill who makes a call: under one, all is tried in a child.
    """
    return _try(way, lambda: None) if "\nSeccomp:\t0\n" in read("/proc/self/status") else _in_child(way)


def _try(way: str, done: Callable[[], object]) -> tuple[str, str] | None:
    steps = iter(STEPS)
    step = next(steps)
    try:
        uffd = open_userfaultfd(way)
        try:
            done()
            step = next(steps)
            shake_hands(uffd, Feature(0))
            done()
            step = next(steps)
            with suppress(BlockingIOError):  # nothing has happened
                os.read(uffd, MESSAGE)
        finally:
            os.close(uffd)
    except OSError as error:
        return step, errno.errorcode.get(error.errno or 0, str(error.errno))
    return None


def _in_child(way: str) -> tuple[str, str] | None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if refused := _try(way, lambda: os.write(writer, b".")):
                os.write(writer, "\n".join(("", *refused)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as pipe:
        steps, *told = pipe.read().split("\n")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return STEPS[len(steps)], signal.Signals(os.WTERMSIG(status)).name
    return (told[0], told[1]) if told else None


def built_in() -> bool | None:
    """Whether this kernel has userfaultfd(2), as other places than the call itself tell; None when none does."""
    if SYSCTL.exists() or "userfaultfd" in read("/proc/misc").split():
        return True
    if symbols := read("/proc/kallsyms"):
        return " userfaultfd_ioctl\n" in symbols
    return None


def security_modules() -> tuple[str, ...]:
    """The security modules in force that say who may have a userfaultfd, by their kernel's own names."""
    found = read(SECURITYFS / "lsm").strip().split(",")  # a container has none of it
    return tuple(name for name in found if name) or (("selinux",) if (SELINUXFS / "enforce").exists() else ())


def security_context() -> str:
    """The type of this process in a policy of SELinux (user:role:type:level), or whatever the module calls it."""
    context = read("/proc/self/attr/current").strip("\0\n ")
    parts = context.split(":")
    return parts[2] if len(parts) > 2 else context


def lockdown() -> str:
    """What kernel_lockdown(7) is in force for: integrity or confidentiality; empty when it is not."""
    chosen = read(SECURITYFS / "lockdown").partition("[")[2].partition("]")[0]
    return "" if chosen == "none" else chosen


def sandbox() -> str:
    """The name of what answers system calls in place of a Linux kernel; empty when that is one."""
    uname = os.uname()
    if (uname.release, uname.version) == GVISOR or "gVisor" in read("/proc/version"):
        return "gVisor"
    return "WSL 1" if uname.release.startswith("4.4.0-") and "Microsoft" in uname.release else ""


def read(path: Path | str) -> str:
    """Return what a file says; nothing when it cannot be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
