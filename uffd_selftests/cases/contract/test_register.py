# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_REGISTER: which memory can be registered, in which modes, and what that leaves of its mappings."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EBUSY, EFAULT, EINVAL, ENOENT, ENOMEM, EPERM
from functools import partial
from pathlib import Path
from signal import SIGSEGV

from uffd_selftests import syscalls, uapi
from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    MINOR,
    MINOR_FAULTS,
    MISSING,
    RWP,
    UNREGISTERED,
    WP,
    WRITEPROTECT,
    Context,
    Pagemap,
    Skip,
    Uffd,
    UffdError,
    bad_ranges,
    eventually,
    expect,
    expect_errno,
    expect_mappings,
    expect_modes,
    fails,
    no_mapping_left,
    promise,
    refuses,
)
from uffd_selftests.files import plain_file
from uffd_selftests.hugetlb import shared_page_table
from uffd_selftests.mem_types import (
    ALL,
    ANON,
    EACH_HUGETLB,
    HUGETLB,
    NOT_HUGETLB,
    SHMEM,
    SHMEM_PRIVATE,
)
from uffd_selftests.memory import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    AccessError,
    KernelError,
    Range,
    errno_name,
    expect_same,
    map_memory,
    peek,
    poke,
    protect,
    read_only,
    smaps_fields,
    unmap,
    user_space_end,
)
from uffd_selftests.processes import Channel, Child, Waiter, faulting, orphaned, undisturbed, unread_event
from uffd_selftests.sysv import SHM_HUGETLB, sysv_segment
from uffd_selftests.uapi import Feature, PagefaultFlag, RangeIoctls, RegisterMode

MAP_DROPPABLE = 0x08  # include/uapi/linux/mman.h, Linux 6.11
MAP_HUGETLB = 0x40000


def new_mapping(length: int, flags: int, *, prot: int = PROT_READ | PROT_WRITE, fd: int = -1, at: int = 0) -> Range:
    """Map memory for the rest of the case."""
    return Range(map_memory(length, flags=flags, prot=prot, fd=fd, at=at), length)


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


# ---- what can be registered ----------------------------------------------------------------------------------------


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


def expect_registrable(ctx: Context, where: Range) -> None:
    """Register a new mapping, resolve a fault there, and unmap it."""
    ctx.uffd.register(where, MISSING)
    expect_modes(where, MISSING)
    with faulting(ctx.uffd, where.start) as waiter:
        ctx.uffd.copy(where.start, ctx.src.start, where.len)
        expect(waiter.result(), peek(ctx.src.start), "the byte read")
    unmap(where)


@uffd_case("register-anonymous-kinds", mem=(ANON,), pages=1, rows=("REG-18",))
def test_register_anonymous_kinds(ctx: Context) -> None:
    """Shared anonymous memory and /dev/zero can be registered, and what is shared can be filled."""
    ctx.src.fill()
    fd = os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC)
    with promise("REG-18", "MAP_SHARED | MAP_ANONYMOUS"):
        expect_registrable(ctx, new_mapping(PAGE_SIZE, MAP_SHARED | MAP_ANONYMOUS))
    with promise("REG-18", "/dev/zero, shared"):
        expect_registrable(ctx, new_mapping(PAGE_SIZE, MAP_SHARED, fd=fd))
    with promise("REG-18", "/dev/zero, private"):
        where = new_mapping(PAGE_SIZE, MAP_PRIVATE, fd=fd)
        ctx.uffd.register(where, MISSING)
        with faulting(ctx.uffd, where.start):
            ctx.uffd.release(where)


DEV_ZERO = Defect(
    id="D-REG-18",
    summary="a private mapping of /dev/zero can be registered as MISSING, but COPY, ZEROPAGE and POISON say EFAULT",
    kernels="6.12.117, 6.18.44; not 6.1.192",
    advice="map anonymous memory with MAP_ANONYMOUS instead of /dev/zero",
    shows=r"UFFDIO_\w+\(.*\): EFAULT with \w+ = -EFAULT",
)


@uffd_case("register-dev-zero", mem=(ANON,), pages=1, rows=("REG-18",), defect=DEV_ZERO)
def test_register_dev_zero(ctx: Context) -> None:
    """A private mapping of /dev/zero can be filled as it can be registered."""
    ctx.src.fill()
    where = new_mapping(PAGE_SIZE, MAP_PRIVATE, fd=os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC))
    ctx.uffd.register(where, MISSING)
    with promise("REG-18"):
        ctx.uffd.copy(where.start, ctx.src.start, PAGE_SIZE)
        expect_same(ctx.src.start, where.start, PAGE_SIZE)


