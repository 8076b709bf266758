#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Compare this suite's fault handler with that of the kernel's uffd-stress (C): faults a second, in turn.

Exit code: 0 compared, 1 slower than --at-least says, 2 no comparison was possible, 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import IO, TYPE_CHECKING

from faults import MIB, Setup, in_units, lacks, numbers, positive, progress
from loop import DEADLINE, BenchmarkError
from upstream import UpstreamError, build_faults
from workloads import KINDS

from uffd_selftests.command.interrupts import Interrupted, Signals
from uffd_selftests.machine.facts import Facts, probe
from uffd_selftests.machine.hugepages import HugepagePool
from uffd_selftests.machine.requirements import no_userfaultfd
from uffd_selftests.mem_types import ANON, HUGETLB, HUGETLB_PRIVATE, SHMEM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

PASSES = 9
"""Of each round, by both in turn."""
FEWEST = 8
"""Pages: the first fault of a pass wakes a handler that sleeps, and is not to weigh too much."""
# What uffd-stress does. Upstream's handler of minor faults checks more than it answers; its "shmem-private" is shared.
UPSTREAM_KINDS = ("missing", "wp")
UPSTREAM_MEMS = {mem.name: mem for mem in (ANON, SHMEM, HUGETLB, HUGETLB_PRIVATE)}


class Upstream:
    """The program with upstream's handler; it measures one pass whenever it is asked to."""

    def __init__(self, program: Path, setup: Setup, threads: int, handlers: int) -> None:
        self.setup = setup
        arguments = [setup.kind, setup.mem.name, setup.size, threads, handlers]
        self._command = [str(program), *map(str, arguments)]

    def __enter__(self) -> Upstream:
        with ExitStack() as stack:
            self._errors: IO[str] = stack.enter_context(tempfile.TemporaryFile("w+"))
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if kind is not None:
                self._process.kill()  # a pass may be hanging; there is nothing to tidy up
            self._process.communicate()
            if kind is None and self._process.returncode:
                raise self._failure()

    def run(self) -> float:
        """Have every page take its fault once; return the seconds."""
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # what it has said tells why
        if not select.select([self._process.stdout], [], [], DEADLINE)[0]:
            raise BenchmarkError(f"upstream: {self.setup}: a pass does not end within {DEADLINE:g} s")
        if line := self._process.stdout.readline():
            return int(line) / 1e9
        self._process.wait()
        raise self._failure()

    def _failure(self) -> BenchmarkError:
        self._errors.seek(0)
        lines = self._errors.read().splitlines() or [f"status {self._process.returncode}"]
        return BenchmarkError(f"upstream: {self.setup}: {lines[-1]}")


@dataclass(frozen=True)
class Pair:
    """Faults a second of one round."""

    upstream: float
    ours: float

    @property
    def ratio(self) -> float:
        """Ours by upstream's."""
        return self.ours / self.upstream


@dataclass
class Comparison:
    """All rounds of one setup."""

    setup: Setup
    threads: int
    handlers: int
    pairs: list[Pair]

    @property
    def ratio(self) -> float:
        """The middle one."""
        return median(pair.ratio for pair in self.pairs)

    def to_dict(self) -> dict[str, object]:
        """Return plain data for --json."""
        return {
            "kind": self.setup.kind,
            "memory": self.setup.mem.name,
            "page_size": self.setup.mem.page_size,
            "area_size": self.setup.size,
            "threads": self.threads,
            "handlers": self.handlers,
            "ratio": self.ratio,
            "faults_per_second": [asdict(pair) for pair in self.pairs],
        }


def compare(program: Path, setup: Setup, threads: int, handlers: int, rounds: int) -> Comparison:
    """Let both do the same work, and begin anew each round: how the scheduler places the threads lasts for one."""
    comparison = Comparison(setup, threads, handlers, [])
    for number in range(1, rounds + 1):
        progress(f"{setup}: round {number} of {rounds}")
        comparison.pairs.append(compare_once(program, setup, threads, handlers))
    return comparison


def compare_once(program: Path, setup: Setup, threads: int, handlers: int) -> Pair:
    """Let both make PASSES passes in turn, after one that does not count; the middle one of each tells its rate."""
    with (
        Upstream(program, setup, threads, handlers) as upstream,
        KINDS[setup.kind](setup.mem, setup.nr_pages, handlers=handlers) as ours,
    ):
        seconds = [(upstream.run(), ours.run(threads).seconds) for _ in range(PASSES + 1)][1:]
    theirs, own = zip(*seconds, strict=True)
    return Pair(setup.nr_pages / median(theirs), setup.nr_pages / median(own))


