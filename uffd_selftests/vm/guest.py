# SPDX-License-Identifier: GPL-2.0-only
"""Inside the virtual machine: give the suite what the kernel has, then run it.

Nothing is put back, for the machine ends with the run. For what cannot be had the suite skips, and says why.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import time
from pathlib import Path

from uffd_selftests.machine.hugepages import HUGEPAGES, hugepage_sizes
from uffd_selftests.mem_types import default_hugepage_size

DEBUGFS = Path("/sys/kernel/debug")
CGROUPS = Path("/sys/fs/cgroup")
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SWAP_BYTES = 512 << 20
POOL_BYTES = 32 << 20
"""Up to this size, huge pages that are not of the default size are had, four of each."""
DEVICE_SECONDS = 5.0
"""How long a device may take to appear behind its module."""


def prepare() -> None:
    """Mount debugfs and cgroups, allow transparent huge pages where they are asked for, add huge pages and swap."""
    if DEBUGFS.is_dir() and not DEBUGFS.is_mount():
        _run("mount", "-t", "debugfs", "none", str(DEBUGFS))
    if CGROUPS.is_dir() and not CGROUPS.is_mount():
        _run("mount", "-t", "cgroup2", "none", str(CGROUPS))
    with contextlib.suppress(OSError):
        if "[never]" in THP.read_text():
            THP.write_text("madvise")
    _grow_pools()
    if len(Path("/proc/swaps").read_text().splitlines()) == 1 and (device := _zram() or _loop()):
        _run("mkswap", device)
        _run("swapon", device)


def _grow_pools() -> None:
    """Have some huge pages of each size that takes little memory; to those of the default size the suite sees."""
    for size in hugepage_sizes():
        if size != default_hugepage_size() and size <= POOL_BYTES:
            with contextlib.suppress(OSError):
                (HUGEPAGES / f"hugepages-{size >> 10}kB/nr_hugepages").write_text("4")


def _zram() -> str:
    """Return a compressed RAM disk, or nothing if the kernel has none."""
    size = Path("/sys/block/zram0/disksize")
    if not size.exists():
        _run("modprobe", "zram", "num_devices=1")
    with contextlib.suppress(OSError):
        size.write_text(str(SWAP_BYTES))
        return _there("/dev/zram0")
    return ""


def _loop() -> str:
    """Return a loop device on a file in memory, or nothing if the kernel has no such device."""
    _run("modprobe", "loop")
    file = Path("/dev/shm/uffd-swap")
    with contextlib.suppress(OSError), file.open("wb") as swap:
        os.posix_fallocate(swap.fileno(), 0, SWAP_BYTES // 4)
        return _run("losetup", "--find", "--show", str(file))
    return ""


def _there(device: str) -> str:
    """Wait for a device file and return its name, or nothing."""
    until = time.monotonic() + DEVICE_SECONDS
    while not os.path.exists(device):
        if time.monotonic() > until:
            return ""
        time.sleep(0.05)
    return device


def _run(*command: str) -> str:
    """Run a program and return what it says; nothing if it fails or is not there."""
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(
            command, env={**os.environ, "PATH": path}, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
        ).strip()
    return ""


if __name__ == "__main__":
    prepare()
    runpy.run_module("uffd_selftests", run_name="__main__", alter_sys=True)