@uffd_case("register-anonymous-hugetlb", mem=EACH_HUGETLB, pages=1, rows=("REG-18",))
def test_register_anonymous_hugetlb(ctx: Context) -> None:
    """Huge pages mapped without a file can be registered and filled."""
    ctx.src.fill()
    flags = MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE | (MAP_SHARED if ctx.mem.shared else MAP_PRIVATE)
    expect_registrable(ctx, new_mapping(ctx.page_size, flags))


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


@contextmanager
def in_the_middle(ctx: Context, fd: int, flags: int) -> Iterator[Range]:
    """Put a mapping of a file in the middle of three anonymous pages, and expect them unregistered in the end."""
    yield new_mapping(PAGE_SIZE, flags | MAP_FIXED, fd=fd, at=ctx.dst.page(1).start)
    expect_modes(ctx.dst.range, UNREGISTERED, UNREGISTERED, UNREGISTERED)


def expect_incompatible(ctx: Context, middle: Range, what: str) -> None:
    """Assert that a mapping can be registered in no mode, neither alone nor with what is before and behind it."""
    for mode in (MISSING, WP, MINOR, MISSING | WP):
        for where in (middle, ctx.dst.page(0, 2), ctx.dst.page(1, 2), ctx.dst.range):
            with promise("REG-11", f"{what}, {mode}, {where}"), refuses(EINVAL):
                ctx.uffd.register(where, mode)


@uffd_case("register-file", mem=(ANON,), pages=3, rows=("REG-11",))
def test_register_file(ctx: Context) -> None:
    """A mapping of an ordinary file is refused, shared or private, and with it all that the range holds."""
    with plain_file(PAGE_SIZE) as fd:
        for what, flags in {"shared file": MAP_SHARED, "private file": MAP_PRIVATE}.items():
            with in_the_middle(ctx, fd, flags) as middle:
                expect_incompatible(ctx, middle, what)


@uffd_case("register-secretmem", mem=(ANON,), pages=3, rows=("REG-11",))
def test_register_secretmem(ctx: Context) -> None:
    """Secret memory is refused, and with it all that the range holds."""
    try:
        fd = syscalls.call("memfd_secret", os.O_CLOEXEC)
        unmap(new_mapping(PAGE_SIZE, MAP_SHARED, fd=fd))
    except KernelError as error:
        raise Skip(f"{error}: needs CONFIG_SECRETMEM, secretmem.enable=1 at boot and RLIMIT_MEMLOCK") from None
    os.ftruncate(fd, PAGE_SIZE)
    with in_the_middle(ctx, fd, MAP_SHARED) as middle:
        expect_incompatible(ctx, middle, "secretmem")


