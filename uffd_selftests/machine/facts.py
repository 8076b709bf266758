# SPDX-License-Identifier: GPL-2.0-only
"""What the running kernel offers, as one probe finds it; nothing is changed for it.

A reason is a sentence that says why something is missing and what to do; None means that nothing is missing.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import resource
from collections.abc import Callable
from ctypes import sizeof
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uffd_selftests.abi.uapi import PAGEMAP_SCAN, Feature, pm_scan_arg
from uffd_selftests.machine import doors
from uffd_selftests.machine.debugfs import DEBUGFS, open_debugfs
from uffd_selftests.machine.doors import WAYS
from uffd_selftests.machine.hugepages import hugepage_sizes

MEMINFO = "/proc/meminfo"
PAGEMAP = "/proc/self/pagemap"
KMSG = "/dev/kmsg"
THP = Path("/sys/kernel/mm/transparent_hugepage")
AS_ROOT = "run as root"

# include/uapi/linux/capability.h, in the order of the bits.
CAPABILITIES = (
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
)

# The first user namespace's inode number, PROC_USER_INIT_INO of include/linux/proc_ns.h.
INITIAL_USER_NAMESPACE = "user:[4026531837]"


@dataclass(frozen=True)
class Facts:
    """What one probe found: plain data, the same for every process of a run."""

    release: str
    """uname -r."""
    version: str
    """uname -v."""
    machine: str
    """uname -m."""
    cpus: int
    """Processors that this process may use."""
    memory: int
    """RAM in bytes."""
    page_size: int
    """Bytes."""
    hugepage_size: int
    """Default huge page size in bytes, 0 when the kernel has none."""
    hugepage_sizes: tuple[int, ...]
    """All huge page sizes in bytes."""
    pmd_size: int
    """Bytes of a transparent huge page (hpage_pmd_size), 0 without THP."""
    thp: dict[str, str]
    """The setting in force of enabled, defrag and shmem_enabled in /sys/kernel/mm/transparent_hugepage."""
    thp_disabled: bool
    """This process got PR_SET_THP_DISABLE from a parent."""
    swap_total: int
    """Bytes of swap space."""
    features: Feature
    """What UFFDIO_API offers on a fresh descriptor; Feature(0) when no userfaultfd can be had."""
    access: dict[str, str | None]
    """Ways to a userfaultfd (syscall, device, syscall-user-mode-only): None when it works, else the errno's name, or
    that of the signal that a seccomp filter sends."""
    handshake: str | None
    """None when a descriptor serves, else what is refused on it, and how: ``UFFDIO_API: EACCES``."""
    built_in: bool | None
    """Whether the kernel was built with userfaultfd(2); None when that cannot be told."""
    event_fork: str | None
    """None when UFFDIO_API enables UFFD_FEATURE_EVENT_FORK, else the errno's name."""
    unprivileged_userfaultfd: int | None
    """sysctl vm.unprivileged_userfaultfd; None when there is no such setting."""
    device_mode: int | None
    """Permission bits of /dev/userfaultfd; None when it is not there."""
    euid: int
    """Effective user ID."""
    capabilities: tuple[str, ...]
    """Effective capabilities (CAP_SYS_PTRACE)."""
    user_namespace: bool
    """In a user namespace of its own, whose capabilities do not count for most of what the kernel protects."""
    seccomp: int
    """Seccomp mode of this process: 0 none, 1 strict, 2 filter."""
    security_modules: tuple[str, ...]
    """The Linux security modules in force."""
    security_context: str
    """What SELinux's policy takes this process for (its type), or another module's name for it."""
    sandbox: str
    """What stands in for a Linux kernel (gVisor); empty when nothing does."""
    memlock: int
    """Soft RLIMIT_MEMLOCK in bytes, -1 when there is no limit."""
    pagemap: str | None
    """Reason why /proc/self/pagemap cannot be read."""
    pagemap_scan: str | None
    """Reason why PAGEMAP_SCAN does not work."""
    gup_test: str | None
    """Reason why gup_test in debugfs cannot be opened."""
    kmsg: str | None
    """Reason why the kernel log cannot be read."""
    kvm: dict[str, str | None] | None = None
    """What probe_kvm() of machine/kvm.py says; None until a case wants a virtual processor."""

    def to_dict(self) -> dict[str, object]:
        """Return plain data, fit for JSON and xdist, from which from_dict makes the same facts again."""
        return {
            **dataclasses.asdict(self),
            "hugepage_sizes": list(self.hugepage_sizes),
            "capabilities": list(self.capabilities),
            "security_modules": list(self.security_modules),
            "features": int(self.features),
            "feature_names": list(self.features.names),  # for whoever reads it
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Facts:
        """Return the facts that to_dict made plain."""
        values = {field.name: plain[field.name] for field in dataclasses.fields(cls)}
        values["hugepage_sizes"] = tuple(values["hugepage_sizes"])
        values["capabilities"] = tuple(values["capabilities"])
        values["security_modules"] = tuple(values["security_modules"])
        values["features"] = Feature(values["features"])
        return cls(**values)


def probe() -> Facts:
    """Look at the kernel and at what this process may do. Takes a millisecond or two and never fails."""
    uname = os.uname()
    meminfo = _fields(MEMINFO)
    status = _fields("/proc/self/status")
    refused = {way: doors.refusal(way) for way in WAYS}
    access = {way: None if not found or found[0] else found[1] for way, found in refused.items()}
    way = next((way for way in WAYS if access[way] is None), None)
    handshake = ": ".join(refused[way] or ()) if way else ""
    usable = way if not handshake else None
    return Facts(
        release=uname.release,
        version=uname.version,
        machine=uname.machine,
        cpus=len(os.sched_getaffinity(0)),
        memory=_bytes(meminfo, "MemTotal"),
        page_size=os.sysconf("SC_PAGE_SIZE"),
        hugepage_size=_bytes(meminfo, "Hugepagesize"),
        hugepage_sizes=hugepage_sizes(),
        pmd_size=_number(_read(THP / "hpage_pmd_size")) or 0,
        thp={name: _chosen(_read(THP / name)) for name in ("enabled", "defrag", "shmem_enabled")},
        thp_disabled=status.get("THP_enabled") == "0",
        swap_total=_bytes(meminfo, "SwapTotal"),
        features=_offered(usable, Feature(0)) if usable else Feature(0),
        access=access,
        handshake=handshake or None,
        built_in=True if way else doors.built_in(),
        event_fork=_errno_of(lambda: _offered(usable, Feature.EVENT_FORK)) if usable else access["syscall"],
        unprivileged_userfaultfd=_number(_read("/proc/sys/vm/unprivileged_userfaultfd")),
        device_mode=_device_mode(),
        euid=os.geteuid(),
        capabilities=_capability_names(int(status.get("CapEff", "0"), 16)),
        user_namespace=_in_user_namespace(),
        seccomp=_number(status.get("Seccomp", "")) or 0,
        security_modules=doors.security_modules(),
        security_context=doors.security_context(),
        sandbox=doors.sandbox(),
        memlock=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        pagemap=_pagemap_reason(),
        pagemap_scan=_pagemap_scan_reason(),
        gup_test=_gup_test_reason(),
        kmsg=_kmsg_reason(),
    )


def _offered(way: str, features: Feature) -> Feature:
    """Enable features on a descriptor of one's own, and return what is offered."""
    uffd = doors.open_userfaultfd(way)
    try:
        return doors.shake_hands(uffd, features)
    finally:
        os.close(uffd)


def as_root() -> str:
    """Say what helps whom the kernel refuses what root may."""
    if os.geteuid():
        return AS_ROOT
    if locked := doors.lockdown():
        return f"the kernel is locked down ({locked}), for root too: boot it without lockdown= and Secure Boot"
    return "root of a container may not: run outside of it"


def _pagemap_reason() -> str | None:
    name = _errno_of(lambda: os.close(os.open(PAGEMAP, os.O_RDONLY)))
    return f"{PAGEMAP}: {name}: boot a kernel with CONFIG_PROC_PAGE_MONITOR" if name else None


def _pagemap_scan_reason() -> str | None:
    def scan_nothing() -> None:
        with open(PAGEMAP, "rb", buffering=0) as pagemap:
            fcntl.ioctl(pagemap, PAGEMAP_SCAN, pm_scan_arg(size=sizeof(pm_scan_arg)))

    name = _errno_of(scan_nothing)
    return f"PAGEMAP_SCAN: {name} (Linux 6.7)" if name else None


def _gup_test_reason() -> str | None:
    name = _errno_of(lambda: os.close(open_debugfs("gup_test", os.O_RDWR)))
    if name in ("EACCES", "EPERM"):
        return f"{DEBUGFS}/gup_test: {name}: {as_root()}"
    return f"CONFIG_GUP_TEST: {DEBUGFS}/gup_test: {name}" if name else None


def _kmsg_reason() -> str | None:
    name = _errno_of(lambda: os.close(os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK)))
    return f"{KMSG}: {name}" + (f": {as_root()}" if name in ("EACCES", "EPERM") else "") if name else None


