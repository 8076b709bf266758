#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Compare this suite with the kernel's uffd-unit-tests (C): same verdicts, and in what time.

Exit code: 0 all verdicts are the same, 1 some differ, 2 no comparison was possible.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from upstream import UpstreamError, Verdict, build, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

OURS = Path(__file__).resolve().parent.parent / "run_tests.sh"
UPSTREAM = "upstream"
ATTEMPTS = 3
"""How often the C program may be started for one complete run: its events case hangs or dies now and then."""


class ComparisonError(Exception):
    """No comparison is possible; the message says what to do."""


# ---- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One run of one program."""

    contender: str
    seconds: float
    """Wall time from before the start to after the end."""
    user: float
    system: float
    """Processor seconds, of all its processes."""
    verdicts: dict[str, Verdict]
    complete: bool
    """Whether every result that was announced is there."""


def run(contender: str, command: Sequence[str], timeout: float) -> Run:
    """Run a program to its end, or for timeout seconds, and read its verdicts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.monotonic()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
        except OSError as error:
            raise ComparisonError(f"cannot run {command[0]}: {error.strerror}") from None
        # Not wait(timeout), which polls in steps of up to 50 ms.
        timer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            process.wait()
        finally:
            timer.cancel()
            end(process)
        seconds = time.monotonic() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        output.seek(0)
        errors.seek(0)
        verdicts, complete = parse(output.read())
        message = errors.read().strip()
    if not verdicts:
        last = message.splitlines()[-1] if message else f"status {process.returncode}"
        raise ComparisonError(f"{shlex.join(command)} gave no results: {last}")
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return Run(contender, seconds, user, system, verdicts, complete)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program that may still run, giving it ten seconds to tidy up."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_upstream(program: Path, timeout: float, *, one_cpu: bool) -> Run:
    """Run the C program until a run is complete, ATTEMPTS times at most."""
    command = [*(["taskset", "-c", str(min(os.sched_getaffinity(0)))] if one_cpu else []), str(program)]
    for attempt in range(1, ATTEMPTS + 1):
        result = run(UPSTREAM, command, timeout)
        if result.complete:
            break
        last = list(result.verdicts)[-1]
        print(f"upstream ended in '{last}' (attempt {attempt} of {ATTEMPTS}), results after it are unknown")
    return result


@contextlib.contextmanager
def hugepages(pages: int) -> Iterator[None]:
    """Let at least so many pages of the default huge page size be free; take away at the end what was added."""
    control = Path("/proc/sys/vm/nr_hugepages")
    missing = pages - meminfo("HugePages_Free") + meminfo("HugePages_Rsvd")
    added = 0
    try:
        if missing > 0:
            before = int(control.read_text())
            control.write_text(str(before + missing))
            added = int(control.read_text()) - before
    except OSError as error:
        print(f"{control}: {error.strerror}; hugetlb results will be skipped", file=sys.stderr)
    try:
        yield
    finally:
        if added > 0:
            control.write_text(str(max(0, int(control.read_text()) - added)))


def meminfo(field: str) -> int:
    """Return a field of /proc/meminfo, in the unit used there; 0 when there is no such field."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    return 0


