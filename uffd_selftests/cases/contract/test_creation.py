# SPDX-License-Identifier: GPL-2.0-only
"""userfaultfd(2): who gets a handle, with which flags, and what kind of file it is."""

from __future__ import annotations

import ctypes
import fcntl
import os
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, EAGAIN, EBADF, EINVAL, EMFILE, ENODEV, ENOTTY, ENXIO, EPERM, ESPIPE

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ANON, DEFAULT_FLAGS, MAP_PRIVATE, MESSAGE_SIZE, MISSING, PAGE_SIZE, PROT_READ, UFFD_USER_MODE_ONLY,
    UNPRIVILEGED_USERFAULTFD, USER_MODE_ONLY, Channel, Child, Context, Fault, Feature, Ia32, KernelError, PagefaultFlag,
    Uffd, Waiter, become_nobody, combinations, drop_capability, enter_user_namespace, expect, expect_errno,
    expect_handle, fails, faulting, flag_names, map_memory, out_of_descriptors, parse_message, peek, promise, refuses,
    run_as, uapi, unprivileged_userfaultfd, without_cap_sys_ptrace,
)  # fmt: skip

FLAGS = (os.O_CLOEXEC, os.O_NONBLOCK, USER_MODE_ONLY)
BLOCKING = DEFAULT_FLAGS & ~os.O_NONBLOCK


def create(flags: int) -> Uffd:
    """userfaultfd(2), and no other way to a handle."""
    return Uffd.create(flags, via="syscall")


def open_files() -> set[str]:
    """Return the descriptors that are in use."""
    return set(os.listdir("/proc/self/fd"))


@contextmanager
def nothing_opened() -> Iterator[None]:
    """Assert that the block uses up no descriptor."""
    before = open_files()
    yield
    expect(open_files(), before, "open descriptors")


# ---- flags ---------------------------------------------------------------------------------------------------------


@uffd_case("creation-flags", needs=("syscall", "cap_sys_ptrace"), rows=("CR-01", "CR-02"))
def test_creation_flags() -> None:
    """userfaultfd(2) takes its three flags in every combination, and the handle shows O_CLOEXEC and O_NONBLOCK."""
    for flags in combinations(*FLAGS):
        with promise("CR-02" if flags else "CR-01", f"flags {flag_names(flags)}"), create(flags) as uffd:
            expect_handle(uffd, flags)


@uffd_case("creation-unknown-flags", needs=("syscall",), rows=("CR-03",))
def test_creation_unknown_flags() -> None:
    """userfaultfd(2) refuses every other flag, alone or with good ones, and uses up no descriptor."""
    known = sum(FLAGS)
    single = [1 << bit for bit in range(32) if not known >> bit & 1]
    for flags in [*single, os.O_RDWR | os.O_APPEND, 0xFFFF_FFFF, ~known & 0xFFFF_FFFF]:
        for given in (flags | USER_MODE_ONLY, flags | DEFAULT_FLAGS):
            with promise("CR-03", f"flags {flag_names(given)}"), nothing_opened(), fails(EINVAL):
                create(given)


@uffd_case("creation-unknown-flags-alone", needs=("syscall", "cap_sys_ptrace"), rows=("CR-03",))
def test_creation_unknown_flags_alone() -> None:
    """userfaultfd(2) refuses a flag that it does not know when that is the only one."""
    for bit in range(32):
        if not sum(FLAGS) >> bit & 1:
            with promise("CR-03", f"flag {1 << bit:#x}"), nothing_opened(), fails(EINVAL):
                create(1 << bit)


@uffd_case("creation-user-mode-only", needs=("syscall",), rows=("CR-04",), kind=Kind.VERSION)
def test_creation_user_mode_only() -> None:
    """UFFD_USER_MODE_ONLY is taken, or refused as a flag that the kernel does not know (before Linux 5.11)."""
    try:
        uffd = create(UFFD_USER_MODE_ONLY)
    except KernelError as error:
        expect_errno(error, EINVAL, "CR-04: errno of userfaultfd(UFFD_USER_MODE_ONLY)")
        return
    with uffd, promise("CR-04"):
        uffd.api()


