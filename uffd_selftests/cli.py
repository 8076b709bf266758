# SPDX-License-Identifier: GPL-2.0-only
"""The command line: run the suite under pytest, with KTAP on stdout and nothing else.

Exit codes: 0 nothing failed, 1 something failed, 2 usage error, 4 nothing could be tested, 128 + N ended by signal N.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffd_selftests import __version__
from uffd_selftests.harness.reporter import FILES, KMSG
from uffd_selftests.harness.settings import MAY_HANG_KERNEL, OPTIONS, STRESS_LOG, check_keyword, duration
from uffd_selftests.program import EXIT_FAILED, EXIT_NOTHING, EXIT_OK, EXIT_USAGE, PROGRAM, Parser
from uffd_selftests.vm.options import add_options, machine_options

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PACKAGE = Path(__file__).resolve().parent
CASES = PACKAGE / "cases"

FORMATS = ("junit", "kcidb", "summary")
"""The commands that make other formats of results (docs/ci.md)."""

MAX_WORKERS_PER_CPU = 16
"""More of them would only keep the machine from everything else."""

OUTPUT_TAIL = 20
"""How many lines of pytest's own output are shown when pytest gives up."""


def parser() -> Parser:
    """Return the parser of everything before ``--``."""
    # Without abbreviations: an option that comes later must not change what a script means.
    result = Parser(prog=PROGRAM, allow_abbrev=False)
    result.description = "Test the running kernel's userfaultfd."
    result.epilog = (
        "Arguments after -- go to pytest; a path among them replaces the suite's cases. "
        f"'{PROGRAM} report' makes a page of the results of runs: '{PROGRAM} report --help'; "
        f"{', '.join(FORMATS)} make what CI systems read."
    )
    add = result.add_argument
    add("-l", "--list", action="store_true", help="list the results that a run would produce")
    add("-f", "--filter", action="append", default=[], metavar="SUBSTR",
        help="only cases whose name has SUBSTR, or results if it has ' on ' (can be repeated)")  # fmt: skip
    add("-k", dest="keyword", metavar="EXPR", help="only results that pytest's -k would choose: 'move and not hugetlb'")
    add("-n", dest="workers", metavar="N", type=_workers, default="0", help="run in N processes, or auto")
    add("-o", "--output", metavar="DIR", type=Path, help=f"write {', '.join(FILES)} into DIR")
    add("--probe", action="store_true", help="say what this kernel can do instead, and for whom that is enough")
    add("--json", action="store_true", help="with --probe: as JSON (docs/probe.md)")
    add("--documented-only", action="store_true", help="leave out what only the kernel's source promises")
    add("--strict", action="store_true", help="let known defects of kernels fail")
    for each in OPTIONS:
        add(each.flag, metavar=each.metavar, help=f"{each.help} [{each.variable}]")
    add(MAY_HANG_KERNEL.flag, action="store_true", help=f"{MAY_HANG_KERNEL.help} [{MAY_HANG_KERNEL.variable}]")
    add("--no-sharing", action="store_true", help="run each result in a process of its own")
    add("--no-isolation", action="store_true", help="run cases in one process, for a debugger")
    add("--soak", metavar="TIME", type=_duration,
        help="repeat all for TIME in two workers, with short memory: what differs or is left behind fails")  # fmt: skip
    add("--kmsg", action="store_true", help="note in the kernel log which case begins (boot with printk.devkmsg=on)")
    add_options(result)
    # For --kernel, which does here what it can spare the guest:
    add("--with-ids", action="store_true", help=argparse.SUPPRESS)  # -l tells pytest's name of each result, too
    add("--case-file", action="append", default=[], help=argparse.SUPPRESS)  # collect these files only
    add("--data-only", action="store_true", help=argparse.SUPPRESS)  # no report that can be made of results.json
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
    return result


def _workers(text: str) -> str:
    most = MAX_WORKERS_PER_CPU * (os.cpu_count() or 1)
    if text.isdecimal() and int(text) > most:
        raise argparse.ArgumentTypeError(f"{text} processes are too many for this machine: at most {most}")
    if text == "auto" or text.isdecimal():
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")