def _device_mode() -> int | None:
    try:
        return os.stat(doors.DEVICE).st_mode & 0o7777
    except OSError:
        return None


def _in_user_namespace() -> bool:
    try:
        return os.readlink("/proc/self/ns/user") != INITIAL_USER_NAMESPACE
    except OSError:  # no /proc, or a kernel without user namespaces
        return False


def _capability_names(mask: int) -> tuple[str, ...]:
    known = dict(enumerate(CAPABILITIES))
    return tuple(f"CAP_{known.get(bit, bit)}" for bit in range(mask.bit_length()) if mask >> bit & 1)


def _errno_of(attempt: Callable[[], object]) -> str | None:
    """Return the name of the errno with which an attempt fails, None when it succeeds."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))
    return None


def _read(path: Path | str) -> str:
    """Return what a small file says, without the line's end; nothing when it cannot be read."""
    try:
        return Path(path).read_text().rstrip("\n")
    except OSError:
        return ""


def _fields(path: str) -> dict[str, str]:
    """Return the ``Name: value`` lines of a file of /proc."""
    lines = (line.partition(":") for line in _read(path).splitlines())
    return {name: value.strip() for name, _, value in lines}


def _bytes(meminfo: dict[str, str], name: str) -> int:
    return int(meminfo.get(name, "0 kB").split()[0]) * 1024


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _chosen(text: str) -> str:
    """Return the setting in brackets: ``always [madvise] never``."""
    return text.partition("[")[2].partition("]")[0]
