# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_REGISTER: its argument, the modes, several handles, and what it leaves of the mappings."""

from __future__ import annotations

from collections.abc import Callable
from errno import EBUSY, EFAULT, EINVAL, ENOENT, ENOMEM
from functools import partial
from signal import SIGSEGV

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, HUGETLB, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MINOR, MINOR_FAULTS,
    MISSING, NOT_HUGETLB, PAGE_SIZE, PROT_NONE, PROT_READ, PROT_WRITE, RWP, SHMEM, UNREGISTERED, WP, WRITEPROTECT,
    AccessError, Channel, Child, Context, Feature, KernelError, PagefaultFlag, Range, RangeIoctls, RegisterMode, Skip,
    Uffd, UffdError, bad_ranges, expect, expect_errno, expect_mappings, expect_modes, faulting, new_mapping,
    no_mapping_left, orphaned, peek, poke, promise, protect, read_only, refuses, smaps_fields, uapi, undisturbed, unmap,
    unread_event, user_space_end,
)  # fmt: skip


# ---- arguments -----------------------------------------------------------------------------------------------------


@uffd_case("register-errors", mem=(ANON,), pages=2, rows=("REG-01", "REG-03", "REG-04", "REG-05", "REG-08"))
def test_register_errors(ctx: Context) -> None:
    """UFFDIO_REGISTER refuses to register for nothing, what is not whole pages of user space, and no argument."""
    rows = {"start not page aligned": "REG-03", "start + len wraps": "REG-05", "start beyond user space": "REG-05"}
    with promise("REG-01"), refuses(EINVAL):
        ctx.uffd.register(ctx.dst.page(0), UNREGISTERED)
    for what, bad in bad_ranges(ctx.dst.page(0)).items():
        with promise(rows.get(what, "REG-04"), what), refuses(EINVAL):
            ctx.uffd.register(bad, MISSING)
    with promise("REG-08"), refuses(EFAULT):
        ctx.uffd.raw_ioctl(uapi.UFFDIO_REGISTER, 0)
    expect_modes(ctx.dst.range, UNREGISTERED, UNREGISTERED)


@uffd_case("register-unknown-modes", mem=(ANON,), pages=1, rows=("REG-02",))
def test_register_unknown_modes(ctx: Context) -> None:
    """A mode bit that the kernel does not know is refused, alone and beside one that it knows."""
    known = MISSING | WP | MINOR | (RWP if Feature.RWP in ctx.uffd.offered else UNREGISTERED)
    for bit in range(64):
        if not known >> bit & 1:
            for mode in (RegisterMode(1 << bit), MISSING | RegisterMode(1 << bit)):
                with promise("REG-02", f"mode {mode:#x}"), refuses(EINVAL):
                    ctx.uffd.register(ctx.dst.range, mode)
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("register-user-space-end", mem=(ANON,), pages=1, rows=("REG-05",))
def test_register_user_space_end(ctx: Context) -> None:
    """The last page of user space can be registered; nothing behind it can, alone or as the end of a range."""
    end = user_space_end()
    try:
        last = new_mapping(PAGE_SIZE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, at=end - PAGE_SIZE)
    except KernelError as error:
        raise Skip(f"the last page of user space is not free: {error}") from None
    for bad in (Range(end, PAGE_SIZE), Range(last.start, 2 * PAGE_SIZE), Range(1 << 63, PAGE_SIZE)):
        with promise("REG-05", f"the range {bad}"), refuses(EINVAL):
            ctx.uffd.register(bad, MISSING)
    with promise("REG-05", "the last page"):
        expect_modes(last, UNREGISTERED)
        ctx.uffd.register(last, MISSING)
        with faulting(ctx.uffd, last.start):
            ctx.uffd.copy(last.start, ctx.src.start, PAGE_SIZE)
    unmap(last)


@uffd_case("register-nothing-mapped", mem=(ANON,), pages=5, rows=("REG-07",))
def test_register_nothing_mapped(ctx: Context) -> None:
    """A range without any mapping is refused, also right before and right behind one."""
    for number in (1, 3):
        unmap(ctx.dst.page(number))
        with promise("REG-07", f"hole at page {number}"), refuses(EINVAL):
            ctx.uffd.register(ctx.dst.page(number), MISSING)
    for number in (0, 2, 4):
        expect_modes(ctx.dst.page(number), UNREGISTERED)


