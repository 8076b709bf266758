# SPDX-License-Identifier: GPL-2.0-only
"""What the probe found, as text for people and as plain data for programs."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from uffd_selftests import __version__
from uffd_selftests.machine.doors import DEVICE
from uffd_selftests.machine.hugetlb_cgroup import hugetlb_limit
from uffd_selftests.machine.requirements import no_userfaultfd
from uffd_selftests.mem_types import Backing
from uffd_selftests.probe.access import SYSCTL, doors
from uffd_selftests.probe.config import Configuration
from uffd_selftests.probe.consumers import Judgement
from uffd_selftests.probe.findings import Answer, Column, FeatureFinding, Findings, Outcome
from uffd_selftests.probe.questions import QUESTIONS
from uffd_selftests.probe.suite import Prospect
from uffd_selftests.probe.trials import BY_MEMORY

FORMAT = 1
"""Raised when a key of the JSON changes its meaning or goes away; new keys leave it alone."""

WIDTH = 110
NAME, CELL = 38, 9
CAPABILITIES = ("CAP_SYS_PTRACE", "CAP_SYS_ADMIN")
SECCOMP_MODES = ("none", "strict", "filter")


@dataclass(frozen=True)
class Report:
    """All that there is to say."""

    findings: Findings
    judgements: Sequence[Judgement]
    configuration: Configuration
    prospect: Prospect

    # ---- for people ----

    def text(self) -> str:
        """Return one screen of plain text, the verdicts first."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        facts = self.findings.facts
        nothing = no_userfaultfd(facts)
        kernel = f"Linux {facts.release} {facts.machine}, pages of {size(facts.page_size)}"
        yield from wrapped(f"{kernel}: " + (f"no userfaultfd: {nothing}" if nothing else "userfaultfd works"), 2)
        sections = {
            "Who gets what they need": self._verdict_lines(),
            "Ways to a userfaultfd": self._access_lines(),
            "UFFD_FEATURE_ bits, each enabled on a descriptor of its own, with the Linux release that brought it": (
                self._feature_lines()
            ),
            "UFFDIO_ requests and features by memory type, each used once": self._matrix_lines(),
            "What differs between kernels, asked of this one": self._behaviour_lines(),
            "Memory": self._memory_lines(),
            f"Kernel options that the suite can use and this kernel lacks ({self._source})": self._option_lines(),
            f"The suite here: {self._prospect}": self._shortage_lines(),
        }
        for title, lines in sections.items():
            body = list(lines)
            if body:
                yield from ("", title, *(f"  {line}".rstrip() for line in body))

    def _verdict_lines(self) -> Iterator[str]:
        for reasons, judgements in itertools.groupby(self.judgements, lambda judgement: judgement.reasons):
            for judgement in judgements:
                yield f"{judgement.consumer.name:<{NAME}}{judgement.verdict.value}"
            for reason in reasons:  # the same for all these
                yield from wrapped(f"    {reason}", 6)

    def _access_lines(self) -> Iterator[str]:
        facts = self.findings.facts
        for door in doors(facts):
            mode = f", mode {facts.device_mode:04o}" if door.title == DEVICE and facts.device_mode is not None else ""
            state = "shut" if door.refused else "open" if door.kernel_faults else "open, without kernel faults"
            yield f"{door.title + mode:<{NAME}}{state}"
            if door.refused:
                yield from wrapped(f"    {door.reason or door.refused}", 6)
        sysctl = "not there" if facts.unprivileged_userfaultfd is None else str(facts.unprivileged_userfaultfd)
        seccomp = SECCOMP_MODES[facts.seccomp] if facts.seccomp < len(SECCOMP_MODES) else str(facts.seccomp)
        own = ", in its own user namespace alone" if facts.user_namespace else ""
        held = "; ".join(f"{name}: {yes(name in facts.capabilities)}" for name in CAPABILITIES)
        yield f"{SYSCTL}: {sysctl}; uid {facts.euid}; {held}{own}; seccomp: {seccomp}"

    def _feature_lines(self) -> Iterator[str]:
        yield from two_columns([self._feature_line(feature) for feature in self.findings.features])
        yield from trouble(self.findings.handle)

    def _feature_line(self, feature: FeatureFinding) -> str:
        return f"{feature.name:<20}{feature.since or '?':<7}{self._feature_state(feature)}"

    def _feature_state(self, feature: FeatureFinding) -> str:
        if not feature.offered:
            return "no"
        tried = self.findings.handle.get(feature.name)
        return feature.refused or ("yes" if tried is None or tried.works else tried.answer.value.upper())

    def _matrix_lines(self) -> Iterator[str]:
        columns = self.findings.columns
        if not columns:
            return
        for row in zip(*map(heading, columns), strict=True):
            yield f"{'':<23}" + "".join(f"{word:<{CELL}}" for word in row)
        shown = set()
        for trial in BY_MEMORY:
            cells = [cell(column.outcomes[trial.name]) for column in columns]
            shown.update(cells)
            yield f"{trial.name:<16}{trial.since:<7}" + "".join(f"{word:<{CELL}}" for word in cells)
        for word in sorted(word for word in shown if word.endswith("*") and word != "yes*"):
            yield f"{word} refused, though UFFDIO_REGISTER offers it"
        if "yes*" in shown:
            yield "yes* though UFFDIO_REGISTER does not offer it"
        if shown & {"(yes)", "?"}:
            yield "(yes) offered by UFFDIO_REGISTER, not tried; ? not tried"
        for note in dict.fromkeys(column.note for column in columns if column.note):
            yield from wrapped(note, 2)
        for column in columns:
            yield from trouble(column.outcomes, f" on {column.name}")

    def _behaviour_lines(self) -> Iterator[str]:
        for question in QUESTIONS:
            if outcome := self.findings.behaviour.get(question.key):
                said = outcome.detail if outcome.works else f"cannot be asked: {outcome.errno or outcome.detail}"
                yield from wrapped(f"{question.text:<60}{said}", 2)

    def _memory_lines(self) -> Iterator[str]:
        facts = self.findings.facts
        if facts.pmd_size:
            settings = f"enabled: {facts.thp['enabled']}, shmem_enabled: {facts.thp['shmem_enabled'] or 'not there'}"
            yield f"transparent huge pages: {size(facts.pmd_size)}; {settings}"
        else:
            yield "transparent huge pages: none"
        if self.findings.mthp:
            yield from wrapped("their sizes, for anonymous memory: " + "; ".join(self._mthp_settings()), 2)
        pools = (
            f"{size(each)}{' (default)' if each == facts.hugepage_size else ''}: {counts.free} of {counts.total} free"
            for each, counts in self.findings.pools.items()
        )
        yield "huge pages: " + ("; ".join(pools) or "none")
        for each in facts.hugepage_sizes:
            if limit := hugetlb_limit(each):
                yield from wrapped(f"  of {size(each)} the cgroup allows {limit.pages} more: {limit.file}", 4)
        yield f"swap: {size(facts.swap_total) if facts.swap_total else 'none'}; memory: {size(facts.memory)}"
        yield f"/proc/self/pagemap: {facts.pagemap or 'yes'}; PAGEMAP_SCAN: {facts.pagemap_scan or 'yes'}"

    def _mthp_settings(self) -> Iterator[str]:
        """Group the sizes of transparent huge pages by their setting."""
        settings = {bytes_: anon for bytes_, (anon, _) in self.findings.mthp.items() if anon}
        for setting in dict.fromkeys(settings.values()):
            yield f"{', '.join(size(each) for each, what in settings.items() if what == setting)}: {setting}"

    @property
    def _source(self) -> str:
        return self.configuration.source or "no configuration to be read: looked for by their effects"

    def _option_lines(self) -> Iterator[str]:
        for option in self.configuration.lacking:
            count = self.prospect.dependent.get(option.name, 0)
            results = f"up to {count} results" if count else ""
            yield f"CONFIG_{option.name:<23}{results:<18}{option.purpose}"
        if not self.configuration.lacking:
            yield "none"
        if unknown := [f"CONFIG_{option.name}" for option in self.configuration.unknown]:
            yield from wrapped(f"cannot be told: {', '.join(unknown)}", 2)

    @property
    def _prospect(self) -> str:
        more = f", and up to {self.prospect.perhaps} more for lack of kernel options" if self.prospect.perhaps else ""
        return f"{self.prospect.results} results, {self.prospect.skipped} of them skipped{more}"

    def _shortage_lines(self) -> Iterator[str]:
        for shortage in self.prospect.shortages:
            yield from wrapped(f"{shortage.results:>5}  {shortage.name}: {shortage.reason}", 7)

    # ---- for programs ----

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; docs/probe.md describes the keys."""
        findings, facts = self.findings, self.findings.facts
        return {
            "format": FORMAT,
            "suite_version": __version__,
            "available": no_userfaultfd(facts) is None,
            "reason": no_userfaultfd(facts),
            "consumers": [
                {
                    "key": each.consumer.key,
                    "name": each.consumer.name,
                    "verdict": each.verdict.name.lower(),
                    "reasons": list(each.reasons),
                    "source": each.consumer.source,
                }
                for each in self.judgements
            ],
            "access": [
                {
                    "way": door.name,
                    "open": door.refused is None,
                    "errno": door.refused,
                    "kernel_faults": door.kernel_faults,
                    "reason": door.reason,
                }
                for door in doors(facts)
            ],
            "api_ioctls": list(findings.ioctls.names),
            "features": [
                {
                    "name": each.name,
                    "bit": each.bit.bit_length() - 1,
                    "since": each.since or None,
                    "offered": each.offered,
                    "enabled": each.enabled,
                    "errno": each.refused,
                    "tried": plain(findings.handle[each.name]) if each.name in findings.handle else None,
                }
                for each in findings.features
            ],
            "memory": [
                {
                    "name": column.name,
                    "page_size": column.mem.page_size,
                    "note": column.note,
                    "tried": {name: plain(outcome) for name, outcome in column.outcomes.items()},
                }
                for column in findings.columns
            ],
            "behaviour": [
                {"key": each.key, "question": each.text, **plain(findings.behaviour[each.key])}
                for each in QUESTIONS
                if each.key in findings.behaviour
            ],
            "transparent_hugepage_sizes": [
                {"bytes": bytes_, "enabled": anon or None, "shmem_enabled": shmem or None}
                for bytes_, (anon, shmem) in findings.mthp.items()
            ],
            "hugepage_pools": [
                {"bytes": bytes_, **dataclasses.asdict(counts)} for bytes_, counts in findings.pools.items()
            ],
            "mremap_dontunmap_shared": findings.dontunmap,
            "kernel_options": {
                "source": self.configuration.source,
                "lacking": [
                    {
                        "name": f"CONFIG_{option.name}",
                        "purpose": option.purpose,
                        "results": self.prospect.dependent.get(option.name, 0),
                    }
                    for option in self.configuration.lacking
                ],
                "unknown": [f"CONFIG_{option.name}" for option in self.configuration.unknown],
            },
            "suite": {
                "results": self.prospect.results,
                "skipped": self.prospect.skipped,
                "perhaps": self.prospect.perhaps,
                "shortages": [dataclasses.asdict(shortage) for shortage in self.prospect.shortages],
            },
            "facts": facts.to_dict(),
        }


# ---- words ----------------------------------------------------------------------------------------------------------


def cell(outcome: Outcome) -> str:
    """Return what the table says of one trial; a star where UFFDIO_REGISTER said something else."""
    match outcome.answer:
        case Answer.WORKS:
            return "yes*" if outcome.offered is False else "yes"
        case Answer.REFUSED:
            return f"{outcome.errno}*" if outcome.offered else "-"
        case Answer.UNTESTED:
            return "?" if outcome.offered is None else "(yes)" if outcome.offered else "-"
        case _:
            return str(outcome.answer.value).upper()


def trouble(outcomes: dict[str, Outcome], where: str = "") -> Iterator[str]:
    """Say what went wrong in trials that no kernel should fail."""
    for name, outcome in outcomes.items():
        if outcome.answer in (Answer.WRONG, Answer.HANGS, Answer.CRASHES):
            yield from wrapped(f"{name}{where}: {outcome.answer.value}: {outcome.detail}", 2)


def heading(column: Column) -> tuple[str, str, str]:
    """Return the three lines above a column: what kind, shared or private, page size."""
    mem = column.mem
    sharing = "" if mem.backing is Backing.ANON else "shared" if mem.shared else "private"
    return mem.backing.value, sharing, size(mem.page_size)


def plain(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as plain data."""
    return {
        "answer": outcome.answer.value,
        "offered": outcome.offered,
        "errno": outcome.errno,
        "detail": outcome.detail or None,
    }


def size(count: int) -> str:
    """Return bytes in the largest unit that leaves a whole number, or one digit: 4 kB, 2 MB, 15.6 GB."""
    unit = next((unit for unit in (3, 2, 1) if count >= 1 << 10 * unit), 0)
    value = count / (1 << 10 * unit)
    return f"{value:.{0 if value.is_integer() else 1}f} {('B', 'kB', 'MB', 'GB')[unit]}"


def yes(condition: bool) -> str:
    """Say yes or no."""
    return "yes" if condition else "no"


def wrapped(line: str, indent: int) -> list[str]:
    """Break a long line; what follows is indented."""
    return textwrap.wrap(line, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def two_columns(lines: Sequence[str]) -> Iterator[str]:
    """Set lines side by side, the second half beside the first."""
    half = -(-len(lines) // 2)
    for number, line in enumerate(lines[:half]):
        other = lines[half + number] if half + number < len(lines) else ""
        yield f"{line:<{NAME}}{other}"
