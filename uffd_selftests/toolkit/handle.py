# SPDX-License-Identifier: GPL-2.0-only
"""The userfaultfd: each ioctl is a method."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import addressof
from typing import Any, NamedTuple

from uffd_selftests.abi import syscalls, uapi
from uffd_selftests.abi.errors import checked
from uffd_selftests.abi.native import lib
from uffd_selftests.abi.uapi import (
    ContinueMode,
    CopyMode,
    Feature,
    MoveMode,
    PagefaultFlag,
    PoisonMode,
    RangeIoctls,
    RegisterMode,
    RwprotectMode,
    WriteprotectMode,
    ZeropageMode,
)
from uffd_selftests.machine import doors
from uffd_selftests.toolkit.expectations import DEADLINE, Unexplained, expect
from uffd_selftests.toolkit.memory import PAGE_SIZE, Range, mmap_min_addr
from uffd_selftests.toolkit.messages import MESSAGE_SIZE, Fault, Message, parse_message
from uffd_selftests.toolkit.refusals import UNTOUCHED, UffdError, output_text

__all__ = [
    "MISSING",
    "WP",
    "MINOR",
    "RWP",
    "WRITEPROTECT",
    "MINOR_FAULTS",
    "MOVE",
    "HOLES",
    "USER_MODE_ONLY",
    "DEFAULT_FLAGS",
    "KERNEL_FAULTS",
    "FdInfo",
    "Uffd",
    "mended",
    "combinations",
    "flag_names",
    "expect_handle",
    "lowest_start",
]


MISSING = RegisterMode.MISSING
WP = RegisterMode.WP
MINOR = RegisterMode.MINOR
RWP = RegisterMode.RWP

WRITEPROTECT = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
"""Write protection, of any type of memory."""

MINOR_FAULTS = Feature.MINOR_HUGETLBFS | Feature.MINOR_SHMEM
"""Minor faults, of any type of memory that has them."""

MOVE = Feature.MOVE
HOLES = MoveMode.ALLOW_SRC_HOLES


_REFUSED = doors.refusal("syscall-user-mode-only")
_DEADLY = _REFUSED == ("", "SIGSYS")
"""A seccomp filter kills who calls userfaultfd(2)."""
USER_MODE_ONLY = 0 if _REFUSED == ("", "EINVAL") else uapi.UFFD_USER_MODE_ONLY
"""What asks for the least privilege: UFFD_USER_MODE_ONLY where there is such a flag, else 0."""
DEFAULT_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | USER_MODE_ONLY
"""Flags of a handle unless a case says otherwise: those of upstream, which need no privilege."""
KERNEL_FAULTS = os.O_CLOEXEC | os.O_NONBLOCK
"""Flags of a handle that reports faults of the kernel itself, too: of system calls, of the source of UFFDIO_COPY."""


class FdInfo(NamedTuple):
    """What /proc/PID/fdinfo says of a userfaultfd (userfaultfd_show_fdinfo)."""

    pending: int
    """Page faults that nobody has read yet."""
    total: int
    """Those, and the ones read but not resolved."""
    api: int
    features: int
    ioctls: int


class Uffd:
    """A userfaultfd. Each ioctl is a method; it raises UffdError when the kernel refuses.

    A fill ioctl that succeeds must have written the whole length into its output field; every call checks that.
    """

    def __init__(self, fd: int, features: Feature = Feature(0)) -> None:
        self.fd = fd
        self.features = features
        """Bits enabled by UFFDIO_API."""
        self.offered = Feature(0)
        """Bits that the kernel offers, as UFFDIO_API answered."""

    @classmethod
    def create(cls, flags: int = DEFAULT_FLAGS, *, via: str | None = None) -> Uffd:
        """Make a handle without UFFDIO_API, through the "syscall", the "device", or whichever works (None).

        Errors are those of userfaultfd(2): EPERM without privilege, EINVAL for unknown flags, ENOSYS.
        """
        if via == "syscall" or not (via or _DEADLY):
            ret = lib.uffd_syscall(syscalls.number("userfaultfd"), flags, 0, 0, 0, 0, 0)
            if ret >= 0 or via == "syscall" or not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
                return cls(checked(ret, f"userfaultfd({flag_names(flags)})"))
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            ret = lib.uffd_ioctl(device, uapi.USERFAULTFD_IOC_NEW, flags)
            return cls(checked(ret, f"USERFAULTFD_IOC_NEW({flags:#x})"))
        finally:
            os.close(device)

    @classmethod
    def open(cls, features: Feature = Feature(0), flags: int = DEFAULT_FLAGS, *, via: str | None = None) -> Uffd:
        """Make a handle and enable features; ready to use."""
        uffd = cls.create(flags, via=via)
        try:
            uffd.api(features)
        except OSError:
            uffd.close()
            raise
        return uffd

    # -- plumbing

    def raw_ioctl(self, request: int, address: int = 0) -> int:
        """Issue an ioctl whose argument is at any address, or a plain value; returns its result."""
        name = uapi.IOCTL_NAMES.get(request, f"ioctl {request:#x}")
        ret: int = lib.uffd_ioctl(self.fd, request, address)
        if ret < 0:
            raise UffdError(-ret, f"{name}({address:#x})")
        return ret

    def knows(self, request: int) -> bool:
        """Whether the kernel has this request: it looks at its argument then, which is NULL. Needs the handshake."""
        result: int = lib.uffd_ioctl(self.fd, request, 0)
        return result != -errno.EINVAL

    def ioctl(self, request: int, arg: Any, call: str, field: str | None = None) -> None:
        """Issue one ioctl; ``call`` is how messages name it, ``field`` its output field.

        The kernel must leave the other fields alone, but for UFFDIO_API, which answers in all of them.
        """
        if field is not None:
            setattr(arg, field, UNTOUCHED)
        given = bytes(arg)
        ret = lib.uffd_ioctl(self.fd, request, addressof(arg))
        inputs = len(given) if field is None else getattr(type(arg), field).offset
        if request != uapi.UFFDIO_API and bytes(arg)[:inputs] != given[:inputs]:
            raise AssertionError(f"{call}: the kernel changed an input field")
        if ret:
            raise UffdError(-ret, call, field, None if field is None else getattr(arg, field))

    def _fill(self, request: int, arg: Any, call: str, field: str, length: int) -> int:
        self.ioctl(request, arg, call, field)
        output: int = getattr(arg, field)
        if output != length:
            raise AssertionError(f"{call}: returned 0{output_text(field, output)}, expected {field} = {length}")
        return output

    # -- one method an ioctl

    def api(self, features: Feature = Feature(0), api: int = uapi.UFFD_API) -> uapi.uffdio_api:
        """UFFDIO_API: enable features; returns the struct as the kernel left it.

        EINVAL: other api, unknown feature, second call. EPERM: EVENT_FORK without CAP_SYS_PTRACE.
        """
        arg = uapi.uffdio_api(api=api, features=features)
        self.ioctl(uapi.UFFDIO_API, arg, f"UFFDIO_API(api={api:#x}, features={features})")
        self.features = features
        self.offered = Feature(arg.features)
        return arg

    def register(self, where: Range, mode: RegisterMode) -> RangeIoctls:
        """UFFDIO_REGISTER: report faults of these kinds; returns the ioctls that the range offers.

        Where it fails it must leave the field ``ioctls`` alone.
        """
        arg = uapi.uffdio_register(uapi.uffdio_range(where.start, where.len), mode)
        call = f"UFFDIO_REGISTER({where}, {mode})"
        try:
            self.ioctl(uapi.UFFDIO_REGISTER, arg, call, "ioctls")
        except UffdError as error:
            if arg.ioctls != UNTOUCHED & (1 << 64) - 1:
                raise AssertionError(f"{error}: expected ioctls untouched") from None
            raise UffdError(error.errno or 0, call) from None
        return RangeIoctls(arg.ioctls)

    def unregister(self, where: Range) -> None:
        """UFFDIO_UNREGISTER. Follow with wake() where a thread may be touching the range: see release()."""
        arg = uapi.uffdio_range(where.start, where.len)
        self.ioctl(uapi.UFFDIO_UNREGISTER, arg, f"UFFDIO_UNREGISTER({where})")

    def wake(self, where: Range) -> None:
        """UFFDIO_WAKE: let the threads that sleep on the range try again."""
        arg = uapi.uffdio_range(where.start, where.len)
        self.ioctl(uapi.UFFDIO_WAKE, arg, f"UFFDIO_WAKE({where})")

    def release(self, where: Range) -> None:
        """Unregister a range that is being touched.

        With per-VMA locks a fault can slip in behind the wake of UFFDIO_UNREGISTER and sleep for ever, hence the
        second one.
        """
        self.unregister(where)
        self.wake(where)

    def copy(self, dst: int, src: int, length: int, mode: CopyMode = CopyMode(0)) -> int:
        """UFFDIO_COPY; returns the bytes copied, always the whole length."""
        call = f"UFFDIO_COPY(dst={dst:#x}, src={src:#x}, len={length}, mode={mode})"
        return self._fill(uapi.UFFDIO_COPY, uapi.uffdio_copy(dst, src, length, mode), call, "copy", length)

    def zeropage(self, where: Range, mode: ZeropageMode = ZeropageMode(0)) -> int:
        """UFFDIO_ZEROPAGE; returns the bytes zeroed."""
        arg = uapi.uffdio_zeropage(uapi.uffdio_range(where.start, where.len), mode)
        return self._fill(uapi.UFFDIO_ZEROPAGE, arg, f"UFFDIO_ZEROPAGE({where}, {mode})", "zeropage", where.len)

    def move(self, dst: int, src: int, length: int, mode: MoveMode = MoveMode(0)) -> int:
        """UFFDIO_MOVE; returns the bytes moved."""
        call = f"UFFDIO_MOVE(dst={dst:#x}, src={src:#x}, len={length}, mode={mode})"
        return self._fill(uapi.UFFDIO_MOVE, uapi.uffdio_move(dst, src, length, mode), call, "move", length)

    def continue_(self, where: Range, mode: ContinueMode = ContinueMode(0)) -> int:
        """UFFDIO_CONTINUE; returns the bytes mapped."""
        arg = uapi.uffdio_continue(uapi.uffdio_range(where.start, where.len), mode)
        return self._fill(uapi.UFFDIO_CONTINUE, arg, f"UFFDIO_CONTINUE({where}, {mode})", "mapped", where.len)

    def poison(self, where: Range, mode: PoisonMode = PoisonMode(0)) -> int:
        """UFFDIO_POISON; returns the bytes poisoned."""
        arg = uapi.uffdio_poison(uapi.uffdio_range(where.start, where.len), mode)
        return self._fill(uapi.UFFDIO_POISON, arg, f"UFFDIO_POISON({where}, {mode})", "updated", where.len)

    def writeprotect(self, where: Range, mode: WriteprotectMode = WriteprotectMode.WP) -> None:
        """UFFDIO_WRITEPROTECT: protect, or with mode 0 un-protect and wake."""
        arg = uapi.uffdio_writeprotect(uapi.uffdio_range(where.start, where.len), mode)
        self.ioctl(uapi.UFFDIO_WRITEPROTECT, arg, f"UFFDIO_WRITEPROTECT({where}, {mode})")

    def unprotect(self, where: Range) -> None:
        """UFFDIO_WRITEPROTECT with mode 0: drop the protection and wake."""
        self.writeprotect(where, WriteprotectMode(0))

    def rwprotect(self, where: Range, mode: RwprotectMode = RwprotectMode.RWP) -> None:
        """UFFDIO_RWPROTECT: protect, or with mode 0 un-protect and wake."""
        arg = uapi.uffdio_rwprotect(uapi.uffdio_range(where.start, where.len), mode)
        self.ioctl(uapi.UFFDIO_RWPROTECT, arg, f"UFFDIO_RWPROTECT({where}, {mode})")

    def resolve(self, where: Range) -> None:
        """UFFDIO_RWPROTECT with mode 0: make the pages accessible and wake."""
        self.rwprotect(where, RwprotectMode(0))

    def set_mode(self, enable: Feature = Feature(0), disable: Feature = Feature(0)) -> None:
        """UFFDIO_SET_MODE: switch RWP_ASYNC while the handle is in use."""
        arg = uapi.uffdio_set_mode(enable, disable)
        self.ioctl(uapi.UFFDIO_SET_MODE, arg, f"UFFDIO_SET_MODE(enable={enable}, disable={disable})")

    # -- messages

    def read(self, count: int = 1) -> list[Message]:
        """read(2) of up to ``count`` messages; an empty list stands for EAGAIN."""
        try:
            raw = os.read(self.fd, count * MESSAGE_SIZE)
        except BlockingIOError:
            return []
        return [parse_message(raw[at : at + MESSAGE_SIZE]) for at in range(0, len(raw), MESSAGE_SIZE)]

    def readable(self, timeout: float = 0) -> bool:
        """Whether poll(2) says POLLIN, within ``timeout`` seconds. Needs O_NONBLOCK."""
        poller = select.poll()
        poller.register(self.fd, select.POLLIN)
        return any(events & select.POLLIN for _, events in poller.poll(timeout * 1000))

    def wait(self, what: str = "a message") -> Message:
        """Read the next message, waiting for it; AssertionError when none comes within the deadline."""
        end = time.monotonic() + DEADLINE
        while (left := end - time.monotonic()) > 0:
            if self.readable(left) and (messages := self.read()):
                return messages[0]
        raise AssertionError(f"expected {what}; nothing came within {DEADLINE:g} seconds")

    def wait_fault(self, where: Range | int, flags: PagefaultFlag = PagefaultFlag(0)) -> Fault:
        """Read the next message: a page fault in ``where`` (at it, if it is an address) with exactly these flags."""
        message = self.wait(f"a page fault with flags {flags}")
        inside = isinstance(message, Fault) and (
            message.address == where if isinstance(where, int) else message.address in where
        )
        if not isinstance(message, Fault) or message.flags != flags or not inside:
            place = f"at {where:#x}" if isinstance(where, int) else f"in {where}"
            raise AssertionError(f"expected a page fault {place} with flags {flags}, got {message}")
        return message

    def expect_asleep(self, threads: int) -> None:
        """Assert how many threads sleep in a fault of this handle.

        A wake takes a thread off the kernel's list at once, before it runs again, so this needs no patience.
        """
        expect(self.fdinfo.total, threads, "threads asleep in a fault (total: of fdinfo)")

    def expect_still_asleep(self, threads: int) -> None:
        """Assert that so many threads sleep in a fault, and that none woke only to fault again.

        All messages must have been read before.
        """
        self.expect_asleep(threads)
        self.expect_no_message()

    def expect_no_message(self) -> None:
        """Assert that nothing is queued."""
        messages = self.read()
        if messages:
            raise AssertionError(f"expected no message, got {messages[0]}")

    # -- state

    @property
    def fdinfo(self) -> FdInfo:
        """The counters of /proc/self/fdinfo."""
        fields = {}
        with open(f"/proc/self/fdinfo/{self.fd}") as file:
            for line in file:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        api, features, ioctls = (int(part, 16) for part in fields["API"].split(":"))
        return FdInfo(int(fields["pending"]), int(fields["total"]), api, features, ioctls)

    def fileno(self) -> int:
        """The descriptor, for select and friends."""
        return self.fd

    def close(self) -> None:
        """Close the descriptor; the last close unregisters everything and wakes everybody."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Uffd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def mended(uffd: Uffd) -> Iterator[None]:
    """Check a promise whose known defect is mended wherever UFFD_FEATURE_RWP is offered, which is Linux 7.3 and later.

    There a failure of the block is one, however much it reads like the defect; elsewhere the defect may explain it.
    """
    try:
        yield
    except AssertionError as error:
        if Feature.RWP in uffd.offered:
            text = f"{error} (mended by Linux 7.3, which this kernel is by its UFFD_FEATURE_RWP: a defect come back)"
            raise Unexplained(text) from error
        raise