def pages_for(workers: int) -> int:
    """Return the huge pages that a program with so many workers takes: two areas of 32 MiB for each, and spare."""
    size = meminfo("Hugepagesize") * 1024
    return workers * (2 * max(2, (32 << 20) // size) + 4) if size else 0


# ---- comparing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """A result that upstream and we do not agree on."""

    contender: str
    name: str
    upstream: str
    ours: str


def differences(upstream: Run, ours: Run) -> list[Difference]:
    """Return the results of upstream's that ours lacks or that are different there."""
    missing = Verdict("missing")
    return [
        Difference(ours.contender, name, str(theirs), str(other))
        for name, theirs in upstream.verdicts.items()
        if (other := ours.verdicts.get(name, missing)).outcome != theirs.outcome
    ]


def compare_verdicts(pairs: list[tuple[Run, Run]]) -> list[Difference]:
    """Return what differs in any pair, each difference once."""
    found = (difference for upstream, ours in pairs for difference in differences(upstream, ours))
    return list(dict.fromkeys(found))


def print_verdicts(upstream: Run, ours: Run, found: list[Difference]) -> None:
    """Say what was compared, and each difference."""
    outcomes = [verdict.outcome for verdict in upstream.verdicts.values()]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
    print(f"upstream: {len(outcomes)} results, {counts}")
    for difference in found:
        print(f"DIFFERENT  {difference.name}: upstream {difference.upstream}, {difference.contender} {difference.ours}")
    if not found:
        print("verdicts: all the same")
    if extra := sorted(ours.verdicts.keys() - upstream.verdicts.keys()):
        print(f"only ours, and in our time: {', '.join(extra)}")


def print_times(pairs: list[tuple[Run, Run]]) -> None:
    """Print a table: seconds and processor seconds, and ours divided by upstream's, pair by pair."""
    print("\nseconds       median     min     max    user  system   ratio to upstream, pair by pair")
    print(row([upstream for upstream, _ in pairs], []))
    for contender in dict.fromkeys(ours.contender for _, ours in pairs):
        own = [(upstream, ours) for upstream, ours in pairs if ours.contender == contender]
        print(row([ours for _, ours in own], [ours.seconds / upstream.seconds for upstream, ours in own]))


def row(runs: list[Run], ratios: list[float]) -> str:
    """Return a line of the table."""
    seconds = [run.seconds for run in runs]
    columns = [median(seconds), min(seconds), max(seconds)]
    columns += [median(run.user for run in runs), median(run.system for run in runs)]
    line = f"{runs[0].contender:<12}" + "".join(f"{column:8.2f}" for column in columns)
    return line + (f"   {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "")


def report(pairs: list[tuple[Run, Run]], found: list[Difference]) -> dict[str, object]:
    """Return everything that was seen, for --json."""
    uname = platform.uname()
    return {
        "kernel": uname.release,
        "machine": uname.machine,
        "cpus": os.cpu_count(),
        "differences": [asdict(difference) for difference in found],
        "pairs": [{"upstream": asdict(upstream), "ours": asdict(ours)} for upstream, ours in pairs],
    }


# ---- the command line ----------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed runs of each (5; 0: verdicts only)")
    parser.add_argument("-n", "--workers", type=int, default=0, metavar="N", help="also time ours with N workers")
    parser.add_argument(
        "--one-cpu", action="store_true", help="keep upstream's program on one processor, where it is at its best"
    )
    parser.add_argument("--kernel-tree", type=Path, metavar="PATH", help="build upstream's program from this tree")
    parser.add_argument("--build-dir", type=Path, metavar="DIR", help="keep the program here, and use the one there")
    parser.add_argument("--ours", default=shlex.quote(str(OURS)), metavar="CMD", help="our command (run_tests.sh)")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="end a run after this (300)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run and result there")
    arguments = parser.parse_args()
    if arguments.rounds < 0 or arguments.workers < 0:
        parser.error("--rounds and --workers take numbers from 0")
    return arguments


def contenders(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, list[str]]:
    """Return our command lines, restricted to upstream's results, by their labels."""
    command = shlex.split(arguments.ours)
    for name in names:
        command += ["-f", f"={name}"]
    found = {"ours": command}
    if arguments.workers:
        found[f"ours -n {arguments.workers}"] = [*command, "-n", str(arguments.workers)]
    return found


def compare(arguments: argparse.Namespace, program: Path) -> int:
    """Do the comparison and print it; return the exit code."""
    warm = run_upstream(program, arguments.timeout, one_cpu=arguments.one_cpu)
    commands = contenders(arguments, list(warm.verdicts))
    first = [(warm, run(label, command, arguments.timeout)) for label, command in commands.items()]
    timed = []
    for number in range(1, arguments.rounds + 1):
        for label, command in commands.items():
            if sys.stderr.isatty():
                print(f"\rround {number} of {arguments.rounds}: {label}\033[K\r", end="", file=sys.stderr, flush=True)
            theirs = run_upstream(program, arguments.timeout, one_cpu=arguments.one_cpu)
            timed.append((theirs, run(label, command, arguments.timeout)))
    found = compare_verdicts(first + timed)
    print_verdicts(*first[0], found)
    if whole := [pair for pair in timed if pair[0].complete and pair[1].complete]:
        print_times(whole)
    if len(whole) < len(timed):
        print(f"{len(timed) - len(whole)} of {len(timed)} timed pairs are left out of the table: incomplete runs")
    if arguments.json:
        arguments.json.write_text(json.dumps(report(timed or first, found), indent=1) + "\n")
    return 1 if found else 0


def leave(number: int, _frame: FrameType | None) -> None:
    """Turn a signal into an exception, so that everything is put back."""
    raise SystemExit(128 + number)


def main() -> int:
    """Build, prepare, compare; return the exit code."""
    arguments = parse_arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    try:
        with contextlib.ExitStack() as stack:
            folder = arguments.build_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uffd-")))
            program = build(folder.resolve(), arguments.kernel_tree)
            stack.enter_context(hugepages(pages_for(max(1, arguments.workers))))
            return compare(arguments, program)
    except (ComparisonError, UpstreamError) as error:
        print(f"compare_upstream.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
