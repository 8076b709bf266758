# SPDX-License-Identifier: GPL-2.0-only
"""What the probe tries: each ioctl and each feature really used once, on a page of each memory type.

A trial fails with OSError when the kernel refuses, with AssertionError when the kernel accepts and does something else.
Each runs in a process of its own, so it may hang or crash.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.uapi import (
    CopyMode,
    Feature,
    PageCategory,
    PagefaultFlag,
    PmScanFlag,
    RangeIoctls,
    RegisterMode,
    RwprotectMode,
)
from uffd_selftests.machine.kvm import probe_kvm
from uffd_selftests.mem_types import MemType
from uffd_selftests.toolkit.access import peek, poke, touch_trapped
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import Skip, expect
from uffd_selftests.toolkit.faulting import faulting
from uffd_selftests.toolkit.handle import MINOR, MISSING, RWP, WP, Uffd
from uffd_selftests.toolkit.handler import FaultHandler
from uffd_selftests.toolkit.memory import Advice, advise, remap, unmap
from uffd_selftests.toolkit.messages import Fault
from uffd_selftests.toolkit.pagemap import Pagemap
from uffd_selftests.toolkit.processes import Child
from uffd_selftests.toolkit.vcpu import guest, vcpu_faulting

VCPU = "vCPU's faults"
WP_FAULT = PagefaultFlag.WRITE | PagefaultFlag.WP
WP_ASYNC = Feature.WP_ASYNC | Feature.WP_UNPOPULATED
RWP_ASYNC = Feature.RWP | Feature.RWP_ASYNC


class Stage(Context):
    """One page of memory that is registered, a page of the same type beside it, and the handle."""

    def __init__(self, trial: Trial, mem: MemType, flags: int) -> None:
        super().__init__(mem, nr_pages=1)
        self.uffd = Uffd.open(trial.features, flags)
        self.offered = self.uffd.register(self.dst.range, trial.mode)
        """The ioctls that UFFDIO_REGISTER said the range offers."""

    def __enter__(self) -> Stage:
        super().__enter__()
        return self

    def resolve(self) -> None:
        """Fill the missing page, and wake whoever waits for it."""
        self.src.fill()
        self.uffd.copy(self.dst.start, self.src.start, self.page_size)

    def expect_copy(self) -> None:
        """Assert that the page holds what the source page was filled with."""
        self.dst.expect_pattern_of(self.src, 0, 1)

    def watched(self) -> FaultHandler:
        """Have a thread read the events of the handle."""
        return FaultHandler(self.uffd, self.dst.range, self.page_size, src=self.src.range, log_events_only=True)


@dataclass(frozen=True)
class Trial:
    """One thing to try."""

    name: str
    """The ioctl or the feature that is tried, without its prefix; the probe's key for it."""
    body: Callable[[Stage], object]
    mode: RegisterMode = MISSING
    ioctl: RangeIoctls = RangeIoctls(0)
    """The bit of uffdio_register.ioctls that offers it; none for a feature."""
    features: Feature = Feature(0)
    """What UFFDIO_API must enable for it."""
    kernel_faults: bool = False
    """It needs a handle that reports the kernel's own faults."""
    ioctl_since: str = "4.3"

    @property
    def since(self) -> str:
        """The first Linux release with it; some memory types came later."""
        return self.features.since or self.ioctl_since


# ---- ioctls --------------------------------------------------------------------------------------------------------


def copy(on: Stage) -> None:
    """Fill the page."""
    on.resolve()
    on.expect_copy()


def zeropage(on: Stage) -> None:
    """Map a page of zeroes."""
    on.uffd.zeropage(on.dst.range)
    on.dst.expect_zero()


def move(on: Stage) -> None:
    """Move the source page, mapping and all."""
    on.src.fill()
    on.uffd.move(on.dst.start, on.src.start, on.page_size)
    on.expect_copy()


def poison(on: Stage) -> None:
    """Let whoever touches the page get SIGBUS."""
    on.uffd.poison(on.dst.range)
    expect_sigbus(on)


