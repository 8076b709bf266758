# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of the probe need that are no fixtures."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

from tests.conftest import PATIENCE, ROOT
from uffd_selftests.abi.uapi import Feature
from uffd_selftests.machine.hugepages import HugepageCounts
from uffd_selftests.mem_types import HUGETLB
from uffd_selftests.probe import findings
from uffd_selftests.probe.consumers import Judgement, judge
from uffd_selftests.probe.findings import Answer, Findings, Outcome
from uffd_selftests.probe.trials import BY_MEMORY, OF_HANDLE

AREA = 32 << 20


def verdicts(found: Findings) -> dict[str, Judgement]:
    """Return the verdicts by key."""
    return {judgement.consumer.key: judgement for judgement in judge(found)}


def capable(found: Findings) -> Findings:
    """Return findings of a kernel that can do everything, on a machine that allows everything."""
    facts = dataclasses.replace(
        found.facts,
        access=dict.fromkeys(found.facts.access, None),
        features=Feature(sum(Feature)),
        event_fork=None,
        pagemap_scan=None,
        hugepage_size=2 << 20,
        kvm={"reason": None, "accesses": "page faults"},
    )
    works = Outcome(Answer.WORKS)
    outcomes = {trial.name: works for trial in BY_MEMORY}
    names = ("anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")
    columns = tuple(findings.Column(dataclasses.replace(HUGETLB, name=name), dict(outcomes), None) for name in names)
    handle = {trial.name: works for trial in OF_HANDLE}
    pools = {2 << 20: HugepageCounts(4, 4, 0, 0)}
    behaviour = {**found.behaviour, "scan-accessed": Outcome(Answer.WORKS, detail="tells it")}
    able = dataclasses.replace(found, facts=facts, columns=columns, handle=handle, behaviour=behaviour)
    return dataclasses.replace(able, pools=pools, dontunmap=None)


def without(found: Findings, *features: Feature, **facts: Any) -> Findings:
    """Return findings of a kernel without these features, or with other facts."""
    rest = found.facts.features.without(sum(features))
    return dataclasses.replace(found, facts=dataclasses.replace(found.facts, **{"features": rest, **facts}))


def failing(found: Findings, memory: str, trial: str, outcome: Outcome, note: str | None = None) -> Findings:
    """Return findings with another outcome of one trial."""
    columns = tuple(
        dataclasses.replace(column, outcomes={**column.outcomes, trial: outcome}, note=note)
        if column.name == memory
        else column
        for column in found.columns
    )
    return dataclasses.replace(found, columns=columns)


def run(*args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "uffd_selftests", *args]
    pipe = subprocess.PIPE
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=pipe, text=True, check=False, timeout=PATIENCE)
