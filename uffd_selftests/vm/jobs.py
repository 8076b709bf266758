# SPDX-License-Identifier: GPL-2.0-only
"""What the launcher of a guest does beside running cases: what ``--probe`` and ``--soak`` want of its kernel."""

from __future__ import annotations

from uffd_selftests.harness.jobs import Cases
from uffd_selftests.machine.requirements import no_userfaultfd
from uffd_selftests.probe.command import probe
from uffd_selftests.soak.watch import Here


class GuestJobs(Cases):
    """The jobs of a machine that is there for them alone."""

    def __init__(self) -> None:
        super().__init__(own_machine=True)
        self._watch = Here(join=True)

    def ask_probe(self, area_bytes: int) -> dict[str, object]:
        """Say what the kernel can do, as data and for people."""
        report = probe(area_bytes)
        usable = no_userfaultfd(report.findings.facts) is None
        return {"report": report.to_dict(), "text": report.text(), "usable": usable}

    def ask_soak(self, method: str, *arguments: int) -> object:
        """Do what a soak wants: a method of soak/watch.py."""
        return getattr(self._watch, method)(*arguments)
