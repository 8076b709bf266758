# SPDX-License-Identifier: GPL-2.0-only
"""What was found by trying: plain data, and the trying of it, each trial in a process with a deadline."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from uffd_selftests.abi.errors import errno_name
from uffd_selftests.abi.uapi import ApiIoctls, Feature
from uffd_selftests.harness.isolation import How, Isolator, Send
from uffd_selftests.machine.facts import THP, Facts, probe
from uffd_selftests.machine.hugepages import HugepageCounts, HugepagePool, hugepages
from uffd_selftests.machine.kvm import probe_kvm
from uffd_selftests.machine.requirements import no_userfaultfd
from uffd_selftests.mem_types import ALL, ANON, MemType
from uffd_selftests.probe.questions import QUESTIONS
from uffd_selftests.probe.trials import BY_MEMORY, OF_HANDLE, Stage, Trial
from uffd_selftests.toolkit.access import AccessError
from uffd_selftests.toolkit.expectations import DEADLINE, Skip
from uffd_selftests.toolkit.handle import DEFAULT_FLAGS, KERNEL_FAULTS, Uffd
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_SHARED,
    MREMAP_DONTUNMAP,
    MREMAP_MAYMOVE,
    PAGE_SIZE,
    Range,
    mapped,
    remap,
    unmap,
)

HUGEPAGES_TAKEN = 4
"""Huge pages that a trial takes at most: destination, source, and a copy on write of each."""
LARGEST_TRIED = 64 << 20
"""Bytes of the largest huge page that is used; clearing larger ones takes long, and few machines can spare them."""
DEADLINE_OF_TRIAL = DEADLINE + 2
"""Seconds after which a trial counts as hanging: what it waits for itself, it gives up earlier."""


class Answer(Enum):
    """What came of a trial."""

    WORKS = "works"
    REFUSED = "refused"
    """The kernel says no, with an errno."""
    WRONG = "wrong"
    """The kernel says yes and does something else."""
    HANGS = "hangs"
    CRASHES = "crashes"
    UNTESTED = "untested"
    """It was not tried, for lack of huge pages."""


@dataclass(frozen=True)
class Outcome:
    """What came of one trial."""

    answer: Answer
    offered: bool | None = None
    """Whether UFFDIO_REGISTER offered the ioctl; None where that says nothing: features, and refused registrations."""
    errno: str | None = None
    """The errno's name, of what was refused."""
    detail: str = ""
    """What was called and what came, if it does not work; the answer to a question."""

    @property
    def works(self) -> bool:
        """Whether it does what it is for."""
        return self.answer is Answer.WORKS

    def to_plain(self) -> list[object]:
        """Return plain data, as a process can send it."""
        return [self.answer.name, self.offered, self.errno, self.detail]

    @classmethod
    def of(cls, plain: object) -> Outcome | None:
        """Return what to_plain() made plain; None when it is something else."""
        if not isinstance(plain, list) or len(plain) != len(dataclasses.fields(cls)):
            return None
        name, *rest = plain
        return cls(Answer[name], *rest)


@dataclass(frozen=True)
class Column:
    """What was tried on one memory type."""

    mem: MemType
    outcomes: dict[str, Outcome]
    note: str | None
    """Why the huge pages of this size were not used."""

    @property
    def name(self) -> str:
        """The memory type, with the page size where it is not the default: ``hugetlb-1048576kB``."""
        return self.mem.name


@dataclass(frozen=True)
class FeatureFinding:
    """One bit of uffdio_api.features."""

    name: str
    """Without UFFD_FEATURE_; ``bit 23`` for one that has no name yet."""
    bit: int
    since: str
    """The first Linux release that has it on some architecture."""
    offered: bool
    refused: str | None
    """The errno with which UFFDIO_API refused to enable it alone; None when it did enable it."""

    @property
    def enabled(self) -> bool:
        """Whether it can be used."""
        return self.offered and self.refused is None


