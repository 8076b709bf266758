# SPDX-License-Identifier: GPL-2.0-only
"""The userfaultfd user-space API up to Linux 7.3, independent of the installed kernel headers.

Every number is that of <linux/userfaultfd.h>, and of <linux/fs.h> for PAGEMAP_SCAN; tests/abi/test_uapi.py compares
them with the headers at hand.  A mask keeps bits it does not know, so that a newer kernel's answer survives.
Addresses and lengths are in bytes, all integers are in the machine's byte order.
"""

# The structures are named as in C.
# ruff: noqa: N801

from __future__ import annotations

import enum
import os
from ctypes import Structure, Union, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    # Opening a userfaultfd
    "USERFAULTFD_IOC_NEW",
    "UFFD_API",
    "UFFD_USER_MODE_ONLY",
    # Request codes
    "UFFDIO_API",
    "UFFDIO_REGISTER",
    "UFFDIO_UNREGISTER",
    "UFFDIO_WAKE",
    "UFFDIO_COPY",
    "UFFDIO_ZEROPAGE",
    "UFFDIO_MOVE",
    "UFFDIO_WRITEPROTECT",
    "UFFDIO_CONTINUE",
    "UFFDIO_POISON",
    "UFFDIO_RWPROTECT",
    "UFFDIO_SET_MODE",
    "PAGEMAP_SCAN",
    "IOCTL_NAMES",
    "ioctl_bit",
    # Masks and numbers
    "Mask",
    "Feature",
    "ApiIoctls",
    "RangeIoctls",
    "RegisterMode",
    "CopyMode",
    "ZeropageMode",
    "MoveMode",
    "WriteprotectMode",
    "ContinueMode",
    "PoisonMode",
    "RwprotectMode",
    "PagefaultFlag",
    "Event",
    "PagemapBit",
    "PM_SOFT_DIRTY",
    "PM_MMAP_EXCLUSIVE",
    "PM_UFFD_WP",
    "PM_GUARD",
    "PM_FILE",
    "PM_SWAP",
    "PM_PRESENT",
    "PM_PFN_MASK",
    "PageCategory",
    "PmScanFlag",
    # Structures
    "uffdio_api",
    "uffdio_range",
    "uffdio_register",
    "uffdio_copy",
    "uffdio_zeropage",
    "uffdio_move",
    "uffdio_writeprotect",
    "uffdio_continue",
    "uffdio_poison",
    "uffdio_rwprotect",
    "uffdio_set_mode",
    "uffd_msg",
    "page_region",
    "pm_scan_arg",
]


# ---- masks and numbers ---------------------------------------------------------------------------------------------


class Mask(enum.IntFlag):
    """A mask of up to 64 bits whose members show themselves under the kernel's names."""

    prefix: ClassVar[str]

    def __init_subclass__(cls, *, prefix: str) -> None:
        super().__init_subclass__()
        cls.prefix = prefix

    @property
    def names(self) -> tuple[str, ...]:
        """The kernel's names of the bits that are set, lowest bit first; ``bit 23`` for one without a name."""
        value = int(self)
        members = ((bit, type(self)(1 << bit)) for bit in range(value.bit_length()) if value >> bit & 1)
        return tuple(f"{self.prefix}{member.name}" if member.name else f"bit {bit}" for bit, member in members)

    def __str__(self) -> str:
        return "|".join(self.names) or "0"

    def __format__(self, spec: str) -> str:
        # Python 3.10 refuses number formats to an enum that has a __str__.
        return int.__format__(self.value, spec) if spec else str(self)

    def without(self, other: int) -> Self:
        """Return these bits without those of other; ``self & ~other`` would lose the bits without a name."""
        return type(self)(self.value & ~int(other))


class Feature(Mask, prefix="UFFD_FEATURE_"):
    """uffdio_api.features: what UFFDIO_API offers and enables."""

    PAGEFAULT_FLAG_WP = 1 << 0  # write-protect faults
    EVENT_FORK = 1 << 1  # needs CAP_SYS_PTRACE, else EPERM
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4  # says what the kernel can; enabling it has no effect
    MISSING_SHMEM = 1 << 5  # likewise
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7  # a signal instead of a page-fault message
    THREAD_ID = 1 << 8  # fills in pagefault.feat.ptid
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11  # the fault address is not rounded down to its page
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13  # anonymous memory without a page can be write protected
    POISON = 1 << 14
    WP_ASYNC = 1 << 15  # the kernel resolves write-protect faults itself; implies WP_UNPOPULATED
    MOVE = 1 << 16
    RWP = 1 << 17  # read-write-protect faults
    RWP_ASYNC = 1 << 18  # the kernel resolves these itself; EINVAL without RWP

    @property
    def since(self) -> str:
        """The first Linux release that has all these bits on some architecture ("6.8"); "" for unknown bits."""
        releases = [_SINCE.get(1 << bit, "") for bit in range(64) if self.value >> bit & 1]
        if not all(releases):
            return ""
        return max(releases, key=lambda release: tuple(map(int, release.split("."))), default="")


