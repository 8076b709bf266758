# SPDX-License-Identifier: GPL-2.0-only
"""A run in other kernels: one KTAP document with a subtest for each kernel, one folder for each below ``-o DIR``.

Each kernel has a run of the suite of its own, in a process that has its cases run in guests (harness/guest.py); here
the machines for them are made, the runs started, and what they say put together. A kernel's folder has the files of a
run of the suite (harness/reporter.py), and what each guest's kernel and QEMU said in console-GUEST.txt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import uffd_selftests
from uffd_selftests.command.interrupts import Interrupted, Signals
from uffd_selftests.command.program import EXIT_FAILED, EXIT_NOTHING, EXIT_OK, EXIT_USAGE, PROGRAM
from uffd_selftests.formats import junit
from uffd_selftests.harness import ktap
from uffd_selftests.harness.again import PRESSURE_SCALE, suite_arguments
from uffd_selftests.harness.isolation import fork
from uffd_selftests.harness.results import Planned, Result, told_of_deaths
from uffd_selftests.machine.system import available_memory
from uffd_selftests.report.command import write
from uffd_selftests.report.model import FORMAT, load
from uffd_selftests.vm import images, qemu, userland
from uffd_selftests.vm.machines import Maker, Unbootable, remove_drafts
from uffd_selftests.vm.options import native
from uffd_selftests.vm.qemu import AUTO, KVM, TCG, Shape

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from uffd_selftests.vm.images import Kernel

VERSION = "KTAP version 1"
INDENT = "  "
TCG_SCALE = 8.0
"""How much longer everything may take under emulation."""
BY_EXIT_CODE = {EXIT_OK: "pass", EXIT_FAILED: "fail", EXIT_NOTHING: "skip"}
NOTHING = "nothing could be tested"
END_SECONDS = 30.0
"""How long a run may take to end in order."""
POLL_SECONDS = 0.05
SETTLE_SECONDS = 3.0
"""How much later than the first worker of a run the others may want a place."""


def main(args: argparse.Namespace, passed: Sequence[str]) -> int:
    """Run the suite in each kernel of ``--kernel`` and return the exit code."""
    with contextlib.ExitStack() as cleanup:
        signals = Signals()
        cleanup.callback(signals.close)
        try:
            kernels, shape = wanted(args)
            common = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix=f"{PROGRAM}-")))
            cleanup.enter_context(survived_by_none(common))
            session = Session(args, passed, (args.output or common / "results").resolve(), common, shape)
            return exit_code(session.run(kernels))
        except ValueError as error:
            say(str(error))
            return EXIT_USAGE
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


@contextlib.contextmanager
def survived_by_none(common: Path) -> Iterator[None]:
    """Have a process remove what this one leaves on disks if it is killed."""
    reader, writer = os.pipe()
    parent = os.getpid()
    pid = fork()
    if not pid:
        try:
            os.setpgid(0, 0)
            os.close(writer)
            os.read(reader, 1)  # until the other end is closed, by whatever
            shutil.rmtree(common, ignore_errors=True)
            remove_drafts(parent)
        finally:
            os._exit(0)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        os.waitpid(pid, 0)


def wanted(args: argparse.Namespace) -> tuple[list[Kernel], Shape]:
    """Return the kernels and the machines that the options name; raises ValueError with what cannot be had."""
    kernels = images.distinguish(images.find(path, args.arch) for path in args.kernel)
    if lacking := qemu.missing(args.arch):
        raise ValueError(lacking)
    if args.arch not in (native(), *userland.TOOLCHAINS):
        raise ValueError(f"--arch {args.arch}: only kernels for {native()} can be booted here")
    if args.vm_accel == KVM:
        _check_kvm(args.arch)
    shape = Shape(args.arch, args.vm_memory, args.vm_cpus, tuple(args.vm_append), tuple(args.vm_qemu))
    _check_memory(shape, _workers(args))
    return kernels, shape


def accelerator(args: argparse.Namespace) -> str:
    """Return what is to be used, or AUTO."""
    wish = str(args.vm_accel)
    return TCG if qemu.native_only(args.arch) and wish == AUTO else wish


def scale_of(args: argparse.Namespace) -> Callable[[str], float]:
    """Return what tells by how much deadlines are multiplied, with an accelerator."""
    given = args.deadline_scale or os.environ.get("UFFD_DEADLINE_SCALE")
    pressure = PRESSURE_SCALE if args.soak else 1.0
    return lambda accelerator: float(given or pressure * (TCG_SCALE if accelerator == TCG else 1.0))


def _check_kvm(arch: str) -> None:
    """Refuse to do without; raises ValueError."""
    if qemu.native_only(arch):
        raise ValueError(f"--vm-accel kvm: a kernel for {arch} can only be emulated here")
    if not qemu.kvm_present():
        raise ValueError("--vm-accel kvm: cannot open /dev/kvm: load kvm_intel or kvm_amd, join the group kvm")


def _check_memory(shape: Shape, guests: int) -> None:
    """Refuse guests that want more memory than there is; raises ValueError."""
    there = available_memory()
    if there is not None and guests * shape.bytes > there:
        raise ValueError(
            f"{guests} guests of {shape.memory} need more memory than the {there >> 20} MiB that are available: "
            "a smaller -n or --vm-memory"
        )


def _workers(args: argparse.Namespace) -> int:
    return max(1, len(os.sched_getaffinity(0)) if args.workers == "auto" else int(args.workers))


def exit_code(outcomes: Sequence[str]) -> int:
    """Return the exit code of a run with these outcomes of its kernels."""
    if any(outcome in ktap.FAILURES for outcome in outcomes):
        return EXIT_FAILED
    return EXIT_NOTHING if set(outcomes) <= {"skip"} else EXIT_OK


def _python() -> list[str]:
    """Return the call of this program."""
    return [sys.executable, *(["-I"] if sys.flags.isolated else []), "-m", "uffd_selftests"]


def say(message: str) -> None:
    """Say something on stderr."""
    sys.stderr.write(f"{PROGRAM}: {message}\n")


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


class Run:
    """The suite in one kernel."""

    def __init__(self, kernel: Kernel, folder: Path) -> None:
        self.kernel = kernel
        self.folder = folder
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """The suite's KTAP; None is the end."""
        self.settled = math.inf
        """From when on it has all the guests that it wants, by time.monotonic()."""
        self.messages: list[str] = []
        """What it said for people."""
        self.others: list[str] = []
        """What others said there."""
        self.code = EXIT_FAILED
        self.unbootable: Unbootable | None = None
        self.error: Exception | None = None
        self.process: subprocess.Popen[str] | None = None