@dataclass(frozen=True)
class Findings:
    """Everything that the probe knows."""

    facts: Facts
    ioctls: ApiIoctls
    """What UFFDIO_API offers on the descriptor as such."""
    features: tuple[FeatureFinding, ...]
    """Every bit that has a name or is offered; none when the kernel could not be asked."""
    handle: dict[str, Outcome]
    """What was tried of the features that do not depend on the memory."""
    columns: tuple[Column, ...]
    behaviour: dict[str, Outcome]
    """The answer to each question, by its key."""
    dontunmap: str | None
    """The errno with which mremap(2) refused MREMAP_DONTUNMAP of shared memory; None when it works (Linux 5.13)."""
    mthp: dict[int, tuple[str, str]]
    """Sizes of transparent huge pages in bytes, each with its settings for anonymous memory and for shmem."""
    pools: dict[int, HugepageCounts]
    """The pool of each huge page size in bytes, as it was before the probe."""


def look() -> Findings:
    """Try everything. The machine is as before afterwards; KeyboardInterrupt ends it early."""
    facts = dataclasses.replace(probe(), kvm=probe_kvm())
    pools = {size: hugepages(size) for size in facts.hugepage_sizes}
    with contextlib.closing(Isolator()) as isolator:
        usable = no_userfaultfd(facts) is None
        ioctls, features = _features(isolator, facts) if usable else (ApiIoctls(0), ())
        handle = {trial.name: _try(isolator, trial, ANON, facts) for trial in OF_HANDLE} if usable else {}
        columns = tuple(_columns(isolator, facts)) if usable else ()
        questions = QUESTIONS if usable else ()
        behaviour = {question.key: _try(isolator, question.trial, ANON, facts) for question in questions}
    return Findings(facts, ioctls, features, handle, columns, behaviour, _dontunmap(), _mthp(), pools)


# ---- trials --------------------------------------------------------------------------------------------------------


def _try(isolator: Isolator, trial: Trial, mem: MemType, facts: Facts, *, use: bool = True) -> Outcome:
    """Do one trial in a process of its own; without use only register."""
    flags = KERNEL_FAULTS if trial.kernel_faults else DEFAULT_FLAGS
    ending = isolator.run(
        lambda send: send(_attempt(trial, mem, flags, use=use).to_plain()), deadline=DEADLINE_OF_TRIAL
    )
    if ending.how is How.TIMEOUT:
        return Outcome(Answer.HANGS, detail="; ".join(ending.evidence[:1]) or ending.reason)
    found = next(filter(None, map(Outcome.of, ending.records)), None)
    return found or Outcome(Answer.CRASHES, detail=ending.reason)


def _attempt(trial: Trial, mem: MemType, flags: int, *, use: bool) -> Outcome:
    offered = None
    try:
        with Stage(trial, mem, flags) as stage:
            if trial.ioctl:
                offered = trial.ioctl in stage.offered
            if not use:
                return Outcome(Answer.UNTESTED, offered)
            said = trial.body(stage)
    except Skip as reason:
        return Outcome(Answer.UNTESTED, offered, detail=str(reason))
    except OSError as error:
        return Outcome(Answer.REFUSED, offered, errno_name(error.errno or 0), str(error))
    except (AssertionError, AccessError, ValueError) as error:
        return Outcome(Answer.WRONG, offered, detail=str(error))
    return Outcome(Answer.WORKS, offered, detail=said if isinstance(said, str) else "")


# ---- features ------------------------------------------------------------------------------------------------------