_SINCE: dict[int, str] = {
    Feature.PAGEFAULT_FLAG_WP: "5.7",  # arm64: 6.10, riscv: 6.19
    Feature.EVENT_FORK: "4.11",
    Feature.EVENT_REMAP: "4.11",
    Feature.EVENT_REMOVE: "4.11",
    Feature.MISSING_HUGETLBFS: "4.11",
    Feature.MISSING_SHMEM: "4.11",
    Feature.EVENT_UNMAP: "4.11",
    Feature.SIGBUS: "4.14",
    Feature.THREAD_ID: "4.14",
    Feature.MINOR_HUGETLBFS: "5.13",
    Feature.MINOR_SHMEM: "5.14",
    Feature.EXACT_ADDRESS: "5.18",
    Feature.WP_HUGETLBFS_SHMEM: "5.19",
    Feature.WP_UNPOPULATED: "6.4",
    Feature.POISON: "6.6",
    Feature.WP_ASYNC: "6.7",
    Feature.MOVE: "6.8",
    Feature.RWP: "7.3",
    Feature.RWP_ASYNC: "7.3",
}


class ApiIoctls(Mask, prefix="_UFFDIO_"):
    """uffdio_api.ioctls: requests on the file descriptor as such, 1 << _UFFDIO_*."""

    REGISTER = 1 << 0x00
    UNREGISTER = 1 << 0x01
    SET_MODE = 1 << 0x0A
    API = 1 << 0x3F


class RangeIoctls(Mask, prefix="_UFFDIO_"):
    """uffdio_register.ioctls: requests that the registered range allows, 1 << _UFFDIO_*."""

    WAKE = 1 << 0x02
    COPY = 1 << 0x03
    ZEROPAGE = 1 << 0x04
    MOVE = 1 << 0x05
    WRITEPROTECT = 1 << 0x06
    CONTINUE = 1 << 0x07
    POISON = 1 << 0x08
    RWPROTECT = 1 << 0x09


class RegisterMode(Mask, prefix="UFFDIO_REGISTER_MODE_"):
    """uffdio_register.mode: which faults the range reports."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


class CopyMode(Mask, prefix="UFFDIO_COPY_MODE_"):
    """uffdio_copy.mode."""

    DONTWAKE = 1 << 0
    WP = 1 << 1


class ZeropageMode(Mask, prefix="UFFDIO_ZEROPAGE_MODE_"):
    """uffdio_zeropage.mode."""

    DONTWAKE = 1 << 0


class MoveMode(Mask, prefix="UFFDIO_MOVE_MODE_"):
    """uffdio_move.mode."""

    DONTWAKE = 1 << 0
    ALLOW_SRC_HOLES = 1 << 1


class WriteprotectMode(Mask, prefix="UFFDIO_WRITEPROTECT_MODE_"):
    """uffdio_writeprotect.mode: WP protects, 0 un-protects; both bits at once are EINVAL."""

    WP = 1 << 0
    DONTWAKE = 1 << 1


class ContinueMode(Mask, prefix="UFFDIO_CONTINUE_MODE_"):
    """uffdio_continue.mode."""

    DONTWAKE = 1 << 0
    WP = 1 << 1


class PoisonMode(Mask, prefix="UFFDIO_POISON_MODE_"):
    """uffdio_poison.mode."""

    DONTWAKE = 1 << 0


class RwprotectMode(Mask, prefix="UFFDIO_RWPROTECT_MODE_"):
    """uffdio_rwprotect.mode: RWP protects, 0 un-protects; both bits at once are EINVAL."""

    RWP = 1 << 0
    DONTWAKE = 1 << 1


class PagefaultFlag(Mask, prefix="UFFD_PAGEFAULT_FLAG_"):
    """uffd_msg.arg.pagefault.flags; none of WP, MINOR and RWP means that the page was missing."""

    WRITE = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2
    RWP = 1 << 3


class Event(enum.IntEnum):
    """uffd_msg.event."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16

    def __str__(self) -> str:
        return f"UFFD_EVENT_{self.name}"


class PagemapBit(Mask, prefix="PM_"):
    """An entry of /proc/PID/pagemap without its page frame number or swap place (admin-guide/mm/pagemap.rst)."""

    SOFT_DIRTY = 1 << 55
    MMAP_EXCLUSIVE = 1 << 56
    UFFD_WP = 1 << 57  # the userfaultfd marker, of write protection or of read-write protection
    GUARD = 1 << 58  # MADV_GUARD_INSTALL
    FILE = 1 << 61
    SWAP = 1 << 62
    PRESENT = 1 << 63


