# SPDX-License-Identifier: GPL-2.0-only
"""A soak: the whole suite again and again with short memory, until the time is over.

The first round has all the memory it wants, and its verdicts are those to keep. In the others a memory cgroup lets
processes have half of what the first round took, so that the kernel reclaims, swaps and faults pages in again below
every case; each has another stress seed. Whatever then differs, or is left behind when a round is over, is a failure.

What is changed for it on the machine, machine/ puts back.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uffd_selftests.command.interrupts import Interrupted, Signals
from uffd_selftests.command.program import EXIT_FAILED, EXIT_NOTHING, EXIT_OK, EXIT_USAGE, PROGRAM
from uffd_selftests.formats import junit
from uffd_selftests.harness import ktap
from uffd_selftests.harness.again import PRESSURE_SCALE, suite_arguments
from uffd_selftests.harness.guest import Guest, Machine
from uffd_selftests.harness.results import Planned, Result
from uffd_selftests.harness.settings import seed
from uffd_selftests.report import command as page
from uffd_selftests.report import model
from uffd_selftests.soak.watch import Elsewhere, Here, Watch

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

WORKERS = 2
LEAST_BYTES = 96 << 20
"""Two workers need as much at times: two thousand threads have stacks in the kernel, and Python's pages come and go."""
Call = Callable[..., tuple[list[str], tuple[int, ...]]]
"""Makes of words the call of a run of the suite, and the descriptors that it inherits."""

LEFT = "left-behind"
"""The result that says what is left behind; it is there when something is."""


def main(args: argparse.Namespace, passed: Sequence[str]) -> int:
    """Run a soak and return the exit code."""
    with contextlib.ExitStack() as cleanup:
        signals = Signals()
        cleanup.callback(signals.close)
        try:
            here = Here()
            watch: Watch = here
            guest = None
            if args.machine:
                guest = cleanup.enter_context(contextlib.closing(Guest(Machine.load(Path(args.machine)), "1")))
                watch = Elsewhere(guest.ask)
            cleanup.callback(here.close)
            try:
                watch.begin()
            except OSError as error:
                say(f"--soak needs root, a memory cgroup and swap or zram: {error.strerror or error}")
                return EXIT_USAGE
            folder = args.output or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-")))

            def call(*words: str) -> tuple[list[str], tuple[int, ...]]:
                """Return the call of a run of the suite in the group, and the descriptors that it inherits."""
                if not guest:
                    return here.group.command(*words), ()
                guest.dismiss()
                return [*words, *guest.lend(Path(args.machine), folder / "guest.json")], guest.descriptors

            return Soak(args, passed, folder.resolve(), watch, call=call, cleanup=cleanup).run()
        except EOFError as error:
            say(f"the guest is gone: {error}")
            return EXIT_FAILED
        except Interrupted:
            return 128 + signals.number
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except OSError as error:
            say(f"{error.filename or 'the soak'}: {errno.errorcode.get(error.errno or 0, error)}")
            return EXIT_FAILED


def say(message: str) -> None:
    """Say something on stderr."""
    sys.stderr.write(f"{PROGRAM}: {message}\n")