@uffd_case("register-above-everything", rows=("REG-07",), kind=Kind.VERSION)
def test_register_above_everything() -> None:
    """Above the last mapping nothing can be registered; old kernels call that ENOMEM."""
    last = Range(user_space_end() - PAGE_SIZE, PAGE_SIZE)
    if not user_space_end() or list(smaps_fields(last)):
        raise Skip("the last page of user space is mapped or cannot be found")
    with Uffd.open() as uffd:
        try:
            uffd.register(last, MISSING)
        except UffdError as error:
            if error.errno not in (EINVAL, ENOMEM):
                raise AssertionError(f"REG-07: expected EINVAL or ENOMEM, got {error}") from None
        else:
            raise AssertionError("REG-07: expected EINVAL or ENOMEM; the call succeeded")


@uffd_case("register-low-address", mem=(ANON,), pages=1, rows=("REG-06",), kind=Kind.VERSION)
def test_register_low_address(ctx: Context) -> None:
    """Below vm.mmap_min_addr it counts whether something is mapped; kernels before 2026 refuse it all the same."""
    with promise("REG-06", "nothing mapped"), refuses(EINVAL):
        ctx.uffd.register(Range(0, PAGE_SIZE), MISSING)
    try:
        low = new_mapping(PAGE_SIZE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, at=PAGE_SIZE)
    except KernelError as error:
        raise Skip(f"{error}: needs CAP_SYS_RAWIO, run as root") from None
    try:
        ctx.uffd.register(low, MISSING)
    except UffdError as error:
        expect_errno(error, EINVAL, "REG-06, page mapped below vm.mmap_min_addr: errno")
    else:
        with promise("REG-06"), faulting(ctx.uffd, low.start):
            ctx.uffd.copy(low.start, ctx.src.start, PAGE_SIZE)


def argument(where: Range) -> bytes:
    """Make the argument that registers a range as MISSING."""
    return bytes(uapi.uffdio_register(uapi.uffdio_range(where.start, where.len), MISSING))


def cut_off(ctx: Context, data: bytes, count: int) -> int:
    """Put data where its last bytes, so many, would have to be in a page that is not mapped; return its address."""
    unmap(ctx.src.page(1))
    start = ctx.src.page(1).start - len(data) + count
    poke(start, data[:-count])
    return start


@uffd_case("register-unwritable-answer", mem=(ANON,), pages=3, rows=("REG-09",), kind=Kind.DETAIL)
def test_register_unwritable_answer(ctx: Context) -> None:
    """Where the field ioctls cannot be written the call fails with EFAULT, but the range is registered."""
    with promise("REG-09", "read-only argument"):
        with read_only(argument(ctx.dst.page(0))) as address, refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_REGISTER, address)
        expect_modes(ctx.dst.range, MISSING, UNREGISTERED, UNREGISTERED)
    with promise("REG-09", "ioctls in a page that is not mapped"):
        with refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_REGISTER, cut_off(ctx, argument(ctx.dst.page(1)), 8))
        expect_modes(ctx.dst.range, MISSING, MISSING, UNREGISTERED)


@uffd_case("register-unreadable-argument", mem=(ANON,), pages=2, rows=("REG-08",))
def test_register_unreadable_argument(ctx: Context) -> None:
    """An argument of which only a part can be read is refused with EFAULT, and nothing is registered."""
    for count in (16, 24):
        with promise("REG-08", f"last {count} bytes unreadable"), refuses(EFAULT):
            ctx.uffd.raw_ioctl(uapi.UFFDIO_REGISTER, cut_off(ctx, argument(ctx.dst.range), count))
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("register-orphaned", mem=(ANON,), pages=1, rows=("REG-39",), kind=Kind.DETAIL)
def test_register_orphaned(ctx: Context) -> None:
    """When the process has exited or runs another program, UFFDIO_REGISTER says ENOMEM."""
    for by_exec in (False, True):
        when = "after exec" if by_exec else "after exit"
        with orphaned(ctx.dst.range, MISSING, by_exec=by_exec) as uffd, promise("REG-39", when), refuses(ENOMEM):
            uffd.register(ctx.dst.range, MISSING)


# ---- modes ---------------------------------------------------------------------------------------------------------


