#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Measure what userfaults cost: faults a second, and how long each one takes.

Exit code: 0 measured, 1 a measurement failed, 2 usage error, 4 nothing could be measured, 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

try:
    from compare_upstream import meminfo
    from loop import BenchmarkError
    from workloads import KINDS, Sample, Workload

    from uffd_selftests.command.interrupts import Interrupted, Signals
    from uffd_selftests.machine.facts import Facts, probe
    from uffd_selftests.machine.hugepages import HugepagePool, lack_of_hugepages
    from uffd_selftests.machine.requirements import missing_features, no_userfaultfd
    from uffd_selftests.mem_types import ALL, MemType
except ImportError as error:
    root = Path(__file__).resolve().parent.parent
    print(f"faults.py: {error}: {root}/run_tests.sh -l makes {root}/.venv; use its bin/python", file=sys.stderr)
    sys.exit(2)

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
ENOUGH_FAULTS = 256
"""A round goes over a small area so often that there are as many faults."""


@dataclass(frozen=True)
class Setup:
    """What is set up once a round, and measured with different numbers of threads."""

    kind: str
    mem: MemType
    nr_pages: int

    @property
    def size(self) -> int:
        """Bytes of the area."""
        return self.nr_pages * self.mem.page_size

    @property
    def memory(self) -> int:
        """Bytes that it takes."""
        return self.size * (2 if KINDS[self.kind].with_source else 1)

    def __str__(self) -> str:
        return f"{self.kind} on {self.mem}, {in_units(self.mem.page_size)} pages, area of {in_units(self.size)}"


@dataclass
class Result:
    """A line of the table: all rounds of a setup with so many threads."""

    setup: Setup
    threads: int
    rounds: list[Sample] = field(default_factory=list)

    @property
    def total(self) -> Sample:
        """All rounds together."""
        first, *rest = self.rounds
        return sum(rest, first)

    @property
    def rates(self) -> list[float]:
        """Faults a second, round by round."""
        return [sample.faults / sample.seconds for sample in self.rounds]

    def to_dict(self) -> dict[str, object]:
        """Return plain data for --json."""
        total = self.total
        scan = {name: seconds / total.faults * 1e9 for name, seconds in self._scans(total)}
        return {
            "kind": self.setup.kind,
            "memory": self.setup.mem.name,
            "page_size": self.setup.mem.page_size,
            "area_size": self.setup.size,
            "threads": self.threads,
            "faults": total.faults,
            "faults_per_second": {"median": median(self.rates), "min": min(self.rates), "max": max(self.rates)},
            "latency_ns": {
                "p50": total.latencies.percentile(50),
                "p99": total.latencies.percentile(99),
                "max": total.latencies.slowest,
                "histogram": total.latencies.buckets,
            },
            "scan_ns_per_page": scan or None,
        }

    @staticmethod
    def _scans(total: Sample) -> list[tuple[str, float]]:
        scans = [("written", total.scan_written), ("clean", total.scan_clean)]
        return scans if total.scan_written else []


@dataclass
class Report:
    """What was measured, and what was not."""

    results: list[Result] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> list[Result]:
        """The results with at least one round."""
        return [result for result in self.results if result.rounds]

    def to_dict(self, facts: Facts, arguments: argparse.Namespace) -> dict[str, Any]:
        """Return plain data for --json."""
        return {
            "kernel": facts.release,
            "machine": facts.machine,
            "cpus": facts.cpus,
            "handlers": arguments.handlers,
            "rounds": arguments.rounds,
            "results": [result.to_dict() for result in self.measured],
            "left_out": self.left_out,
            "failed": self.failed,
        }


# ---- the command line ----------------------------------------------------------------------------------------------


def in_units(size: int) -> str:
    """Return a size in bytes as in ``64 kB``, ``2 MB``."""
    for unit, name in ((1 << 30, "GB"), (MIB, "MB")):
        if size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size // 1024} kB"


def numbers(text: str) -> list[int]:
    """Read ``1,2,4``."""
    found = [int(number) for number in text.split(",")]
    if min(found) < 1:
        raise ValueError
    return sorted(set(found))


def bytes_of(text: str) -> int:
    """Read ``64kB``, ``2MB``, ``1GB``."""
    match = re.fullmatch(r"(\d+) ?([kMG])B?", text)
    if not match:
        raise ValueError
    return int(match[1]) << {"k": 10, "M": 20, "G": 30}[match[2]]


def positive(text: str) -> int:
    """Read a number from 1 on."""
    return numbers(text)[0]