@dataclass
class Round:
    """What came out of one run of the suite."""

    number: int
    seed: int
    code: int
    document: dict[str, Any]
    """Its results.json; empty when there is none."""

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Its results by name."""
        return {result["name"]: result for result in self.document.get("results", ())}

    def __str__(self) -> str:
        return f"round {self.number} (--stress-seed {self.seed})"


class Soak:
    """Rounds, and what is to be said of them together."""

    def __init__(
        self, args: argparse.Namespace, passed: Sequence[str], folder: Path, watch: Watch,
        *, call: Call, cleanup: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        self._args = args
        self._passed = passed
        self._folder = folder
        self._watch = watch
        self._call = call
        copy = cleanup.enter_context((folder / "results.tap").open("w"))
        stdout = os.fdopen(1, "w", closefd=False)  # sys.stdout would try again to write, at the program's end
        self._ktap = ktap.Writer(stdout, copy)
        self._rounds = 0
        self._results = 0
        self._deviations: dict[str, list[str]] = {}
        """What differed from the first round, and how, by the name of the result."""
        self._left: list[str] = []

    def run(self) -> int:
        """Run rounds until the time is over, two at least, and return the exit code; raises Interrupted."""
        begun = time.monotonic()
        try:
            first = self._round()
            if not first.results or first.document["interrupted"]:
                if first.document:
                    self._ktap.bail_out(first.document["interrupted"] or "the first round has no results")
                return first.code or EXIT_FAILED  # it has said why
            self._look_behind(first)
            self._watch.settle()
            self._limit()
            while self._rounds == 1 or time.monotonic() - begun < self._args.soak:
                later = self._round()
                if not (self._compare(first, later) | self._look_behind(later)):
                    shutil.rmtree(self._folder / f"round-{later.number}", ignore_errors=True)
        except Interrupted as interrupted:
            for name, lines in self._deviations.items():
                self._ktap.remark(f"{name}:", *lines)
            self._ktap.remark(*self._left)
            self._ktap.bail_out(str(interrupted))
            raise
        return self._finish(first, time.monotonic() - begun)

    def _limit(self) -> None:
        """Give the later rounds half of the memory that the first one took."""
        size = max(LEAST_BYTES, self._watch.peak() // 2)
        self._watch.limit(size)
        self._ktap.remark(f"from now on with {size >> 20} MiB of memory, and what does not fit in swap")

    # ---- a round ----

    def _round(self) -> Round:
        self._rounds += 1
        folder = self._folder / f"round-{self._rounds}"
        shutil.rmtree(folder, ignore_errors=True)
        number = seed(self._args.stress_seed or os.environ.get("UFFD_STRESS_SEED") or "")
        before = self._watch.statistics()
        start = time.monotonic()
        code = self._run_suite(folder, number)
        result = Round(self._rounds, number, code, _document(folder))
        if not result.results:
            return result
        self._results += len(result.results)
        grown = {name: count - before[name] for name, count in self._watch.statistics().items()}
        self._ktap.remark(
            f"{result}: {len(result.results)} results in {time.monotonic() - start:.0f} s, "
            f"{grown['pgfault']} faults, {grown['pgmajfault']} of them from swap or disk"
        )
        if grown["oom_kill"]:
            self._left.append(f"{result}: the limit of memory killed {grown['oom_kill']} processes")
        return result

    def _run_suite(self, folder: Path, number: int) -> int:
        """Run the suite in the cgroup and return its exit code."""
        isolated = ["-I"] if sys.flags.isolated else []
        workers = self._args.workers if self._args.workers != "0" else str(WORKERS)
        if self._args.machine:
            workers = "0"  # there is one launcher
        words = [sys.executable, *isolated, "-m", "uffd_selftests", "-n", workers, "-o", str(folder)]
        words += ["--data-only", *(f"--case-file={path}" for path in self._args.case_file)]
        words += ["--kmsg"] if self._args.kmsg else []
        words += [f"--stress-seed={number}", *suite_arguments(self._args, self._passed, PRESSURE_SCALE)]
        call, inherited = self._call(*words)
        with subprocess.Popen(
            call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, pass_fds=inherited
        ) as process:
            assert process.stdout
            try:
                for line in process.stdout:
                    if self._rounds == 1 and line.startswith("1.."):
                        self._ktap.plan(int(line[3:]), [f"a soak of {self._args.soak} seconds"])
                    elif line.startswith("not ok"):
                        self._ktap.remark(f"round {self._rounds}: {line.rstrip()}")
            finally:
                process.terminate()  # it ends in order
        return process.returncode

    # ---- what is wrong ----

    def _compare(self, first: Round, later: Round) -> bool:
        """Note which results differ from those of the first round; returns whether there are some."""
        different = False
        if not later.document or later.document["interrupted"]:
            why = later.document.get("interrupted") or f"the run ended with exit code {later.code}"
            self._left.append(f"{later}: {why}")
            different = True
        for name in first.results | later.results:
            result = later.results.get(name, {"outcome": "no result", "diagnostics": []})
            expected = first.results.get(name, {"outcome": "no result"})
            if agree(expected, result):
                continue
            different = True
            lines = self._deviations.setdefault(name, [])
            reason = f" ({result['reason']})" if result.get("reason") else ""
            lines.append(f"{later}: {result['outcome']}{reason}; in the first round: {expected['outcome']}")
            lines += [f"  {line}" for line in result["diagnostics"]]
        return different

    def _look_behind(self, after: Round) -> bool:
        """Note what a round has left behind; returns whether there is something."""
        lines = self._watch.left()
        self._left += [f"{after}: {line}" for line in lines]
        return bool(lines)

    # ---- the end ----

    def _finish(self, first: Round, seconds: float) -> int:
        """Write all results."""
        results = [self._judge(result) for result in first.results.values()]
        extra = [name for name in self._deviations if name not in first.results]
        results += [Result(Planned(name, name, name), "fail", diagnostics=self._deviations[name]) for name in extra]
        if self._left:
            results.append(Result(Planned(LEFT, LEFT, LEFT), "fail", diagnostics=self._left))
        for result in results:
            self._ktap.result(result)
        faults = self._watch.statistics()
        self._ktap.remark(
            f"{self._rounds} rounds, {self._results} results, {faults['pgfault']} faults, "
            f"{faults['pgmajfault']} of them from swap or disk, in {seconds:.0f} seconds"
        )
        totals = Counter(result.outcome for result in results)
        self._ktap.totals(totals)
        failed = any(totals[outcome] for outcome in ktap.FAILURES)
        code = EXIT_FAILED if failed else EXIT_NOTHING if set(totals) <= {"skip"} else EXIT_OK
        if self._args.output:
            self._write_files(first, results, totals, seconds, code)
        return code

    def _judge(self, plain: dict[str, Any]) -> Result:
        """Return the result of all rounds that has this name."""
        planned = Planned.from_dict({name: plain[name] for name in Planned.__dataclass_fields__})
        if lines := self._deviations.get(planned.name):
            promise = [f"promise: {planned.promise}"] if planned.promise else []
            return Result(planned, "fail", diagnostics=[*promise, *lines], seconds=plain["seconds"])
        return Result(planned, plain["outcome"], plain["reason"], plain["diagnostics"], plain["seconds"])

    def _write_files(
        self, first: Round, results: list[Result], totals: Counter[str], seconds: float, code: int
    ) -> None:
        """Write what a run leaves, for all rounds together; raises OSError."""
        document = {
            **first.document,
            "seconds": round(seconds, 3),
            "results": [result.to_dict() for result in results],
            "totals": dict(totals),
            "exitstatus": code,
            "options": {**first.document["options"], "soak": self._args.soak, "rounds": self._rounds},
        }
        (self._folder / "results.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8", "surrogateescape")
        for name in ("environment.json", "dmesg.txt"):
            shutil.copy(self._folder / "round-1" / name, self._folder / name)
        if self._args.data_only:
            return
        try:
            run = model.load(self._folder)
            (self._folder / "junit.xml").write_bytes(junit.document([run]))
            page.write([run], self._folder / "report.html")
        except ValueError as error:
            say(f"no report.html: {error}")


def agree(expected: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether two results of one name say the same; that a known defect shows is chance where it is a race."""
    outcomes = {expected["outcome"], result["outcome"]}
    return len(outcomes) == 1 or outcomes == {"xfail", "xpass"}


def _document(folder: Path) -> dict[str, Any]:
    """Return the results.json in a folder; nothing if there is none."""
    with contextlib.suppress(OSError, ValueError):
        document: dict[str, Any] = json.loads((folder / "results.json").read_text())
        return document
    return {}