@uffd_case(
    "register-modes", mem=ALL, features=WRITEPROTECT | MINOR_FAULTS, pages=1, rows=("REG-17", "REG-18", "REG-21")
)
def test_register_modes(ctx: Context) -> None:
    """Every combination of modes can be registered, but MINOR not on anonymous memory, and smaps shows exactly that."""
    for mode in map(RegisterMode, range(1, MISSING | WP | MINOR | 1)):
        with promise("REG-17, REG-18, REG-21", str(mode)):
            if MINOR in mode and ctx.mem is ANON:
                with refuses(EINVAL):
                    ctx.uffd.register(ctx.dst.range, mode)
                expect_modes(ctx.dst.range, UNREGISTERED)
            else:
                ctx.uffd.register(ctx.dst.range, mode)
                expect_modes(ctx.dst.range, mode)
                ctx.uffd.unregister(ctx.dst.range)


@uffd_case("register-missing-only", mem=ALL, features=WRITEPROTECT, pages=2, rows=("REG-18", "REG-32"))
def test_register_missing_only(ctx: Context) -> None:
    """Memory registered as MISSING reports missing pages and cannot be write protected."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.page(0), MISSING)
    with faulting(ctx.uffd, ctx.dst.start):
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
    ctx.dst.expect_pattern_of(ctx.src, 0, 1)
    with promise("REG-32"), refuses(ENOENT):
        ctx.uffd.writeprotect(ctx.dst.page(0))
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_zero(1, 1))


@uffd_case("register-wp-only", mem=ALL, features=WRITEPROTECT, pages=2, rows=("REG-21", "REG-32"))
def test_register_wp_only(ctx: Context) -> None:
    """Memory registered as WP can be write protected, reports writes to it, and no missing page."""
    page = ctx.dst.page(0)
    ioctls = ctx.uffd.register(page, WP)
    expect(ioctls & RangeIoctls.WRITEPROTECT, RangeIoctls.WRITEPROTECT, "REG-21, REG-32: WRITEPROTECT in ioctls")
    undisturbed(ctx.uffd, lambda: poke(page.start, b"\1"))
    ctx.uffd.writeprotect(page)
    with faulting(ctx.uffd, page.start, write=True, flags=PagefaultFlag.WRITE | PagefaultFlag.WP):
        ctx.uffd.unprotect(page)
    undisturbed(ctx.uffd, lambda: ctx.dst.expect_zero(1, 1))


@uffd_case("register-minor-only", mem=(SHMEM, HUGETLB), features=MINOR_FAULTS, pages=2, rows=("REG-32",))
def test_register_minor_only(ctx: Context) -> None:
    """Memory registered as MINOR reports pages that the page cache has, and CONTINUE maps them."""
    poke(ctx.dst.alias_page(0).start, b"\1")
    ioctls = ctx.uffd.register(ctx.dst.page(0), MINOR)
    expect(ioctls & RangeIoctls.CONTINUE, RangeIoctls.CONTINUE, "REG-32: CONTINUE in ioctls")
    with faulting(ctx.uffd, ctx.dst.start, flags=PagefaultFlag.MINOR) as waiter:
        ctx.uffd.continue_(ctx.dst.page(0))
        expect(waiter.result(), b"\1", "the byte read")


@uffd_case("register-protections", mem=ALL, features=WRITEPROTECT, pages=3, rows=("REG-16", "REG-37"))
def test_register_protections(ctx: Context) -> None:
    """One call registers neighbouring mappings whatever their protection, also one that nobody may access."""
    protect(ctx.dst.page(0), PROT_NONE)
    protect(ctx.dst.page(1), PROT_READ)
    for mode in (MISSING, WP, MISSING | WP):
        with promise("REG-16, REG-37", str(mode)):
            ctx.uffd.register(ctx.dst.range, mode)
            expect_modes(ctx.dst.range, mode, mode, mode)
            ctx.uffd.unregister(ctx.dst.range)


@uffd_case("register-holes", mem=ALL, pages=5, rows=("REG-10",), kind=Kind.DETAIL)
def test_register_holes(ctx: Context) -> None:
    """Holes at the start, in the middle and at the end of the range do not matter: every mapping is registered."""
    for number in (0, 2, 4):
        unmap(ctx.dst.page(number))
    start = ctx.dst.page(1 if ctx.mem.hugetlb else 0).start
    ctx.uffd.register(Range(start, ctx.dst.range.end - start), MISSING)
    expect_modes(ctx.dst.page(1), MISSING)
    expect_modes(ctx.dst.page(3), MISSING)


# ---- several handles -----------------------------------------------------------------------------------------------


@uffd_case("register-busy", mem=ALL, pages=3, rows=("REG-22",))
def test_register_busy(ctx: Context) -> None:
    """Memory that another handle has registered is refused with EBUSY, and with it all that the range holds."""
    ctx.src.fill()
    with Uffd.open() as owner:
        owner.register(ctx.dst.page(1), MISSING)
        for where in (ctx.dst.page(1), ctx.dst.page(0, 2), ctx.dst.page(1, 2), ctx.dst.range):
            with promise("REG-22", str(where)), refuses(EBUSY):
                ctx.uffd.register(where, MISSING)
        expect_modes(ctx.dst.range, UNREGISTERED, MISSING, UNREGISTERED)
        with promise("REG-22", "the owner's fault"), faulting(owner, ctx.dst.page(1).start):
            ctx.uffd.expect_no_message()
            owner.copy(ctx.dst.page(1).start, ctx.src.start, ctx.page_size)


@uffd_case("register-several-handles", mem=ALL, pages=2, rows=("REG-23",))
def test_register_several_handles(ctx: Context) -> None:
    """Handles of one process serve disjoint ranges; what one registered is free when it is closed."""
    with Uffd.open() as other:
        ctx.uffd.register(ctx.dst.page(0), MISSING)
        other.register(ctx.dst.page(1), MISSING)
        for number, uffd in enumerate((ctx.uffd, other)):
            with promise("REG-23", f"page {number}"), faulting(uffd, ctx.dst.page(number).start):
                uffd.copy(ctx.dst.page(number).start, ctx.src.start, ctx.page_size)
        other.expect_no_message()
        ctx.uffd.expect_no_message()
    with promise("REG-23", "after close"):
        expect_modes(ctx.dst.range, MISSING, UNREGISTERED)
        ctx.uffd.register(ctx.dst.range, MISSING)
        expect_modes(ctx.dst.range, MISSING, MISSING)


@uffd_case("register-remote", mem=(ANON,), pages=3, rows=("REG-44",), kind=Kind.DETAIL)
def test_register_remote(ctx: Context) -> None:
    """Through a handle from another process it is that process's memory that is registered, whoever calls."""
    ours, both, theirs = ctx.dst.page(0), ctx.dst.page(1), ctx.dst.page(2)

    def target(channel: Channel) -> None:
        unmap(ours)
        with Uffd.open() as uffd:
            channel.send(None, uffd.fd)
            channel.receive()

    with Child(target) as child:
        _, (fd,) = child.receive_fds()
        unmap(theirs)
        with Uffd(fd) as remote:
            with promise("REG-44", "the caller's page"), refuses(EINVAL):
                remote.register(ours, MISSING)
            with promise("REG-44", "the target's pages"):
                remote.register(both, MISSING)
                remote.register(theirs, MISSING)
                expect_modes(ctx.dst.page(1, 2), MISSING, MISSING, pid=child.pid)
                expect_modes(ctx.dst.page(0, 2), UNREGISTERED, UNREGISTERED)
        child.send()


