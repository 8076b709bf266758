# SPDX-License-Identifier: GPL-2.0-only
"""A run in other kernels: one KTAP document with a subtest for each kernel, one folder for each below ``-o DIR``.

A kernel's folder has the files of a run of the suite (harness/reporter.py; junit.xml and report.html are made here),
guest.sh, which began it, and console.txt: what the kernel and virtme-ng said. Of a kernel that died, results.json has
what came out of it; like the KTAP it blames the case that was running and skips the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import uffd_selftests
from uffd_selftests.command.interrupts import Interrupted, Signals
from uffd_selftests.command.program import EXIT_FAILED, EXIT_NOTHING, EXIT_OK, EXIT_USAGE, PROGRAM
from uffd_selftests.formats import junit
from uffd_selftests.harness import ktap
from uffd_selftests.harness.again import PRESSURE_SCALE, suite_arguments
from uffd_selftests.harness.settings import OPTIONS
from uffd_selftests.report.command import write
from uffd_selftests.report.model import FORMAT, load
from uffd_selftests.vm import images, userland, vng
from uffd_selftests.vm.guests import MARGIN_SECONDS, Accelerator, Ending, Guest
from uffd_selftests.vm.options import native
from uffd_selftests.vm.verdict import judge, reported, unfinished

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from uffd_selftests.harness.results import Result
    from uffd_selftests.vm.images import Kernel

VERSION = "KTAP version 1"
INDENT = "  "
TCG_SCALE = 8.0
"""How much longer everything may take under emulation."""


class Plan(NamedTuple):
    """What a guest is to run."""

    names: list[str]
    """Of all results to come."""
    files: list[Path]
    """Those with their cases."""


def main(args: argparse.Namespace, passed: Sequence[str]) -> int:
    """Run the suite in each kernel of ``--kernel`` and return the exit code."""
    with contextlib.ExitStack() as cleanup:
        signals = Signals()
        cleanup.callback(signals.close)
        try:
            kernels = images.distinguish(images.find(path, args.arch) for path in args.kernel)
            if args.arch not in (native(), *userland.TOOLCHAINS):
                raise ValueError(f"--arch {args.arch}: only kernels for {native()} can be booted here")
            if lacking := vng.missing(args.arch):
                raise ValueError(lacking)
            if args.vm_accel == vng.KVM:
                _check_kvm(args.arch)
            folder = args.output or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-")))
            session = Session(args, passed, folder.resolve())
            with session.trying_kvm(kernels[0]):
                plan = _plan(args, passed)
            programs = userland.prepare(args.arch, say) if args.arch != native() else None
            return exit_code(session.run(kernels, plan, programs))
        except ValueError as error:
            say(str(error))
            return EXIT_USAGE
        except subprocess.CalledProcessError as error:
            sys.stderr.write(error.stderr)
            return error.returncode
        except Interrupted:
            return 128 + signals.number
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        except OSError as error:
            say(_unwritable(error))
            return EXIT_FAILED


def _unwritable(error: OSError) -> str:
    """Say what cannot be written, and why."""
    return f"cannot write {error.filename or 'the results'}: {error.strerror}"


def _check_kvm(arch: str) -> None:
    """Refuse to do without; raises ValueError."""
    if arch != native():
        raise ValueError(f"--vm-accel kvm: a kernel for {arch} can only be emulated here")
    if not vng.kvm_present():
        raise ValueError("--vm-accel kvm: cannot open /dev/kvm: load kvm_intel or kvm_amd, join the group kvm")


def exit_code(outcomes: Sequence[str]) -> int:
    """Return the exit code of a run with these outcomes of its kernels."""
    if any(outcome in ktap.FAILURES for outcome in outcomes):
        return EXIT_FAILED
    return EXIT_NOTHING if set(outcomes) <= {"skip"} else EXIT_OK


def say(message: str) -> None:
    """Say something on stderr."""
    sys.stderr.write(f"{PROGRAM}: {message}\n")


def _is_ours(argument: str) -> bool:
    """Whether an argument for pytest is but a place where the suite's cases are."""
    path = Path(argument)
    return not argument.startswith("-") and path.exists() and vng.PROJECT in path.resolve().parents


def _plan(args: argparse.Namespace, passed: Sequence[str]) -> Plan:
    """Ask the suite what it would run.

    On the way pytest compiles the cases, which a guest could not keep.  Raises CalledProcessError when the options are
    wrong.
    """
    isolated = ["-I"] if sys.flags.isolated else []
    call = [sys.executable, *isolated, "-m", "uffd_selftests", "-l", "--with-ids", *suite_arguments(args, passed)]
    listing = subprocess.run(call, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True)
    results = [line.partition("\t") for line in listing.stdout.splitlines()]
    files = dict.fromkeys(vng.PROJECT / nodeid.partition("::")[0] for _, _, nodeid in results)
    return Plan([name for name, _, _ in results], list(files))


