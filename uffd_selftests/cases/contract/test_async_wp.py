# SPDX-License-Identifier: GPL-2.0-only
"""UFFD_FEATURE_WP_ASYNC: the kernel notes who writes and lets nobody wait."""

from __future__ import annotations

import os
from errno import EINVAL
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, ASYNC, CHECK, MAP_PRIVATE, MAP_SHARED, MISSING, NEW, PAGE_SIZE, RESTART, SCAN, SHMEM, SHMEM_PRIVATE, WP,
    WRITTEN, Advice, Channel, Child, Context, CopyMode, Feature, PageCategory, PagefaultFlag, Pagemap, Range, Region,
    Scan, Uffd, UffdError, advise, expect, expect_errno, expect_scan, expect_written, faulting, huge_area, map_memory,
    peek, plain_file, poke, promise, refuses, regions, swap_out, syscalls, touch, tracked, undisturbed, unmap, write,
)  # fmt: skip


@uffd_case("async-write", mem=ALL, features=ASYNC, pages=4, rows=("AS-01",))
def test_async_write(ctx: Context) -> None:
    """A write to a protected page sends no message and waits for nobody; it ends the protection of that page alone."""
    area, page = tracked(ctx), ctx.dst.page(1)
    old = peek(page.start, len(NEW))
    undisturbed(ctx.uffd, partial(poke, page.start, NEW))
    expect(peek(page.start, len(NEW)), NEW, "what was written")
    Pagemap.expect_protected(area, {0, 2, 3}, "after a write to page 1")
    write(ctx.uffd, area, 1, 3)
    Pagemap.expect_protected(area, {0, 2}, "after a write to page 3")
    poke(page.start, old)
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
    Pagemap.expect_protected(area, {0, 2}, "after reads")


@uffd_case("async-missing", mem=ALL, features=ASYNC, pages=4, rows=("AS-01",))
def test_async_missing(ctx: Context) -> None:
    """Pages that are not there are tracked like the others, anonymous ones too."""
    area = ctx.dst
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    Pagemap.expect_protected(area, range(4), "of pages that are not there")
    undisturbed(ctx.uffd, lambda: area.expect_zero(0, 2))
    Pagemap.expect_protected(area, range(4), "after reads of pages 0 and 1")
    write(ctx.uffd, area, 1, 2)
    Pagemap.expect_protected(area, {0, 3}, "after writes to pages 1 and 2")
    area.expect_zero()


@uffd_case("async-thp", mem=(ANON, SHMEM), features=ASYNC, needs=("thp",), pages=1, rows=("AS-01",))
def test_async_thp(ctx: Context) -> None:
    """Of a transparent huge page only the base page that is written loses its protection."""
    area = huge_area(ctx)
    ctx.uffd.register(area.range, WP)
    ctx.uffd.writeprotect(area.range)
    write(ctx.uffd, area, 7)
    Pagemap.expect_protected(area, set(range(area.nr_pages)) - {7}, "after a write to page 7")
    area.expect_pattern_of(area)


@uffd_case("async-kernel", mem=ALL, features=ASYNC, pages=3, rows=("AS-02",))
def test_async_kernel(ctx: Context) -> None:
    """The kernel that writes for a process, by read(2) or process_vm_writev(2), is tracked and not held up either."""
    area = tracked(ctx)
    reader, writer = os.pipe()
    os.write(writer, NEW)
    count = undisturbed(ctx.uffd, lambda: syscalls.read_into(reader, area.start, len(NEW)))
    expect(count, len(NEW), "bytes read into page 0")
    Pagemap.expect_protected(area, {1, 2}, "after read(2) into page 0")
    address = area.page(1).start
    count = undisturbed(ctx.uffd, lambda: syscalls.process_vm_writev(os.getpid(), address, NEW))
    expect(count, len(NEW), "bytes written to page 1")
    Pagemap.expect_protected(area, {2}, "after process_vm_writev(2) to page 1")
    expect((peek(area.start, len(NEW)), peek(address, len(NEW))), (NEW, NEW), "what was written")
    os.close(reader)
    os.close(writer)