def wake(on: Stage) -> None:
    """Fill the page without waking the thread that waits for it, then wake it."""
    on.src.fill()
    with faulting(on.uffd, on.dst.start):
        on.uffd.copy(on.dst.start, on.src.start, on.page_size, CopyMode.DONTWAKE)
        on.uffd.expect_still_asleep(1)
        on.uffd.wake(on.dst.range)


def unregister(on: Stage) -> None:
    """Let the kernel handle the page again."""
    on.uffd.unregister(on.dst.range)
    on.dst.expect_zero()
    on.uffd.expect_no_message()


def writeprotect(on: Stage) -> None:
    """Protect a page, have a write reported, and lift the protection."""
    on.dst.fill()
    write_reported(on)


def wp_unpopulated(on: Stage) -> None:
    """Protect a page that is not there yet, and have a write reported."""
    write_reported(on)


def write_reported(on: Stage) -> None:
    """Protect the page; a write sleeps until the protection is lifted."""
    on.uffd.writeprotect(on.dst.range)
    with faulting(on.uffd, on.dst.start, write=True, flags=WP_FAULT):
        on.uffd.unprotect(on.dst.range)


def wp_async(on: Stage) -> None:
    """Protect a page; a write goes on at once, and PAGEMAP_SCAN reports it and protects the page again."""

    def written() -> int:
        flags = PmScanFlag.WP_MATCHING | PmScanFlag.CHECK_WPASYNC
        found = Pagemap.scan(on.dst.range, PageCategory.WRITTEN, flags=flags).regions
        return sum(region.end - region.start for region in found)

    on.dst.fill()  # on a hole of hugetlb PM_SCAN_WP_MATCHING hangs for good before Linux 7.1
    on.uffd.writeprotect(on.dst.range)
    expect(written(), 0, "bytes written before the write")
    poke(on.dst.start, b"\0")
    on.uffd.expect_no_message()
    expect(written() > 0, True, "whether the write is reported")
    expect(written(), 0, "bytes written since they were last reported")


def continue_(on: Stage) -> None:
    """Map a page that is in the file already."""
    on.src.fill()
    with on.dst.file_view() as view:
        on.src.pattern.fill(view.start, 0, 1)
    with faulting(on.uffd, on.dst.start, flags=PagefaultFlag.MINOR):
        on.uffd.continue_(on.dst.range)
    on.expect_copy()


def rwprotect(on: Stage) -> None:
    """Protect a page, have a read reported, and lift the protection."""
    on.dst.fill()
    on.uffd.rwprotect(on.dst.range)
    with faulting(on.uffd, on.dst.start, flags=PagefaultFlag.RWP):
        on.uffd.rwprotect(on.dst.range, RwprotectMode(0))


def sigbus(on: Stage) -> None:
    """Let whoever touches a missing page get SIGBUS, and no message."""
    expect_sigbus(on)
    on.uffd.expect_no_message()


def expect_sigbus(on: Stage) -> None:
    """Touch the page and assert the signal."""
    (trap,) = touch_trapped(on.dst.range, on.page_size)
    expect(str(trap).partition(" ")[0], "SIGBUS", "what became of an access")


def kernel_faults(on: Stage) -> None:
    """Have read(2) meet the missing page: its fault is reported like any other."""
    source, sink = os.pipe()
    os.write(sink, b"x")
    call = partial(syscalls.read_into, source, on.dst.start, 1)
    with faulting(on.uffd, on.dst.start, flags=PagefaultFlag.WRITE, call=call):
        on.resolve()
    expect(peek(on.dst.start), b"x", "the byte that read(2) wrote")


def vcpu_fault(on: Stage) -> None:
    """Have a virtual processor meet the missing page: its fault is reported like any other, and served."""
    if reason := probe_kvm()["reason"]:
        raise Skip(reason)
    with guest(on.dst) as processor:
        with vcpu_faulting(processor, on.uffd, on.dst.start) as waiter:
            on.resolve()
        expect(waiter.result(), peek(on.src.start, 4), "what the processor read")


