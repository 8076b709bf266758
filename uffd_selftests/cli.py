# SPDX-License-Identifier: GPL-2.0-only
"""The command line: run the suite under pytest, with KTAP on stdout and nothing else.

Exit codes: 0 nothing failed, 1 something failed, 2 usage error, 4 nothing could be tested, 128 + N ended by signal N.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from uffd_selftests import __version__
from uffd_selftests.command.program import EXIT_OK, EXIT_USAGE, PROGRAM, Parser
from uffd_selftests.harness.settings import FILES, MAY_HANG_KERNEL, OPTIONS, STRESS_LOG, check_keyword, duration
from uffd_selftests.machine.facts import KMSG
from uffd_selftests.vm.options import add_options, machine_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uffd_selftests.harness.launcher import Launcher
    from uffd_selftests.harness.launchpad import Launchpad

FORMATS = ("junit", "kcidb", "summary")
"""The commands that make other formats of results (docs/ci.md)."""

MAX_WORKERS_PER_CPU = 16
"""More of them would only keep the machine from everything else."""


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
        help="only cases with SUBSTR in their name, or results if it has ' on ', or just =NAME (repeatable)",
    )  # fmt: skip
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
    add("--case-file", action="append", default=[], help=argparse.SUPPRESS)  # collect these files only
    add("--machine", help=argparse.SUPPRESS)  # run in guests that are started from what this file says
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
    if args.machine:
        from uffd_selftests.harness.isolation import end_with  # noqa: PLC0415  # most runs do without

        end_with(os.getppid(), signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        try:
            _check_streams()
            launcher: Launcher | Launchpad | None = None
            if args.machine and args.workers in ("0", "1") and not args.soak:
                launcher = _guest(args, stack)
            elif _is_plain(args, passed):
                launcher = _launcher(args, stack)  # before anything else loads pytest
            _check(args, passed)
        except ValueError as error:
            print(f"{PROGRAM}: {error}", file=sys.stderr)  # which may be closed, too
            return EXIT_USAGE
        return _main(args, passed, launcher)


def _is_plain(args: argparse.Namespace, passed: list[str]) -> bool:
    """Whether this run has cases run here, and only tells of them what every report tells."""
    elsewhere = args.list or args.probe or args.kernel or args.soak or args.machine or args.vm_forget
    return not (elsewhere or args.no_isolation or passed)


def _launcher(args: argparse.Namespace, stack: contextlib.ExitStack) -> Launcher | Launchpad | None:
    """Start the process that starts the cases, or those that do, while this one is small: without pytest.

    Raises ValueError for a bad option of the command line.
    """
    scale = next(each for each in OPTIONS if each.name == "deadline_scale")
    os.environ[scale.variable] = f"{scale.value(args.deadline_scale):g}"  # for common.py, which is about to be loaded
    from uffd_selftests.harness.jobs import Cases  # noqa: PLC0415  # --help does without
    from uffd_selftests.harness.launcher import Launcher  # noqa: PLC0415  # --help does without
    from uffd_selftests.harness.launchpad import Launchpad  # noqa: PLC0415

    guarded = [1]  # on which the results are written
    with contextlib.suppress(OSError):  # the first case will tell
        if args.workers in ("0", "1"):
            launcher: Launcher | Launchpad = Launcher.start(Cases(), guarded)
        else:
            launcher = Launchpad(Cases(), guarded)
        stack.callback(launcher.close)
        return launcher
    return None


def _guest(args: argparse.Namespace, stack: contextlib.ExitStack) -> Launcher | None:
    """Start the first guest: it comes up while pytest is loaded."""
    from uffd_selftests.harness.guest import Machine  # noqa: PLC0415  # most runs do without

    with contextlib.suppress(EOFError):  # the first case will tell
        guest = Machine.load(Path(args.machine)).source()()
        stack.callback(guest.close)
        return guest
    return None


def _check(args: argparse.Namespace, passed: list[str]) -> None:
    """Refuse what cannot be done, and make the folder for reports; raises ValueError."""
    for each in OPTIONS:
        each.value(getattr(args, each.name))
    MAY_HANG_KERNEL.value(None)
    if args.keyword:
        check_keyword(args.keyword)
    if args.kmsg and not args.machine and not os.access(KMSG, os.W_OK):
        raise ValueError(f"--kmsg: cannot write to {KMSG}: run as root")
    _check_probe(args, passed)
    if not (args.kernel or args.machine or args.vm_forget) and (flags := machine_options(args)):
        raise ValueError(f"{flags[0]} needs --kernel: it shapes the machine that the kernel is booted in")
    if args.soak and args.no_isolation:
        raise ValueError("--soak needs processes for the cases: leave --no-isolation out")
    if args.output and not args.list:
        _make_ready(args.output)


def _main(args: argparse.Namespace, passed: list[str], launcher: Launcher | Launchpad | None) -> int:
    """Do what was asked for; return the exit code."""
    if args.kernel or args.soak or args.probe:
        gc.enable()
    if args.probe and args.kernel:
        from uffd_selftests.vm import probe  # noqa: PLC0415  # most runs do without

        return probe.main(args, area_bytes=_area_bytes(args))
    if args.vm_forget:
        from uffd_selftests.vm import machines  # noqa: PLC0415  # most runs do without

        print(f"{PROGRAM}: {machines.empty() >> 20} MiB of saved machines removed", file=sys.stderr)
        return EXIT_OK
    if args.kernel and not args.list:
        from uffd_selftests.vm import session  # noqa: PLC0415  # most runs do without

        return session.main(args, passed)
    if args.soak and not args.list:
        from uffd_selftests.soak import command as soak  # noqa: PLC0415  # most runs do without

        return soak.main(args, passed)
    if args.probe:
        return _probe(args)
    from uffd_selftests.harness import invocation  # noqa: PLC0415  # which loads pytest

    return invocation.run(args, passed, launcher)


def _check_streams() -> None:
    """Refuse to work for nobody; raises ValueError. Other streams that are closed lead nowhere from now on.

    Else what is opened next would be taken for one of them.
    """
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115  # open as long as this process is
    try:
        os.fstat(1)
    except OSError:
        raise ValueError("stdout is closed") from None
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # likewise


def _check_probe(args: argparse.Namespace, passed: list[str]) -> None:
    """Refuse what a probe would ignore; raises ValueError."""
    if args.json and not args.probe:
        raise ValueError("--json needs --probe")
    chosen = [args.list, args.filter, args.keyword, args.workers != "0", args.output, args.require]
    if args.probe and any([*chosen, args.kmsg, args.soak, passed]):
        raise ValueError("--probe runs nothing: it takes --json, --deadline-scale, --area-mib and --kernel only")


def _probe(args: argparse.Namespace) -> int:
    """Say what the kernel can do."""
    from uffd_selftests.probe import command  # noqa: PLC0415  # which loads that

    return command.main(as_json=args.json, area_bytes=_area_bytes(args))


def _area_bytes(args: argparse.Namespace) -> int:
    mib: int = next(each for each in OPTIONS if each.name == "area_mib").value(args.area_mib)
    return mib << 20


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