def show(comparisons: list[Comparison]) -> None:
    """Print a table: the middle rates, and of the ratios round by round the middle one and the middle half."""
    print("fault    memory           page    area  threads  handlers  upstream/s    ours/s  ratio (middle half)")
    for comparison in comparisons:
        setup, pairs = comparison.setup, comparison.pairs
        rates = median(pair.upstream for pair in pairs), median(pair.ours for pair in pairs)
        low, _, high = quantiles([pair.ratio for pair in pairs])
        print(
            f"{setup.kind:<8} {setup.mem.name:<15}{in_units(setup.mem.page_size):>6}{in_units(setup.size):>8}"
            f"{comparison.threads:>9}{comparison.handlers:>10}{rates[0]:>12.0f}{rates[1]:>10.0f}"
            f"{comparison.ratio:>7.2f} ({low:.2f}-{high:.2f})"
        )
    number = sum(len(comparison.pairs) for comparison in comparisons)
    print(f"all: {overall(comparisons):.2f}, the middle of {number} rounds")


def overall(comparisons: list[Comparison]) -> float:
    """Return the middle of all ratios."""
    return median(pair.ratio for comparison in comparisons for pair in comparison.pairs)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kind", action="append", choices=UPSTREAM_KINDS, help="kind of fault (all); may be repeated")
    add("--mem", action="append", choices=UPSTREAM_MEMS, help="memory type (all); may be repeated")
    add("--size", type=positive, default=2, metavar="MIB", help=f"size of the area in MiB, at least {FEWEST} pages (2)")
    add("--threads", type=numbers, default=[1, 2], metavar="N,...", help="threads that touch pages (1,2)")
    add("--handlers", type=positive, metavar="N", help="threads that answer faults (one for each that touches pages)")
    add("--rounds", type=positive, default=25, metavar="N", help="rounds, from 2 on (25)")
    add("--at-least", type=float, default=0, metavar="RATIO", help="exit code 1 when the middle of all ratios is less")
    add("--kernel-tree", type=Path, metavar="PATH", help="take upstream's handler from this tree")
    add("--build-dir", type=Path, metavar="DIR", help="keep the program here, and use the one there")
    add("--json", type=Path, metavar="FILE", help="write every round there")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: one round has no spread: give two")
    if arguments.json and not arguments.json.parent.is_dir():
        parser.error(f"{arguments.json}: there is no folder {arguments.json.parent}")
    return arguments


def setups(arguments: argparse.Namespace, facts: Facts) -> Iterator[Setup]:
    """Yield what both can do here; say what is left out."""
    for kind in arguments.kind or UPSTREAM_KINDS:
        for name in arguments.mem or UPSTREAM_MEMS:
            mem = UPSTREAM_MEMS[name]
            if mem not in KINDS[kind].mems:
                continue
            setup = Setup(kind, mem, max(FEWEST, arguments.size * MIB // mem.page_size) if mem.page_size else 0)
            if reason := lacks(setup, facts):
                print(f"left out: {setup}: {reason}", file=sys.stderr)
            else:
                yield setup


def with_hugepages(found: list[Setup], stack: ExitStack) -> list[Setup]:
    """Have huge pages for both sides as long as the stack is open; leave out what there are not enough for."""
    of_hugetlb = [setup for setup in found if setup.mem.hugetlb]
    if not of_hugetlb:
        return found
    wanted = 4 * max(setup.nr_pages for setup in of_hugetlb)  # two areas each
    pool = stack.enter_context(HugepagePool(of_hugetlb[0].mem.page_size, wanted))
    if not pool.shortage:
        return found
    print(f"left out: hugetlb: {pool.shortage}", file=sys.stderr)
    return [setup for setup in found if not setup.mem.hugetlb]


def benchmark(arguments: argparse.Namespace) -> int:
    """Build, compare, show; return the exit code."""
    facts = probe()
    if reason := no_userfaultfd(facts):
        raise BenchmarkError(reason)
    with ExitStack() as stack:
        folder = arguments.build_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uffd-")))
        program = build_faults(folder.resolve(), arguments.kernel_tree)
        found = with_hugepages(list(setups(arguments, facts)), stack)
        comparisons = [
            compare(program, setup, threads, arguments.handlers or threads, arguments.rounds)
            for setup in found
            for threads in arguments.threads
            if threads <= setup.nr_pages
        ]
    progress("")
    if not comparisons:
        raise BenchmarkError("nothing to compare")
    print(f"Linux {facts.release} {facts.machine}, CPUs: {facts.cpus}, rounds: {arguments.rounds}")
    show(comparisons)
    if arguments.json:
        document = {"kernel": facts.release, "cpus": os.cpu_count(), "results": [c.to_dict() for c in comparisons]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if overall(comparisons) < arguments.at_least else 0


def main() -> int:
    """Run; return the exit code."""
    arguments = parse_arguments()
    signals = Signals()
    try:
        return benchmark(arguments)
    except (BenchmarkError, UpstreamError, OSError) as error:
        progress("")
        print(f"compare_faults.py: {error}", file=sys.stderr)
        return 2
    except Interrupted:
        progress("")
        return 128 + signals.number
    finally:
        signals.close()


if __name__ == "__main__":
    sys.exit(main())