def expect_vdso_refused(uffd: Uffd, *modes: RegisterMode, note: str = "") -> None:
    """Assert that the pages which the kernel shares with every process can be registered in none of these modes."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(("[vdso]", "[vvar]", "[vvar_vclock]")):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            for mode in modes:
                with promise("REG-11", f"{line.split()[-1]}, {mode}{note}"), refuses(EINVAL):
                    uffd.register(Range(start, end - start), mode)


@uffd_case("register-vdso", rows=("REG-11",))
def test_register_vdso() -> None:
    """The pages that the kernel shares with every process are refused."""
    with Uffd.open() as uffd:
        expect_vdso_refused(uffd, MISSING, WP, MINOR, MISSING | WP)


@uffd_case("register-vdso-async", features=Feature.WP_ASYNC, rows=("REG-11",), bugs=(4,), kind=Kind.DETAIL)
def test_register_vdso_async() -> None:
    """They are refused with UFFD_FEATURE_WP_ASYNC too; a kernel that takes them lacks the fix of CVE-2026-68166."""
    with Uffd.open(Feature.WP_ASYNC) as uffd:
        expect_vdso_refused(uffd, WP, note=" (the fix of CVE-2026-68166)")


@uffd_case(
    "register-read-only-file",
    mem=(SHMEM, HUGETLB),
    features=WRITEPROTECT,
    pages=1,
    rows=("REG-13",),
    bugs=(15,),
    kind=Kind.DETAIL,
)
def test_register_read_only_file(ctx: Context) -> None:
    """A shared mapping that could never be written is refused with EPERM; a private one of the same file is not."""
    fd = os.open(f"/proc/self/fd/{ctx.dst.fd}", os.O_RDONLY | os.O_CLOEXEC)
    shared = new_mapping(ctx.page_size, MAP_SHARED | MAP_NORESERVE, prot=PROT_READ, fd=fd)
    for mode in (MISSING, WP, MISSING | WP):
        with promise("REG-13", str(mode)), refuses(EPERM):
            ctx.uffd.register(shared, mode)
    expect_modes(shared, UNREGISTERED)
    private = new_mapping(ctx.page_size, MAP_PRIVATE | MAP_NORESERVE, prot=PROT_READ, fd=fd)
    with promise("REG-13", "private"):
        ctx.uffd.register(private, MISSING)
        expect_modes(private, MISSING)


MFD_ALLOW_SEALING = 2
F_ADD_SEALS = 1033
F_SEAL_WRITE = 8
F_SEAL_FUTURE_WRITE = 16


def sealable() -> int:
    """Make a memfd of one page that can be sealed; it goes with the process."""
    fd = os.memfd_create("uffd-sealed", os.MFD_CLOEXEC | MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE_SIZE)
    return fd


@uffd_case("register-sealed", rows=("REG-14",), kind=Kind.DETAIL)
def test_register_sealed() -> None:
    """A shared mapping of a write-sealed memfd is refused with EPERM, but not a writable one from before the seal."""
    with Uffd.open() as uffd:
        for seal in (F_SEAL_WRITE, F_SEAL_FUTURE_WRITE):
            fd = sealable()
            older = new_mapping(PAGE_SIZE, MAP_SHARED, fd=fd) if seal == F_SEAL_FUTURE_WRITE else None
            fcntl.fcntl(fd, F_ADD_SEALS, seal)
            try:
                sealed = new_mapping(PAGE_SIZE, MAP_SHARED, prot=PROT_READ, fd=fd)
            except KernelError as error:  # before Linux 6.7, F_SEAL_WRITE forbids any shared mapping
                expect_errno(error, EPERM, f"REG-14, seal {seal}: mmap's errno")
            else:
                with promise("REG-14", f"seal {seal}"), refuses(EPERM):
                    uffd.register(sealed, MISSING)
            if older:
                with promise("REG-14", "mapping older than the seal"):
                    uffd.register(older, MISSING)


@uffd_case("register-forbids-seal", rows=("REG-15",), kind=Kind.DETAIL)
def test_register_forbids_seal() -> None:
    """While a shared mapping of a memfd is registered, even a read-only one, F_SEAL_WRITE says EBUSY."""
    fd = sealable()
    mapping = new_mapping(PAGE_SIZE, MAP_SHARED, prot=PROT_READ, fd=fd)
    with Uffd.open() as uffd:
        uffd.register(mapping, MISSING)
        with promise("REG-15"), fails(EBUSY):
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)
    unmap(mapping)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)


@uffd_case("register-sealed-address", mem=(ANON,), pages=1, rows=("REG-42",), kind=Kind.DETAIL)
def test_register_sealed_address(ctx: Context) -> None:
    """A mapping sealed with mseal(2) can be registered, filled and unregistered."""

    def target(_: Channel) -> None:
        syscalls.call("mseal", ctx.dst.start, PAGE_SIZE, 0)
        with Uffd.open() as uffd, promise("REG-42"):
            uffd.register(ctx.dst.range, MISSING)
            expect_modes(ctx.dst.range, MISSING)
            with faulting(uffd, ctx.dst.start):
                uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)
            uffd.unregister(ctx.dst.range)
            expect_modes(ctx.dst.range, UNREGISTERED)

    try:
        syscalls.call("mseal", 0, 0, 0)  # seals nothing
    except KernelError as error:
        raise Skip(f"{error}: Linux 6.10 has mseal(2)") from None
    with Child(target):
        pass


DROPPABLE = Defect(
    id="D-REG-19",
    summary="MAP_DROPPABLE memory can be registered: the check tests the flag after it was masked away",
    kernels="6.12.117; fixed in 6.18.44",
    advice="do not register memory mapped MAP_DROPPABLE: the kernel may drop its pages and report them missing again",
    shows=r"expected EINVAL; the call succeeded",
)


@uffd_case("register-droppable", rows=("REG-19",), defect=DROPPABLE)
def test_register_droppable() -> None:
    """Memory that the kernel may drop under pressure cannot be registered."""
    try:
        where = new_mapping(PAGE_SIZE, MAP_DROPPABLE | MAP_ANONYMOUS)
    except KernelError as error:
        raise Skip(f"MAP_DROPPABLE: {error} (Linux 6.11)") from None
    with Uffd.open() as uffd, promise("REG-19"):
        for mode in (MISSING, WP):
            with refuses(EINVAL):
                uffd.register(where, mode)
        expect_modes(where, UNREGISTERED)


# ---- System V shared memory ----------------------------------------------------------------------------------------

SYSV = Defect(
    id="D-REG-12",
    summary="System V shared memory cannot be registered, though the documents list it",
    kernels="6.1.192, 6.12.117, 6.18.44",
    advice="use memfd_create(2) or mmap(2) with MAP_SHARED instead of shmat(2)",
    shows=r"UFFDIO_REGISTER\(.*\): EINVAL",
)


@uffd_case("register-sysv", rows=("REG-12",), defect=SYSV)
def test_register_sysv() -> None:
    """A System V shared memory segment can be registered like any other shared memory."""
    with sysv_segment(PAGE_SIZE) as where, Uffd.open() as uffd, promise("REG-12"):
        uffd.register(where, MISSING)


@uffd_case("register-sysv-all-or-nothing", rows=("REG-12",), kind=Kind.DETAIL)
def test_register_sysv_all_or_nothing() -> None:
    """A System V shared memory segment can be registered in every mode or is refused with EINVAL in every mode."""
    answers = set()
    with sysv_segment(PAGE_SIZE) as where, Uffd.open(WRITEPROTECT | MINOR_FAULTS) as uffd:
        for mode in (MISSING, WP, MINOR):
            try:
                uffd.register(where, mode)
            except UffdError as error:
                answers.add(error.errno)
                expect_modes(where, UNREGISTERED)
            else:
                answers.add(0)
                expect_modes(where, mode)
                uffd.unregister(where)
    if answers not in ({0}, {EINVAL}):
        names = sorted(errno_name(answer) if answer else "success" for answer in answers)
        raise AssertionError(f"REG-12: expected success or EINVAL in every mode, got {', '.join(names)}")


@uffd_case("register-sysv-hugetlb", mem=(HUGETLB,), pages=1, rows=("REG-12",))
def test_register_sysv_hugetlb(ctx: Context) -> None:
    """A System V segment of huge pages can be registered and filled."""
    ctx.src.fill()
    with sysv_segment(ctx.page_size, SHM_HUGETLB) as where, promise("REG-12"):
        ctx.uffd.register(where, MISSING)
        with faulting(ctx.uffd, where.start):
            ctx.uffd.copy(where.start, ctx.src.start, where.len)


@uffd_case("register-sysv-async", features=Feature.WP_ASYNC, rows=("REG-12", "REG-20"))
def test_register_sysv_async() -> None:
    """With UFFD_FEATURE_WP_ASYNC a System V segment can be registered as WP."""
    with sysv_segment(PAGE_SIZE) as where, Uffd.open(Feature.WP_ASYNC) as uffd, promise("REG-12, REG-20"):
        uffd.register(where, WP)
        expect_modes(where, WP)


# ---- files with UFFD_FEATURE_WP_ASYNC ------------------------------------------------------------------------------


@uffd_case("register-file-async", features=Feature.WP_ASYNC, rows=("REG-20",))
def test_register_file_async() -> None:
    """With UFFD_FEATURE_WP_ASYNC any file can be registered as WP, and in that mode only."""
    with plain_file(PAGE_SIZE) as fd, Uffd.open(Feature.WP_ASYNC) as uffd:
        for what, flags in {"shared file": MAP_SHARED, "private file": MAP_PRIVATE}.items():
            where = new_mapping(PAGE_SIZE, flags, fd=fd)
            for mode in (MISSING, MINOR, MISSING | WP, MINOR | WP):
                with promise("REG-20", f"{what}, {mode}"), refuses(EINVAL):
                    uffd.register(where, mode)
            with promise("REG-20", what):
                expect_modes(where, UNREGISTERED)
                expect(RangeIoctls.WRITEPROTECT in uffd.register(where, WP), True, "WRITEPROTECT in ioctls")
                expect_modes(where, WP)


@uffd_case("register-file-async-read-only", features=Feature.WP_ASYNC, rows=("REG-20", "REG-13"))
def test_register_file_async_read_only() -> None:
    """A shared mapping of a file opened for reading only is refused with EPERM also with UFFD_FEATURE_WP_ASYNC."""
    with plain_file(PAGE_SIZE) as writable, Uffd.open(Feature.WP_ASYNC) as uffd:
        fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        where = new_mapping(PAGE_SIZE, MAP_SHARED, prot=PROT_READ, fd=fd)
        with promise("REG-20"), refuses(EPERM):
            uffd.register(where, WP)
        expect_modes(where, UNREGISTERED)


ASYNC_IOCTLS = Defect(
    id="D-REG-34",
    summary="for a file registered with UFFD_FEATURE_WP_ASYNC, COPY, ZEROPAGE, MOVE and POISON are offered but fail",
    kernels="6.12.117, 6.18.44",
    advice="use nothing but WAKE and WRITEPROTECT on memory that is neither anonymous nor shmem nor hugetlb",
    shows=r"ioctls offered that cannot work on a file: expected 0, got _UFFDIO_COPY",
)
FILLS = RangeIoctls.COPY | RangeIoctls.ZEROPAGE | RangeIoctls.MOVE | RangeIoctls.POISON


@uffd_case("register-file-async-offers", features=Feature.WP_ASYNC, rows=("REG-34",), defect=ASYNC_IOCTLS)
def test_register_file_async_offers() -> None:
    """A file registered with UFFD_FEATURE_WP_ASYNC is offered only the ioctls that work on it."""
    with plain_file(PAGE_SIZE) as fd, Uffd.open(Feature.WP_ASYNC) as uffd:
        offered = uffd.register(new_mapping(PAGE_SIZE, MAP_SHARED, fd=fd), WP)
        expect(str(offered & FILLS), "0", "REG-34: ioctls offered that cannot work on a file")


@uffd_case("register-file-async-fills", features=Feature.WP_ASYNC | Feature.MOVE, rows=("REG-34",), kind=Kind.DETAIL)
def test_register_file_async_fills() -> None:
    """On a file registered with UFFD_FEATURE_WP_ASYNC all fill ioctls fail with EINVAL, be they offered or not."""
    with plain_file(PAGE_SIZE) as fd, Uffd.open(Feature.WP_ASYNC) as uffd:
        where, src = new_mapping(PAGE_SIZE, MAP_SHARED, fd=fd), new_mapping(PAGE_SIZE, MAP_PRIVATE | MAP_ANONYMOUS)
        offered = uffd.register(where, WP)
        expect(offered in (offered | FILLS, offered.without(FILLS)), True, "REG-34: either all fill ioctls or none")
        with promise("REG-34", "UFFDIO_COPY"), refuses(EINVAL):
            uffd.copy(where.start, src.start, PAGE_SIZE)
        with promise("REG-34", "UFFDIO_ZEROPAGE"), refuses(EINVAL):
            uffd.zeropage(where)
        with promise("REG-34", "UFFDIO_POISON"), refuses(EINVAL):
            uffd.poison(where)
        with promise("REG-34", "UFFDIO_MOVE"), refuses(EINVAL):
            uffd.move(where.start, src.start, PAGE_SIZE)


# ---- which ioctls are offered --------------------------------------------------------------------------------------

KNOWN_BITS = (1 << 11) - 1 | 1 << 63
"""The bits of all requests up to Linux 7.3; a newer kernel may offer more."""


def expect_offers(ctx: Context, offers: dict[RegisterMode, int], optional: int = 0) -> None:
    """Assert exactly which ioctls the destination area is offered in each mode; POISON and MOVE where they exist."""
    lacking = (0 if Feature.POISON in ctx.uffd.offered else RangeIoctls.POISON) | (
        0 if Feature.MOVE in ctx.uffd.offered else RangeIoctls.MOVE
    )
    for mode, ioctls in offers.items():
        seen = ctx.uffd.register(ctx.dst.range, mode) & KNOWN_BITS
        if seen | optional != (ioctls & ~lacking) | optional:
            raise AssertionError(f"{mode}: expected ioctls {RangeIoctls(ioctls & ~lacking)}, got {seen}")
        ctx.uffd.unregister(ctx.dst.range)


@uffd_case("register-offers-anon", mem=(ANON,), features=WRITEPROTECT, pages=1, rows=("REG-29", "REG-32"))
def test_register_offers_anon(ctx: Context) -> None:
    """Anonymous memory is offered WAKE, COPY, ZEROPAGE, POISON and MOVE, and WRITEPROTECT in mode WP."""
    with promise("REG-29, REG-32"):
        expect_offers(ctx, {MISSING: 0x13C, WP: 0x17C, MISSING | WP: 0x17C})


@uffd_case(
    "register-offers-shmem",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=WRITEPROTECT | MINOR_FAULTS,
    pages=1,
    rows=("REG-30", "REG-32"),
)
def test_register_offers_shmem(ctx: Context) -> None:
    """Shared memory is offered WAKE, COPY, ZEROPAGE and POISON, WRITEPROTECT in mode WP and CONTINUE in mode MINOR."""
    with promise("REG-30, REG-32"):
        offers = {MISSING: 0x13C, WP: 0x17C, MINOR: 0x1BC, MINOR | WP: 0x1FC, MISSING | WP | MINOR: 0x1FC}
        expect_offers(ctx, offers, optional=RangeIoctls.MOVE)


@uffd_case(
    "register-offers-hugetlb",
    mem=EACH_HUGETLB,
    features=WRITEPROTECT | MINOR_FAULTS,
    pages=1,
    rows=("REG-31", "REG-32"),
)
def test_register_offers_hugetlb(ctx: Context) -> None:
    """Huge pages are offered the same without ZEROPAGE and MOVE."""
    with promise("REG-31, REG-32"):
        expect_offers(ctx, {MISSING: 0x10C, WP: 0x14C, MINOR: 0x18C, MINOR | WP: 0x1CC, MISSING | WP | MINOR: 0x1CC})


MOVE_ON_SHMEM = Defect(
    id="D-REG-30",
    summary="UFFDIO_MOVE is offered for shared memory, where it always fails with EINVAL",
    kernels="6.12.117, 6.18.44",
    advice="do not take the _UFFDIO_MOVE bit for a promise: use UFFDIO_MOVE on private anonymous memory only",
    shows=r"MOVE offered: expected False, got True",
)


@uffd_case(
    "register-offers-no-move",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=Feature.MOVE,
    pages=1,
    rows=("REG-30",),
    defect=MOVE_ON_SHMEM,
)
def test_register_offers_no_move(ctx: Context) -> None:
    """Shared memory is not offered UFFDIO_MOVE, which does not work there."""
    offered = ctx.uffd.register(ctx.dst.range, MISSING)
    with refuses(EINVAL):
        ctx.uffd.move(ctx.dst.start, ctx.src.start, PAGE_SIZE)
    expect(RangeIoctls.MOVE in offered, False, "REG-30: MOVE offered")


@uffd_case("register-mixed-offer", mem=EACH_HUGETLB, pages=1, rows=("REG-33",), kind=Kind.DETAIL)
def test_register_mixed_offer(ctx: Context) -> None:
    """One call over huge pages and others registers both and offers what holds for both, in either order."""
    before, behind = Range(ctx.dst.start - PAGE_SIZE, PAGE_SIZE), Range(ctx.dst.range.end, PAGE_SIZE)
    alone = ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.unregister(ctx.dst.range)
    for where, other in (
        (Range(before.start, PAGE_SIZE + ctx.page_size), before),
        (Range(ctx.dst.start, PAGE_SIZE + ctx.page_size), behind),
    ):
        with promise("REG-33", f"the other page at {other.start:#x}"):
            expect(ctx.uffd.register(where, MISSING), alone, "ioctls offered")
            expect_modes(ctx.dst.range, MISSING)
            expect_modes(other, MISSING)
            ctx.uffd.unregister(where)


# ---- huge pages ----------------------------------------------------------------------------------------------------


@uffd_case("register-hugetlb-alignment", mem=EACH_HUGETLB, pages=2, rows=("REG-35",))
def test_register_hugetlb_alignment(ctx: Context) -> None:
    """A range must not start or end inside of a huge page."""
    start, huge = ctx.dst.start, ctx.page_size
    for what, bad in {
        "start inside": Range(start + PAGE_SIZE, huge),
        "start inside, end aligned": Range(start + PAGE_SIZE, huge - PAGE_SIZE),
        "one base page": Range(start, PAGE_SIZE),
        "end inside": Range(start, huge - PAGE_SIZE),
        "end inside of the second": Range(start, huge + PAGE_SIZE),
        "from other memory into it": Range(start - PAGE_SIZE, 2 * PAGE_SIZE),
    }.items():
        with promise("REG-35", what), refuses(EINVAL):
            ctx.uffd.register(bad, MISSING)
    expect_modes(Range(start - PAGE_SIZE, PAGE_SIZE), UNREGISTERED)
    expect_modes(ctx.dst.range, UNREGISTERED, UNREGISTERED)


@uffd_case("register-hugetlb-hole", mem=EACH_HUGETLB, pages=1, rows=("REG-35",), kind=Kind.DETAIL)
def test_register_hugetlb_hole(ctx: Context) -> None:
    """Where huge pages come first in it, a range must start at one, even if it starts in the hole before them."""
    hole = Range(ctx.dst.start - PAGE_SIZE, PAGE_SIZE)
    unmap(hole)
    with promise("REG-35"), refuses(EINVAL):
        ctx.uffd.register(Range(hole.start, hole.len + ctx.page_size), MISSING)
    expect_modes(ctx.dst.range, UNREGISTERED)


@uffd_case("register-wp-unshares", mem=(HUGETLB,), features=WRITEPROTECT, pages=1, rows=("REG-21",), kind=Kind.DETAIL)
def test_register_wp_unshares(ctx: Context) -> None:
    """Protection of huge pages does not reach another mapping that has shared the page table until then."""
    with shared_page_table(ctx.page_size) as (one, other):
        ctx.uffd.register(one, WP)
        ctx.uffd.writeprotect(Range(one.start, ctx.page_size))
        Pagemap.expect_uffd_wp(other.start, False, "in the mapping that is not registered")
        undisturbed(ctx.uffd, lambda: poke(other.start, b"\2"))
        Pagemap.expect_uffd_wp(one.start, True, "in the registered mapping")


@uffd_case("register-wp-shares-not", mem=(HUGETLB,), features=WRITEPROTECT, pages=1, rows=("REG-21",), kind=Kind.DETAIL)
def test_register_wp_shares_not(ctx: Context) -> None:
    """Two mappings of the same huge pages that are both registered for write protection are protected one by one."""
    with shared_page_table(ctx.page_size) as (one, other):
        for mapping in (one, other):
            ctx.uffd.register(mapping, WP)
            expect(peek(mapping.start), b"\1", "the byte in the file")
        ctx.uffd.writeprotect(Range(one.start, ctx.page_size))
        Pagemap.expect_uffd_wp(other.start, False, "in the mapping that is not protected")
        undisturbed(ctx.uffd, lambda: poke(other.start, b"\2"))
        Pagemap.expect_uffd_wp(one.start, True, "in the protected mapping")


@uffd_case(
    "register-minor-unshares", mem=(HUGETLB,), features=MINOR_FAULTS, pages=1, rows=("REG-32",), kind=Kind.DETAIL
)
def test_register_minor_unshares(ctx: Context) -> None:
    """A minor fault comes although another mapping, which has shared the page table until then, maps the page."""
    with shared_page_table(ctx.page_size) as (one, other):
        ctx.uffd.register(one, MINOR)
        poke(other.start + ctx.page_size, b"\2")
        page = Range(one.start + ctx.page_size, ctx.page_size)
        with faulting(ctx.uffd, page.start, flags=PagefaultFlag.MINOR):
            ctx.uffd.continue_(page)


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


# ---- again ---------------------------------------------------------------------------------------------------------


@uffd_case("register-again", mem=ALL, pages=2, rows=("REG-24",), kind=Kind.DETAIL)
def test_register_again(ctx: Context) -> None:
    """Registering the same again changes nothing: neither mode nor offer, and who waits goes on waiting."""
    ioctls = ctx.uffd.register(ctx.dst.range, MISSING)
    with faulting(ctx.uffd, ctx.dst.start), promise("REG-24"):
        expect(ctx.uffd.register(ctx.dst.range, MISSING), ioctls, "ioctls offered")
        expect_modes(ctx.dst.range, MISSING, MISSING)
        ctx.uffd.expect_still_asleep(1)
        ctx.uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)


@uffd_case("register-rest", mem=ALL, pages=5, rows=("REG-24", "REG-37"), kind=Kind.DETAIL)
def test_register_rest(ctx: Context) -> None:
    """A range that is registered in parts gets registered as a whole."""
    ctx.uffd.register(ctx.dst.page(0), MISSING)
    ctx.uffd.register(ctx.dst.page(2), MISSING)
    ctx.uffd.register(ctx.dst.page(0, 4), MISSING)
    expect_modes(ctx.dst.range, MISSING, MISSING, MISSING, MISSING, UNREGISTERED)


@uffd_case("register-wider", mem=ALL, features=WRITEPROTECT, pages=2, rows=("REG-25",), kind=Kind.DETAIL)
def test_register_wider(ctx: Context) -> None:
    """Registering with a mode more adds that mode, and its ioctl is offered."""
    page = ctx.dst.page(0)
    ctx.uffd.register(ctx.dst.range, MISSING)
    ioctls = ctx.uffd.register(page, MISSING | WP)
    with promise("REG-25"):
        expect(RangeIoctls.WRITEPROTECT in ioctls, True, "WRITEPROTECT offered")
        expect_modes(ctx.dst.range, MISSING | WP, MISSING)
        with faulting(ctx.uffd, page.start):
            ctx.uffd.copy(page.start, ctx.src.start, page.len)
        ctx.uffd.writeprotect(page)
        with faulting(ctx.uffd, page.start, write=True, flags=PagefaultFlag.WRITE | PagefaultFlag.WP):
            ctx.uffd.unprotect(page)


NARROWER = Defect(
    id="D-REG-26",
    summary="registering a range again with fewer modes succeeds but leaves it in all of its modes",
    kernels="6.1.192, 6.12.117, 6.18.44",
    advice="unregister the range first, then register it with the modes wanted",
    shows=r"expected UFFDIO_REGISTER_MODE_MISSING, got UFFDIO_REGISTER_MODE_MISSING\|UFFDIO_REGISTER_MODE_WP",
)


@uffd_case("register-narrower", mem=ALL, features=WRITEPROTECT, pages=1, rows=("REG-26",), defect=NARROWER)
def test_register_narrower(ctx: Context) -> None:
    """After registering with fewer modes, a range has those modes only."""
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    ctx.uffd.register(ctx.dst.range, MISSING)
    with promise("REG-26"):
        expect_modes(ctx.dst.range, MISSING)


@uffd_case("register-narrower-mode", mem=ALL, features=WRITEPROTECT, pages=1, rows=("REG-26",), kind=Kind.DETAIL)
def test_register_narrower_mode(ctx: Context) -> None:
    """Registering with fewer modes leaves the range in the new or in the old modes and offers what the new ones do."""
    alone = ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.register(ctx.dst.range, MISSING | WP)
    with promise("REG-26"):
        expect(ctx.uffd.register(ctx.dst.range, MISSING), alone, "ioctls offered")
        kept = set(next(smaps_fields(ctx.dst.range))["VmFlags"].split()) & {"um", "uw", "ui"}
        if kept not in ({"um"}, {"um", "uw"}):
            raise AssertionError(f"expected um, with uw or without, in VmFlags of smaps; got {sorted(kept)}")


@uffd_case("register-other-mode", mem=ALL, features=WRITEPROTECT, pages=2, rows=("REG-27",), kind=Kind.DETAIL)
def test_register_other_mode(ctx: Context) -> None:
    """Registering with another mode puts it in place of the old: missing pages are reported no more."""
    ctx.uffd.register(ctx.dst.range, MISSING)
    ctx.uffd.register(ctx.dst.page(0), WP)
    with promise("REG-27"):
        expect_modes(ctx.dst.range, WP, MISSING)
        undisturbed(ctx.uffd, lambda: poke(ctx.dst.start, b"\1"))
        ctx.uffd.writeprotect(ctx.dst.page(0))
        with faulting(ctx.uffd, ctx.dst.start, write=True, flags=PagefaultFlag.WRITE | PagefaultFlag.WP):
            ctx.uffd.unprotect(ctx.dst.page(0))


def drop_wp(ctx: Context) -> bool:
    """Protect page 0, then register it as MISSING instead of WP; False when the kernel refuses that (Linux 7.3)."""
    ctx.uffd.register(ctx.dst.range, WP)
    poke(ctx.dst.start, b"\1")
    ctx.uffd.writeprotect(ctx.dst.page(0))
    try:
        ctx.uffd.register(ctx.dst.range, MISSING)
    except UffdError as error:
        expect_errno(error, EBUSY, "REG-28: errno of dropping WP by UFFDIO_REGISTER")
        expect_modes(ctx.dst.page(0), WP)
        return False
    expect_modes(ctx.dst.page(0), MISSING)
    return True


STALE_WP = Defect(
    id="D-REG-28",
    summary="registering a WP range as MISSING leaves its pages marked as protected; nothing is reported any more: a "
    "write to such a page gets done, but on hugetlb it spins for ever in the fault",
    kernels="6.1.192, 6.12.117, 6.18.44; said to be refused with EBUSY since 7.3",
    advice="un-protect or unregister the range before registering it without WP",
    shows=r"expected PM_UFFD_WP clear in pagemap|again and again, without end: expected False, got True",
)


ENOUGH = 0.05
"""Seconds on the processor that no single write takes."""


@uffd_case("register-drops-wp", mem=ALL, features=WRITEPROTECT, pages=1, rows=("REG-28",), bugs=(3,), defect=STALE_WP)
def test_register_drops_wp(ctx: Context) -> None:
    """When a range is registered without WP, the protection of its pages goes; or the kernel refuses to."""
    if drop_wp(ctx):
        Pagemap.expect_uffd_wp(ctx.dst.start, False, "REG-28: after registering as MISSING")


@uffd_case(
    "register-dropped-wp-hugetlb",
    mem=EACH_HUGETLB,
    features=WRITEPROTECT,
    pages=1,
    rows=("REG-28",),
    bugs=(3,),
    defect=STALE_WP,
)
def test_register_dropped_wp_hugetlb(ctx: Context) -> None:
    """When huge pages are registered without WP, a write to one that was protected gets done."""
    if not drop_wp(ctx):
        return
    with Waiter(lambda: poke(ctx.dst.start, b"\2")) as waiter:
        eventually(lambda: waiter.done or waiter.cpu_time > ENOUGH, "the thread to write or to waste its time")
        spins = not waiter.done
        if spins:
            ctx.uffd.register(ctx.dst.range, WP)
            ctx.uffd.unprotect(ctx.dst.page(0))
    expect(spins, False, "REG-28: the thread that writes faults again and again, without end")


@uffd_case(
    "register-dropped-wp-writable",
    mem=NOT_HUGETLB,
    features=WRITEPROTECT,
    pages=1,
    rows=("REG-28",),
    bugs=(3,),
    kind=Kind.DETAIL,
)
def test_register_dropped_wp_writable(ctx: Context) -> None:
    """When a range is registered without WP, its once protected pages can be written, and nothing is reported."""
    if drop_wp(ctx):
        with promise("REG-28"):
            undisturbed(ctx.uffd, lambda: poke(ctx.dst.start, b"\2"))


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
