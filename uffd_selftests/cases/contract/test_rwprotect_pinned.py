# SPDX-License-Identifier: GPL-2.0-only
"""Read-write protection and those who have a way to the page of their own: devices that hold it, other mappings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC_RWP, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED, NEW, RWP, SHARED, SYNC_RWP, Area, Context,
    IoUring, Pagemap, Range, expect, expect_accessed, expect_rwp_free, expect_rwp_trapped, huge_area, peek, poke,
    promise, rwp_protected, touch, uapi, undisturbed,
)  # fmt: skip

DEVICE = b"from the device"
"""What comes into a page behind its mapping's back."""
PFN = (1 << 55) - 1


def frames(area: Area) -> list[int]:
    """The page frames of an area, all zero without the privilege to see them."""
    return [entry & PFN for entry in Pagemap.entries(area.range)]


class Device:
    """A ring that holds pages of a buffer, and its file: it reads from there and writes to there without a fault."""

    def __init__(self, ring: IoUring, file: int) -> None:
        self._ring = ring
        self._file = file

    def store(self, address: int, data: bytes) -> None:
        """Have the kernel write to the held pages."""
        os.pwrite(self._file, data, 0)
        self._ring.submit(IORING_OP_READ_FIXED, self._file, address, len(data), offset=0)
        expect(self._ring.complete(), len(data), "result of IORING_OP_READ_FIXED")

    def load(self, address: int, length: int) -> bytes:
        """Have the kernel read from them."""
        os.ftruncate(self._file, 0)
        self._ring.submit(IORING_OP_WRITE_FIXED, self._file, address, length, offset=0)
        expect(self._ring.complete(), length, "result of IORING_OP_WRITE_FIXED")
        return os.pread(self._file, length + 1, 0)


@contextmanager
def device(where: Range) -> Iterator[Device]:
    """Have a device hold the range."""
    file = os.memfd_create("device", os.MFD_CLOEXEC)
    try:
        with IoUring() as ring:
            ring.register_buffer(where)
            yield Device(ring, file)
            ring.unregister_buffer()
    finally:
        os.close(file)


def hold_and_protect(ctx: Context, area: Area, *, told: bool) -> None:
    """Pin pages 1 and 2, protect all, and go to them from both sides: the device's is free, the processor's is not."""
    uffd, everything = ctx.uffd, set(range(area.nr_pages))
    area.fill()
    uffd.register(area.range, RWP)
    with device(area.page(1, 2)) as held:
        before = frames(area)
        uffd.rwprotect(area.range)
        across = area.page(1).end - 4
        with promise("RW-64", "the device writes"):
            undisturbed(uffd, partial(held.store, across, DEVICE))
            Pagemap.expect_protected(area, everything, "after the device has written")
        with promise("RW-64", "the device reads"):
            expect(undisturbed(uffd, partial(held.load, across, len(DEVICE))), DEVICE, "what the device reads")
            Pagemap.expect_protected(area, everything, "after the device has read")
        expect(frames(area), before, "page frames while they are protected")
        if told:
            with promise("RW-64", "the processor reads"):
                expect_rwp_trapped(uffd, area, 1)
            with promise("RW-64", "the processor writes"):
                expect_rwp_trapped(uffd, area, 2, write=True)
        else:
            undisturbed(uffd, partial(touch, area.page(1), area.page_size))
            undisturbed(uffd, partial(poke, area.page(2).start, NEW))
        Pagemap.expect_protected(area, everything - {1, 2}, "after the processor's accesses")
        expect(peek(across, 4), DEVICE[:4], "what the device wrote to the first page")
        # the write of the processor must be in the page that the device holds, and the other way round
        expect(held.load(across, 4 + len(NEW)), DEVICE[:4] + NEW, "what the device reads after the processor wrote")
        poke(area.page(1).start, NEW)
        expect(held.load(area.page(1).start, len(NEW)), NEW, "what the device reads of the other page")
        held.store(across, DEVICE)
        expect(peek(across, len(DEVICE)), DEVICE, "what the processor reads after the device wrote")
        expect(frames(area), before, "page frames afterwards")
        uffd.rwprotect(area.range)
        uffd.unregister(area.range)
        Pagemap.expect_protected(area, (), "after UFFDIO_UNREGISTER")
        poke(area.page(2).start, DEVICE)
        expect(held.load(area.page(2).start, len(DEVICE)), DEVICE, "what the device reads after UFFDIO_UNREGISTER")
    area.expect_pattern_of(area, 0, 1)
    area.expect_pattern_of(area, 3, 1)


