# SPDX-License-Identifier: GPL-2.0-only
"""The options of a run, wherever they come from: command line, environment, default."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uffd_selftests.case import Kind
from uffd_selftests.harness import gating

if TYPE_CHECKING:
    import pytest

    from uffd_selftests.case import Case
    from uffd_selftests.mem_types import MemType

STRESS_LOG = "stress.log"
"""In the folder of ``-o``: a line for each bounce of a stress case, with what each thread did."""

FILES = ("results.tap", "results.json", "environment.json", "dmesg.txt", "junit.xml", "report.html")
"""The others in that folder."""

Parse = Callable[[str], Any]


def positive(text: str) -> float:
    """Read a positive number; raises ValueError."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ValueError(f"{text!r} is not a positive number")


def positive_int(text: str) -> int:
    """Read a positive whole number; raises ValueError."""
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{text!r} is not a positive whole number")
    return int(text)


def yes_or_no(text: str) -> bool:
    """Read 1 or 0; raises ValueError."""
    if text not in ("0", "1"):
        raise ValueError(f"{text!r} is neither 0 nor 1")
    return text == "1"


def duration(text: str) -> int:
    """Read a duration like 90s, 10m, 1h30m or 90 as seconds, nothing as 0; raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not match:
        raise ValueError(f"{text!r} is not a duration like 90s, 10m or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600 * hours + 60 * minutes + seconds


def seed(text: str) -> int:
    """Read a whole number, nothing as one at random; raises ValueError."""
    if not text:
        return int.from_bytes(os.urandom(4), "little")
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


@dataclass(frozen=True)
class Option:
    """An option that takes a value and can be set by the environment as well."""

    flag: str
    metavar: str
    variable: str
    default: str
    parse: Parse
    help: str

    @property
    def name(self) -> str:
        """Its name in pytest's configuration."""
        return self.flag.lstrip("-").replace("-", "_")

    def value(self, given: str | None) -> Any:
        """Return what counts: the given text, else that of the environment, else the default; raises ValueError."""
        text = given if given is not None else os.environ.get(self.variable) or self.default
        try:
            return self.parse(text)
        except ValueError as error:
            raise ValueError(f"{self.flag if given is not None else self.variable}: {error}") from None


OPTIONS = (
    Option("--deadline", "SECONDS", "UFFD_DEADLINE", "30", positive, "kill a case after SECONDS (30)"),
    Option("--deadline-scale", "FACTOR", "UFFD_DEADLINE_SCALE", "1", positive, "multiply all deadlines, for emulators"),
    Option("--area-mib", "MIB", "UFFD_AREA_MIB", "32", positive_int, "size of a case's source and destination (32)"),
    Option("--stress-mib", "MIB", "UFFD_STRESS_MIB", "20", positive_int, "the same, of a stress case (20)"),
    Option("--stress-bounces", "N", "UFFD_STRESS_BOUNCES", "8", positive_int, "bounces of a stress case (8)"),
    Option("--stress-seed", "N", "UFFD_STRESS_SEED", "", seed, "seed of the stress cases (a random one)"),
    Option("--duration", "TIME", "UFFD_DURATION", "", duration, "let each stress case last for TIME: 90s, 10m, 2h"),
    Option(
        "--require", "NAME,...", "UFFD_REQUIRE", "", gating.parse_requirements,
        "skips for lack of these features (wp, minor-shmem) or requirements (device) are failures",
    ),
)  # fmt: skip


MAY_HANG_KERNEL = Option(
    "--may-hang-kernel", "", "UFFD_MAY_HANG_KERNEL", "0", yes_or_no,
    "run, at the end, cases of bugs that leave a process which nothing can end",
)  # fmt: skip
"""Takes no value on the command line."""


