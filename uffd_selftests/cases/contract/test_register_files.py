# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_REGISTER of files: ordinary, read-only, sealed, of System V; and of any file with UFFD_FEATURE_WP_ASYNC."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBUSY, EINVAL, EPERM

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ANON, HUGETLB, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MINOR, MINOR_FAULTS, MISSING,
    PAGE_SIZE, PROT_READ, SHMEM, SHM_HUGETLB, UNREGISTERED, WP, WRITEPROTECT, Context, Feature, KernelError, Range,
    RangeIoctls, Skip, Uffd, UffdError, errno_name, expect, expect_errno, expect_modes, expect_same, fails, faulting,
    new_mapping, plain_file, promise, refuses, saw, syscalls, sysv_segment, unmap,
)  # fmt: skip


# ---- ordinary files and secret memory ------------------------------------------------------------------------------


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


# ---- read-only and sealed files ------------------------------------------------------------------------------------


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


# ---- System V shared memory ----------------------------------------------------------------------------------------

SYSV = Defect(
    id="D-REG-12",
    summary="System V shared memory cannot be registered, though the documents list it",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="use memfd_create(2) or mmap(2) with MAP_SHARED instead of shmat(2)",
    shows=r"UFFDIO_REGISTER\(.*\): EINVAL",
)


@uffd_case("register-sysv", rows=("REG-12",), defect=SYSV)
def test_register_sysv() -> None:
    """A System V shared memory segment can be registered like any other shared memory."""
    with sysv_segment(PAGE_SIZE) as where, Uffd.open() as uffd, promise("REG-12"):
        uffd.register(where, MISSING)


@uffd_case("register-sysv-all-or-nothing", features=WRITEPROTECT | MINOR_FAULTS, rows=("REG-12",), kind=Kind.DETAIL)
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
    saw("EINVAL in every mode" if EINVAL in answers else "success in every mode")


SYSV_HUGETLB = Defect(
    id="D-REG-56",
    summary="System V shared memory of huge pages cannot be registered any more",
    kernels="7.2.12, 7.3.4; not 6.1.192, 6.12.117, 6.18.44 (since 7.1, when the mapping's type began to be asked)",
    advice="use memfd_create(2) with MFD_HUGETLB, or MAP_HUGETLB, instead of shmget(2) with SHM_HUGETLB",
    shows=r"UFFDIO_REGISTER\(.*\): EINVAL",
)


@uffd_case("register-sysv-hugetlb", mem=(HUGETLB,), pages=1, rows=("REG-12", "REG-56"), defect=SYSV_HUGETLB)
def test_register_sysv_hugetlb(ctx: Context) -> None:
    """A System V segment of huge pages can be registered and filled."""
    ctx.src.fill()
    with sysv_segment(ctx.page_size, SHM_HUGETLB) as where, promise("REG-12, REG-56"):
        ctx.uffd.register(where, MISSING)
        with faulting(ctx.uffd, where.start):
            ctx.uffd.copy(where.start, ctx.src.start, where.len)
        expect_same(ctx.src.start, where.start, where.len)


@uffd_case(
    "register-sysv-hugetlb-refused",
    mem=(HUGETLB,),
    features=WRITEPROTECT | MINOR_FAULTS,
    pages=1,
    rows=("REG-56",),
    kind=Kind.DETAIL,
)
def test_register_sysv_hugetlb_refused(ctx: Context) -> None:
    """A System V segment of huge pages is taken in every mode, or refused in every mode with EINVAL, unchanged."""
    taken = set()
    with sysv_segment(ctx.page_size, SHM_HUGETLB) as where:
        for mode in (MISSING, WP, MINOR, MISSING | WP):
            try:
                ctx.uffd.register(where, mode)
            except UffdError as error:
                expect_errno(error, EINVAL, f"REG-56, {mode}: errno")
                expect_modes(where, UNREGISTERED)
                taken.add(False)
            else:
                expect_modes(where, mode)
                ctx.uffd.unregister(where)
                taken.add(True)
    expect(len(taken), 1, "REG-56: different answers, of success and EINVAL, by mode")
    saw("success in every mode" if True in taken else "EINVAL in every mode")


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
    kernels="6.12.117, 6.18.44, 7.3.4",
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