def _features(isolator: Isolator, facts: Facts) -> tuple[ApiIoctls, tuple[FeatureFinding, ...]]:
    """Ask what is offered and enable each bit alone, every time on a fresh descriptor."""

    def ask(offered: Feature) -> Iterator[FeatureFinding]:
        for bit in _bits(offered):
            name = bit.names[0].removeprefix(Feature.prefix)
            refused = _refusal(bit | Feature.RWP if bit == Feature.RWP_ASYNC else bit)
            yield FeatureFinding(name, int(bit), bit.since, bool(bit & offered), refused)

    def work(send: Send) -> None:
        with Uffd.create() as uffd:
            answer = uffd.api()
        send([int(answer.ioctls), [dataclasses.astuple(each) for each in ask(Feature(answer.features))]])

    ending = isolator.run(work, deadline=DEADLINE_OF_TRIAL)
    for record in ending.records:
        if isinstance(record, list):
            return ApiIoctls(record[0]), tuple(FeatureFinding(*each) for each in record[1])
    return ApiIoctls(0), ()


def _bits(offered: Feature) -> Iterable[Feature]:
    """Return every bit that has a name or is offered."""
    known = sum(int(member) for member in Feature)
    return [Feature(1 << number) for number in range(64) if (known | int(offered)) >> number & 1]


def _refusal(feature: Feature) -> str | None:
    try:
        Uffd.open(feature).close()
    except OSError as error:
        return errno_name(error.errno or 0)
    return None


# ---- memory --------------------------------------------------------------------------------------------------------


def _columns(isolator: Isolator, facts: Facts) -> Iterator[Column]:
    """Try all memory types, huge pages in all their sizes."""
    for mem in (mem for mem in ALL if not mem.hugetlb):
        yield _column(isolator, facts, mem, None)
    sizes = sorted(facts.hugepage_sizes, key=lambda size: (size != facts.hugepage_size, size))
    for size in sizes:
        with _hugepages(size) as shortage:
            for mem in (mem for mem in ALL if mem.hugetlb):
                yield _column(isolator, facts, _sized(mem, size, facts), shortage)


def _column(isolator: Isolator, facts: Facts, mem: MemType, shortage: str | None) -> Column:
    use = shortage is None
    return Column(mem, {trial.name: _try(isolator, trial, mem, facts, use=use) for trial in BY_MEMORY}, shortage)


def _sized(mem: MemType, size: int, facts: Facts) -> MemType:
    """Return hugetlb memory with pages of a size."""
    if size == facts.hugepage_size:
        return mem
    return MemType(f"{mem.name}-{size // 1024}kB", mem.backing, mem.shared, huge_size=size)


@contextlib.contextmanager
def _hugepages(size: int) -> Iterator[str | None]:
    """Have a few huge pages free for the block, which gets the reason if that is not to be had."""
    if size > LARGEST_TRIED:
        yield f"huge pages of {size >> 20} MB were registered and not filled: clearing one takes long"
        return
    with HugepagePool(size, HUGEPAGES_TAKEN) as pool:
        yield pool.shortage


def _dontunmap() -> str | None:
    """Try mremap(2) with MREMAP_DONTUNMAP on shared memory, to a place of the kernel's choice."""
    flags = MAP_SHARED | MAP_ANONYMOUS
    with mapped(PAGE_SIZE, flags=flags) as old:
        try:
            new = remap(old, flags=MREMAP_MAYMOVE | MREMAP_DONTUNMAP)
        except OSError as error:
            return errno_name(error.errno or 0)
        except Skip:  # remap() knows why
            return errno_name(errno.EINVAL)
        unmap(Range(new, old.len))
    return None


def _mthp() -> dict[int, tuple[str, str]]:
    """Return the sizes of transparent huge pages with their settings (admin-guide/mm/transhuge.rst)."""
    found = {}
    for folder in THP.glob("hugepages-*kB"):
        size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) * 1024
        found[size] = (_setting(folder / "enabled"), _setting(folder / "shmem_enabled"))
    return dict(sorted(found.items()))


def _setting(path: Path) -> str:
    """Return the choice in brackets, nothing where there is no such file."""
    if not os.access(path, os.R_OK):
        return ""
    return path.read_text().partition("[")[2].partition("]")[0]
