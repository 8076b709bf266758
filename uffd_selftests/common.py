# SPDX-License-Identifier: GPL-2.0-only
"""What the cases are written in: the userfaultfd handle, the fault handler, contexts, processes, pagemap.

It stands where uffd-common.c stands upstream, without its globals. Nothing here knows pytest.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import select
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from ctypes import addressof, sizeof
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import cached_property
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from uffd_selftests import uapi
from uffd_selftests.kernel import open_debugfs
from uffd_selftests.machine import Swap, keep_swap, release_swap
from uffd_selftests.mem_types import Area, MemType, pmd_size
from uffd_selftests.memory import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_NONE,
    PROT_READ,
    Advice,
    KernelError,
    Range,
    advise,
    checked,
    errno_name,
    map_memory,
    mapped,
    pmd_mapped,
    poke,
    resident,
    smaps_fields,
    touch,
    unmap,
)
from uffd_selftests.native import ffi, lib
from uffd_selftests.uapi import (
    ContinueMode,
    CopyMode,
    Event,
    Feature,
    MoveMode,
    PageCategory,
    PagefaultFlag,
    PmScanFlag,
    PoisonMode,
    RangeIoctls,
    RegisterMode,
    RwprotectMode,
    WriteprotectMode,
    ZeropageMode,
)

MISSING = RegisterMode.MISSING
WP = RegisterMode.WP
MINOR = RegisterMode.MINOR
RWP = RegisterMode.RWP

WRITEPROTECT = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM
"""Write protection, of any type of memory."""
MINOR_FAULTS = Feature.MINOR_HUGETLBFS | Feature.MINOR_SHMEM
"""Minor faults, of any type of memory that has them."""

DEADLINE = 10.0 * float(os.environ.get("UFFD_DEADLINE_SCALE") or 1)
"""Seconds after which something awaited counts as not happening."""

DEFAULT_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK | uapi.UFFD_USER_MODE_ONLY
"""Flags of a handle unless a case says otherwise: those of upstream, which need no privilege."""

UNTOUCHED = -0x5EED_0BAD_CAFE
"""Output fields hold this before the call; the kernel writes no such value."""


waiting_threads: list[threading.Thread] = []
"""The threads in which cases make calls that may sleep: see Waiter of processes.py."""


class Skip(Exception):
    """Something the case needs is missing; the text is the reason, with the remedy."""


def expect(observed: object, expected: object, what: str) -> None:
    """Assert equality; a failure says ``what: expected X, got Y``."""
    if observed != expected:
        raise AssertionError(f"{what}: expected {_told(expected)}, got {_told(observed)}")


def _told(value: object) -> object:
    """Return what names a value, in a container too: str() of a signal is its number, repr() of flags has both."""
    if isinstance(value, signal.Signals):
        return value.name
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):  # not the named ones: they tell themselves
        parts = ", ".join(f"{_told(part)}" if isinstance(part, (Enum, tuple, list)) else repr(part) for part in value)
        return f"[{parts}]" if isinstance(value, list) else f"({parts})"
    return value


def expect_errno(error: OSError, number: int, what: str) -> None:
    """Assert that a call failed with this errno; a failure names both."""
    expect(errno_name(error.errno or 0), errno_name(number), what)


def expect_failed(error: UffdError, number: int) -> None:
    """Assert that a request failed with this errno and put it, negative, into its output field."""
    output = error.output if error.output is None else errno_name(error.output)
    expect((errno_name(error.errno or 0), output), (errno_name(number), errno_name(-number)), "errno and output field")


@contextmanager
def promise(row: str, when: str = "") -> Iterator[None]:
    """Name the promise (a row of the contract, or several) that the block checks, and the instance of it.

    A failure of the block begins with these.
    """
    try:
        yield
    except (AssertionError, OSError) as error:
        raise AssertionError(f"{row}{f', {when}' if when else ''}: {error}") from error


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a state is reached that another thread or process must reach; AssertionError after the deadline."""
    end = time.monotonic() + DEADLINE
    pause = 0.00002
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"expected {what} within {DEADLINE:g} seconds")
        # Not sched_yield: on the same CPU, one that does not sleep would go on until its time is over.
        time.sleep(pause)
        pause = min(1.5 * pause, 0.01)


# ---- messages ------------------------------------------------------------------------------------------------------