@uffd_case("creation-fresh", mem=(ANON,), pages=1, needs=("syscall",), rows=("CR-01",))
def test_creation_fresh(ctx: Context) -> None:
    """A new handle has nothing of those closed before it: no features, no handshake, no faults."""
    offered = ctx.uffd.offered.without(Feature.EVENT_FORK | Feature.SIGBUS)
    for _ in range(32):
        with Uffd.open(offered) as old:
            old.register(ctx.dst.range, MISSING)
    handles = [create(DEFAULT_FLAGS) for _ in range(32)]
    for uffd in handles:
        with promise("CR-01", "before UFFDIO_API"), refuses(EINVAL):
            uffd.wake(ctx.dst.range)
        uffd.api()
        uffd.register(ctx.dst.range, MISSING)
        with promise("CR-01"), faulting(uffd, ctx.dst.start + 1, at=ctx.dst.start):
            uffd.copy(ctx.dst.start, ctx.src.start, ctx.page_size)
        uffd.close()
        ctx.dst.release()


# ---- who may -------------------------------------------------------------------------------------------------------


def expect_unprivileged() -> None:
    """Assert what a process gets that is not trusted with the faults of the kernel."""
    for flags in combinations(os.O_CLOEXEC, os.O_NONBLOCK):
        with promise("CR-05", f"flags {flag_names(flags)}"), nothing_opened(), fails(EPERM):
            create(flags)
        modest = flags | USER_MODE_ONLY
        with promise("CR-06", f"flags {flag_names(modest)}"), create(modest) as uffd:
            expect_handle(uffd, modest)
            uffd.api()


@uffd_case("creation-unprivileged", needs=("syscall", "user_mode_only"), rows=("CR-05", "CR-06"))
def test_creation_unprivileged() -> None:
    """With vm.unprivileged_userfaultfd=0 only CAP_SYS_PTRACE gets a handle without UFFD_USER_MODE_ONLY."""
    with unprivileged_userfaultfd(0):
        run_as(without_cap_sys_ptrace, expect_unprivileged)


@uffd_case("creation-nobody", needs=("syscall", "user_mode_only", "cap_sys_ptrace"), rows=("CR-05", "CR-06"))
def test_creation_nobody() -> None:
    """With vm.unprivileged_userfaultfd=0 an ordinary user gets a handle with UFFD_USER_MODE_ONLY alone."""
    with unprivileged_userfaultfd(0):
        run_as(become_nobody, expect_unprivileged)


@uffd_case("creation-only-ptrace", needs=("syscall", "cap_sys_ptrace"), rows=("CR-01",))
def test_creation_only_ptrace() -> None:
    """With vm.unprivileged_userfaultfd=0 CAP_SYS_PTRACE is enough for a handle without UFFD_USER_MODE_ONLY."""
    with unprivileged_userfaultfd(0):
        run_as(lambda: drop_capability("cap_sys_admin"), lambda: create(0))


@uffd_case("creation-order", needs=("syscall", "user_mode_only"), rows=("CR-07",), kind=Kind.DETAIL)
def test_creation_order() -> None:
    """Without the privilege an unknown flag is EPERM, and EINVAL only with UFFD_USER_MODE_ONLY beside it."""

    def life() -> None:
        with promise("CR-07", "flags 0x2"), fails(EPERM):
            create(2)
        with promise("CR-07", "flags UFFD_USER_MODE_ONLY | 0x2"), fails(EINVAL):
            create(USER_MODE_ONLY | 2)

    with unprivileged_userfaultfd(0):
        run_as(without_cap_sys_ptrace, life)


def expect_sysctl_allows() -> None:
    """Assert what vm.unprivileged_userfaultfd=1 allows, and what not."""
    for flags in combinations(*FLAGS):
        with promise("CR-08", f"flags {flag_names(flags)}"), create(flags) as uffd:
            expect_handle(uffd, flags)
            with refuses(EPERM):
                uffd.api(Feature.EVENT_FORK)
            uffd.api()


@uffd_case("creation-sysctl", needs=("syscall",), rows=("CR-08",))
def test_creation_sysctl() -> None:
    """With vm.unprivileged_userfaultfd=1 everybody gets a handle, but not UFFD_FEATURE_EVENT_FORK with it."""
    with unprivileged_userfaultfd(1):
        run_as(without_cap_sys_ptrace, expect_sysctl_allows)