@uffd_case("rwprotect-pinned", mem=ALL, features=SYNC_RWP, pages=4, rows=("RW-64",), kind=Kind.DETAIL)
def test_rwprotect_pinned(ctx: Context) -> None:
    """A device that holds a page goes on with it when it is protected; the processor is trapped; both see one page."""
    hold_and_protect(ctx, ctx.dst, told=True)


@uffd_case("rwprotect-pinned-async", mem=ALL, features=ASYNC_RWP, pages=4, rows=("RW-64",), kind=Kind.DETAIL)
def test_rwprotect_pinned_async(ctx: Context) -> None:
    """With RWP_ASYNC accesses of a device do not count, those of the processor do, and both see one page."""
    hold_and_protect(ctx, ctx.dst, told=False)


@uffd_case("rwprotect-pinned-thp", mem=(ANON,), features=SYNC_RWP, pages=4, rows=("RW-64",), kind=Kind.DETAIL)
def test_rwprotect_pinned_thp(ctx: Context) -> None:
    """The same in a transparent huge page, of which a part is held, and a part resolved."""
    hold_and_protect(ctx, huge_area(ctx), told=True)


@uffd_case("rwprotect-aliases", mem=SHARED, features=SYNC_RWP, pages=4, rows=("RW-65",))
def test_rwprotect_aliases(ctx: Context) -> None:
    """Other mappings of the memory, and calls on its file, are not trapped, and see the same bytes as the mapping."""
    uffd, area = ctx.uffd, ctx.dst
    alias, fd = area.alias, area.fd
    assert fd is not None
    touch(alias, area.page_size)  # maps what is there before it is protected
    rwp_protected(ctx)
    with promise("RW-65", "another mapping"):
        undisturbed(uffd, partial(area.expect_pattern, alias))
        undisturbed(uffd, partial(poke, area.alias_page(1).start, NEW))
    with promise("RW-65", "pread(2)"):
        data = undisturbed(uffd, lambda: os.pread(fd, area.page_size, 2 * area.page_size))
        expect(data == peek(area.alias_page(2).start, area.page_size), True, "whether the bytes are the same")
    if not area.mem.hugetlb:  # whose files cannot be written to
        with promise("RW-65", "pwrite(2)"):
            undisturbed(uffd, lambda: os.pwrite(fd, DEVICE, 3 * area.page_size))
    with promise("RW-65", "another process"):
        alias_marks = Pagemap.have(alias, uapi.PM_UFFD_WP)
        expect(any(alias_marks), False, "PM_UFFD_WP in the other mapping")
    Pagemap.expect_protected(area, range(4), "after accesses by other ways")
    for page, data in ((1, NEW), (3, peek(area.alias_page(3).start, len(DEVICE)))):
        expect_rwp_trapped(uffd, area, page)
        expect(peek(area.page(page).start, len(data)), data, f"what the mapping has in page {page}")
    expect_rwp_trapped(uffd, area, 0, write=True)
    expect(peek(area.alias_page(0).start, len(NEW)), NEW, "what the other mapping has")
    Pagemap.expect_protected(area, {2}, "after three pages were resolved")


@uffd_case("rwprotect-aliases-late", mem=SHARED, features=ASYNC_RWP, pages=4, rows=("RW-65",))
def test_rwprotect_aliases_late(ctx: Context) -> None:
    """Accesses by another mapping, first ones too, do not count as accesses of the protected one."""
    area = rwp_protected(ctx)
    undisturbed(ctx.uffd, partial(touch, area.alias, area.page_size, write=True))
    Pagemap.expect_protected(area, range(4), "after writes by a mapping made since")
    expect_accessed(area, (), "after writes by a mapping made since")
    expect_rwp_free(ctx.uffd, area, 2)
    Pagemap.expect_protected(area, {0, 1, 3}, "after an access of its own")
    area.expect_pattern_of(area)
