# SPDX-License-Identifier: GPL-2.0-only
"""/proc/PID/pagemap and PAGEMAP_SCAN."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable
from ctypes import addressof, sizeof
from functools import cache
from typing import NamedTuple

from uffd_selftests.abi import uapi
from uffd_selftests.abi.errors import checked
from uffd_selftests.abi.native import lib
from uffd_selftests.abi.uapi import Feature, PageCategory, PmScanFlag
from uffd_selftests.mem_types import Area
from uffd_selftests.toolkit.access import poke
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import DEADLINE, Skip, expect
from uffd_selftests.toolkit.handle import WP, Uffd
from uffd_selftests.toolkit.memory import MAP_ANONYMOUS, MAP_PRIVATE, PAGE_SIZE, Range, mapped
from uffd_selftests.toolkit.smaps import resident

__all__ = [
    "shows_uffd_wp",
    "require_uffd_wp_shown",
    "page_numbers",
    "Region",
    "Scan",
    "FILLED",
    "Pagemap",
    "expect_mapped",
    "expect_moved",
    "require_soft_dirty",
]


@cache
def shows_uffd_wp() -> bool:
    """Whether PM_UFFD_WP shows that a page is protected, as tried: kernels before 5.14 have no such bit."""
    with mapped(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS) as page, Uffd.open() as probe:
        if not probe.offered & Feature.PAGEFAULT_FLAG_WP:
            return True
        with Uffd.open(Feature.PAGEFAULT_FLAG_WP) as uffd:
            poke(page.start, b"x")
            uffd.register(page, WP)
            uffd.writeprotect(page)
            return Pagemap.uffd_wp(page.start)


def require_uffd_wp_shown() -> None:
    """Skip where the kernel does not show which pages are protected."""
    if not shows_uffd_wp():
        raise Skip("kernel lacks PM_UFFD_WP in pagemap (Linux 5.14)")


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
            if expected:
                require_uffd_wp_shown()
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
            if wanted and not some:
                require_uffd_wp_shown()
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

        One that the kernel has swapped out meanwhile, for want of memory, counts as mapped; one that it moves to other
        memory at this moment is waited for: like a marker it shows as PM_SWAP, but not for long.
        """
        end = time.monotonic() + DEADLINE
        while True:
            present = {i for i, mark in enumerate(cls.have(area.range, uapi.PM_PRESENT, area.page_size)) if mark}
            lacking = set(pages) - present
            if not lacking or not present <= set(pages) or time.monotonic() > end:
                break
            swap = cls.have(area.range, uapi.PM_SWAP, area.page_size)
            if resident("VmSwap"):
                present |= {page for page in lacking if swap[page]}
            if not all(swap[page] for page in lacking) or set(pages) <= present:
                break
            time.sleep(0.001)
        expect(page_numbers(present), page_numbers(set(pages)), f"pages of the {area.mem.name} area that are mapped")


def expect_mapped(ctx: Context, *pages: int) -> None:
    """Assert that these pages, and no others, are mapped, and hold the area's own pattern."""
    Pagemap.expect_present(ctx.dst, *pages)
    for page in pages:
        ctx.dst.expect_pattern_of(ctx.dst, page, 1)


def expect_moved(ctx: Context, *pages: int) -> None:
    """Assert that these pages have moved, and that all others are where they were, with their bytes."""
    stayed = sorted(set(range(ctx.nr_pages)) - set(pages))
    Pagemap.expect_present(ctx.dst, *pages)
    Pagemap.expect_present(ctx.src, *stayed)
    for area, numbers in (ctx.dst, pages), (ctx.src, stayed):
        for page in numbers:
            area.expect_pattern_of(ctx.src, page, 1)


def require_soft_dirty(written: int) -> None:
    """Skip unless the page at this address, just written, shows as soft-dirty: not every kernel has such bits."""
    if not Pagemap.entry(written) & uapi.PM_SOFT_DIRTY:
        raise Skip("no soft-dirty bits: boot a kernel with CONFIG_MEM_SOFT_DIRTY")