@uffd_case("creation-sysctl-nobody", needs=("syscall", "cap_sys_ptrace"), rows=("CR-08",))
def test_creation_sysctl_nobody() -> None:
    """With vm.unprivileged_userfaultfd=1 an ordinary user gets a handle that serves the kernel's faults."""
    with unprivileged_userfaultfd(1):
        run_as(become_nobody, expect_sysctl_allows)


@uffd_case("creation-sysctl-values", needs=("cap_sys_ptrace",), rows=("CR-09",), kind=Kind.DETAIL)
def test_creation_sysctl_values() -> None:
    """vm.unprivileged_userfaultfd is 0 or 1 and nothing else; all may read it, only root may write it."""
    setting = UNPRIVILEGED_USERFAULTFD
    expect(oct(setting.stat().st_mode), oct(0o100644), "CR-09: mode of vm.unprivileged_userfaultfd")
    with unprivileged_userfaultfd(1):
        for value in ("0", "1"):
            setting.write_text(value)
            expect(setting.read_text(), f"{value}\n", "CR-09: vm.unprivileged_userfaultfd")
            for bad in ("2", "-1", str(1 << 31), str(1 << 32), "x"):
                with promise("CR-09", f"{bad} written"), fails(EINVAL):
                    setting.write_text(bad)
                expect(setting.read_text(), f"{value}\n", f"CR-09: vm.unprivileged_userfaultfd after {bad}")


@uffd_case("creation-sysctl-others", needs=("cap_sys_ptrace",), rows=("CR-09",), kind=Kind.DETAIL)
def test_creation_sysctl_others() -> None:
    """An ordinary user can read vm.unprivileged_userfaultfd and not write it."""

    def life() -> None:
        expect(UNPRIVILEGED_USERFAULTFD.read_text(), "0\n", "CR-09: vm.unprivileged_userfaultfd")
        with promise("CR-09"), fails(EACCES):
            UNPRIVILEGED_USERFAULTFD.write_text("0")

    with unprivileged_userfaultfd(0):
        run_as(become_nobody, life)


@uffd_case("creation-user-namespace", needs=("syscall", "user_mode_only"), rows=("CR-10",))
def test_creation_user_namespace() -> None:
    """CAP_SYS_PTRACE in a user namespace of one's own counts neither for a handle nor for UFFD_FEATURE_EVENT_FORK."""

    def life() -> None:
        with promise("CR-10", "userfaultfd(0)"), fails(EPERM):
            create(0)
        with create(USER_MODE_ONLY) as uffd:
            with promise("CR-10", "UFFD_FEATURE_EVENT_FORK"), refuses(EPERM):
                uffd.api(Feature.EVENT_FORK)
            uffd.api()

    with unprivileged_userfaultfd(0):
        run_as(enter_user_namespace, life)


# ---- how many ------------------------------------------------------------------------------------------------------


@uffd_case("creation-emfile", needs=("syscall",), rows=("CR-11",))
def test_creation_emfile() -> None:
    """At RLIMIT_NOFILE userfaultfd(2) says EMFILE; when there is room again it gives a handle."""
    with out_of_descriptors(), promise("CR-11"):
        for flags in (USER_MODE_ONLY, DEFAULT_FLAGS):
            with fails(EMFILE):
                create(flags)
    with promise("CR-11", "with room again"), create(DEFAULT_FLAGS) as uffd:
        uffd.api()


@uffd_case("creation-emfile-order", needs=("syscall",), rows=("CR-11",), kind=Kind.DETAIL)
def test_creation_emfile_order() -> None:
    """An unknown flag is EINVAL even where there is no descriptor to be had."""
    with out_of_descriptors(), promise("CR-11"), fails(EINVAL):
        create(USER_MODE_ONLY | 2)


# ---- the file ------------------------------------------------------------------------------------------------------


@uffd_case("creation-exec", needs=("syscall",), rows=("CR-14",))
def test_creation_exec() -> None:
    """A handle with O_CLOEXEC is gone after execve(2); one without it is still open."""

    def life(channel: Channel) -> None:
        channel.send([create(USER_MODE_ONLY | flag).fd for flag in (os.O_CLOEXEC, 0)])
        channel.become_stdin()
        os.execlp("cat", "cat")

    with Child(life) as child:
        closed, kept = (f"/proc/{child.pid}/fd/{fd}" for fd in child.receive())
        child.wait_exec()
        with promise("CR-14"):
            expect(os.path.lexists(closed), False, "the handle with O_CLOEXEC is there after execve")
            expect(os.readlink(kept), "anon_inode:[userfaultfd]", "the handle without O_CLOEXEC after execve")
        child.kill()