numbers.__name__, bytes_of.__name__, positive.__name__ = "list of numbers", "size", "number"  # argparse shows these


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="faults.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kind", action="append", choices=KINDS, help="kind of fault (all); may be repeated")
    add("--mem", action="append", choices=[mem.name for mem in ALL], help="memory type (all); may be repeated")
    add("--hugepage-size", action="append", type=bytes_of, metavar="SIZE", help="of hugetlb: 2MB, 1GB; may be repeated")
    add("--sizes", type=numbers, default=[16], metavar="MIB,...", help="sizes of the area in MiB (16)")
    add("--threads", type=numbers, default=[1, 2], metavar="N,...", help="threads that touch pages (1,2)")
    add("--handlers", type=positive, default=1, metavar="N", help="threads that answer faults (1)")
    add("--rounds", type=positive, default=5, metavar="N", help="rounds over everything (5)")
    add("--json", type=Path, metavar="FILE", help="write every result there, with its histogram")
    add("--plot", type=Path, metavar="FILE", help="draw cost by size and rate by threads: .png, .svg, .pdf")
    arguments = parser.parse_args(words)
    for path in filter(None, (arguments.json, arguments.plot)):
        if not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    return arguments


def memory_types(arguments: argparse.Namespace, facts: Facts) -> Iterator[MemType]:
    """Yield the memory types asked for, hugetlb in each page size asked for."""
    for mem in ALL:
        if arguments.mem and mem.name not in arguments.mem:
            continue
        if not mem.hugetlb:
            yield mem
        else:
            for size in arguments.hugepage_size or [facts.hugepage_size]:
                yield replace(mem, huge_size=0 if size == facts.hugepage_size else size)


