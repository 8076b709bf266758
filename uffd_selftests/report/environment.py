# SPDX-License-Identifier: GPL-2.0-only
"""What the page says about kernels, machines and runs, in a person's words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from uffd_selftests.abi.uapi import Feature
from uffd_selftests.report.model import Run


def duration(seconds: float) -> str:
    """Return a time as a person would say it, in one word for whoever breaks lines."""
    if seconds < 0.0095:
        return f"{seconds * 1e3:.1f}\xa0ms"
    if seconds < 0.995:
        return f"{seconds * 1e3:.0f}\xa0ms"
    if seconds < 59.95:
        return f"{seconds:.1f}\xa0s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}\xa0min {rest}\xa0s"


def size(number: int) -> str:
    """Return a number of bytes in the unit that fits."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if number >= factor:
            return f"{number / factor:.{3 if number < 100 * factor else 4}g} {unit}"
    return f"{number} B"


def about(run: Run) -> list[str]:
    """Return the few facts that a reader wants at once."""
    page = run.facts.get("page_size")
    pages = f"{size(page)} pages" if isinstance(page, int) else ""
    machine = run.facts.get("machine")
    known = [str(machine) if machine else "", pages, _started(run), duration(run.seconds) if run.seconds else ""]
    return [each for each in known if each]


@dataclass(frozen=True)
class Fact:
    """One thing about the environment."""

    name: str
    values: list[str]
    """For each run; empty when unknown."""

    @property
    def differs(self) -> bool:
        """Whether the runs differ."""
        return len(set(self.values)) > 1


def facts(runs: list[Run]) -> list[Fact]:
    """Return what is known of the machines and the runs, what differs first."""
    found: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        for name, value in _facts(run):
            found.setdefault(name, [""] * len(runs))[number] = value
    listed = [Fact(name, values) for name, values in found.items() if any(values)]
    return sorted(listed, key=lambda fact: not fact.differs)


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    known = run.facts

    def number(name: str, show: Callable[[int], str] = str) -> str:
        value = known.get(name)
        return show(value) if isinstance(value, int) else ""

    yield "Kernel", " ".join(filter(None, (run.kernel, str(known.get("version", "")))))
    yield "Architecture", str(known.get("machine", ""))
    yield "Processors", number("cpus")
    yield "Memory", number("memory", size)
    yield "Page size", number("page_size", size)
    yield "Huge pages", _huge_pages(run)
    yield "Transparent huge pages", _thp(known)
    yield "Swap", number("swap_total", lambda total: size(total) if total else "none")
    yield "Ways to a userfaultfd", _ways(known)
    yield "vm.unprivileged_userfaultfd", number("unprivileged_userfaultfd")
    yield "/dev/userfaultfd", number("device_mode", lambda mode: f"mode {mode:04o}")
    yield "Privileges", _privileges(known)
    yield "memlock limit", number("memlock", lambda limit: "none" if limit < 0 else size(limit))
    for name in ("pagemap", "pagemap_scan", "gup_test", "kmsg"):
        if name in known:
            yield name, str(known[name] or "yes")
    yield "Tainted", str(run.environment.get("tainted") or ("no" if "tainted" in run.environment else ""))
    yield "Started", _started(run)
    yield "Duration", duration(run.seconds) if run.seconds else ""
    workers = run.options.get("workers")
    yield "Workers", str(workers) if isinstance(workers, int) and workers else ""
    yield "Deadline of a case", f"{run.options['deadline']:g} s" if _is_number(run.options.get("deadline")) else ""
    yield "uffd-selftests", run.versions.get("uffd-selftests", "")
    yield "Python, pytest", ", ".join(filter(None, (run.versions.get("python"), run.versions.get("pytest"))))


def _started(run: Run) -> str:
    return run.started.replace("T", " ").replace("+00:00", " UTC")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


def _huge_pages(run: Run) -> str:
    sizes, default = run.facts.get("hugepage_sizes"), run.facts.get("hugepage_size")
    if not isinstance(sizes, list) or not all(isinstance(each, int) for each in sizes):
        return ""
    if not sizes:
        return "none"
    shown = ", ".join(size(each) + (" (default)" if each == default and len(sizes) > 1 else "") for each in sizes)
    changed = run.environment.get("changed")
    pool = changed.get("hugepages") if isinstance(changed, dict) else None
    added = pool.get("added") if isinstance(pool, dict) else None
    return shown + (f"; {added} added for the run" if added else "")


def _thp(known: dict[str, Any]) -> str:
    settings = known.get("thp")
    if not isinstance(settings, dict):
        return ""
    pmd = known.get("pmd_size")
    shown = [size(pmd)] if isinstance(pmd, int) and pmd else []
    shown += [f"{name} {value}" for name, value in settings.items() if value]
    return ", ".join(shown) or "none"


def _ways(known: dict[str, Any]) -> str:
    access = known.get("access")
    if not isinstance(access, dict):
        return ""
    return ", ".join(f"{way}{f' ({error})' if error else ''}" for way, error in access.items())


def _privileges(known: dict[str, Any]) -> str:
    capabilities = known.get("capabilities")
    if not isinstance(capabilities, list):
        return ""
    who = "root" if known.get("euid") == 0 else f"user {known.get('euid')}"
    inside = " in a user namespace" if known.get("user_namespace") else ""
    telling = [name for name in ("CAP_SYS_PTRACE", "CAP_SYS_ADMIN") if name not in capabilities]
    seccomp = ", under seccomp" if known.get("seccomp") else ""
    return f"{who}{inside}" + (f", without {' and '.join(telling)}" if telling else "") + seccomp


def features(runs: list[Run]) -> list[tuple[str, str, list[bool | None]]]:
    """Return each feature bit, the version that brought it, and whether each run's kernel offers it."""
    offered = [run.facts.get("feature_names") for run in runs]
    if not any(isinstance(names, list) for names in offered):
        return []
    since = {str(feature): feature.since for feature in Feature}
    unknown = {name for names in offered if isinstance(names, list) for name in names} - set(since)
    names = [*since, *sorted(map(str, unknown))]
    return [
        (name, since.get(name) or "", [name in has if isinstance(has, list) else None for has in offered])
        for name in names
    ]
