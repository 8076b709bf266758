# SPDX-License-Identifier: GPL-2.0-only
"""The kernel options that the suite can use, and which of them the running kernel lacks."""

from __future__ import annotations

import errno
import gzip
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.uapi import Feature
from uffd_selftests.machine.facts import Facts

PLACES = (
    "/proc/config.gz",
    "/boot/config-{release}",
    "/lib/modules/{release}/config",
    "/lib/modules/{release}/build/.config",
)
"""Where a running kernel's configuration is, with CONFIG_IKCONFIG_PROC or in distributions."""

SETTING = re.compile(r"^CONFIG_([A-Z0-9_]+)=(.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Option:
    """One line of the fragment."""

    name: str
    """Without CONFIG_."""
    value: str
    purpose: str
    """The comment above it: what needs it."""


@dataclass(frozen=True)
class Configuration:
    """What is known of how the running kernel was configured."""

    source: str | None
    """The file that says so; None when there is none, and each option was looked for by its effects."""
    lacking: tuple[Option, ...]
    unknown: tuple[Option, ...]
    """Options that leave no trace which could be looked for."""


def fragment() -> list[Option]:
    """Return what vm/kernel.config asks for."""
    text = (resources.files("uffd_selftests") / "vm" / "kernel.config").read_text()
    return list(_options(text))


def _options(text: str) -> Iterator[Option]:
    purpose = ""
    for line in text.splitlines():
        if line.startswith("#"):
            purpose = line.lstrip("# ")
        elif setting := SETTING.match(line):
            yield Option(setting[1], setting[2], purpose)


def examine(facts: Facts) -> Configuration:
    """Compare the running kernel with the fragment."""
    source, values = _running(facts.release)
    wanted = [option for option in fragment() if option.name != "IA32_EMULATION" or facts.machine == "x86_64"]
    if source:
        lacking = tuple(option for option in wanted if values.get(option.name) not in ("y", "m"))
        return Configuration(source, lacking, ())
    traces = {option: _trace(option.name, facts) for option in wanted}
    return Configuration(
        None,
        tuple(option for option in wanted if traces[option] is False),
        tuple(option for option in wanted if traces[option] is None),
    )


def _running(release: str) -> tuple[str | None, dict[str, str]]:
    """Return the file with the running kernel's configuration, and what it says."""
    for place in PLACES:
        path = Path(place.format(release=release))
        try:
            raw = path.read_bytes()
            text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode(errors="replace")
        except OSError:
            continue
        if values := dict(SETTING.findall(text)):
            return str(path), values
    return None, {}


# ---- without a file -------------------------------------------------------------------------------------------------


def _trace(name: str, facts: Facts) -> bool | None:
    """Return whether an option's effects are there; None when nothing tells."""
    if name in PATHS:
        return os.path.exists(PATHS[name])
    return TRACES[name](facts) if name in TRACES else None


def _gup_test(facts: Facts) -> bool | None:
    if facts.gup_test and "ENOENT" not in facts.gup_test:
        return None  # may not look
    return facts.gup_test is None


def _has_system_call(name: str, _facts: Facts) -> bool:
    try:
        syscalls.call(name, (1 << 31) - 1)  # nonsense: whoever knows the call refuses it
    except OSError as error:
        return error.errno != errno.ENOSYS
    return True


def _in_file(path: str, word: str, _facts: Facts) -> bool | None:
    try:
        return word in Path(path).read_text().split()
    except OSError:
        return None


PATHS = {
    "AIO": "/proc/sys/fs/aio-nr",
    "CHECKPOINT_RESTORE": "/proc/sys/kernel/ns_last_pid",
    "ELF_CORE": "/proc/self/coredump_filter",
    "IKCONFIG_PROC": "/proc/config.gz",
    "KALLSYMS": "/proc/kallsyms",
    "MEMORY_FAILURE": "/proc/sys/vm/memory_failure_recovery",
    "PID_NS": "/proc/self/ns/pid",
    "PRINTK": "/proc/sys/kernel/printk",
    "PROC_PAGE_MONITOR": "/proc/self/pagemap",
    "SECRETMEM": "/sys/module/secretmem",
    "STACKTRACE": "/proc/self/stack",
    "SWAP": "/proc/swaps",
    "SYSVIPC": "/proc/sysvipc",
    "USER_NS": "/proc/self/ns/user",
}
"""Files that are there with the option alone."""

TRACES: dict[str, Callable[[Facts], bool | None]] = {
    "DEBUG_FS": partial(_in_file, "/proc/filesystems", "debugfs"),
    "GUP_TEST": _gup_test,
    "HUGETLBFS": lambda facts: facts.hugepage_size > 0,
    "IO_URING": partial(_has_system_call, "io_uring_setup"),
    "MEM_SOFT_DIRTY": partial(_in_file, "/proc/self/smaps", "sd"),
    "PTE_MARKER_UFFD_WP": lambda facts: bool(facts.features & Feature.WP_HUGETLBFS_SHMEM) if facts.features else None,
    "TMPFS": partial(_in_file, "/proc/filesystems", "tmpfs"),
    "TRANSPARENT_HUGEPAGE": lambda facts: facts.pmd_size > 0,
    "USERFAULTFD": lambda facts: facts.unprivileged_userfaultfd is not None or "ENOSYS" not in facts.access.values(),
}