@uffd_case("async-dontneed", mem=ALL, features=ASYNC, needs=SCAN, pages=3, rows=("AS-11",), bugs=(36,))
def test_async_dontneed(ctx: Context) -> None:
    """MADV_DONTNEED of anonymous memory counts as a write; other memory stays protected by it."""
    area = tracked(ctx)
    advise(area.page(1), Advice.DONTNEED)
    changed = {1} if ctx.mem is ANON else set()
    Pagemap.expect_protected(area, {0, 1, 2} - changed, "after MADV_DONTNEED of page 1")
    expect_written(area, changed, "pages written, after MADV_DONTNEED of page 1")
    write(ctx.uffd, area, 1)
    expect_written(area, {1}, "pages written, after a write to page 1")


@uffd_case(
    "async-swap",
    mem=(ANON, SHMEM_PRIVATE),
    features=ASYNC,
    needs=("swap", *SCAN),
    pages=4,
    rows=("AS-01", "AS-04"),
    bugs=(33,),
)
def test_async_swap(ctx: Context) -> None:
    """Swapped-out pages keep their state, are protected again there, and hold their data afterwards."""
    area = tracked(ctx)
    write(ctx.uffd, area, 1, 2)
    swap_out(area.range)
    expect_written(area, {1, 2}, "pages written, swapped out")
    both = WRITTEN | PageCategory.SWAPPED
    found = Pagemap.scan(area.range, both, flags=CHECK)
    expect_scan(area, found, Scan(regions(area, {1, 2}, both), area.range.end), "pages written and swapped out")
    expect_written(area, {1, 2}, "pages written, taken while swapped out", flags=RESTART)
    expect_written(area, (), "pages written, after that")
    undisturbed(ctx.uffd, lambda: area.expect_pattern_of(area))
    Pagemap.expect_protected(area, range(4), "after reads, which swap in")
    swap_out(area.range)
    write(ctx.uffd, area, 2, 3)
    expect_written(area, {2, 3}, "pages written, after writes to swapped-out pages")


@uffd_case("async-with-missing", mem=ALL, features=ASYNC, pages=3, rows=("AS-13",), kind=Kind.DETAIL)
def test_async_with_missing(ctx: Context) -> None:
    """Missing pages are reported as ever; a page filled with WP is tracked, for the writer that waits for it too."""
    area, page = ctx.dst, ctx.dst.page(0)
    ctx.src.fill()
    ctx.uffd.register(area.range, MISSING | WP)
    waiting = partial(poke, page.start, peek(ctx.src.start, 8))
    with faulting(ctx.uffd, page.start, call=waiting, flags=PagefaultFlag.WRITE):
        ctx.uffd.copy(page.start, ctx.src.start, page.len, CopyMode.WP)
    Pagemap.expect_protected(area, (), "when the waiting write has gone through")
    ctx.uffd.copy(area.page(1).start, ctx.src.page(1).start, 2 * page.len, CopyMode.WP)
    Pagemap.expect_protected(area, {1, 2}, "after UFFDIO_COPY with WP")
    write(ctx.uffd, area, 2)
    Pagemap.expect_protected(area, {1}, "after a write to page 2")
    area.expect_pattern_of(ctx.src)


@uffd_case("async-fork", mem=ALL, features=ASYNC, pages=3, spare_hugepages=4, rows=("AS-14",), kind=Kind.DETAIL)
def test_async_fork(ctx: Context) -> None:
    """A forked child is not tracked; its parent is as before."""
    area = tracked(ctx)

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, (), "in the child")
        touch(area.page(0), area.page_size, write=True)
        channel.send()

    with Child(child) as process:
        process.receive()
    Pagemap.expect_protected(area, {0, 1, 2}, "in the parent")
    write(ctx.uffd, area, 1)
    Pagemap.expect_protected(area, {0, 2}, "in the parent after a write to page 1")
    area.expect_pattern_of(area)


