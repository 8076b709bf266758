# SPDX-License-Identifier: GPL-2.0-only
"""/dev/userfaultfd: the other way to a handle, open to whoever may open the file."""

from __future__ import annotations

import os
import stat
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EACCES, EFAULT, EINVAL, EMFILE, EPERM
from functools import partial
from pathlib import Path

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, DEVICE, MISSING, UFFD_USER_MODE_ONLY, Context, Ia32, PagefaultFlag, Skip, Uffd, become_nobody, checked,
    combinations, expect, expect_handle, fails, faulting, flag_names, lib, out_of_descriptors, peek, promise, run_as,
    syscalls, uapi, undisturbed, unprivileged_userfaultfd, without_cap_sys_ptrace,
)  # fmt: skip

FLAGS = (os.O_CLOEXEC, os.O_NONBLOCK, UFFD_USER_MODE_ONLY)
NODE = "userfaultfd"


class Device:
    """The open device, in a ``with`` block."""

    def __init__(self, access: int = os.O_RDONLY, folder: int | None = None) -> None:
        self._access = access
        self._folder = folder

    def __enter__(self) -> Device:
        path = DEVICE if self._folder is None else NODE
        self.fd = os.open(path, self._access | os.O_CLOEXEC, dir_fd=self._folder)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def ioctl(self, request: int, argument: int) -> int:
        """Issue an ioctl on the device; returns its result."""
        return checked(lib.uffd_ioctl(self.fd, request, argument), f"ioctl({DEVICE}, {request:#x}, {argument:#x})")

    def new(self, flags: int) -> Uffd:
        """USERFAULTFD_IOC_NEW."""
        return Uffd(self.ioctl(uapi.USERFAULTFD_IOC_NEW, flags))


@contextmanager
def node(mode: int) -> Iterator[int]:
    """Make another file of the device, owned by root, and yield the descriptor of its folder, which is its own."""
    try:
        folder = syscalls.mount_nowhere("tmpfs")
        os.mknod(NODE, stat.S_IFCHR | 0o600, os.stat(DEVICE).st_rdev, dir_fd=folder)
    except OSError as error:
        raise Skip(f"no device can be made: {error}: run as root, outside of a container") from None
    os.chmod(NODE, mode, dir_fd=folder)
    try:
        yield folder
    finally:
        os.close(folder)


# ---- the file ------------------------------------------------------------------------------------------------------


@uffd_case("device-node", needs=("device",), rows=("DEV-01",))
def test_device_node() -> None:
    """/dev/userfaultfd is a character device of the kind misc, with the number that /proc/misc gives it."""
    facts = os.stat(DEVICE)
    expect(stat.S_ISCHR(facts.st_mode), True, "DEV-01: a character device")
    expect(os.major(facts.st_rdev), 10, "DEV-01: major number")
    numbers = {name: int(number) for number, name in map(str.split, Path("/proc/misc").read_text().splitlines())}
    expect(os.minor(facts.st_rdev), numbers.get("userfaultfd"), "DEV-01: minor number")


@uffd_case("device-default-mode", needs=("device",), rows=("DEV-01",))
def test_device_default_mode() -> None:
    """The kernel makes /dev/userfaultfd with its own default, mode 0600 of root, and asks for nothing else."""
    try:
        facts = Path("/sys/class/misc/userfaultfd/uevent").read_text()
    except OSError as error:
        raise Skip(f"{error}: mount sysfs") from None
    expect([line for line in facts.splitlines() if line.startswith(("DEVMODE", "DEVUID", "DEVGID"))], [], "DEV-01")


def expect_permissions(folder: int, allowed: tuple[int, ...]) -> None:
    """Assert with which access an ordinary user can open the device, and that he gets handles from it."""
    for access in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        with promise("DEV-01", f"access mode {access}"):
            if access in allowed:
                with Device(access, folder) as device, device.new(0) as uffd:
                    uffd.api()
            else:
                with fails(EACCES), Device(access, folder):
                    pass


@uffd_case("device-permissions", needs=("device", "cap_sys_admin"), rows=("DEV-01",))
def test_device_permissions() -> None:
    """Whoever has the permission to open the file gets a handle, and nobody else."""
    everything = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
    for mode, allowed in {0o660: (), 0o604: (os.O_RDONLY,), 0o602: (os.O_WRONLY,), 0o606: everything}.items():
        with promise("DEV-01", f"mode {mode:o}"), unprivileged_userfaultfd(0), node(mode) as folder:
            run_as(become_nobody, partial(expect_permissions, folder, allowed))