# ---- what is left of the mappings ----------------------------------------------------------------------------------


@uffd_case("register-part", mem=ALL, pages=4, rows=("REG-36",), bugs=(48,))
def test_register_part(ctx: Context) -> None:
    """Registering a part of a mapping affects exactly that part."""
    ctx.src.fill()
    ctx.uffd.register(ctx.dst.page(1, 2), MISSING)
    expect_modes(ctx.dst.range, UNREGISTERED, MISSING, MISSING, UNREGISTERED)
    expect_mappings(ctx.dst, 1, 2, 1)
    for number in (0, 3):
        undisturbed(ctx.uffd, partial(ctx.dst.expect_zero, number, 1))
    for number in (1, 2):
        with promise("REG-36", f"page {number}"), faulting(ctx.uffd, ctx.dst.page(number).start):
            ctx.uffd.copy(ctx.dst.page(number).start, ctx.src.page(number).start, ctx.page_size)
    ctx.dst.expect_pattern_of(ctx.src, 1, 2)


@uffd_case("register-merges", mem=NOT_HUGETLB, features=WRITEPROTECT, pages=4, rows=("REG-36",))
def test_register_merges(ctx: Context) -> None:
    """Neighbours registered with one handle and mode become one mapping; with another mode or handle they do not."""
    with Uffd.open() as other:
        for number, uffd, mode in ((1, ctx.uffd, MISSING), (2, ctx.uffd, WP), (3, other, WP)):
            uffd.register(ctx.dst.page(number), mode)
        expect_mappings(ctx.dst, 1, 1, 1, 1)
        ctx.uffd.register(ctx.dst.page(0), MISSING)
        expect_mappings(ctx.dst, 2, 1, 1)
        ctx.uffd.register(ctx.dst.page(2), MISSING | WP)
        expect_mappings(ctx.dst, 2, 1, 1)
    ctx.uffd.register(ctx.dst.page(0, 2), MISSING | WP)
    expect_mappings(ctx.dst, 3, 1)
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    expect_mappings(ctx.dst, 4)