@uffd_case(
    "async-fork-event",
    mem=ALL,
    features=ASYNC | Feature.EVENT_FORK,
    pages=3,
    spare_hugepages=4,
    rows=("AS-14",),
    kind=Kind.DETAIL,
)
def test_async_fork_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK the child is tracked on its own, without a message."""
    area = tracked(ctx)

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, {0, 1, 2}, "in the child")
        touch(area.page(0), area.page_size, write=True)
        Pagemap.expect_protected(area, {1, 2}, "in the child after a write to page 0")
        channel.send()

    with ctx.handler(src=None) as handler, Child(child) as process:
        process.receive()
    expect((handler.stats.messages, handler.stats.fork), (1, 1), "messages, UFFD_EVENT_FORK among them")
    Pagemap.expect_protected(area, {0, 1, 2}, "in the parent")
    write(ctx.uffd, area, 1)
    Pagemap.expect_protected(area, {0, 2}, "in the parent after a write to page 1")


RESOLVABLE = Defect(
    id="D-AS-16",
    summary="UFFDIO_WRITEPROTECT un-protects a page that is tracked asynchronously, which makes it count as written",
    kernels="6.12.117, 6.18.44, 7.3.4",
    advice="do not un-protect in a range registered with UFFD_FEATURE_WP_ASYNC",
    shows=r"expected EINVAL; the call succeeded",
)


@uffd_case("async-unprotect", mem=ALL, features=ASYNC, pages=2, rows=("AS-16",), defect=RESOLVABLE)
def test_async_unprotect(ctx: Context) -> None:
    """Un-protecting a page by hand is invalid where the kernel itself does it."""
    area = tracked(ctx)
    with promise("AS-16"), refuses(EINVAL):
        ctx.uffd.unprotect(area.page(0))


@uffd_case("async-unprotected", mem=ALL, features=ASYNC, needs=SCAN, pages=2, rows=("AS-16",), kind=Kind.DETAIL)
def test_async_unprotected(ctx: Context) -> None:
    """Un-protecting a page by hand either is EINVAL and changes nothing, or counts as a write to that page."""
    area, written = tracked(ctx), {0}
    try:
        ctx.uffd.unprotect(area.page(0))
    except UffdError as error:
        expect_errno(error, EINVAL, "errno")
        written = set()
    Pagemap.expect_protected(area, {0, 1} - written, "after un-protecting page 0")
    expect_written(area, written, "pages written, after un-protecting page 0")
    write(ctx.uffd, area, 0)


@uffd_case("async-file", features=ASYNC, needs=SCAN, rows=("AS-12",))
def test_async_file() -> None:
    """With WP alone files of any kind are tracked, mapped shared or private."""
    for sharing, flags in (("shared", MAP_SHARED), ("private", MAP_PRIVATE)):
        with promise("AS-12", sharing), plain_file(4 * PAGE_SIZE) as fd, Uffd.open(ASYNC) as uffd:
            where = Range(map_memory(4 * PAGE_SIZE, flags=flags, fd=fd), 4 * PAGE_SIZE)
            changed = Range(where.start + PAGE_SIZE, 2 * PAGE_SIZE)
            uffd.register(where, WP)
            uffd.writeprotect(where)
            undisturbed(uffd, partial(touch, where, PAGE_SIZE))
            expect(Pagemap.scan(where, WRITTEN, flags=CHECK), Scan([], where.end), "pages written, after reads")
            undisturbed(uffd, partial(poke, changed.end - len(NEW), NEW))
            undisturbed(uffd, partial(touch, changed, PAGE_SIZE, write=True))
            expected = Scan([Region(changed.start, changed.end, WRITTEN)], where.end)
            expect(Pagemap.scan(where, WRITTEN, flags=RESTART), expected, "pages written, after writes to 1 and 2")
            expect(Pagemap.scan(where, WRITTEN, flags=CHECK), Scan([], where.end), "pages written, after that")
            expect(peek(changed.end - len(NEW), len(NEW)), NEW, "what was written")
            unmap(where)