class Document:
    """The KTAP of the whole run, on stdout and in a file."""

    def __init__(self, copy: Path) -> None:
        self._stdout = os.fdopen(1, "w", closefd=False)  # sys.stdout would try again to write, at the program's end
        self._file: TextIO | None = copy.open("w")
        self.trouble = ""
        """Why the file is not whole."""

    def write(self, *lines: str) -> None:
        """Write lines, at once; raises BrokenPipeError when nobody reads them."""
        text = "".join(f"{line}\n" for line in lines)
        self._stdout.write(text)
        self._stdout.flush()
        if not self._file:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self.trouble = f"cannot write {self._file.name}: {error.strerror}"
            self._file = None

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


class Job:
    """A kernel, its machine, and what comes out of it."""

    def __init__(self, kernel: Kernel, folder: Path) -> None:
        self.kernel = kernel
        self.guest = Guest(kernel, folder)
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """The suite's KTAP; None is the end."""
        self.ending: Future[Ending]


class Session:
    """Boots kernels, several at once if asked to, and reports them in their order."""

    def __init__(self, args: argparse.Namespace, passed: Sequence[str], folder: Path) -> None:
        self._args = args
        self._passed = passed
        self._folder = folder
        self._plan = Plan([], [])
        self._accelerator = Accelerator(args.vm_accel if args.arch == native() else vng.TCG)
        extra = (tuple(args.vm_append), tuple(args.vm_qemu))
        self._shape = vng.Shape(args.arch, args.vm_memory, args.vm_cpus, *extra)

    @contextlib.contextmanager
    def trying_kvm(self, kernel: Kernel) -> Iterator[None]:
        """Find out meanwhile whether KVM works."""
        with tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-") as scratch, ThreadPoolExecutor(1) as thread:
            guest = Guest(kernel, Path(scratch))
            command = functools.partial(vng.command, kernel, self._shape, vng.KVM, guest.folder, [])
            trial = thread.submit(self._accelerator.try_early, guest, command)
            try:
                yield
                trial.result()
            finally:
                guest.stop()

    def run(self, kernels: Sequence[Kernel], plan: Plan, programs: userland.Userland | None = None) -> list[str]:
        """Run all and return their outcomes; raises OSError when nothing can be written, Interrupted.

        programs are the guest's, where it cannot run the host's.
        """
        self._plan = plan
        self._shape = dataclasses.replace(self._shape, userland=programs)
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(Document(self._folder / "results.tap")) as document:
            try:
                with self._booting(kernels) as jobs:
                    document.write(VERSION, f"1..{len(jobs)}")
                    outcomes = [self._report(job, number, document) for number, job in enumerate(jobs, 1)]
            except Interrupted as interrupted:
                document.write(f"Bail out! {interrupted}")
                raise
            except BrokenPipeError:
                raise
            except OSError as error:
                document.write(f"Bail out! {_unwritable(error)}")
                raise
            document.write(ktap.totals_line(Counter(outcomes)))
        if self._args.output:
            self._write_overviews(kernels)
        if document.trouble:
            say(document.trouble)
            outcomes.append("error")
        return outcomes

    # ---- booting ----

    @contextlib.contextmanager
    def _booting(self, kernels: Sequence[Kernel]) -> Iterator[list[Job]]:
        """Start the machines, so many at once; none is left at the end."""
        jobs = [Job(kernel, self._fresh(kernel)) for kernel in kernels]
        with ThreadPoolExecutor(self._at_once()) as threads:
            try:
                for job in jobs:
                    job.ending = threads.submit(self._start, job)
                yield jobs
            finally:
                threads.shutdown(wait=False, cancel_futures=True)
                for job in jobs:
                    job.guest.stop()

    def _at_once(self) -> int:
        workers = self._args.workers
        return max(1, len(os.sched_getaffinity(0)) if workers == "auto" else int(workers))

    def _fresh(self, kernel: Kernel) -> Path:
        """Return an empty folder for a kernel."""
        folder = self._folder / kernel.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def _start(self, job: Job) -> Ending:
        """Boot a kernel with what works here and run the suite in it."""
        try:
            boot = functools.partial(self._boot, job)
            return self._accelerator.run(boot, say, job.kernel.name)
        finally:
            job.lines.put(None)

    def _boot(self, job: Job, accelerator: str, alive: Callable[[], None]) -> Ending:
        say(f"{job.kernel.name}: booting, {'with KVM' if accelerator == vng.KVM else 'emulated'}")
        scale = self._scale(accelerator)
        arguments = ["--kmsg", "-o", vng.RESULTS, "--data-only"]
        arguments += [f"--soak={self._args.soak}"] if self._args.soak else []
        passed = self._passed
        if all(_is_ours(argument) for argument in passed):  # the guest need not look elsewhere, nor talk to anybody
            passed = []
            arguments += [f"--case-file={path}" for path in self._plan.files]
        arguments += suite_arguments(self._args, passed, scale)
        command = vng.command(job.kernel, self._shape, accelerator, job.guest.folder, arguments)
        return job.guest.run(command, accelerator, self._patience(scale), job.lines.put, alive)

    def _patience(self, scale: float) -> float:
        """Return for how many seconds a guest may make no progress: longer than its suite lets a case take."""
        values = {each.name: each.value(getattr(self._args, each.name)) for each in OPTIONS}
        return float(scale * values["deadline"] + values["duration"] + MARGIN_SECONDS)

    def _scale(self, accelerator: str) -> float:
        """Return by how much deadlines are multiplied."""
        given = self._args.deadline_scale or os.environ.get("UFFD_DEADLINE_SCALE")
        scale = TCG_SCALE if accelerator == vng.TCG else 1.0
        return float(given or scale * (PRESSURE_SCALE if self._args.soak else 1))

    # ---- reporting ----

    def _report(self, job: Job, number: int, document: Document) -> str:
        """Hand on what a guest says as it says it, judge it at its end, and return the outcome."""
        name = job.kernel.name
        heard = []
        while (line := job.lines.get()) is not None:
            heard.append(line)
            if line == ktap.VERSION:  # the name is for kunit.py, which else cannot tell where the subtest ends
                document.write(INDENT + VERSION, f"{INDENT}# Subtest: {name}")
            elif line:
                document.write(INDENT + line)
        ending = job.ending.result()
        whole = judge(name, ending)
        results = reported(ending)
        if ending.watch.planned and not ending.watch.totals:
            rest = unfinished(self._plan.names, ending, whole)
            results += rest
            lines = list(_rest_of_document(rest, ending))
            document.write(*(INDENT + line for line in lines))
            _write(job.guest.folder / "results.tap", "".join(f"{line}\n" for line in [*heard, *lines]))
        if not ending.watch.totals:
            self._write_results(job, results, whole.reason)
        if not ending.watch.running:  # else the case shows them
            document.write(*ktap.diagnostic_lines(whole.diagnostics))
        document.write(ktap.result_line(number, whole))
        for message in (whole.reason or ending.watch.totals or whole.outcome, *ending.watch.messages, ending.trouble):
            if message:
                say(f"{name}: {message}")
        return whole.outcome

    def _write_overviews(self, kernels: Sequence[Kernel]) -> None:
        """Write junit.xml and report.html, of each kernel and of all; if one cannot be made the run does not fail."""
        try:
            runs = {self._folder / kernel.name: load(self._folder / kernel.name, kernel.name) for kernel in kernels}
            shown = {self._folder: list(runs.values()), **{folder: [run] for folder, run in runs.items()}}
            for folder, some in shown.items():
                _write(folder / "junit.xml", junit.document(some).decode())
                write(some, folder / "report.html")
        except ValueError as error:
            say(f"no report.html: {error}")

    def _write_results(self, job: Job, results: list[Result], why: str) -> None:
        """Write what the suite in a guest could not write any more."""
        summary = {
            "format": FORMAT,
            "planned": len(results) or len(self._plan.names),
            "results": [result.to_dict() for result in results],
            "totals": Counter(result.outcome for result in results),
            "interrupted": why,
            "exitstatus": EXIT_FAILED,
            "options": {},
            "versions": {"uffd-selftests": uffd_selftests.__version__, "kernel": job.kernel.name},
        }
        _write(job.guest.folder / "results.json", json.dumps(summary, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Write a file about kernels that are judged already; if that cannot be done, it is only said."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        say(f"cannot write {path}: {error.strerror}")


def _rest_of_document(rest: Sequence[Result], ending: Ending) -> Iterator[str]:
    """Return the lines that complete a guest's KTAP."""
    done = reported(ending)
    for number, result in enumerate(rest, len(done) + 1):
        yield from ktap.diagnostic_lines(result.diagnostics)
        yield ktap.result_line(number, result)
    yield ktap.totals_line(Counter(result.outcome for result in [*done, *rest]))