# ---- the handle ----------------------------------------------------------------------------------------------------


@uffd_case("device-flags", needs=("device",), rows=("DEV-02",))
def test_device_flags() -> None:
    """USERFAULTFD_IOC_NEW takes the flags of userfaultfd(2) in every combination, however the device is open."""
    for access in (os.O_RDONLY, os.O_RDWR):
        with Device(access) as device:
            for flags in combinations(*FLAGS):
                with promise("DEV-02", f"flags {flag_names(flags)}, access mode {access}"), device.new(flags) as uffd:
                    expect_handle(uffd, flags)


@uffd_case("device-handle", mem=ALL, pages=2, needs=("device", "syscall"), rows=("DEV-02",))
def test_device_handle(ctx: Context) -> None:
    """A handle from the device is one as from userfaultfd(2): the same handshake, registration and faults."""
    ctx.src.fill()
    flags = os.O_NONBLOCK | UFFD_USER_MODE_ONLY
    page = ctx.dst.page(1)
    with Device() as device, device.new(flags) as uffd, Uffd.create(flags, via="syscall") as other:
        expect(bytes(uffd.api()).hex(), bytes(other.api()).hex(), "DEV-02: the struct of UFFDIO_API")
        expect(uffd.fdinfo, other.fdinfo, "DEV-02: fdinfo")
        expect(uffd.register(ctx.dst.page(0), MISSING), other.register(page, MISSING), "DEV-02: ioctls")
        other.unregister(page)
        uffd.register(ctx.dst.range, MISSING)
        with promise("DEV-02"), faulting(uffd, page.start):
            uffd.copy(page.start, ctx.src.page(1).start, page.len)
        ctx.dst.expect_pattern_of(ctx.src, 1, 1)


@uffd_case("device-user-mode-only", mem=(ANON,), pages=1, needs=("device",), rows=("DEV-02",))
def test_device_user_mode_only(ctx: Context) -> None:
    """A handle from the device with UFFD_USER_MODE_ONLY is told of no fault met in the kernel: the call fails."""
    with Device() as device, device.new(os.O_NONBLOCK | UFFD_USER_MODE_ONLY) as uffd, open("/dev/zero", "rb") as zero:
        uffd.api()
        uffd.register(ctx.dst.range, MISSING)
        with promise("DEV-02"), fails(EFAULT):
            undisturbed(uffd, partial(syscalls.read_into, zero.fileno(), ctx.dst.start, 1))


@uffd_case("device-outlived", needs=("device",), rows=("DEV-02",))
def test_device_outlived() -> None:
    """A handle lives on when the device it came from is closed, and each one is a handle of its own."""
    with Device() as device:
        handles = [device.new(UFFD_USER_MODE_ONLY | os.O_CLOEXEC) for _ in range(3)]
    for uffd in handles:
        with promise("DEV-02"):
            uffd.api()
        uffd.close()


def serve_the_kernel(ctx: Context, folder: int | None = None) -> None:
    """Assert that userfaultfd(2) refuses a handle, and that one from the device serves a fault met in the kernel."""
    with fails(EPERM):
        Uffd.create(0, via="syscall")
    end, other_end = os.pipe()
    os.write(other_end, b"x")
    with promise("DEV-03"), Device(folder=folder) as device, device.new(os.O_CLOEXEC | os.O_NONBLOCK) as uffd:
        uffd.api()
        uffd.register(ctx.dst.range, MISSING)
        start = ctx.dst.start
        with faulting(uffd, start, flags=PagefaultFlag.WRITE, call=lambda: syscalls.read_into(end, start, 1)):
            uffd.copy(start, ctx.src.start, ctx.page_size)
        expect(peek(start), b"x", "the byte that read(2) brought")


@uffd_case("device-unprivileged", mem=(ANON,), pages=1, needs=("device", "syscall"), rows=("DEV-03",))
def test_device_unprivileged(ctx: Context) -> None:
    """The device gives a handle for the kernel's faults too, without CAP_SYS_PTRACE and whatever the sysctl says."""
    with unprivileged_userfaultfd(0):
        run_as(without_cap_sys_ptrace, partial(serve_the_kernel, ctx))