BY_MEMORY = (
    Trial("COPY", copy, ioctl=RangeIoctls.COPY),
    Trial("ZEROPAGE", zeropage, ioctl=RangeIoctls.ZEROPAGE),
    Trial("MOVE", move, ioctl=RangeIoctls.MOVE, ioctl_since="6.8"),
    Trial("POISON", poison, ioctl=RangeIoctls.POISON, ioctl_since="6.6"),
    Trial("WAKE", wake, ioctl=RangeIoctls.WAKE),
    Trial("UNREGISTER", unregister),
    Trial("WRITEPROTECT", writeprotect, mode=WP, ioctl=RangeIoctls.WRITEPROTECT, ioctl_since="5.7"),
    Trial("CONTINUE", continue_, mode=MINOR, ioctl=RangeIoctls.CONTINUE, ioctl_since="5.13"),
    Trial("RWPROTECT", rwprotect, mode=RWP, ioctl=RangeIoctls.RWPROTECT, features=Feature.RWP),
    Trial("SIGBUS", sigbus, features=Feature.SIGBUS),
    Trial("WP_UNPOPULATED", wp_unpopulated, mode=WP, features=Feature.WP_UNPOPULATED),
    Trial("WP_ASYNC", wp_async, mode=WP, features=WP_ASYNC),
    Trial("kernel faults", kernel_faults, kernel_faults=True),
    Trial(VCPU, vcpu_fault, kernel_faults=True),
)
"""Tried on every memory type."""


# ---- features of the handle ----------------------------------------------------------------------------------------


def event_fork(on: Stage) -> None:
    """Hear of a fork."""
    with on.watched() as handler, Child(lambda _: None):
        pass
    expect(handler.stats.fork, 1, "UFFD_EVENT_FORK messages")


def event_remap(on: Stage) -> None:
    """Hear of a mremap."""
    with on.watched() as handler:
        remap(on.dst.range, to=on.src.start)
    expect(handler.stats.remap, 1, "UFFD_EVENT_REMAP messages")


def event_remove(on: Stage) -> None:
    """Hear of pages that are dropped."""
    with on.watched() as handler:
        advise(on.dst.range, Advice.DONTNEED)
    expect(handler.stats.remove, 1, "UFFD_EVENT_REMOVE messages")


def event_unmap(on: Stage) -> None:
    """Hear of a munmap."""
    with on.watched() as handler:
        unmap(on.dst.range)
    expect(handler.stats.unmap, 1, "UFFD_EVENT_UNMAP messages")


def thread_id(on: Stage) -> None:
    """Be told which thread faults."""
    with faulting(on.uffd, on.dst.start) as waiter:
        on.resolve()
    fault = waiter.fault or Fault(0, PagefaultFlag(0))
    expect(fault.ptid, waiter.tid, "pagefault.feat.ptid")


def exact_address(on: Stage) -> None:
    """Be told which byte is touched, not only which page."""
    with faulting(on.uffd, on.dst.start + 8, at=on.dst.start + 8):
        on.resolve()


def rwp_async(on: Stage) -> None:
    """Switch the kernel's own resolving of read-write-protect faults off while in use (UFFDIO_SET_MODE)."""
    on.dst.fill()
    on.uffd.rwprotect(on.dst.range)
    peek(on.dst.start)
    on.uffd.expect_no_message()
    on.uffd.set_mode(disable=Feature.RWP_ASYNC)
    on.uffd.rwprotect(on.dst.range)
    with faulting(on.uffd, on.dst.start, flags=PagefaultFlag.RWP):
        on.uffd.rwprotect(on.dst.range, RwprotectMode(0))


OF_HANDLE = (
    Trial("EVENT_FORK", event_fork, features=Feature.EVENT_FORK),
    Trial("EVENT_REMAP", event_remap, features=Feature.EVENT_REMAP),
    Trial("EVENT_REMOVE", event_remove, features=Feature.EVENT_REMOVE),
    Trial("EVENT_UNMAP", event_unmap, features=Feature.EVENT_UNMAP),
    Trial("THREAD_ID", thread_id, features=Feature.THREAD_ID),
    Trial("EXACT_ADDRESS", exact_address, features=Feature.EXACT_ADDRESS),
    Trial("RWP_ASYNC", rwp_async, mode=RWP, features=RWP_ASYNC),
)
"""Tried on anonymous memory alone: they do not depend on it."""