class _Told:
    """A message: addresses are told in hexadecimal, flags by their names."""

    ADDRESSES = ("address", "start", "end", "to", "len")

    def __repr__(self) -> str:
        fields = (f"{name}={f'{value:#x}' if name in self.ADDRESSES else value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({', '.join(fields)})"


@dataclass(frozen=True, repr=False)
class Fault(_Told):
    """UFFD_EVENT_PAGEFAULT. ``ptid`` is 0 without UFFD_FEATURE_THREAD_ID."""

    address: int
    flags: PagefaultFlag
    ptid: int = 0


@dataclass(frozen=True, repr=False)
class Forked(_Told):
    """UFFD_EVENT_FORK: the descriptor that serves the child."""

    ufd: int


@dataclass(frozen=True, repr=False)
class Remapped(_Told):
    """UFFD_EVENT_REMAP, in bytes."""

    start: int
    to: int
    len: int


@dataclass(frozen=True, repr=False)
class Removed(_Told):
    """UFFD_EVENT_REMOVE."""

    start: int
    end: int


@dataclass(frozen=True, repr=False)
class Unmapped(_Told):
    """UFFD_EVENT_UNMAP."""

    start: int
    end: int


Message = Fault | Forked | Remapped | Removed | Unmapped

MESSAGE_SIZE = sizeof(uapi.uffd_msg)


def parse_message(raw: bytes) -> Message:
    """Return what one uffd_msg says; every byte that its event does not define must be zero."""
    msg = uapi.uffd_msg.from_buffer_copy(raw)
    arg = msg.arg
    message: Message
    match msg.event:
        case Event.PAGEFAULT:
            fault = arg.pagefault
            message, used = Fault(fault.address, PagefaultFlag(fault.flags), fault.feat.ptid), 20
        case Event.FORK:
            message, used = Forked(arg.fork.ufd), 4
        case Event.REMAP:
            message, used = Remapped(arg.remap.from_, arg.remap.to, arg.remap.len), 24
        case Event.REMOVE:
            message, used = Removed(arg.remove.start, arg.remove.end), 16
        case Event.UNMAP:
            message, used = Unmapped(arg.remove.start, arg.remove.end), 16
        case _:
            raise AssertionError(f"unknown event {msg.event:#x} in message {raw.hex()}")
    if any(raw[1:8]) or any(raw[8 + used :]):
        raise AssertionError(f"reserved bytes of {Event(msg.event)} are not zero: {raw.hex()}")
    return message


# ---- the handle ----------------------------------------------------------------------------------------------------


class UffdError(KernelError):
    """An ioctl of a userfaultfd failed. ``output`` is the output field afterwards, None where there is none."""

    def __init__(self, number: int, call: str, field: str | None = None, output: int | None = None) -> None:
        super().__init__(number, call)
        self.field = field
        self.output = output

    def __str__(self) -> str:
        return super().__str__() + _output_text(self.field, self.output)


def _output_text(field: str | None, output: int | None) -> str:
    if field is None or output is None:
        return ""
    return f" with {field} {'untouched' if output == UNTOUCHED else f'= {errno_name(output)}'}"


@contextmanager
def refuses(number: int, *, output: int | None = None, or_untouched: bool = False) -> Iterator[None]:
    """Assert that the one ioctl in the block fails with this errno.

    ``output`` is the value its output field must have then; by default -errno. UNTOUCHED stands for a field that
    the kernel must leave alone; ``or_untouched`` leaves it the choice. Requests without an output field only have the
    errno.
    """
    wanted = -number if output is None else output
    try:
        yield
    except UffdError as error:
        allowed = {None, wanted, *([UNTOUCHED] if or_untouched else [])}
        if error.errno != number or error.output not in allowed:
            text = errno_name(number) + (_output_text(error.field, wanted))
            raise AssertionError(f"expected {text}; got {error}") from None
    else:
        raise AssertionError(f"expected {errno_name(number)}; the call succeeded")


def held_up() -> AbstractContextManager[None]:
    """Assert that the fill in the block says EAGAIN: an event is unread, or the operation behind it not over yet.

    The output field says so, too, or is left alone, as by kernels before 6.15; event-output-field tells which.
    """
    return refuses(errno.EAGAIN, or_untouched=True)


@contextmanager
def fails(*numbers: int) -> Iterator[None]:
    """Assert that the one system call in the block fails with one of these; for ioctls of a userfaultfd: refuses()."""
    wanted = " or ".join(map(errno_name, numbers))
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise AssertionError(f"expected {wanted}; got {error}") from None
    else:
        raise AssertionError(f"expected {wanted}; the call succeeded")


def bad_ranges(good: Range) -> dict[str, Range]:
    """Ranges that every request must refuse with EINVAL (validate_range of the kernel), made from a good one."""
    return {
        "start not page aligned": Range(good.start + 1, good.len),
        "len 0": Range(good.start, 0),
        "len 1": Range(good.start, 1),
        "len not a multiple of the page size": Range(good.start, good.len + 1),
        "start + len wraps": Range(good.start, (1 << 64) - PAGE_SIZE),
        "start beyond user space": Range((1 << 64) - PAGE_SIZE, PAGE_SIZE),
        "start with a tag in its top byte": Range(good.start | 1 << 57, good.len),  # arm64 took it, before Linux 5.14
    }


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
        if via in (None, "syscall"):
            ret = lib.uffd_syscall(uapi.NR_USERFAULTFD, flags, 0, 0, 0, 0, 0)
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
            raise AssertionError(f"{call}: returned 0{_output_text(field, output)}, expected {field} = {length}")
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


# ---- the fault handler ---------------------------------------------------------------------------------------------


class Action(IntEnum):
    """What the handler thread does about a fault."""

    RECORD = lib.UFFD_RECORD
    COPY = lib.UFFD_COPY
    ZEROPAGE = lib.UFFD_ZEROPAGE
    MOVE = lib.UFFD_MOVE
    POISON = lib.UFFD_POISON
    CONTINUE = lib.UFFD_CONTINUE
    UNPROTECT = lib.UFFD_UNPROTECT
    WAKE = lib.UFFD_WAKE


class Stats(NamedTuple):
    """What a handler has seen and done so far."""

    messages: int
    logged: int
    missing: int
    minor: int
    wp: int
    rwp: int
    write: int
    """Missing faults that were writes."""
    fork: int
    remap: int
    remove: int
    unmap: int
    resolved: int
    eexist: int
    eagain: int
    gone: int


class HandlerError(AssertionError):
    """The handler thread met something that it should not have met."""


class FaultHandler:
    """A native thread that answers the messages of a userfaultfd, in a ``with`` block.

    ``where`` is the registered area, ``src`` where COPY and MOVE take its data from; a fault outside the area is an
    error. ``unit`` is how many bytes a fault resolves (default: a page), ``plan`` the actions for missing faults
    unit by unit. ``flip`` is a second mapping of the area through which a minor fault's page is bit flipped first.
    ``retry`` repeats every fill, at the second mapping ``retry_at`` if given, and wants EEXIST. At the end of the
    block the thread answers what is queued and ends; if it met an error, that is raised.
    """

    def __init__(
        self,
        uffd: Uffd,
        where: Range,
        page_size: int,
        *,
        src: Range | None = None,
        unit: int | None = None,
        missing: Action = Action.COPY,
        minor: Action = Action.CONTINUE,
        wp: Action = Action.UNPROTECT,
        rwp: Action = Action.UNPROTECT,
        plan: Sequence[Action] | None = None,
        copy_mode: CopyMode = CopyMode(0),
        zeropage_mode: ZeropageMode = ZeropageMode(0),
        move_mode: MoveMode = MoveMode(0),
        continue_mode: ContinueMode = ContinueMode(0),
        poison_mode: PoisonMode = PoisonMode(0),
        flip: Range | None = None,
        retry: bool = False,
        retry_at: Range | None = None,
        unregister_removed: bool = False,
        blocking: bool = False,
        log_size: int = 64,
        log_events_only: bool = False,
    ) -> None:
        self._plan = ffi.new("uint8_t[]", [int(action) for action in plan]) if plan is not None else ffi.NULL
        self._log = ffi.new("struct uffd_message[]", log_size)
        self._config = ffi.new(
            "struct uffd_handler_config *",
            {
                "uffd": uffd.fd,
                "blocking": blocking,
                "dst": where.start,
                "src": src.start if src else 0,
                "len": where.len,
                "unit": unit or page_size,
                "flip": flip.start if flip else 0,
                "missing": int(missing),
                "minor": int(minor),
                "wp": int(wp),
                "rwp": int(rwp),
                "plan": self._plan,
                "copy_mode": int(copy_mode),
                "zeropage_mode": int(zeropage_mode),
                "move_mode": int(move_mode),
                "continue_mode": int(continue_mode),
                "poison_mode": int(poison_mode),
                "retry": retry,
                "retry_at": retry_at.start if retry_at else 0,
                "unregister_removed": unregister_removed,
                "log": self._log,
                "log_size": log_size,
                "log_events_only": log_events_only,
            },
        )
        self._handler: Any = None
        self._final: Stats | None = None

    def __enter__(self) -> FaultHandler:
        self._handler = lib.uffd_handler_start(self._config)
        if self._handler == ffi.NULL:
            raise KernelError(ffi.errno, "pthread_create")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lib.uffd_handler_stop(self._handler)
        self._final = self.stats
        failure = self._failure()
        lib.uffd_handler_free(self._handler)
        self._handler = None
        # What the handler met came first: the error in the block is its consequence.
        if failure is not None:
            raise HandlerError(failure) from error

    @property
    def stats(self) -> Stats:
        """Counters; final after the block."""
        if self._final is not None:
            return self._final
        stats = ffi.new("struct uffd_stats *")
        lib.uffd_handler_stats(self._handler, stats)
        return Stats(*(getattr(stats, name) for name in Stats._fields))

    @property
    def messages(self) -> list[Message]:
        """The first ``log_size`` messages, in the order in which they were read; without faults if so asked."""
        return [parse_message(bytes(ffi.buffer(self._log[i].bytes))) for i in range(self.stats.logged)]

    @property
    def children(self) -> list[Uffd]:
        """The descriptors that FORK events brought, oldest first; they belong to the handler and end with it."""
        fds = ffi.new("int[]", 64)
        count = lib.uffd_handler_children(self._handler, fds, len(fds))
        return [Uffd(fds[i]) for i in range(count)]

    def _failure(self) -> str | None:
        failure = ffi.new("struct uffd_failure *")
        lib.uffd_handler_failure(self._handler, failure)
        call = f"{uapi.IOCTL_NAMES.get(failure.request, failure.request)} at {failure.address:#x}"
        error = errno_name(failure.err) if failure.err else "success"
        match failure.kind:
            case lib.UFFD_OK:
                return None
            case lib.UFFD_IOCTL_FAILED:
                return f"{call}: expected success, got {error} with output {errno_name(failure.output)}"
            case lib.UFFD_SHORT_OUTPUT:
                return f"{call}: returned 0, expected output {self._config.unit}, got {errno_name(failure.output)}"
            case lib.UFFD_NO_EEXIST:
                output = errno_name(failure.output)
                return f"{call} repeated: expected EEXIST with output -EEXIST, got {error} with output {output}"
            case lib.UFFD_OUTSIDE:
                where = Range(self._config.dst, self._config.len)
                return f"page fault at {failure.address:#x}, outside the registered area {where}"
            case lib.UFFD_UNKNOWN_EVENT:
                return f"unknown event {failure.output:#x}"
            case lib.UFFD_READ_FAILED:
                return f"poll or read of the userfaultfd: {error} (result {failure.output})"
            case _:
                return f"more than {failure.output} forks or postponed faults"


def stats_report(handlers: Sequence[FaultHandler]) -> str:
    """One line with the faults by kind: total, and in brackets the part of each handler (one per CPU, usually)."""
    parts = []
    for kind in ("missing", "minor", "wp", "rwp"):
        counts = [getattr(handler.stats, kind) for handler in handlers]
        if any(counts):
            parts.append(f"{sum(counts)} {kind} ({'+'.join(map(str, counts))})")
    return "userfaults: " + (" ".join(parts) or "none")


# ---- contexts ------------------------------------------------------------------------------------------------------


class ContextHook(Protocol):
    """Called while a context is made; may raise Skip."""

    def __call__(self, ctx: Context, /) -> None:
        """Prepare the context."""


MODEST_BYTES = 1 << 30
"""An area of this size, which no case takes by itself, can be mapped on every machine."""


class Context:
    """What a case works on: a userfaultfd, a source area and a destination area of one memory type.

    Both areas are mapped at first use, empty. Leaving the block closes and unmaps everything.
    """

    def __init__(
        self,
        mem: MemType,
        *,
        features: Feature = Feature(0),
        nr_pages: int = 2,
        pre_alloc: ContextHook | None = None,
        post_alloc: ContextHook | None = None,
    ) -> None:
        self.mem = mem
        self.features = features
        self.nr_pages = nr_pages
        self.page_size = mem.page_size
        self._hooks = (pre_alloc, post_alloc)
        self._areas: list[Area] = []

    @cached_property
    def uffd(self) -> Uffd:
        """The handle, with the context's features."""
        return Uffd.open(self.features)

    @cached_property
    def src(self) -> Area:
        """Where the data come from; never registered unless a case does it."""
        return self.allocate(reserve=True)

    @cached_property
    def dst(self) -> Area:
        """Where the faults happen."""
        return self.allocate()

    def allocate(self, nr_pages: int | None = None, *, reserve: bool = False) -> Area:
        """Map a further area, unmapped with the context."""
        try:
            area = self.mem.allocate(nr_pages or self.nr_pages, reserve=reserve)
        except KernelError as error:
            if error.errno == errno.ENOMEM and self.mem.hugetlb:
                raise Skip(f"{nr_pages or self.nr_pages} huge pages cannot be reserved: {error}") from None
            size = (nr_pages or self.nr_pages) * self.page_size
            if error.errno == errno.ENOMEM and size > MODEST_BYTES:
                raise Skip(f"{size >> 20} MiB cannot be mapped: {error}: choose a smaller --area-mib") from None
            raise
        self._areas.append(area)
        return area

    def handler(self, **options: Any) -> FaultHandler:
        """A fault handler for the destination area, taking its data from the source area; options as FaultHandler."""
        options.setdefault("src", self.src.range)
        return FaultHandler(self.uffd, options.pop("where", self.dst.range), self.page_size, **options)

    def __enter__(self) -> Context:
        pre_alloc, post_alloc = self._hooks
        try:
            if pre_alloc:
                pre_alloc(self)
            if post_alloc:
                post_alloc(self)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the handle, then unmap the areas: nobody waits for an event then.

        A case that failed may have left threads asleep in the areas. The close wakes them; until they have ended,
        their memory stays, else the failure would end as a crash.
        """
        if "uffd" in self.__dict__:
            self.uffd.close()
        end = time.monotonic() + DEADLINE / 10
        for thread in waiting_threads:
            thread.join(max(0, end - time.monotonic()))
        if not any(thread.is_alive() for thread in waiting_threads):
            for area in self._areas:
                area.close()
        self._areas.clear()
        release_swap()


def prevent_hugepages(ctx: Context) -> None:
    """Keep transparent huge pages out of the source area, which is empty yet; fine without THP."""
    try:
        advise(ctx.src.range, Advice.NOHUGEPAGE)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise


def request_hugepages(ctx: Context) -> None:
    """Have the source area, which is empty yet, filled with transparent huge pages."""
    if pmd_size() > ctx.src.range.len:
        raise Skip(f"a transparent huge page is {pmd_size()} bytes, the area only {ctx.src.range.len}: --area-mib")
    try:
        advise(ctx.src.range, Advice.HUGEPAGE)
    except KernelError as error:
        if error.errno != errno.EINVAL:
            raise
        raise Skip("the kernel lacks CONFIG_TRANSPARENT_HUGEPAGE") from None


# ---- what is registered --------------------------------------------------------------------------------------------

UNREGISTERED = RegisterMode(0)

_VM_FLAGS = {"um": MISSING, "uw": WP, "ui": MINOR}


def _mappings(where: Range, pid: int | str = "self") -> list[tuple[Range, RegisterMode]]:
    """Return the part of each mapping that lies in the range, and its modes (VmFlags of /proc/PID/smaps)."""
    found = []
    if not os.path.exists("/proc/self/smaps"):
        raise Skip("/proc/self/smaps: ENOENT: boot a kernel with CONFIG_PROC_PAGE_MONITOR")
    for fields in smaps_fields(where, pid):
        start, end = max(int(fields["start"], 16), where.start), min(int(fields["end"], 16), where.end)
        flags = fields["VmFlags"].split()
        mode = sum(bit for name, bit in _VM_FLAGS.items() if name in flags)
        found.append((Range(start, end - start), RegisterMode(mode)))
    return found


def expect_modes(where: Range, *modes: RegisterMode, pid: int | str = "self") -> None:
    """Assert in which modes memory is registered, with whichever handle.

    The range is looked at in as many equal parts as modes are given: pages, usually. Holes in a part do not count.
    """
    size = where.len // len(modes)
    mappings = _mappings(where, pid)
    seen = []
    for start in range(where.start, where.end, size):
        part = {mode for mapping, mode in mappings if mapping.start < start + size and start < mapping.end}
        seen.append("/".join(sorted(str(mode) for mode in part)) or "not mapped")
    expect(", ".join(seen), ", ".join(str(mode) for mode in modes), f"modes in which {where} is registered, by part")


def expect_mappings(area: Area, *pages: int) -> None:
    """Assert how the kernel has cut an area into mappings: the number of pages of each."""
    seen = [mapping.len // area.page_size for mapping, _ in _mappings(area.range)]
    expect(seen, list(pages), "pages in each mapping of the area")


@contextmanager
def no_mapping_left() -> Iterator[None]:
    """Use up vm.max_map_count: in the block no mapping of this process can be split."""
    with open("/proc/sys/vm/max_map_count") as file:
        limit = int(file.read())
    if limit > 1 << 17:
        raise Skip(f"vm.max_map_count is {limit}, so many mappings would take long to make: set it to 65530")
    length = (limit + 2) * PAGE_SIZE
    pieces = Range(map_memory(length, prot=PROT_NONE, flags=MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE), length)
    try:
        for start in range(pieces.start + PAGE_SIZE, pieces.end, 2 * PAGE_SIZE):
            if lib.uffd_mprotect(start, PAGE_SIZE, PROT_READ) == -errno.ENOMEM:
                break
        yield
    finally:
        unmap(pieces)


def small_area(ctx: Context) -> Area:
    """Map an area that one transparent huge page would fill, filled with small pages, and none else until advised."""
    area = ctx.allocate(pmd_size() // PAGE_SIZE)
    advise(area.range, Advice.NOHUGEPAGE)
    area.fill()
    return area


def collapse(where: Range) -> None:
    """MADV_COLLAPSE, repeated while the kernel says that something is in its way for the moment (EAGAIN)."""

    def collapsed() -> bool:
        try:
            advise(where, Advice.COLLAPSE)
        except KernelError as error:
            if error.errno != errno.EAGAIN:
                raise
            return False
        return True

    advise(where, Advice.HUGEPAGE)
    eventually(collapsed, "MADV_COLLAPSE not to say EAGAIN")


def require_collapse(ctx: Context) -> None:
    """Skip where not even memory that nobody watches can be collapsed into a transparent huge page."""
    area = small_area(ctx)
    try:
        collapse(area.range)
    except KernelError as error:
        raise Skip(f"no transparent huge page of {ctx.mem} memory to be had: {error} (Linux 6.1)") from None


def huge_area(ctx: Context, count: int = 1) -> Area:
    """Map an area that so many transparent huge pages fill, mapped as such; Skip where none can be had."""
    area = ctx.allocate(count * pmd_size() // PAGE_SIZE)
    try:
        advise(area.range, Advice.HUGEPAGE)
        area.fill()
        if pmd_mapped(area.range) < area.range.len:
            collapse(area.range)
    except KernelError as error:
        raise Skip(f"no transparent huge page of {ctx.mem} memory to be had: {error}") from None
    return area


# ---- pagemap and pins ----------------------------------------------------------------------------------------------


def page_numbers(pages: Iterable[int]) -> str:
    """Page numbers for a message: 1, 3-511."""
    runs: list[list[int]] = []
    for page in sorted(pages):
        if runs and page == runs[-1][1] + 1:
            runs[-1][1] = page
        else:
            runs.append([page, page])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"


class Region(NamedTuple):
    """Consecutive pages of the same categories, as PAGEMAP_SCAN reports them (struct page_region)."""

    start: int
    end: int
    categories: PageCategory

    def __repr__(self) -> str:
        return f"[{self.start:#x}, {self.end:#x}) {self.categories}"


class Scan(NamedTuple):
    """What one PAGEMAP_SCAN found."""

    regions: list[Region]
    walk_end: int
    """The address at which it stopped looking."""

    def __repr__(self) -> str:
        return f"{self.regions}, looking until {self.walk_end:#x}"


FILLED = uapi.PM_PRESENT | uapi.PM_SWAP
"""Set in pagemap for a page, for one in swap, and for what UFFDIO_POISON leaves in its place."""


class Pagemap:
    """/proc/self/pagemap of the process that asks: one 64-bit entry a base page (PM_* of uapi)."""

    @staticmethod
    def entries(where: Range) -> list[int]:
        """Return the entries of all base pages of a range."""
        try:
            fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise Skip("/proc/self/pagemap: ENOENT: boot a kernel with CONFIG_PROC_PAGE_MONITOR") from None
        try:
            raw = os.pread(fd, where.len // PAGE_SIZE * 8, where.start // PAGE_SIZE * 8)
        finally:
            os.close(fd)
        return list(struct.unpack(f"={len(raw) // 8}Q", raw))

    @classmethod
    def entry(cls, address: int) -> int:
        """Return the entry of the page at ``address``."""
        return cls.entries(Range(address, PAGE_SIZE))[0]

    @classmethod
    def have(cls, where: Range, bits: int, stride: int = PAGE_SIZE) -> list[bool]:
        """Return of the base page at every ``stride`` bytes of a range whether any of the bits is set."""
        mask = int(bits)  # an enum's own operators take longer than reading the page table
        return [entry & mask != 0 for entry in cls.entries(where)[:: stride // PAGE_SIZE]]

    @classmethod
    def filled(cls, where: Range, stride: int = PAGE_SIZE) -> list[bool]:
        """Return of every ``stride`` bytes of a range whether there is a page, or what UFFDIO_POISON leaves."""
        return cls.have(where, FILLED, stride)

    @classmethod
    def expect_first(cls, where: Range, done: int, when: str, stride: int = PAGE_SIZE) -> None:
        """Assert that of every ``stride`` bytes of a range just the first ``done`` are filled."""
        filled = cls.filled(where, stride)
        expect(filled.count(True), done, f"pages that are there {when}")
        expect(all(filled[:done]), True, f"whether they are the first ones {when}")

    @classmethod
    def uffd_wp(cls, address: int) -> bool:
        """Whether the page is marked as protected, present or not (PM_UFFD_WP)."""
        return bool(cls.entry(address) & uapi.PM_UFFD_WP)

    @classmethod
    def expect_uffd_wp(cls, address: int, expected: bool, when: str) -> None:
        """Assert the mark of the page at ``address``."""
        entry = cls.entry(address)
        if bool(entry & uapi.PM_UFFD_WP) != expected:
            state = "set" if expected else "clear"
            raise AssertionError(f"{when}: expected PM_UFFD_WP {state} in pagemap, got entry {entry:#018x}")

    @classmethod
    def expect_protected(cls, area: Area, pages: Iterable[int], when: str) -> None:
        """Assert that of an area exactly these pages are marked as protected, each with all its base pages."""
        marks = cls.have(area.range, uapi.PM_UFFD_WP)
        step = area.page_size // PAGE_SIZE
        by_page = [marks[i : i + step] for i in range(0, len(marks), step)]
        wanted = set(pages)
        wrong = [page for page, marks in enumerate(by_page) if marks != [page in wanted] * step]
        if wrong:
            some = {page for page, marks in enumerate(by_page) if any(marks)}
            raise AssertionError(
                f"{when}: expected PM_UFFD_WP in pagemap on exactly these pages: {page_numbers(wanted)}, "
                f"got {page_numbers(some)}; first wrong page: {wrong[0]}"
            )

    @staticmethod
    def scan_ioctl(arg: uapi.pm_scan_arg, pid: int | str = "self") -> int:
        """PAGEMAP_SCAN with any argument; returns how many regions were written to its vector.

        EINVAL: unknown flag or category, unaligned start, no vector. EFAULT: memory that is not the caller's. EPERM:
        CHECK_WPASYNC, and part of the range does not track writes.
        """
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            where = f"[{arg.start:#x}, {arg.end:#x}), {PmScanFlag(arg.flags)}"
            return checked(lib.uffd_ioctl(fd, uapi.PAGEMAP_SCAN, addressof(arg)), f"PAGEMAP_SCAN({where})")
        finally:
            os.close(fd)

    @classmethod
    def scan(
        cls,
        where: Range,
        required: PageCategory = PageCategory(0),
        *,
        anyof: PageCategory = PageCategory(0),
        inverted: PageCategory = PageCategory(0),
        returned: PageCategory | None = None,
        flags: PmScanFlag = PmScanFlag(0),
        room: int = 64,
        max_pages: int = 0,
        pid: int | str = "self",
    ) -> Scan:
        """PAGEMAP_SCAN: pages with all ``required`` and one of the ``anyof`` categories, ``inverted`` ones inverted.

        ``returned`` are the categories reported of them, by default the required ones; ``room`` is how many regions
        there is space for (none: no vector); ``pid`` is whose memory it is. The kernel must change nothing but walk_end
        and the regions it returns.
        """
        vector = (uapi.page_region * (room + 1))()
        arg = uapi.pm_scan_arg(
            size=sizeof(uapi.pm_scan_arg),
            flags=flags,
            start=where.start,
            end=where.end,
            vec=addressof(vector) if room else 0,
            vec_len=room,
            max_pages=max_pages,
            category_inverted=inverted,
            category_mask=required,
            category_anyof_mask=anyof,
            return_mask=required if returned is None else returned,
        )
        before = bytes(arg)
        count = cls.scan_ioctl(arg, pid)
        walk_end, arg.walk_end = arg.walk_end, 0
        expect(bytes(arg), before, "the fields of struct pm_scan_arg but walk_end")
        unused = bytes(vector)[count * sizeof(uapi.page_region) :]
        expect(any(unused), False, "bytes written behind the regions returned")
        regions = [Region(region.start, region.end, PageCategory(region.categories)) for region in vector[:count]]
        return Scan(regions, walk_end)

    @classmethod
    def expect_present(cls, area: Area, *pages: int) -> None:
        """Assert that these pages of the area are mapped, and no others.

        One that the kernel has swapped out meanwhile, for want of memory, counts as mapped.
        """
        present = [i for i, mark in enumerate(cls.have(area.range, uapi.PM_PRESENT, area.page_size)) if mark]
        if present != sorted(pages) and resident("VmSwap"):  # else PM_SWAP stands for other things
            swap = cls.have(area.range, uapi.PM_SWAP, area.page_size)
            present = sorted({*present, *(page for page in pages if swap[page])})
        expect(present, sorted(pages), f"pages of the {area.mem.name} area that are mapped")


def require_soft_dirty(written: int) -> None:
    """Skip unless the page at this address, just written, shows as soft-dirty: not every kernel has such bits."""
    if not Pagemap.entry(written) & uapi.PM_SOFT_DIRTY:
        raise Skip("no soft-dirty bits: boot a kernel with CONFIG_MEM_SOFT_DIRTY")


def page_out(where: Range, gone: Callable[[], bool]) -> None:
    """Have pages written to swap (MADV_PAGEOUT) until ``gone`` says so.

    Skip where the kernel writes nothing to swap; AssertionError where it does with other pages.
    """
    keep_swap()
    if _paged_out(where, gone):
        return
    with mapped(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS) as other:
        poke(other.start, b"any")
        if _paged_out(other, lambda: bool(Pagemap.entry(other.start) & uapi.PM_SWAP)):
            raise AssertionError(f"expected MADV_PAGEOUT to write {where} to swap, as it does with other pages")
    raise Skip("MADV_PAGEOUT leaves all pages in memory: is the swap space full?")


def _paged_out(where: Range, gone: Callable[[], bool]) -> bool:
    end = time.monotonic() + DEADLINE / 10
    while time.monotonic() < end:
        advise(where, Advice.PAGEOUT)
        if gone():
            return True
    return False


def swap_out(where: Range) -> None:
    """Have every page of a private mapping written to swap."""
    page_out(where, lambda: all(Pagemap.have(where, uapi.PM_SWAP)))


@contextmanager
def own_swap(size: int = 4 << 20) -> Iterator[Swap]:
    """Have a swap disk of the case's own, to which this processor swaps in the block; Skip where none can be had."""
    with ExitStack() as stack:
        try:
            swap = stack.enter_context(Swap(size, own=True))
        except OSError as error:
            raise Skip(f"no swap disk of its own to be had, which takes root and zram: {error}") from None
        with mapped(2 * size, flags=MAP_PRIVATE | MAP_ANONYMOUS) as other:
            # A processor first uses up the places that it has set aside on another disk.
            for start in range(other.start, other.end, size // 16):
                some = Range(start, size // 16)
                touch(some, PAGE_SIZE, write=True)
                advise(some, Advice.PAGEOUT)
                if swap.used:
                    break
            else:
                raise Skip("the kernel does not use a swap disk of a higher priority")
        yield swap


_PIN_LONGTERM_TEST_START = 0x4018_6707  # _IOW('g', 7, struct pin_longterm_test) of mm/gup_test.h
_PIN_LONGTERM_TEST_STOP = 0x6708


@contextmanager
def pinned(where: Range) -> Iterator[None]:
    """Hold a read-only long-term pin of the range, through CONFIG_GUP_TEST's debugfs file."""
    fd = open_debugfs("gup_test", os.O_RDWR | os.O_CLOEXEC)
    try:
        arg = ffi.from_buffer(struct.pack("=QQI4x", where.start, where.len, 0))
        address = int(ffi.cast("uintptr_t", arg))
        checked(lib.uffd_ioctl(fd, _PIN_LONGTERM_TEST_START, address), f"PIN_LONGTERM_TEST_START({where})")
        try:
            yield
        finally:
            checked(lib.uffd_ioctl(fd, _PIN_LONGTERM_TEST_STOP, 0), "PIN_LONGTERM_TEST_STOP")
    finally:
        os.close(fd)