@uffd_case("device-nobody", mem=(ANON,), pages=1, needs=("device", "syscall", "cap_sys_admin"), rows=("DEV-03",))
def test_device_nobody(ctx: Context) -> None:
    """An ordinary user who can open the device gets a handle for the kernel's faults, whatever the sysctl says."""
    with unprivileged_userfaultfd(0), node(0o666) as folder:
        run_as(become_nobody, partial(serve_the_kernel, ctx, folder))


# ---- what is refused -----------------------------------------------------------------------------------------------


@uffd_case("device-unknown-flags", needs=("device",), rows=("DEV-04",), kind=Kind.DETAIL)
def test_device_unknown_flags() -> None:
    """USERFAULTFD_IOC_NEW refuses every other flag, alone or with good ones, and uses up no descriptor."""
    known = sum(FLAGS)
    unknown = [1 << bit for bit in range(32) if not known >> bit & 1]
    with Device() as device:
        before = os.listdir("/proc/self/fd")
        for flags in [*unknown, *(flag | known for flag in unknown), 0xFFFF_FFFF, (1 << 64) - 1]:
            with promise("DEV-04", f"flags {flag_names(flags)}"), fails(EINVAL):
                device.new(flags)
        expect(os.listdir("/proc/self/fd"), before, "DEV-04: open descriptors")


@uffd_case("device-high-bits", needs=("device",), rows=("DEV-05",), kind=Kind.DETAIL)
def test_device_high_bits() -> None:
    """USERFAULTFD_IOC_NEW looks at the low 32 bits of its argument alone."""
    with Device() as device:
        for flags in (0, sum(FLAGS)):
            for bit in range(32, 64):
                with promise("DEV-05", f"flags {flag_names(flags | 1 << bit)}"), device.new(flags | 1 << bit) as uffd:
                    expect_handle(uffd, flags)


@uffd_case("device-other-calls", needs=("device",), rows=("DEV-06",), kind=Kind.DETAIL)
def test_device_other_calls() -> None:
    """The device knows no other ioctl, can be neither read nor written, and has no places to seek."""
    new = uapi.USERFAULTFD_IOC_NEW
    others = {*uapi.IOCTL_NAMES, new + 1, new ^ 0x100, new | 1 << 16, new | 1 << 30, termios.FIONREAD, 0} - {new}
    with Device(os.O_RDWR) as device:
        for request in others:
            with promise("DEV-06", f"ioctl {request:#x}"), fails(EINVAL):
                device.ioctl(request, 0)
        with promise("DEV-06", "read"), fails(EINVAL):
            os.read(device.fd, 32)
        with promise("DEV-06", "write"), fails(EINVAL):
            os.write(device.fd, bytes(32))
        expect(os.lseek(device.fd, 1, os.SEEK_SET), 0, "DEV-06: lseek")


@uffd_case("device-emfile", needs=("device",), rows=("CR-11", "DEV-02"))
def test_device_emfile() -> None:
    """At RLIMIT_NOFILE USERFAULTFD_IOC_NEW says EMFILE; when there is room again it gives a handle."""
    with Device() as device:
        with out_of_descriptors(), promise("CR-11, DEV-02"), fails(EMFILE):
            device.new(UFFD_USER_MODE_ONLY)
        with promise("CR-11, DEV-02", "with room again"), device.new(UFFD_USER_MODE_ONLY) as uffd:
            uffd.api()


@uffd_case("device-ia32", needs=("device",), rows=("CR-20",), kind=Kind.DETAIL)
def test_device_ia32() -> None:
    """A 32-bit program gets the same handles from the device."""
    with Ia32() as ia32, Device() as device:
        for flags in combinations(*FLAGS):
            with (
                promise("CR-20", f"flags {flag_names(flags)}"),
                Uffd(ia32.call("ioctl", device.fd, uapi.USERFAULTFD_IOC_NEW, flags)) as uffd,
            ):
                expect_handle(uffd, flags)
                uffd.api()
        for request, flags in ((uapi.USERFAULTFD_IOC_NEW, 2), (uapi.UFFDIO_API, 0)):
            with promise("CR-20", f"ioctl {request:#x}, argument {flags}"), fails(EINVAL):
                ia32.call("ioctl", device.fd, request, flags)