@uffd_case("register-too-many-mappings", mem=(ANON,), pages=6, rows=("REG-38",), kind=Kind.DETAIL)
def test_register_too_many_mappings(ctx: Context) -> None:
    """Where a mapping cannot be split UFFDIO_REGISTER says ENOMEM; the mappings before it stay registered."""
    protect(ctx.dst.page(2, 2), PROT_READ)  # three mappings of two pages each
    expect_mappings(ctx.dst, 2, 2, 2)
    with ctx.uffd as uffd:
        with no_mapping_left():
            with promise("REG-38", "part of a mapping"), refuses(ENOMEM):
                uffd.register(ctx.dst.page(0), MISSING)
            with promise("REG-38", "a mapping, and part of the next"), refuses(ENOMEM):
                uffd.register(ctx.dst.page(2, 3), MISSING)
        with promise("REG-38", "what is registered then"):
            expect_modes(ctx.dst.range, *[UNREGISTERED] * 2, *[MISSING] * 2, *[UNREGISTERED] * 2)


# ---- faults --------------------------------------------------------------------------------------------------------


@uffd_case("register-present", mem=ALL, pages=2, rows=("REG-40",))
def test_register_present(ctx: Context) -> None:
    """Pages that are there already are not reported as missing, mapped or only in the page cache."""
    ctx.dst.fill(0, 1)
    pages = 1
    if ctx.dst.fd is not None:
        second = new_mapping(ctx.dst.range.len, MAP_SHARED | MAP_NORESERVE, fd=ctx.dst.fd)
        ctx.dst.pattern.fill(second.start, 1, 1)
        pages = 2
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("REG-40"):
        undisturbed(ctx.uffd, lambda: ctx.dst.expect_pattern_of(ctx.dst, 0, pages, write_back=True))


SEGV_ACCERR = 2


def trap_of(access: Callable[[], object]) -> tuple[int, int] | None:
    """Make an access and return signal and si_code that end it, None when nothing does."""
    try:
        access()
    except AccessError as error:
        return error.trap.signo, error.trap.code
    return None


@uffd_case("register-mprotect", mem=ALL, pages=2, rows=("REG-41",), kind=Kind.DETAIL)
def test_register_mprotect(ctx: Context) -> None:
    """mprotect(2) keeps the registration; an access it forbids is SIGSEGV, and nothing is reported, page or not."""
    ctx.dst.fill(0, 1)
    ctx.uffd.register(ctx.dst.range, MISSING)
    for prot, access in ((PROT_READ, lambda address: poke(address, b"\1")), (PROT_NONE, peek)):
        protect(ctx.dst.range, prot)
        for number in (0, 1):
            trap = undisturbed(ctx.uffd, partial(trap_of, partial(access, ctx.dst.page(number).start)))
            expect(trap, (SIGSEGV, SEGV_ACCERR), f"REG-41, prot {prot}, page {number}: signal and si_code")
        expect_modes(ctx.dst.range, MISSING, MISSING)
    protect(ctx.dst.range, PROT_READ | PROT_WRITE)
    with promise("REG-41", "allowed again"), faulting(ctx.uffd, ctx.dst.page(1).start):
        ctx.uffd.copy(ctx.dst.page(1).start, ctx.src.start, ctx.page_size)


@uffd_case(
    "register-unread-event",
    mem=(ANON,),
    features=Feature.EVENT_REMOVE,
    pages=2,
    rows=("REG-43",),
    kind=Kind.DETAIL,
)
def test_register_unread_event(ctx: Context) -> None:
    """While an event waits to be read, memory can be registered all the same."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    with unread_event(ctx.uffd, ctx.dst.range), promise("REG-43"):
        ctx.uffd.register(ctx.src.range, MISSING)
        expect_modes(ctx.src.range, MISSING, MISSING)
        ctx.uffd.unregister(ctx.src.range)