PM_SOFT_DIRTY = PagemapBit.SOFT_DIRTY
PM_MMAP_EXCLUSIVE = PagemapBit.MMAP_EXCLUSIVE
PM_UFFD_WP = PagemapBit.UFFD_WP
PM_GUARD = PagemapBit.GUARD
PM_FILE = PagemapBit.FILE
PM_SWAP = PagemapBit.SWAP
PM_PRESENT = PagemapBit.PRESENT
PM_PFN_MASK = (1 << 55) - 1
"""The page frame number of a present page; zeros without CAP_SYS_ADMIN."""


class PageCategory(Mask, prefix="PAGE_IS_"):
    """What PAGEMAP_SCAN selects pages by and reports of them."""

    WPALLOWED = 1 << 0
    WRITTEN = 1 << 1
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8
    ACCESSED = 1 << 9


class PmScanFlag(Mask, prefix="PM_SCAN_"):
    """pm_scan_arg.flags."""

    WP_MATCHING = 1 << 0
    CHECK_WPASYNC = 1 << 1


# ---- structures ----------------------------------------------------------------------------------------------------


class uffdio_api(Structure):
    """UFFDIO_API: the features to enable in, those offered and the ApiIoctls out; zeroed on EINVAL and EPERM."""

    _fields_ = (("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64))


class uffdio_range(Structure):
    """UFFDIO_UNREGISTER, UFFDIO_WAKE, and a part of most others."""

    _fields_ = (("start", c_uint64), ("len", c_uint64))


class uffdio_register(Structure):
    """UFFDIO_REGISTER; the kernel writes ioctls."""

    _fields_ = (("range", uffdio_range), ("mode", c_uint64), ("ioctls", c_uint64))


class uffdio_copy(Structure):
    """UFFDIO_COPY; the kernel writes copy, the bytes copied or -errno."""

    _fields_ = (("dst", c_uint64), ("src", c_uint64), ("len", c_uint64), ("mode", c_uint64), ("copy", c_int64))


class uffdio_zeropage(Structure):
    """UFFDIO_ZEROPAGE; the kernel writes zeropage, the bytes zeroed or -errno."""

    _fields_ = (("range", uffdio_range), ("mode", c_uint64), ("zeropage", c_int64))


class uffdio_move(Structure):
    """UFFDIO_MOVE; the kernel writes move, the bytes moved or -errno."""

    _fields_ = (("dst", c_uint64), ("src", c_uint64), ("len", c_uint64), ("mode", c_uint64), ("move", c_int64))


class uffdio_writeprotect(Structure):
    """UFFDIO_WRITEPROTECT; the kernel writes nothing back."""

    _fields_ = (("range", uffdio_range), ("mode", c_uint64))


class uffdio_continue(Structure):
    """UFFDIO_CONTINUE; the kernel writes mapped, the bytes mapped or -errno."""

    _fields_ = (("range", uffdio_range), ("mode", c_uint64), ("mapped", c_int64))


class uffdio_poison(Structure):
    """UFFDIO_POISON; the kernel writes updated, the bytes poisoned or -errno."""

    _fields_ = (("range", uffdio_range), ("mode", c_uint64), ("updated", c_int64))


class uffdio_rwprotect(Structure):
    """UFFDIO_RWPROTECT; the kernel writes nothing back."""

    _fields_ = (("range", uffdio_range), ("mode", c_uint64))


class uffdio_set_mode(Structure):
    """UFFDIO_SET_MODE: features to switch on and off; only RWP_ASYNC is allowed."""

    _fields_ = (("enable", c_uint64), ("disable", c_uint64))


class _feat(Union):
    _fields_ = (("ptid", c_uint32),)


class _pagefault(Structure):
    _fields_ = (("flags", c_uint64), ("address", c_uint64), ("feat", _feat))


class _fork(Structure):
    _fields_ = (("ufd", c_uint32),)


class _remap(Structure):
    # "from" in C, which Python reserves.
    _fields_ = (("from_", c_uint64), ("to", c_uint64), ("len", c_uint64))


class _remove(Structure):
    _fields_ = (("start", c_uint64), ("end", c_uint64))


class _reserved(Structure):
    _fields_ = (("reserved1", c_uint64), ("reserved2", c_uint64), ("reserved3", c_uint64))


class _arg(Union):
    _fields_ = (
        ("pagefault", _pagefault),
        ("fork", _fork),
        ("remap", _remap),
        ("remove", _remove),  # of REMOVE and UNMAP
        ("reserved", _reserved),
    )


class uffd_msg(Structure):
    """What read(2) of a userfaultfd returns, any number of them; arg.remap.from_ is "from" in C."""

    _pack_ = 1
    _layout_ = "ms"  # Python 3.14 wants it said; it differs from the default for bit fields only
    _fields_ = (
        ("event", c_uint8),
        ("reserved1", c_uint8),
        ("reserved2", c_uint16),
        ("reserved3", c_uint32),
        ("arg", _arg),
    )


class page_region(Structure):
    """One answer of PAGEMAP_SCAN: start inclusive, end exclusive, PageCategory bits."""

    _fields_ = (("start", c_uint64), ("end", c_uint64), ("categories", c_uint64))


class pm_scan_arg(Structure):
    """PAGEMAP_SCAN; vec is the address of vec_len page_region, the kernel writes walk_end."""

    _fields_ = (
        ("size", c_uint64),
        ("flags", c_uint64),
        ("start", c_uint64),
        ("end", c_uint64),
        ("walk_end", c_uint64),
        ("vec", c_uint64),
        ("vec_len", c_uint64),
        ("max_pages", c_uint64),
        ("category_inverted", c_uint64),
        ("category_mask", c_uint64),
        ("category_anyof_mask", c_uint64),
        ("return_mask", c_uint64),
    )


# ---- what differs between architectures ----------------------------------------------------------------------------


def _ioctl_layout(machine: str) -> tuple[int, int, int, int]:
    """Return the values of "no argument", "read" and "write" and the shift of all three (<asm/ioctl.h>)."""
    if machine.startswith(("alpha", "mips", "ppc", "sparc")):
        return 1, 2, 4, 29
    if machine.startswith("parisc"):
        return 0, 1, 2, 30
    return 0, 2, 1, 30


_NONE, _READ, _WRITE, _DIRECTION_SHIFT = _ioctl_layout(os.uname().machine)


def _ioc(direction: int, magic: int, number: int, argument: type[Structure] | None = None) -> int:
    """Return an ioctl's request code, as the _IO macros do."""
    size = sizeof(argument) if argument else 0
    return direction << _DIRECTION_SHIFT | size << 16 | magic << 8 | number


def ioctl_bit(request: int) -> int:
    """Return the bit that stands for a UFFDIO_* request in uffdio_api.ioctls and uffdio_register.ioctls."""
    return 1 << (request & 0xFF)


# ---- requests ------------------------------------------------------------------------------------------------------

UFFD_API = 0xAA
"""The only value of uffdio_api.api."""

UFFD_USER_MODE_ONLY = 1
"""userfaultfd(2) flag, beside O_CLOEXEC and O_NONBLOCK: faults of the kernel itself fail instead of waiting."""

USERFAULTFD_IOC_NEW = _ioc(_NONE, 0xAA, 0x00)
"""On /dev/userfaultfd: a new userfaultfd; the argument is the flags of userfaultfd(2) by value."""

UFFDIO_API = _ioc(_READ | _WRITE, 0xAA, 0x3F, uffdio_api)
UFFDIO_REGISTER = _ioc(_READ | _WRITE, 0xAA, 0x00, uffdio_register)
UFFDIO_UNREGISTER = _ioc(_READ, 0xAA, 0x01, uffdio_range)  # the wrong way round, for ever
UFFDIO_WAKE = _ioc(_READ, 0xAA, 0x02, uffdio_range)  # likewise
UFFDIO_COPY = _ioc(_READ | _WRITE, 0xAA, 0x03, uffdio_copy)
UFFDIO_ZEROPAGE = _ioc(_READ | _WRITE, 0xAA, 0x04, uffdio_zeropage)
UFFDIO_MOVE = _ioc(_READ | _WRITE, 0xAA, 0x05, uffdio_move)
UFFDIO_WRITEPROTECT = _ioc(_READ | _WRITE, 0xAA, 0x06, uffdio_writeprotect)
UFFDIO_CONTINUE = _ioc(_READ | _WRITE, 0xAA, 0x07, uffdio_continue)
UFFDIO_POISON = _ioc(_READ | _WRITE, 0xAA, 0x08, uffdio_poison)
UFFDIO_RWPROTECT = _ioc(_READ | _WRITE, 0xAA, 0x09, uffdio_rwprotect)
UFFDIO_SET_MODE = _ioc(_WRITE, 0xAA, 0x0A, uffdio_set_mode)

PAGEMAP_SCAN = _ioc(_READ | _WRITE, ord("f"), 16, pm_scan_arg)
"""On /proc/PID/pagemap."""

IOCTL_NAMES = {
    value: name
    for name, value in globals().items()
    if name.startswith("UFFDIO_") or name in ("USERFAULTFD_IOC_NEW", "PAGEMAP_SCAN")
}
"""Request code to name, for messages."""