def _duration(text: str) -> int:
    with contextlib.suppress(ValueError):
        if seconds := duration(text):
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is not a duration like 90s, 10m or 1h30m")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["report"]:
        from uffd_selftests.report.command import main as report  # noqa: PLC0415  # a run does without

        return report(arguments[1:])
    if arguments and arguments[0] in FORMATS:
        from uffd_selftests.formats.command import main as convert  # noqa: PLC0415  # a run does without

        return convert(arguments[0], arguments[1:])
    passed: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, passed = arguments[:split], arguments[split + 1 :]
    args = parser().parse_args(arguments)
    try:
        _check_stdout()
        for each in OPTIONS:
            each.value(getattr(args, each.name))
        MAY_HANG_KERNEL.value(None)
        check_keyword(args.keyword or "")
        if args.kmsg and not os.access(KMSG, os.W_OK):
            raise ValueError(f"--kmsg: cannot write to {KMSG}: run as root")
        _check_probe(args, passed)
        if not args.kernel and (flags := machine_options(args)):
            raise ValueError(f"{flags[0]} needs --kernel: it shapes the machine that the kernel is booted in")
        if args.soak and args.no_isolation:
            raise ValueError("--soak needs processes for the cases: leave --no-isolation out")
        if args.output and not args.list:
            _make_ready(args.output)
    except ValueError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return EXIT_USAGE
    if args.kernel and not args.list:
        from uffd_selftests.vm import session  # noqa: PLC0415  # most runs do without

        return session.main(args, passed)
    if args.soak and not args.list:
        from uffd_selftests import soak  # noqa: PLC0415  # most runs do without

        return soak.main(args, passed)
    return _probe(args) if args.probe else _run(args, passed)


def _check_stdout() -> None:
    """Refuse to work for nobody; raises ValueError."""
    try:
        os.fstat(1)
    except OSError:
        raise ValueError("stdout is closed") from None


def _check_probe(args: argparse.Namespace, passed: list[str]) -> None:
    """Refuse what a probe would ignore; raises ValueError."""
    if args.json and not args.probe:
        raise ValueError("--json needs --probe")
    chosen = [args.list, args.filter, args.keyword, args.workers != "0", args.output, args.require]
    if args.probe and any([*chosen, args.kernel, args.kmsg, args.soak, passed]):
        raise ValueError("--probe runs nothing: it takes --json, --deadline-scale and --area-mib only")


def _probe(args: argparse.Namespace) -> int:
    """Say what the kernel can do."""
    values = {each.name: each.value(getattr(args, each.name)) for each in OPTIONS}
    os.environ["UFFD_DEADLINE_SCALE"] = f"{values['deadline_scale']:g}"  # uffd_selftests.common reads it
    from uffd_selftests.probe import command  # noqa: PLC0415  # which loads that

    return command.main(as_json=args.json, area_bytes=values["area_mib"] << 20)


def _make_ready(folder: Path) -> None:
    """Make a folder for the reports, without those of an earlier run; raises ValueError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*FILES, STRESS_LOG):
            (folder / name).write_text("")
            (folder / name).unlink()
    except FileExistsError:
        raise ValueError(f"cannot write into {folder}: it is a file: name a folder") from None
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {errno.errorcode.get(error.errno or 0, error)}") from None


def _run(args: argparse.Namespace, passed: list[str]) -> int:
    """Run pytest in this process and translate its end."""
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
    witness = _Witness()
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
        sys.stderr.write(_tail(output))
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
        if args.with_ids:
            yield "--list-ids"
    elif args.workers != "0":
        yield from ("-p", "xdist.plugin", "-n", args.workers, "--dist", "worksteal")
    if args.output and not args.list:
        folder = args.output.resolve()
        yield f"--report-dir={folder}"
        if args.data_only:
            yield "--report-data-only"
    if not passed:
        yield from ("--progress", "--tb=no")
        # Each of them costs every case.
        for name in ("cacheprovider", "logging", "threadexception", "unraisableexception", "warnings"):
            yield from ("-p", f"no:{name}")
    if not paths:
        yield from args.case_file or [str(CASES)]


def _path(argument: str) -> Path | None:
    """Return the path of an argument for pytest that names tests to run, perhaps with ``::test`` behind it."""
    path = Path(argument.partition("::")[0])
    return path.resolve() if not argument.startswith("-") and path.exists() else None


class _Witness:
    """A pytest plugin that remembers what main needs to know afterwards."""

    def __init__(self) -> None:
        self.config: pytest.Config | None = None
        self.broken = ""
        """Why pytest itself could not go on."""

    @pytest.hookimpl
    def pytest_configure(self, config: pytest.Config) -> None:
        """Keep the configuration, and with it what the harness left there."""
        self.config = config

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember that cases cannot be collected."""
        if report.failed:
            self.broken = self.broken or f"cannot collect {report.nodeid}"

    @pytest.hookimpl
    def pytest_internalerror(self, excrepr: object) -> None:
        """Remember a defect of pytest or of the harness."""
        self.broken = self.broken or f"internal error: {str(excrepr).strip().splitlines()[-1]}"


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


def _tail(output: int) -> str:
    """Return the last lines that pytest wrote."""
    lines = os.pread(output, os.fstat(output).st_size, 0).decode(errors="replace").splitlines(keepends=True)
    return "".join(lines[-OUTPUT_TAIL:])
