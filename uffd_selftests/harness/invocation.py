# SPDX-License-Identifier: GPL-2.0-only
"""Run pytest as the command line says, and say how that ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffd_selftests.command.program import EXIT_FAILED, EXIT_NOTHING, EXIT_OK, EXIT_USAGE, PROGRAM
from uffd_selftests.harness.settings import MAY_HANG_KERNEL, OPTIONS

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from uffd_selftests.harness.launcher import Launcher
    from uffd_selftests.harness.launchpad import Launchpad

PACKAGE = Path(__file__).resolve().parent.parent
CASES = PACKAGE / "cases"

UNUSED = (
    *("cacheprovider", "doctest", "faulthandler", "junitxml", "legacypath", "logging", "monkeypatch", "pastebin"),
    *("recwarn", "setuponly", "setupplan", "stepwise", "subtests", "terminal", "threadexception", "tmpdir", "unittest"),
    *("unraisableexception", "warnings"),
)
"""pytest's plugins that the suite's own cases do without: each takes time to load, some at every case."""

OUTPUT_TAIL = 20
"""How many lines of pytest's own output are shown when pytest gives up."""


def run(args: argparse.Namespace, passed: list[str], launcher: Launcher | Launchpad | None) -> int:
    """Run pytest in this process and translate its end into an exit code; the launcher is for it to use."""
    # Somebody else's pytest configuration must not change what is tested.
    for name in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        os.environ.pop(name, None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # Whoever talks to pytest reads its output on stderr; else it is kept, in case that pytest gives up.
    quiet = not passed and not args.no_isolation
    output = os.memfd_create("pytest-output") if quiet else os.dup(2)
    sys.stdout.flush()
    ktap_fd = os.dup(1)  # not inherited by other programs
    os.dup2(output, 1)
    witness = _Witness(launcher)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see __main__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status: int = pytest.ExitCode.INTERRUPTED
    with contextlib.suppress(KeyboardInterrupt):  # before pytest heeds it, or when pytest has finished
        status = pytest.main([*_pytest_arguments(args, passed, ktap_fd), *passed], plugins=[witness])
    sys.stdout.flush()
    os.dup2(ktap_fd, 1)
    code, message = _judge(int(status), witness, args)
    if message:
        sys.stderr.write(f"{PROGRAM}: {message}\n")
    if quiet and code == EXIT_FAILED and witness.broken:
        sys.stderr.write(_tail(witness.details, output))
    return code


def _pytest_arguments(args: argparse.Namespace, passed: list[str], ktap_fd: int) -> Iterator[str]:
    """Say it in pytest's words."""
    paths = [path for argument in passed if (path := _path(argument))]
    root = next((path.parent for path in paths if PACKAGE.parent not in path.parents), PACKAGE.parent)
    yield from ("-c", os.devnull, f"--rootdir={root}", f"--confcutdir={CASES}")
    yield from ("-o", "verbosity_assertions=2")  # whole explanations: nobody can ask again with -v
    yield from ("-p", "uffd_selftests.harness.plugin", f"--ktap-fd={ktap_fd}")
    for each in OPTIONS:
        if (value := getattr(args, each.name)) is not None:
            yield f"{each.flag}={value}"
    yield from (f"--filter={part}" for part in args.filter)
    if args.keyword is not None:
        yield from ("-k", args.keyword)
    if args.documented_only:
        yield "--documented-only"
    if args.strict:
        yield "--strict-defects"
    if args.may_hang_kernel:
        yield MAY_HANG_KERNEL.flag
    if args.no_sharing:
        yield "--no-sharing"
    if args.no_isolation:
        yield "--no-isolation"
    if args.kmsg:
        yield "--kmsg"
    if args.list:
        yield "--collect-only"
    elif args.workers not in ("0", "1"):
        yield from ("-p", "xdist.plugin", "-n", args.workers, "--dist", "worksteal")
    if args.machine:
        yield f"--machine={args.machine}"
    if args.pristine:
        yield "--pristine"
    if args.output and not args.list:
        folder = args.output.resolve()
        yield f"--report-dir={folder}"
        if args.data_only:
            yield "--report-data-only"
    if not passed and not args.no_isolation:
        yield from ("--brief", "--assert=plain")  # the launcher knows nothing of pytest's asserts
        for name in UNUSED:
            yield from ("-p", f"no:{name}")
    if not paths:
        yield from args.case_file or [str(CASES)]


def _path(argument: str) -> Path | None:
    """Return the path of an argument for pytest that names tests to run, perhaps with ``::test`` behind it."""
    path = Path(argument.partition("::")[0])
    return path.resolve() if not argument.startswith("-") and path.exists() else None


class _Witness:
    """A pytest plugin that hands over what there is already, and remembers what is asked for afterwards."""

    def __init__(self, launcher: Launcher | Launchpad | None) -> None:
        self._launcher = launcher
        self.config: pytest.Config | None = None
        self.broken = ""
        """Why pytest itself could not go on."""
        self.details = ""
        """What it has to say about that."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Keep the configuration, and with it what the harness will leave there."""
        from uffd_selftests.harness.plugin import LAUNCHER  # noqa: PLC0415  # loaded by pytest, who rewrites it

        self.config = config
        if self._launcher:
            config.stash[LAUNCHER] = self._launcher

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember that cases cannot be collected."""
        if report.failed and not self.broken:
            self.broken, self.details = f"cannot collect {report.nodeid}", report.longreprtext

    @pytest.hookimpl
    def pytest_internalerror(self, excrepr: object) -> None:
        """Remember a defect of pytest or of the harness."""
        if not self.broken:
            self.details = str(excrepr).strip()
            self.broken = f"internal error: {self.details.splitlines()[-1]}"


def _judge(status: int, witness: _Witness, args: argparse.Namespace) -> tuple[int, str]:
    """Return the exit code for pytest's, and a message if the code alone does not say enough."""
    from uffd_selftests.harness.plugin import REPORTER, SIGNALS  # noqa: PLC0415  # loaded by pytest, who rewrites it

    stash = witness.config.stash if witness.config else pytest.Stash()
    if SIGNALS in stash and (number := stash[SIGNALS].number):
        return 128 + number, ""
    if not witness.config and status == pytest.ExitCode.INTERRUPTED:
        return 128 + signal.SIGINT, ""
    if status == pytest.ExitCode.USAGE_ERROR:
        return EXIT_USAGE, ""  # pytest has said on stderr what is wrong
    if witness.broken:
        return EXIT_FAILED, witness.broken
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        return EXIT_USAGE, "nothing matches the given " + " and ".join(_selection(args))
    if status != pytest.ExitCode.OK:
        return EXIT_FAILED, ""
    if REPORTER in stash and set(stash[REPORTER].totals) <= {"skip"}:
        return EXIT_NOTHING, "nothing could be tested: all results were skipped"
    return EXIT_OK, ""


def _selection(args: argparse.Namespace) -> list[str]:
    """Return the options that chose what to run."""
    chosen = [f"-f {part}" for part in args.filter]
    if args.keyword is not None:
        chosen.append(f"-k {args.keyword}")
    if args.documented_only:
        chosen.append("--documented-only")
    return chosen or ["arguments behind --"]


def _tail(details: str, output: int) -> str:
    """Return the last lines of what pytest had to say, and of what was printed while it ran."""
    printed = os.pread(output, os.fstat(output).st_size, 0).decode(errors="replace")
    lines = [*details.splitlines(), *printed.splitlines()]
    return "".join(f"{line}\n" for line in lines[-OUTPUT_TAIL:])
