# SPDX-License-Identifier: GPL-2.0-only
"""What requests add to the counts of memory: of the process, of the file, of the cgroup that pays."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from errno import EAGAIN, EEXIST
from functools import partial
from resource import RUSAGE_THREAD, getrusage

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, FILE_BACKED, HOLES, MINOR, MINOR_FAULTS, MISSING, NOT_HUGETLB, PAGE_SIZE, PM_PFN_MASK, RWP,
    SHMEM_PRIVATE, SYNC_RWP, WP, WRITEPROTECT, Advice, Area, Channel, Child, Context, Feature, KernelError, Pagemap,
    Range, Skip, advise, errno_name, expect, huge_area, keep_small, monitored, own_memory_group, promise, refuses,
    remap, resident, rwp_protected, syscalls, touch, undisturbed,
)  # fmt: skip

FIELDS = ("RssAnon", "RssFile", "RssShmem", "HugetlbPages", "VmSwap")
BLOCKS = "blocks of the file"
SLACK = 2 * max(32, 2 * (os.cpu_count() or 1))
"""Pages by which a count of /proc/PID/status may be off: a processor adds up so many before it tells (mm/memory.c)."""
MLOCK_ONFAULT = 1
KPF_MLOCKED = 1 << 33
"""Of /proc/kpageflags (include/linux/kernel-page-flags.h)."""
MANY = 1024
"""Pages whose count stands out from that."""


class Counts:
    """What a process and the file of an area have, and by how much that has grown since, in base pages."""

    def __init__(self, area: Area) -> None:
        self.area = area
        self.before = self._now()

    def _now(self) -> dict[str, int]:
        now = {field: resident(field) for field in FIELDS}
        if self.area.fd is not None:
            now[BLOCKS] = os.fstat(self.area.fd).st_blocks * 512 // PAGE_SIZE
        return now

    def expect_grown(self, wanted: dict[str, int], when: str) -> None:
        """Assert by how much the counts have grown: those that are named, and the others not at all."""
        for field, value in self._now().items():
            slack = 0 if field in ("HugetlbPages", BLOCKS) else SLACK
            grown, due = value - self.before[field], wanted.get(field, 0)
            if abs(grown - due) > slack:
                off = f", give or take {slack}" if slack else ""
                raise AssertionError(f"{when}: expected {field} to grow by {due} base pages{off}, got {grown}")


def count_of(area: Area, *, of_file: bool) -> str:
    """Return the count that pages of an area belong to: the file's pages, or those of the mapping alone."""
    if area.mem.hugetlb:
        return "HugetlbPages"
    return "RssShmem" if of_file else "RssAnon"


def locked(address: int) -> bool:
    """Whether the page at an address is one that mlock(2) keeps in memory (/proc/kpageflags)."""
    number = Pagemap.entry(address) & PM_PFN_MASK
    try:
        with open("/proc/kpageflags", "rb", buffering=0) as flags:
            word = os.pread(flags.fileno(), 8, number * 8)
    except OSError as error:
        raise Skip(f"/proc/kpageflags: {errno_name(error.errno or 0)}: CONFIG_PROC_PAGE_MONITOR") from None
    return bool(int.from_bytes(word, sys.byteorder) & KPF_MLOCKED)


def area_to_count(ctx: Context) -> Area:
    """Map an empty area of pages enough to be counted, small ones unless they are huge for sure."""
    area = ctx.allocate(ctx.nr_pages if ctx.mem.hugetlb else MANY)
    if not ctx.mem.hugetlb:
        with suppress(OSError):  # a kernel without them
            advise(area.range, Advice.NOHUGEPAGE)
    return area