class Session:
    """Runs the suite in kernels, several at once if asked to, and reports them in their order."""

    def __init__(
        self, args: argparse.Namespace, passed: Sequence[str], folder: Path, common: Path, shape: Shape
    ) -> None:
        self._args = args
        self._passed = passed
        self._folder = folder
        self._common = common
        self._workers = _workers(args)
        self._scale = scale_of(args)
        self._maker = Maker(shape, accelerator(args), common, say, self._check)
        self._checking: subprocess.Popen[str] | None = None
        """Finds out whether the options are right, while the first kernel boots."""
        self._complaint = ""
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    def run(self, kernels: Sequence[Kernel]) -> list[str]:
        """Run all and return their outcomes; raises OSError when nothing can be written, Interrupted."""
        self._folder.mkdir(parents=True, exist_ok=True)
        runs = [Run(kernel, self._fresh(kernel)) for kernel in kernels]
        for number in range(self._workers):
            (self._common / f"place-{number}").touch()
        with contextlib.closing(Document(self._folder / "results.tap")) as document:
            dispatcher = threading.Thread(target=self._dispatch, args=(runs,))
            dispatcher.start()
            try:
                document.write(VERSION, f"1..{len(runs)}")
                outcomes = [self._report(run, number, document) for number, run in enumerate(runs, 1)]
            except (Interrupted, ValueError) as reason:
                with contextlib.suppress(OSError):
                    document.write(f"Bail out! {ktap.escape(str(reason))}")
                raise
            finally:
                self._stop(runs)
                dispatcher.join()
            document.write(ktap.totals_line(Counter(outcomes)))
        if self._args.output:
            self._write_overviews(kernels)
        if document.trouble:
            say(document.trouble)
            outcomes.append("error")
        return outcomes

    def _fresh(self, kernel: Kernel) -> Path:
        """Return an empty folder for a kernel."""
        folder = self._folder / kernel.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    # ---- the runs ----

    def _dispatch(self, runs: Sequence[Run]) -> None:
        """Start a run as soon as there is a place for a guest that nobody before it wants."""
        threads: list[threading.Thread] = []
        for run in runs:
            while not self._stopped.is_set() and not self._free(runs[: len(threads)]):
                time.sleep(POLL_SECONDS)
            threads.append(threading.Thread(target=self._attend, args=(run,)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _free(self, begun: Sequence[Run]) -> bool:
        """Whether there is a place that none of these runs wants."""
        if any(time.monotonic() < run.settled for run in begun):
            return False
        free = 0
        for place in self._common.glob("place-*"):
            with place.open("a") as file, contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free += 1
        return free > 0

    def _attend(self, run: Run) -> None:
        """Make a kernel's machine and see its run through."""
        try:
            if self._stopped.is_set():
                return
            machine = self._maker.make(
                run.kernel, run.folder, self._scale, places=self._workers, max_deaths=self._args.vm_deaths
            )
            machine.save(notes := self._common / f"{run.kernel.name}.json")
            emulated = machine.command[machine.command.index("-accel") + 1] == TCG
            self._see_through(run, notes, self._scale(TCG if emulated else KVM))
        except Unbootable as error:
            run.unbootable = error
        except (ValueError, OSError) as error:
            run.error = error
        finally:
            run.settled = 0.0
            run.lines.put(None)

    def _check(self) -> None:
        """Begin to ask the suite what it would run, once."""
        if not self._checking:
            call = [*_python(), "-l", *suite_arguments(self._args, self._passed)]
            null = subprocess.DEVNULL
            self._checking = subprocess.Popen(
                call, stdin=null, stdout=null, stderr=subprocess.PIPE, text=True, errors="replace"
            )

    def _await_check(self) -> None:
        """Wait for its answer; raises ValueError with what is wrong."""
        with self._lock:
            if self._checking and self._checking.returncode is None:
                _, self._complaint = self._checking.communicate()
            if self._checking and self._checking.returncode:
                raise ValueError(self._complaint.strip().removeprefix(f"{PROGRAM}: "))

    def _see_through(self, run: Run, notes: Path, scale: float) -> None:
        self._await_check()
        soak = [f"--soak={self._args.soak}"] if self._args.soak else []
        workers = str(self._workers) if self._args.workers != "0" else "0"
        call = [*_python(), f"--machine={notes}", "--kmsg", "--data-only"]
        call += ["-n", workers, "-o", str(run.folder), *soak, *suite_arguments(self._args, self._passed, scale)]
        with self._lock:
            if self._stopped.is_set():
                return
            run.process = process = subprocess.Popen(
                call, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                errors="replace", start_new_session=True,
            )  # fmt: skip
        assert process.stdout
        assert process.stderr
        listener = threading.Thread(target=self._listen, args=(run, process.stderr))
        listener.start()
        for line in process.stdout:
            if line.startswith(("ok 1 ", "not ok 1 ")):
                run.settled = time.monotonic() + SETTLE_SECONDS
            run.lines.put(line.rstrip("\n"))
        listener.join()
        run.code = process.wait()

    def _listen(self, run: Run, stream: TextIO) -> None:
        """Take its own words; where pytest has more to say, it is in the documents."""
        for line in stream:
            _, own, text = line.rstrip("\n").partition(f"{PROGRAM}: ")  # pytest may not have ended its line
            if own:
                run.messages.append(text)
            else:
                run.others.append(line.rstrip("\n"))

    def _stop(self, runs: Sequence[Run]) -> None:
        """End what is running."""
        self._stopped.set()
        self._maker.stop()
        if self._checking:
            self._checking.kill()
        with self._lock:
            pass  # who has it starts nothing any more when it lets go
        processes = [run.process for run in runs if run.process and run.process.returncode is None]
        for process in processes:
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_SECONDS)
            process.kill()

    # ---- reporting ----

    def _report(self, run: Run, number: int, document: Document) -> str:
        """Hand on what a run says as it says it, judge it at its end, and return the outcome."""
        name = run.kernel.name
        while (line := run.lines.get()) is not None:
            if line == ktap.VERSION:  # the name is for kunit.py, which else cannot tell where the subtest ends
                document.write(INDENT + VERSION, f"{INDENT}# Subtest: {name}")
            elif line:
                document.write(INDENT + line)
        if run.error:
            raise run.error
        if run.code == EXIT_USAGE:
            lines = [line.removeprefix("ERROR: ") for line in run.others if line.strip()]
            raise ValueError("\n".join(run.messages or lines[-1:]) or f"{name}: the run was refused")
        whole = self._judge(run)
        summary = self._summary(run, whole)
        if run.code == EXIT_FAILED and summary["interrupted"] and not run.unbootable:
            whole = dataclasses.replace(whole, outcome="error", reason=summary["interrupted"])
        document.write(*ktap.diagnostic_lines(whole.diagnostics), ktap.result_line(number, whole))
        totals = ktap.totals_line(summary["totals"]).removeprefix("# Totals: ")
        deaths = summary.get("deaths", [])
        told = [told_of_deaths(deaths)] if deaths else []
        for message in (whole.reason or totals, *run.messages, *told):
            say(f"{name}: {message}")
        return whole.outcome

    def _judge(self, run: Run) -> Result:
        """Return the result of a kernel as a whole; one that does not boot shows the end of its console."""
        planned = Planned(run.kernel.name, run.kernel.name, run.kernel.name)
        if run.unbootable:
            reason, lines = run.unbootable.args
            return Result(planned, "error", f"does not boot: {reason}", [f"console: {line}" for line in lines])
        outcome = BY_EXIT_CODE.get(run.code, "error")
        reason = {"skip": NOTHING, "error": f"the run ended early (exit code {run.code})"}.get(outcome, "")
        return Result(planned, outcome, reason)

    def _summary(self, run: Run, whole: Result) -> dict[str, Any]:
        """Return a run's results.json, written here if the run has not come so far."""
        path = run.folder / "results.json"
        with contextlib.suppress(OSError, ValueError):
            document: dict[str, Any] = json.loads(path.read_text())
            return document
        document = {
            "format": FORMAT,
            "planned": 0,
            "results": [],
            "totals": {},
            "interrupted": whole.reason,
            "exitstatus": EXIT_FAILED,
            "options": {},
            "versions": {"uffd-selftests": uffd_selftests.__version__, "kernel": run.kernel.name},
        }
        _write(path, json.dumps(document, indent=2) + "\n")
        return document

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


def _write(path: Path, text: str) -> None:
    """Write a file about kernels that are judged already; if that cannot be done, it is only said."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        say(f"cannot write {path}: {error.strerror}")