def lowest_start() -> int:
    """Return where the range of a request may begin: at 0, or, with kernels before 2026, at vm.mmap_min_addr."""
    with Uffd.open() as uffd:
        try:
            uffd.wake(Range(0, PAGE_SIZE))
        except UffdError as error:
            expect(error.errno, errno.EINVAL, "errno of UFFDIO_WAKE at address 0")
            return mmap_min_addr()
    return 0


def combinations(*flags: int) -> list[int]:
    """Return every combination of flags, none and all among them."""
    return [sum(some) for count in range(len(flags) + 1) for some in itertools.combinations(flags, count)]


def flag_names(flags: int) -> str:
    """Return the names of flags of userfaultfd(2), and the number of those that it has not: O_CLOEXEC|0x2."""
    known = {os.O_CLOEXEC: "O_CLOEXEC", os.O_NONBLOCK: "O_NONBLOCK", uapi.UFFD_USER_MODE_ONLY: "UFFD_USER_MODE_ONLY"}
    names = [name for bit, name in known.items() if flags & bit]
    rest = flags & ~sum(known)
    return "|".join([*names, f"{rest:#x}"] if rest else names) or "0"


def expect_handle(uffd: Uffd, flags: int) -> None:
    """Assert what /proc and fcntl(2) say of a handle that was made with these flags (userfaultfd(2)).

    UFFD_USER_MODE_ONLY must show nowhere. Whether it was opened for reading alone does not matter here: it once was
    for both.
    """
    expect(os.readlink(f"/proc/self/fd/{uffd.fd}"), "anon_inode:[userfaultfd]", "link in /proc/self/fd")
    cloexec = os.O_CLOEXEC if fcntl.fcntl(uffd.fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC else 0
    expect(flag_names(cloexec), flag_names(flags & os.O_CLOEXEC), "close-on-exec (F_GETFD)")
    status = fcntl.fcntl(uffd.fd, fcntl.F_GETFL) & ~os.O_RDWR
    expect(flag_names(status), flag_names(flags & os.O_NONBLOCK), "F_GETFL")