def expect_counted(ctx: Context, area: Area, fill: Callable[[], object], wanted: dict[str, int], what: str) -> None:
    """Assert what a fill of the whole area adds to the counts, and that each page takes its part of it with it."""
    counts = Counts(area)
    fill()
    counts.expect_grown(wanted, f"after {what}")
    ctx.uffd.unregister(area.range)
    counts.expect_grown(wanted, f"after {what} and UFFDIO_UNREGISTER")
    file_only = {BLOCKS: wanted.get(BLOCKS, 0)}
    advise(area.page(0), Advice.DONTNEED)
    without = {field: number - number // area.nr_pages for field, number in wanted.items()}
    counts.expect_grown(without | file_only, f"after {what} and MADV_DONTNEED of page 0")
    advise(area.range, Advice.DONTNEED)
    counts.expect_grown(file_only, f"after {what} and MADV_DONTNEED")
    if ctx.mem.shared:
        before = counts.before.get(BLOCKS, 0)
        advise(area.range, Advice.REMOVE)
        counts.expect_grown({BLOCKS: -before}, f"after {what} and MADV_REMOVE")


# ---- of the process and of the file --------------------------------------------------------------------------------


@uffd_case("counts-copy", mem=ALL, pages=3, rows=("AC-01", "AC-02", "CP-01"), kind=Kind.DETAIL)
def test_counts_copy(ctx: Context) -> None:
    """UFFDIO_COPY adds its pages to the one count that they belong to, and to the file's blocks if they are its own."""
    area, src = area_to_count(ctx), area_to_count(ctx)
    src.fill()
    ctx.uffd.register(area.range, MISSING)
    number = area.range.len // PAGE_SIZE
    wanted = {count_of(area, of_file=ctx.mem.shared): number, BLOCKS: number if ctx.mem.shared else 0}
    expect_counted(ctx, area, lambda: ctx.uffd.copy(area.start, src.start, area.range.len), wanted, "UFFDIO_COPY")


@uffd_case(
    "counts-copy-fresh", mem=ALL, pages=3, spare_hugepages=1, rows=("AC-01", "AC-02", "CP-30"), kind=Kind.DETAIL
)
def test_counts_copy_fresh(ctx: Context) -> None:
    """UFFDIO_COPY counts its pages once, too, when it had to fault its source: here with the zero page, uncounted."""
    area = area_to_count(ctx)
    number = area.range.len // PAGE_SIZE
    ctx.uffd.register(area.range, MISSING)
    wanted = {count_of(area, of_file=ctx.mem.shared): number, BLOCKS: number if ctx.mem.shared else 0}
    with closing(ANON.allocate(number)) as src:
        keep_small(src.range)
        expect_counted(ctx, area, lambda: ctx.uffd.copy(area.start, src.start, area.range.len), wanted, "UFFDIO_COPY")


@uffd_case("counts-zeropage", mem=NOT_HUGETLB, pages=3, rows=("AC-01", "AC-02"), kind=Kind.DETAIL)
def test_counts_zeropage(ctx: Context) -> None:
    """UFFDIO_ZEROPAGE adds pages to shared memory, and nothing elsewhere, where all have the one zero page."""
    area = area_to_count(ctx)
    ctx.uffd.register(area.range, MISSING)
    wanted = {"RssShmem": MANY, BLOCKS: MANY} if ctx.mem.shared else {}
    expect_counted(ctx, area, lambda: ctx.uffd.zeropage(area.range), wanted, "UFFDIO_ZEROPAGE")


@uffd_case(
    "counts-continue", mem=FILE_BACKED, features=MINOR_FAULTS, pages=3, rows=("AC-01", "AC-02"), kind=Kind.DETAIL
)
def test_counts_continue(ctx: Context) -> None:
    """UFFDIO_CONTINUE adds the pages that it maps to the process's count of the file's, and to the file nothing."""
    area = area_to_count(ctx)
    with area.file_view() as view:
        touch(view, ctx.page_size, write=True)
    ctx.uffd.register(area.range, MINOR)
    wanted = {count_of(area, of_file=True): area.range.len // PAGE_SIZE}
    expect_counted(ctx, area, lambda: ctx.uffd.continue_(area.range), wanted, "UFFDIO_CONTINUE")


@uffd_case("counts-poison", mem=ALL, features=Feature.POISON, pages=3, rows=("AC-01", "AC-02"), kind=Kind.DETAIL)
def test_counts_poison(ctx: Context) -> None:
    """UFFDIO_POISON takes no memory, neither of the process nor of the file."""
    area = area_to_count(ctx)
    ctx.uffd.register(area.range, MISSING)
    expect_counted(ctx, area, lambda: ctx.uffd.poison(area.range), {}, "UFFDIO_POISON")


@uffd_case("counts-move", mem=(ANON,), features=Feature.MOVE, pages=3, rows=("AC-01",), kind=Kind.DETAIL)
def test_counts_move(ctx: Context) -> None:
    """UFFDIO_MOVE leaves every count as it was, be it of pages, zero pages, holes or transparent huge pages."""
    kinds: dict[str, Callable[[Area], object]] = {
        "pages": lambda src: src.fill(),
        "zero pages": lambda src: touch(src.range, PAGE_SIZE),
        "holes": lambda _: None,
    }
    for what, prepare in kinds.items():
        area, src = area_to_count(ctx), area_to_count(ctx)
        prepare(src)
        ctx.uffd.register(area.range, MISSING)
        with promise("AC-01", what):
            counts = Counts(area)
            ctx.uffd.move(area.start, src.start, src.range.len, HOLES)
            counts.expect_grown({}, "after UFFDIO_MOVE")
            advise(src.range, Advice.DONTNEED)
            counts.expect_grown({}, "after MADV_DONTNEED of the source")
            advise(area.range, Advice.DONTNEED)
            counts.expect_grown({"RssAnon": -MANY if what == "pages" else 0}, "after MADV_DONTNEED of the destination")


@uffd_case(
    "counts-move-thp", mem=(ANON,), features=Feature.MOVE, needs=("thp",), pages=3, rows=("AC-01",), kind=Kind.DETAIL
)
def test_counts_move_thp(ctx: Context) -> None:
    """UFFDIO_MOVE of a transparent huge page, whole or cut in two, leaves every count as it was."""
    for whole in True, False:
        src = huge_area(ctx)
        area = ctx.allocate(src.nr_pages)
        ctx.uffd.register(area.range, MISSING)
        with promise("AC-01", "whole" if whole else "half by half"):
            counts = Counts(area)
            step = src.range.len if whole else src.range.len // 2
            for offset in range(0, src.range.len, step):
                ctx.uffd.move(area.start + offset, src.start + offset, step)
            counts.expect_grown({}, "after UFFDIO_MOVE")
            advise(area.range, Advice.DONTNEED)
            counts.expect_grown({"RssAnon": -src.nr_pages}, "after MADV_DONTNEED of the destination")


@uffd_case("counts-refused", mem=ALL, pages=3, rows=("AC-01", "AC-02"), kind=Kind.DETAIL)
def test_counts_refused(ctx: Context) -> None:
    """A fill that is refused, or stops in the middle at a page that is there, leaves nothing in any count."""
    area, src = area_to_count(ctx), area_to_count(ctx)
    src.fill()
    ctx.uffd.register(area.range, MISSING)
    size, middle = ctx.page_size, area.nr_pages // 2
    ctx.uffd.copy(area.page(middle).start, src.page(middle).start, size)
    counts = Counts(area)
    for _ in range(area.nr_pages):
        with refuses(EEXIST):
            ctx.uffd.copy(area.page(middle).start, src.start, size)
    counts.expect_grown({}, f"after {area.nr_pages} copies onto a page that is there")
    with promise("AC-01", "a copy of all pages"):
        with refuses(EAGAIN, output=middle * size):
            ctx.uffd.copy(area.start, src.start, area.range.len)
        number = middle * size // PAGE_SIZE
        wanted = {count_of(area, of_file=ctx.mem.shared): number, BLOCKS: number if ctx.mem.shared else 0}
        counts.expect_grown(wanted, "after a copy that ends at a page that is there")


@uffd_case(
    "counts-writeprotect", mem=ALL, features=WRITEPROTECT, pages=3, rows=("AC-01", "AC-02"), kind=Kind.DETAIL
)
def test_counts_writeprotect(ctx: Context) -> None:
    """To protect pages, and to un-protect them, adds nothing to any count, whether pages are there or not."""
    for filled in True, False:
        area = area_to_count(ctx)
        if filled:
            area.fill()
        ctx.uffd.register(area.range, WP)
        counts = Counts(area)
        with promise("AC-01", "pages" if filled else "holes"):
            ctx.uffd.writeprotect(area.range)
            counts.expect_grown({}, "after UFFDIO_WRITEPROTECT")
            ctx.uffd.unprotect(area.range)
            counts.expect_grown({}, "after it was taken back")


# ---- faults of the process -----------------------------------------------------------------------------------------


def faults_of(call: Callable[[], object]) -> int:
    """Return how many faults this thread has while it makes a call."""
    before = getrusage(RUSAGE_THREAD).ru_minflt
    call()
    return getrusage(RUSAGE_THREAD).ru_minflt - before


@uffd_case(
    "counts-faults", mem=(ANON,), features=SYNC_RWP, pages=256, rows=("UNR-16", "RW-02", "RW-52", "RW-56"),
    kind=Kind.DETAIL,
)  # fmt: skip
def test_counts_faults(ctx: Context) -> None:
    """Pages that are not protected any more are accessible at once: to read them all takes no fault a page."""

    def expect_no_faults(where: Range, when: str) -> None:
        faults = faults_of(partial(touch, where, PAGE_SIZE))
        expect(faults < ctx.nr_pages // 2, True, f"{when}: that {faults} faults are few for {ctx.nr_pages} pages")

    advise(ctx.dst.range, Advice.NOHUGEPAGE)
    area, place = rwp_protected(ctx), ctx.allocate()
    ctx.uffd.resolve(area.range)
    expect_no_faults(area.range, "after they were resolved")
    ctx.uffd.rwprotect(area.range)
    with Child(lambda _: expect_no_faults(area.range, "in a child that is not told of")):
        pass
    ctx.uffd.unregister(area.range)
    expect_no_faults(area.range, "after UFFDIO_UNREGISTER")
    ctx.uffd.register(area.range, RWP)
    ctx.uffd.rwprotect(area.range)
    undisturbed(ctx.uffd, partial(remap, area.range, to=place.start))
    expect_no_faults(place.range, "after mremap")


# ---- who pays ------------------------------------------------------------------------------------------------------


@uffd_case("charge-remote", mem=NOT_HUGETLB, pages=3, rows=("CG-01", "AC-03"), kind=Kind.DETAIL)
def test_charge_remote(ctx: Context) -> None:
    """What a monitor in another process fills is charged to the memory cgroup of the process whose memory it is."""
    area, src = ctx.allocate(2 * MANY), ctx.allocate(2 * MANY)
    src.fill()
    with own_memory_group() as group:

        def life(channel: Channel) -> None:
            group.join()
            channel.send()
            channel.receive()

        with monitored(area.range, MISSING, life) as (child, uffd):
            child.receive()
            before = group.statistics()["used"]
            uffd.copy(area.start, src.start, area.range.len)
            grown = group.statistics()["used"] - before
            child.send()
    # Memory that others had before may have been given back meanwhile.
    what = f"of {area.range.len} bytes copied, most are charged to the cgroup of their owner ({grown})"
    expect(grown > area.range.len * 3 // 4, True, what)


@uffd_case(
    "counts-locked",
    mem=(ANON, SHMEM_PRIVATE),
    needs=("cap_sys_admin",),
    pages=4,
    rows=("AC-01",),
    kind=Kind.DETAIL,
)
def test_counts_locked(ctx: Context) -> None:
    """Anonymous pages that UFFDIO_COPY puts into locked memory are locked, like one that the process touched."""
    area = ctx.dst
    keep_small(area.range)
    try:
        syscalls.call("mlock2", area.start, area.range.len, MLOCK_ONFAULT)
    except KernelError as error:
        raise Skip(f"mlock2(2): {errno_name(error.errno or 0)}: raise RLIMIT_MEMLOCK (ulimit -l)") from None
    touch(area.page(3), PAGE_SIZE, write=True)
    ctx.src.fill()
    ctx.uffd.register(area.range, MISSING)
    ctx.uffd.copy(area.start, ctx.src.start, 3 * PAGE_SIZE)
    expect([locked(area.page(number).start) for number in range(4)], [True] * 4, "whether each page is locked")
    syscalls.call("munlock", area.start, area.range.len)
    area.expect_pattern_of(ctx.src, 0, 3)