@uffd_case("creation-write", needs=("syscall",), rows=("CR-01", "CR-15"), kind=Kind.DETAIL)
def test_creation_write() -> None:
    """A handle is open for reading only, and cannot be written."""
    for flags in (DEFAULT_FLAGS, USER_MODE_ONLY):
        with create(flags) as uffd:
            uffd.api()
            expect(fcntl.fcntl(uffd.fd, fcntl.F_GETFL) & os.O_ACCMODE, os.O_RDONLY, "CR-01, CR-15: access mode")
            with promise("CR-15"), fails(EBADF):
                os.write(uffd.fd, bytes(MESSAGE_SIZE))


@uffd_case("creation-no-file", needs=("syscall",), rows=("CR-16",), kind=Kind.DETAIL)
def test_creation_no_file() -> None:
    """A handle can be neither mapped, truncated, synced, spliced, nor read at a place; lseek(2) changes nothing."""
    end, other_end = os.pipe()
    with create(DEFAULT_FLAGS) as uffd:
        uffd.api()
        calls: dict[str, tuple[int, Callable[[], object]]] = {
            "mmap": (ENODEV, lambda: map_memory(PAGE_SIZE, prot=PROT_READ, flags=MAP_PRIVATE, fd=uffd.fd)),
            "ftruncate": (EINVAL, lambda: os.ftruncate(uffd.fd, 0)),
            "fsync": (EINVAL, lambda: os.fsync(uffd.fd)),
            "splice": (EINVAL, lambda: os.splice(uffd.fd, other_end, MESSAGE_SIZE)),
            "pread": (ESPIPE, lambda: os.pread(uffd.fd, MESSAGE_SIZE, 0)),
        }
        for name, (number, call) in calls.items():
            with promise("CR-16", name), fails(number):
                call()
        for whence in (os.SEEK_SET, os.SEEK_CUR, os.SEEK_END):
            with promise("CR-16", f"lseek, whence {whence}"):
                try:
                    expect(os.lseek(uffd.fd, PAGE_SIZE, whence), 0, "offset")
                except OSError as error:  # from old kernels
                    expect_errno(error, ESPIPE, "lseek")
    os.close(end)
    os.close(other_end)


def by_fcntl(uffd: Uffd, on: bool) -> None:
    """Set O_NONBLOCK or take it away, with F_SETFL."""
    fcntl.fcntl(uffd.fd, fcntl.F_SETFL, os.O_NONBLOCK if on else 0)


def by_ioctl(uffd: Uffd, on: bool) -> None:
    """Set O_NONBLOCK or take it away, with FIONBIO."""
    fcntl.ioctl(uffd.fd, termios.FIONBIO, ctypes.c_int(on))


@uffd_case("creation-nonblock", mem=(ANON,), pages=4, needs=("syscall",), rows=("CR-17",))
def test_creation_nonblock(ctx: Context) -> None:
    """O_NONBLOCK can be set and taken away later, through any duplicate, and holds for all of them."""
    pages = iter(range(4))
    with Uffd.open(flags=BLOCKING) as uffd, Uffd(os.dup(uffd.fd)) as duplicate:
        uffd.register(ctx.dst.range, MISSING)
        for how, change in {"F_SETFL": by_fcntl, "FIONBIO": by_ioctl}.items():
            for one, other in ((uffd, duplicate), (duplicate, uffd)):
                with promise("CR-17", f"{how} through {'the duplicate' if one is duplicate else 'the original'}"):
                    change(one, True)
                    for handle in (one, other):
                        with fails(EAGAIN):
                            os.read(handle.fd, MESSAGE_SIZE)
                    change(one, False)
                    expect_read_waits(other, ctx, next(pages))