@dataclass(frozen=True)
class Settings:
    """The options of a run, checked."""

    deadline: float
    """Seconds that a case may take, scaled."""
    deadline_scale: float
    area_bytes: int
    """Size of the source and of the destination area of a case that names no number of pages."""
    stress_bytes: int
    """The same, of a stress case."""
    stress_bounces: int
    stress_seed: int
    duration: int
    """Seconds for which a stress case repeats its work; 0: as often as bounces are asked for."""
    require: frozenset[str]
    filters: tuple[str, ...]
    documented_only: bool
    strict: bool
    """Known defects are failures."""
    isolate: bool
    sharing: bool
    """A process may run several cases."""
    isolate_all: bool
    """Isolate tests that declare no case, too."""
    ktap_fd: int | None
    brief: bool
    """Nobody reads pytest's own words: only the results are told, with progress if stderr is a terminal."""
    kmsg: bool
    """Note in the kernel log which case begins."""
    may_hang_kernel: bool
    """Run what leaves a process that nothing can end where the kernel is broken."""
    folder: Path | None
    data_only: bool
    """Write no reports that can be made of results.json."""
    machine: Path | None
    """The file that says from what the guests are started in which cases run (guest.py)."""
    pristine: bool
    """Each result has a guest of its own."""

    @classmethod
    def of(cls, config: pytest.Config) -> Settings:
        """Return the settings of a pytest run; raises pytest.UsageError."""
        import pytest  # noqa: PLC0415  # the command line reads its options without

        option = config.option
        try:
            check_keyword(option.keyword)
            may_hang_kernel = MAY_HANG_KERNEL.value(option.may_hang_kernel)
            values = {each.name: each.value(getattr(option, each.name)) for each in OPTIONS}
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        return cls(
            values["deadline"] * values["deadline_scale"],
            values["deadline_scale"],
            values["area_mib"] << 20,
            values["stress_mib"] << 20,
            values["stress_bounces"],
            values["stress_seed"],
            values["duration"],
            values["require"],
            tuple(option.filter),
            option.documented_only,
            option.strict_defects,
            option.isolation and not option.usepdb and not option.trace,
            not option.no_sharing,
            option.isolate_all,
            option.ktap_fd,
            option.brief,
            option.kmsg,
            may_hang_kernel,
            Path(option.report_dir) if option.report_dir else None,
            option.report_data_only,
            Path(option.machine) if option.machine else None,
            option.pristine,
        )

    def deadline_of(self, case: Case | None) -> float:
        """Return the seconds that a case, or a test that is none, may take."""
        if case and case.deadline:
            return min(self.deadline, case.deadline * self.deadline_scale)
        return self.deadline + (self.duration if case and case.stress else 0.0)

    def area_bytes_of(self, case: Case | None) -> int:
        """Return the size of each of the two areas of a case that names no number of pages."""
        return self.stress_bytes if case and case.stress else self.area_bytes

    def wants(self, case: Case, variant: str | None, mem: MemType | None) -> bool:
        """Whether the options leave a result.

        A filter is part of the case's name, or of the result's if it has " on " in it; behind "=" all of either.
        """
        if self.documented_only and case.kind is Kind.DETAIL:
            return False
        if not self.filters:
            return True
        names = case.name, case.result_name(variant, mem)
        return any(part[1:] in names if part[:1] == "=" else part in names[" on " in part] for part in self.filters)

    def export(self, *, progress: bool) -> None:
        """Tell the cases, and xdist's workers, what concerns them: common.py and stress.py read it."""
        os.environ.update(
            UFFD_DEADLINE_SCALE=f"{self.deadline_scale:g}",
            UFFD_STRESS_BOUNCES=str(self.stress_bounces),
            UFFD_STRESS_SEED=str(self.stress_seed),
            UFFD_DURATION=str(self.duration),
            UFFD_PROGRESS="1" if progress else "",
            UFFD_STRESS_LOG=str(self.folder / STRESS_LOG) if self.folder else "",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what results.json says about them."""
        return {
            "deadline": self.deadline,
            "deadline_scale": self.deadline_scale,
            "area_bytes": self.area_bytes,
            "stress_bytes": self.stress_bytes,
            "stress_bounces": self.stress_bounces,
            "stress_seed": self.stress_seed,
            "duration": self.duration,
            "require": sorted(self.require),
            "filters": list(self.filters),
            "documented_only": self.documented_only,
            "strict": self.strict,
            "isolation": self.isolate,
            "sharing": self.sharing,
            "may_hang_kernel": self.may_hang_kernel,
            "pristine": self.pristine,
        }


def check_keyword(expression: str) -> None:
    """Refuse a bad -k with a ValueError, before xdist's workers find out."""
    from _pytest.mark.expression import Expression  # noqa: PLC0415  # which takes long to load

    try:
        Expression.compile(expression)
    except Exception as error:  # its type depends on pytest's version
        raise ValueError(f"-k {expression!r}: {getattr(error, 'msg', error)}") from None


def add_options(parser: pytest.Parser) -> None:
    """Tell pytest about the options."""
    group = parser.getgroup("userfaultfd")
    for each in OPTIONS:
        group.addoption(each.flag, metavar=each.metavar, help=f"{each.help} [{each.variable}]")
    group.addoption("--filter", action="append", default=[], metavar="SUBSTR", help="only cases whose name has SUBSTR")
    group.addoption("--documented-only", action="store_true", help="leave out what only the kernel's source promises")
    group.addoption("--strict-defects", action="store_true", help="let known defects of kernels fail")
    group.addoption(
        "--no-isolation", action="store_false", dest="isolation", default=True,
        help="run cases in pytest's own process, for a debugger",
    )  # fmt: skip
    group.addoption("--no-sharing", action="store_true", help="run each result in a process of its own")
    group.addoption("--isolate-all", action="store_true", help="run all tests in child processes, not only cases")
    group.addoption("--ktap-fd", type=int, metavar="FD", help="write KTAP to this descriptor")
    group.addoption("--brief", action="store_true", help="tell results, and progress if stderr is a terminal, only")
    group.addoption("--kmsg", action="store_true", help="note in the kernel log which case begins")
    text = f"{MAY_HANG_KERNEL.help} [{MAY_HANG_KERNEL.variable}]"
    group.addoption(MAY_HANG_KERNEL.flag, action="store_const", const="1", help=text)
    group.addoption("--report-data-only", action="store_true", help="write no junit.xml and no report.html")
    group.addoption("--machine", metavar="FILE", help="run cases in guests, as --kernel prepares them")
    group.addoption("--pristine", action="store_true", help="give each result a guest of its own")
    group.addoption("--report-dir", metavar="DIR", help="write results.tap, results.json... into this folder")