def setups(arguments: argparse.Namespace, facts: Facts) -> Iterator[Setup]:
    """Yield everything that was asked for and can exist."""
    for kind, workload in KINDS.items():
        if arguments.kind and kind not in arguments.kind:
            continue
        for mem, size in itertools.product(memory_types(arguments, facts), arguments.sizes):
            if mem.name in [offered.name for offered in workload.mems]:
                yield Setup(kind, mem, max(1, size * MIB // mem.page_size) if mem.page_size else 0)


def lacks(setup: Setup, facts: Facts) -> str | None:
    """Return why a setup cannot be measured here."""
    if setup.mem.hugetlb and setup.mem.page_size not in facts.hugepage_sizes:
        return "kernel lacks huge pages of this size"
    if not setup.mem.hugetlb and setup.memory > (available := meminfo("MemAvailable") * 1024):
        return f"it takes {in_units(setup.memory)}, there are {available // MIB} MB"
    workload = KINDS[setup.kind]
    missing = missing_features(facts, workload.features(setup.mem))
    return workload.lacks(facts) if not missing else missing[0]


# ---- measuring -----------------------------------------------------------------------------------------------------


def plan(arguments: argparse.Namespace, facts: Facts) -> Report:
    """Decide what is measured; the rest is left out with a reason."""
    report = Report()
    for setup in setups(arguments, facts):
        if reason := lacks(setup, facts):
            report.left_out[str(setup)] = reason
            continue
        for threads in arguments.threads:
            if threads > setup.nr_pages:
                report.left_out[f"{setup}, {threads} threads"] = f"there are {setup.nr_pages} pages: --sizes"
            else:
                report.results.append(Result(setup, threads))
    return report


def get_hugepages(report: Report, stack: ExitStack) -> None:
    """Have huge pages for as long as the stack is open; leave out what there are not enough for."""
    of_hugetlb = dict.fromkeys(result.setup for result in report.results if result.setup.mem.hugetlb)
    for size in {setup.mem.page_size for setup in of_hugetlb}:
        own = [setup for setup in of_hugetlb if setup.mem.page_size == size]
        pool = stack.enter_context(HugepagePool(size, max(setup.memory for setup in own) // size))
        for setup in own if pool.shortage else ():
            if reason := lack_of_hugepages(size, setup.memory // size):
                report.left_out[str(setup)] = reason
    report.results = [result for result in report.results if str(result.setup) not in report.left_out]


def measure_round(workload: Workload, result: Result) -> Sample:
    """Go over the area until there are enough faults."""
    passes = -(-ENOUGH_FAULTS // result.setup.nr_pages)
    first, *rest = (workload.run(result.threads) for _ in range(passes))
    return sum(rest, first)


def measure(report: Report, arguments: argparse.Namespace) -> None:
    """Measure everything once a round, so that what else the machine does hits all alike."""
    by_setup = [(setup, list(group)) for setup, group in itertools.groupby(report.results, lambda r: r.setup)]
    for number in range(1, arguments.rounds + 1):
        for setup, results in by_setup:
            if str(setup) in report.failed:
                continue
            progress(f"round {number} of {arguments.rounds}: {setup}")
            try:
                with KINDS[setup.kind](setup.mem, setup.nr_pages, handlers=arguments.handlers) as workload:
                    for result in results:
                        result.rounds.append(measure_round(workload, result))
            except BenchmarkError as error:
                report.failed[str(setup)] = str(error)
    progress("")


def progress(text: str) -> None:
    """Show what is going on, where somebody may look."""
    if sys.stderr.isatty():
        print(f"\r{text}\033[K\r", end="", file=sys.stderr, flush=True)


# ---- showing -------------------------------------------------------------------------------------------------------


def table(results: list[Result]) -> list[str]:
    """Return the lines of the table."""
    heads = ("fault", "memory", "page", "area", "threads", "faults/s", "min", "max", "p50 us", "p99 us", "max us")
    scans = ("scan ns", "clean ns") if any(result.total.scan_written for result in results) else ()
    rows = [(*heads, *scans), *(cells(result) for result in results)]
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    texts = 2  # the first columns, which are flush left
    return [
        "  ".join(
            cell.ljust(width) if i < texts else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def cells(result: Result) -> tuple[str, ...]:
    """Return the cells of a line."""
    setup, total, rates = result.setup, result.total, result.rates
    latencies = total.latencies.percentile(50), total.latencies.percentile(99), total.latencies.slowest
    scans = (total.scan_written, total.scan_clean) if total.scan_written else ()
    return (
        *(setup.kind, setup.mem.name, in_units(setup.mem.page_size), in_units(setup.size), str(result.threads)),
        *(f"{rate:.0f}" for rate in (median(rates), min(rates), max(rates))),
        *(f"{latency / 1000:.1f}" for latency in latencies),
        *(f"{seconds / total.faults * 1e9:.0f}" for seconds in scans),
    )


def show(report: Report, facts: Facts, arguments: argparse.Namespace) -> None:
    """Print the table, and what is not in it."""
    if report.measured:
        handlers, rounds = arguments.handlers, arguments.rounds
        print(f"Linux {facts.release} {facts.machine}, CPUs: {facts.cpus}, handlers: {handlers}, rounds: {rounds}")
        print("\n".join(table(report.measured)))
    for why in dict.fromkeys(report.left_out.values()):
        names = [name for name, reason in report.left_out.items() if reason == why]
        print(f"left out: {'; '.join(names)}: {why}", file=sys.stderr)
    for what, why in report.failed.items():
        print(f"failed: {what}: {why}", file=sys.stderr)


def save(report: Report, facts: Facts, arguments: argparse.Namespace) -> None:
    """Write what --json and --plot ask for."""
    document = report.to_dict(facts, arguments)
    try:
        if arguments.json:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        if arguments.plot:
            from plot import draw  # noqa: PLC0415 - matplotlib takes a second

            draw(document, arguments.plot)
    except OSError as error:
        raise BenchmarkError(f"cannot write {error.filename}: {error.strerror}") from None


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure and show; return the exit code."""
    facts = probe()
    if reason := no_userfaultfd(facts):
        print(f"faults.py: {reason}", file=sys.stderr)
        return 4
    if not any(setups(arguments, facts)):
        raise BenchmarkError("no --kind that is asked for is there on a --mem that is: see benchmarks/README.md")
    report = plan(arguments, facts)
    with ExitStack() as stack:
        get_hugepages(report, stack)
        measure(report, arguments)
    show(report, facts, arguments)
    if report.measured:
        save(report, facts, arguments)
    if report.failed:
        return 1
    return 0 if report.measured else 4


def check_plot(arguments: argparse.Namespace) -> None:
    """Refuse --plot before anything is measured, if it cannot be drawn."""
    if arguments.plot:
        try:
            from plot import FORMATS  # noqa: PLC0415
        except ImportError as error:
            raise BenchmarkError(f"--plot: {error}: pip install matplotlib, or '.[bench]' in the checkout") from None
        if arguments.plot.suffix[1:] not in FORMATS:
            raise BenchmarkError(f"--plot {arguments.plot}: give it the ending of one of these: {', '.join(FORMATS)}")


def main() -> int:
    """Run; return the exit code."""
    arguments = parse_arguments()
    signals = Signals()
    try:
        check_plot(arguments)
        return benchmark(arguments)
    except BenchmarkError as error:
        print(f"faults.py: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        progress("")
        return 128 + signals.number
    finally:
        signals.close()


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