def expect_read_waits(uffd: Uffd, ctx: Context, page: int) -> None:
    """Assert that a read sleeps until a page faults, which is filled then."""
    address = ctx.dst.page(page).start
    with Waiter(uffd.read) as reader:
        reader.expect_sleeping()
        with Waiter(lambda: peek(address)):
            expect(reader.result(), [Fault(address, PagefaultFlag(0))], "what the read returns")
            uffd.copy(address, ctx.src.start, ctx.page_size)


@uffd_case("creation-reopen", needs=("syscall",), rows=("CR-18",), kind=Kind.DETAIL)
def test_creation_reopen() -> None:
    """A handle cannot be opened anew through /proc/self/fd."""
    with create(DEFAULT_FLAGS) as uffd:
        for flags in (os.O_RDONLY, os.O_RDWR):
            with promise("CR-18"), fails(ENXIO):
                os.open(f"/proc/self/fd/{uffd.fd}", flags)


@uffd_case("creation-async", needs=("syscall",), rows=("CR-19",), kind=Kind.DETAIL)
def test_creation_async() -> None:
    """There is no SIGIO from a handle: F_SETFL passes over O_ASYNC, FIOASYNC is ENOTTY."""
    with create(DEFAULT_FLAGS) as uffd:
        uffd.api()
        fcntl.fcntl(uffd.fd, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        expect(flag_names(fcntl.fcntl(uffd.fd, fcntl.F_GETFL) & ~os.O_RDWR), "O_NONBLOCK", "CR-19: F_GETFL")
        with promise("CR-19", "FIOASYNC"), fails(ENOTTY):
            fcntl.ioctl(uffd.fd, termios.FIOASYNC, ctypes.c_int(1))


# ---- programs of 32 bits -------------------------------------------------------------------------------------------


@uffd_case("creation-ia32", needs=("syscall", "cap_sys_ptrace"), rows=("CR-20",), kind=Kind.DETAIL)
def test_creation_ia32() -> None:
    """A 32-bit program gets the same handles for the same flags."""
    with Ia32() as ia32:
        for flags in combinations(*FLAGS):
            with promise("CR-20", f"flags {flag_names(flags)}"), Uffd(ia32.call("userfaultfd", flags)) as uffd:
                expect_handle(uffd, flags)
        for flags in (2, 4, os.O_APPEND, 1 << 31, -1):
            with promise("CR-20", f"flags {flag_names(flags)}"), fails(EINVAL):
                ia32.call("userfaultfd", flags)


@uffd_case("creation-ia32-use", mem=(ANON,), pages=2, needs=("syscall",), rows=("CR-20",), kind=Kind.DETAIL)
def test_creation_ia32_use(ctx: Context) -> None:
    """A 32-bit program shakes hands, registers, reads messages and fills pages as a 64-bit one does."""
    ctx.src.fill()
    page = ctx.dst.page(1)
    with Uffd.create() as other:
        answer = other.api()
    with Ia32() as ia32, Uffd(ia32.call("userfaultfd", DEFAULT_FLAGS)) as uffd, promise("CR-20"):
        with fails(EINVAL):
            ia32.ioctl(uffd.fd, uapi.UFFDIO_API, uapi.uffdio_api(0xAB))
        reply = ia32.ioctl(uffd.fd, uapi.UFFDIO_API, uapi.uffdio_api(uapi.UFFD_API))
        expect(bytes(reply).hex(), bytes(answer).hex(), "the struct of UFFDIO_API")
        where = uapi.uffdio_range(ctx.dst.start, ctx.dst.range.len)
        registered = ia32.ioctl(uffd.fd, uapi.UFFDIO_REGISTER, uapi.uffdio_register(where, MISSING))
        expect(registered.ioctls, int(ctx.uffd.register(ctx.src.range, MISSING)), "ioctls of UFFDIO_REGISTER")
        ctx.uffd.unregister(ctx.src.range)
        with faulting(uffd, page.start, read=False):
            message = parse_message(ia32.read(uffd.fd, PAGE_SIZE))
            expect(message, Fault(page.start, PagefaultFlag(0)), "the message")
            copy = uapi.uffdio_copy(page.start, ctx.src.page(1).start, page.len)
            expect(ia32.ioctl(uffd.fd, uapi.UFFDIO_COPY, copy).copy, page.len, "copy of UFFDIO_COPY")
        ctx.dst.expect_pattern_of(ctx.src, 1, 1)
