# SPDX-License-Identifier: GPL-2.0-only
"""What is measured: kinds of faults, each of which every page of an area takes once a pass."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from ctypes import addressof, sizeof
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from loop import BenchmarkError, Latencies, touch

from uffd_selftests.abi.errors import checked
from uffd_selftests.abi.native import lib
from uffd_selftests.abi.uapi import (
    PAGEMAP_SCAN,
    Feature,
    PageCategory,
    PmScanFlag,
    RegisterMode,
    page_region,
    pm_scan_arg,
)
from uffd_selftests.mem_types import ALL, ANON, SHARED, Area, Backing, MemType
from uffd_selftests.toolkit.handle import MINOR, MISSING, RWP, WP, Uffd
from uffd_selftests.toolkit.handler import Action, FaultHandler
from uffd_selftests.toolkit.memory import Advice, Range, advise, keep_small

if TYPE_CHECKING:
    from types import TracebackType

    from uffd_selftests.machine.facts import Facts


@dataclass(frozen=True)
class Sample:
    """What passes over an area have measured."""

    faults: int
    seconds: float
    latencies: Latencies
    scan_written: float = 0
    """Seconds of PAGEMAP_SCAN over pages that were all touched, and of protecting each again."""
    scan_clean: float = 0
    """Seconds of PAGEMAP_SCAN when no page was touched."""

    def __add__(self, other: Sample) -> Sample:
        return Sample(
            self.faults + other.faults,
            self.seconds + other.seconds,
            self.latencies + other.latencies,
            self.scan_written + other.scan_written,
            self.scan_clean + other.scan_clean,
        )


class Workload:
    """A kind of fault on an area of one memory type, set up for as long as the ``with`` block runs.

    ``handlers`` threads of the suite's answer the faults. Raises BenchmarkError when the kernel refuses a step, and at
    the end of the block when a fault was missing or too many.
    """

    name: ClassVar[str]
    mems: ClassVar[tuple[MemType, ...]] = ALL
    mode: ClassVar[RegisterMode]
    write: ClassVar[bool] = False
    """Whether pages are written; else they are read."""
    with_source: ClassVar[bool] = False
    """Whether the handler takes the pages from a second area."""
    missing: ClassVar[Action] = Action.COPY

    def __init__(self, mem: MemType, nr_pages: int, *, handlers: int = 1) -> None:
        self.mem = mem
        self.nr_pages = nr_pages
        self.handlers = handlers
        self._expected = 0  # faults, so far
        self._running: list[FaultHandler] = []

    @classmethod
    def features(cls, _mem: MemType) -> Feature:
        """Return the features to enable."""
        return Feature(0)

    @classmethod
    def lacks(cls, _facts: Facts) -> str | None:
        """Return what the kernel lacks beside features."""
        return None

    def __enter__(self) -> Workload:
        with ExitStack() as stack:
            self._stack = stack
            try:
                self.dst = self._allocate()
                if self.with_source:
                    self.src = self._allocate()
                    self.src.fill()
                self.uffd = stack.enter_context(Uffd.open(self.features(self.mem)))
                self.populate()
                self.uffd.register(self.target, self.mode)
                self._running = [stack.enter_context(self._handler()) for _ in range(self.handlers)]
            except OSError as error:
                raise BenchmarkError(f"{self}: {error}") from None
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
        except AssertionError as failure:
            raise BenchmarkError(f"{self}: {failure}") from None
        answered = sum(handler.stats.resolved for handler in self._running)
        if kind is None and self._running and answered != self._expected:
            raise BenchmarkError(f"{self}: expected {self._expected} faults, the handlers answered {answered}")

    def __str__(self) -> str:
        return f"{self.name} on {self.mem}"

    def _allocate(self) -> Area:
        area = self.mem.allocate(self.nr_pages, reserve=True)
        self._stack.callback(area.close)
        if not self.mem.hugetlb:
            keep_small(area.range)
        return area

    @property
    def target(self) -> Range:
        """The registered range."""
        return self.dst.range

    def populate(self) -> None:
        """Do what must be done once, before the range is registered."""

    def reset(self) -> None:
        """Have every page of the range fault at its next access."""
        raise NotImplementedError

    def run(self, threads: int) -> Sample:
        """Have every page take its fault once."""
        try:
            self.reset()
            return self.measure(threads)
        except OSError as error:
            raise BenchmarkError(f"{self}: {error}") from None

    def measure(self, threads: int) -> Sample:
        """Touch the range, and time it."""
        page_size = self.mem.page_size
        self._expected += self.nr_pages
        touched = touch(
            self.target, page_size, threads, write=self.write, release=lambda: self.uffd.release(self.target)
        )
        return Sample(self.nr_pages, touched.seconds, touched.latencies)

    def _handler(self) -> FaultHandler:
        return FaultHandler(
            self.uffd,
            self.target,
            self.mem.page_size,
            src=self.src.range if self.with_source else None,
            missing=self.missing,
            log_size=1,
        )


class MissingFaults(Workload):
    """A page is missing; the handler copies it there: UFFDIO_COPY."""

    name = "missing"
    mode = MISSING
    with_source = True

    def reset(self) -> None:
        """Take the pages away."""
        self.dst.release()


class MinorFaults(Workload):
    """A page is in the file and not in the page table; the handler puts it there: UFFDIO_CONTINUE."""

    name = "minor"
    mems = SHARED
    mode = MINOR

    @classmethod
    def features(cls, mem: MemType) -> Feature:
        """Return the feature of the memory type."""
        return Feature.MINOR_HUGETLBFS if mem.hugetlb else Feature.MINOR_SHMEM

    @property
    def target(self) -> Range:
        """The second mapping."""
        return self.dst.alias

    def populate(self) -> None:
        """Put the pages into the file."""
        self.dst.fill()

    def reset(self) -> None:
        """Empty the page table."""
        advise(self.target, Advice.DONTNEED)


class WriteProtectFaults(Workload):
    """A page is protected; the handler lifts the protection: UFFDIO_WRITEPROTECT."""

    name = "wp"
    mode = WP
    write = True

    @classmethod
    def features(cls, mem: MemType) -> Feature:
        """Return the features of the memory type."""
        anon = Feature.PAGEFAULT_FLAG_WP
        return anon if mem.backing is Backing.ANON else anon | Feature.WP_HUGETLBFS_SHMEM

    def populate(self) -> None:
        """Have the pages there."""
        self.dst.fill()

    def reset(self) -> None:
        """Protect them all with one call."""
        self.uffd.writeprotect(self.target)


class Moves(Workload):
    """A page is missing; the handler moves it there from another place: UFFDIO_MOVE."""

    name = "move"
    mems = (ANON,)
    mode = MISSING
    with_source = True
    missing = Action.MOVE

    @classmethod
    def features(cls, _mem: MemType) -> Feature:
        """Return the feature."""
        return Feature.MOVE

    def reset(self) -> None:
        """Take the pages away and make new ones at the source."""
        self.dst.release()
        self.src.fill()


class ReadWriteProtectFaults(WriteProtectFaults):
    """A page is protected from every access; the handler lifts the protection: UFFDIO_RWPROTECT."""

    name = "rwp"
    mode = RWP
    write = False

    @classmethod
    def features(cls, _mem: MemType) -> Feature:
        """Return the feature, which is the same for any memory."""
        return Feature.RWP

    def reset(self) -> None:
        """Protect them all with one call."""
        self.uffd.rwprotect(self.target)


class AsyncWriteProtectFaults(WriteProtectFaults):
    """A page is protected, and the kernel lifts the protection; PAGEMAP_SCAN finds it and protects it again."""

    name = "wp-async"
    category: ClassVar[PageCategory] = PageCategory.WRITTEN
    flags: ClassVar[PmScanFlag] = PmScanFlag.WP_MATCHING | PmScanFlag.CHECK_WPASYNC

    def __init__(self, mem: MemType, nr_pages: int, **_: object) -> None:
        super().__init__(mem, nr_pages, handlers=0)

    @classmethod
    def features(cls, mem: MemType) -> Feature:
        """Return those of write protection and of the asynchronous kind."""
        return super().features(mem) | Feature.WP_ASYNC

    @classmethod
    def lacks(cls, facts: Facts) -> str | None:
        """PAGEMAP_SCAN."""
        return facts.pagemap_scan

    def populate(self) -> None:
        """Have the pages there, and something to ask."""
        super().populate()
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._stack.callback(os.close, self._pagemap)

    def measure(self, threads: int) -> Sample:
        """Touch the range, then scan it twice: once with all pages touched and protected again, once with none."""
        sample = super().measure(threads)
        written = self._scan(self.nr_pages) + self.protect_again()
        clean = self._scan(0)
        return Sample(sample.faults, sample.seconds, sample.latencies, written, clean)

    def protect_again(self) -> float:
        """Protect what the scan has found and does not protect by itself; return the seconds that it took."""
        return 0.0

    def _scan(self, pages: int) -> float:
        """Have the pages found that were touched; return the seconds that it took."""
        region = page_region()
        arg = pm_scan_arg(
            size=sizeof(pm_scan_arg),
            flags=self.flags,
            start=self.target.start,
            end=self.target.end,
            vec=addressof(region),
            vec_len=1,
            category_mask=self.category,
            return_mask=self.category,
        )
        start = time.perf_counter()
        count = lib.uffd_ioctl(self._pagemap, PAGEMAP_SCAN, addressof(arg))
        seconds = time.perf_counter() - start
        checked(count, "PAGEMAP_SCAN")
        found = (region.end - region.start) // self.mem.page_size if count else 0
        if found != pages:
            raise BenchmarkError(f"{self}: expected PAGEMAP_SCAN to find {pages} pages {self.category}, found {found}")
        return seconds


class AsyncReadWriteProtectFaults(AsyncWriteProtectFaults):
    """A page is protected from every access, and the kernel lifts the protection; PAGEMAP_SCAN finds it.

    The scan cannot protect it again: that is one more call, for all pages.
    """

    name = "rwp-async"
    mode = RWP
    write = False
    category = PageCategory.ACCESSED
    flags = PmScanFlag(0)

    @classmethod
    def features(cls, _mem: MemType) -> Feature:
        """Return the features, which are the same for any memory."""
        return Feature.RWP | Feature.RWP_ASYNC

    def reset(self) -> None:
        """Protect them all with one call."""
        self.uffd.rwprotect(self.target)

    def protect_again(self) -> float:
        """Protect what was found, all of it."""
        start = time.perf_counter()
        self.uffd.rwprotect(self.target)
        return time.perf_counter() - start


KINDS: dict[str, type[Workload]] = {
    kind.name: kind
    for kind in (
        *(MissingFaults, MinorFaults, WriteProtectFaults, ReadWriteProtectFaults, Moves),
        *(AsyncWriteProtectFaults, AsyncReadWriteProtectFaults),
    )
}
"""The kinds by name, in the order of the table."""
