# SPDX-License-Identifier: GPL-2.0-only
"""The first process of a guest: gives the suite what the kernel has, then is the parent of the launcher.

Nothing is put back, for the machine ends with it. For what cannot be had the suite skips, and says why. It runs without
any other program.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from uffd_selftests.abi.errors import KernelError
from uffd_selftests.abi.syscalls import number
from uffd_selftests.machine.hugepages import HUGEPAGES, hugepage_sizes
from uffd_selftests.machine.swap import swap_files
from uffd_selftests.machine.swapfile import make_swap, swap_on
from uffd_selftests.machine.system import OWN_MACHINE

MOUNTS = (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"))
OPTIONAL_MOUNTS = (
    *(("tmpfs", "/dev/shm"), ("tmpfs", "/tmp"), ("tmpfs", "/run"), ("devpts", "/dev/pts")),
    *(("debugfs", "/sys/kernel/debug"), ("cgroup2", "/sys/fs/cgroup")),
)
CGROUP_V1 = "uffd_cgroup_v1"
"""On the kernel's command line: mount cgroups of version 1, as far as the kernel has them."""
CONTROLLERS = ("memory", "hugetlb")
MODULES = Path("/modules")

PORT = "uffd-selftests"
"""The name of the port that leads to the host."""
PORTS = Path("/sys/class/virtio-ports")
DEVICES = Path("/dev")
PORT_SECONDS = 30.0
"""How long the port may take to appear, and the host to open its end."""
POLL_SECONDS = 0.01

LOG = Path("/proc/sys/kernel/printk_devkmsg")
"""Else the kernel drops most of what the suite notes in its log."""
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
POOL_BYTES = 32 << 20
"""Up to this size, huge pages that are not of the default size are had, four of each."""
SWAP_BYTES = 512 << 20
ZRAM_SIZE = Path("/sys/block/zram0/disksize")

NO_MATTER = (errno.EEXIST, errno.ENODEV, errno.ENOENT)
"""A module is there already, or finds no device, or misses what it would need for one."""
LOOP_CTL_GET_FREE = 0x4C82
LOOP_SET_FD = 0x4C00
RB_POWER_OFF = 0x4321FEDC

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Prepare the machine, run the launcher to its end, and switch the machine off."""
    try:
        prepare()
        serve(open_port())
    except OSError as error:
        say(str(error))
    except BaseException:  # whatever it is: a machine whose first process dies only panics
        traceback.print_exc()
    finally:
        power_off()


def serve(port: int) -> None:
    """Have a child that is the launcher, and take leave of all processes that end until it does."""
    launcher = os.fork()
    if not launcher:
        try:
            _launch(port)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(port)  # so that its end is seen outside
    pid = status = 0
    while pid != launcher:
        pid, status = os.wait()
    if status:
        say(f"the launcher ended with {os.waitstatus_to_exitcode(status)}")


def _launch(port: int) -> NoReturn:
    """Be the launcher."""
    from uffd_selftests.harness import channel, launcher  # noqa: PLC0415  # when the machine is ready for it
    from uffd_selftests.vm.jobs import GuestJobs  # noqa: PLC0415  # likewise

    launcher.serve(channel.Channel(port, port), GuestJobs(), [], parent=1)


# ---- what the machine is given ---------------------------------------------------------------------------------------


def prepare() -> None:
    """Mount what there is, load the kernel's modules, allow transparent huge pages, add huge pages and swap.

    Raises OSError when there is no /proc, /sys or /dev.
    """
    os.environ["PATH"] = "/usr/bin:/bin:/usr/sbin:/sbin"
    os.environ["PYTHONPATH"] = sys.path[0]  # for programs of the suite's own
    os.environ[OWN_MACHINE] = "1"
    for kind, place in MOUNTS:
        mount(kind, place)
    old = CGROUP_V1 in Path("/proc/cmdline").read_text().split()
    for kind, place in OPTIONAL_MOUNTS:
        if old and kind == "cgroup2":
            _mount_old_cgroups(place)
            continue
        if __file__.startswith(f"{place}/"):  # the suite lies where it does on the host, and would be hidden
            continue
        with contextlib.suppress(OSError):
            Path(place).mkdir(exist_ok=True)
            mount(kind, place)
    load_modules(MODULES)
    with contextlib.suppress(OSError):
        LOG.write_text("on")
    with contextlib.suppress(OSError):
        if "[never]" in THP.read_text():
            THP.write_text("madvise")
    _grow_pools()
    with contextlib.suppress(OSError):
        if not swap_files() and (device := _zram() or _loop()):
            make_swap(device)
            swap_on(device)


def mount(kind: str, place: str, options: str | None = None) -> None:
    """Mount a file system that has no device; raises KernelError, but not when one is there already."""
    data = options.encode() if options else None
    if not os.path.ismount(place) and _libc.mount(b"none", place.encode(), kind.encode(), 0, data):
        raise KernelError(ctypes.get_errno(), f"mount({kind}, {place})")


def _mount_old_cgroups(place: str) -> None:
    with contextlib.suppress(OSError):
        mount("tmpfs", place)
    for controller in CONTROLLERS:
        with contextlib.suppress(OSError):
            folder = f"{place}/{controller}"
            Path(folder).mkdir(exist_ok=True)
            mount("cgroup", folder, controller)


def load_modules(folder: Path) -> None:
    """Load the kernel's modules in a folder, in the order of their names, and remove them; says what went wrong."""
    for path in sorted(folder.glob("*.ko")):
        with path.open("rb") as file:
            if _libc.syscall(number("finit_module"), file.fileno(), b"", 0) and ctypes.get_errno() not in NO_MATTER:
                say(f"{path.name}: {os.strerror(ctypes.get_errno())}")
        path.unlink()  # it is in the kernel now, and a file takes memory


def _grow_pools() -> None:
    """Have some huge pages of each size that takes little memory; to those of the default size the suite sees."""
    from uffd_selftests.mem_types import default_hugepage_size  # noqa: PLC0415  # which reads /proc

    for size in hugepage_sizes():
        if size != default_hugepage_size() and size <= POOL_BYTES:
            with contextlib.suppress(OSError):
                (HUGEPAGES / f"hugepages-{size >> 10}kB/nr_hugepages").write_text("4")


def _zram() -> str:
    """Return a compressed RAM disk, or nothing if the kernel has none."""
    with contextlib.suppress(OSError):
        ZRAM_SIZE.write_text(str(SWAP_BYTES))
        return "/dev/zram0"
    return ""


def _loop() -> str:
    """Return a loop device on a file in memory, or nothing if the kernel has no such device."""
    with contextlib.suppress(OSError), open("/dev/shm/uffd-swap", "wb+") as file, open("/dev/loop-control") as control:
        os.posix_fallocate(file.fileno(), 0, SWAP_BYTES // 4)
        device = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
        with open(device, "rb+") as loop:
            fcntl.ioctl(loop, LOOP_SET_FD, file.fileno())
        return device
    return ""


# ---- the way to the host, and the end --------------------------------------------------------------------------------


def open_port() -> int:
    """Return a descriptor of the port, once the host has opened the other end; raises TimeoutError."""
    until = time.monotonic() + PORT_SECONDS
    while not (name := _port()):
        if time.monotonic() > until:
            raise TimeoutError(f"no port {PORT} in {PORTS}: CONFIG_VIRTIO_PCI, CONFIG_VIRTIO_CONSOLE")
        time.sleep(POLL_SECONDS)
    port = os.open(DEVICES / name, os.O_RDWR | os.O_CLOEXEC)
    poller = select.poll()
    poller.register(port, 0)
    while poller.poll(0):  # POLLHUP: who reads now is told of an end
        if time.monotonic() > until:
            raise TimeoutError(f"the host does not open the port {PORT}")
        time.sleep(POLL_SECONDS)
    return port


def _port() -> str:
    """Return the name of the port's device file, or nothing."""
    for path in PORTS.glob("*/name"):
        with contextlib.suppress(OSError):
            if path.read_text().strip() == PORT:
                return path.parent.name
    return ""


def power_off() -> NoReturn:
    """Switch the machine off."""
    sys.stdout.flush()
    sys.stderr.flush()
    _libc.reboot(ctypes.c_int(RB_POWER_OFF))
    os._exit(1)


def say(text: str) -> None:
    """Say something on the console."""
    print(f"uffd-selftests: {text}", file=sys.stderr, flush=True)
