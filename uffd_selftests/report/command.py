# SPDX-License-Identifier: GPL-2.0-only
"""``uffd-selftests report RESULTS.json... -o report.html``: one page from runs that were made anywhere.

Exit codes: 0 the page is written, 2 a file cannot be read or written.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from uffd_selftests.command.program import EXIT_OK, EXIT_USAGE, PROGRAM, Parser
from uffd_selftests.report.model import load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from uffd_selftests.report.model import Run

COMMAND = f"{PROGRAM} report"


def main(argv: Sequence[str]) -> int:
    """Run the command and return the exit code."""
    parser = Parser(prog=COMMAND, allow_abbrev=False)
    parser.description = "Make one HTML page of the results of one or more runs."
    parser.add_argument("results", nargs="+", metavar="[LABEL=]RESULTS", help="a results.json, or the folder of one")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, default=Path("report.html"),
                        help="the page to write (report.html)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        write([load_argument(argument) for argument in args.results], args.output)
    except ValueError as error:
        sys.stderr.write(f"{COMMAND}: {error}\n")
        return EXIT_USAGE
    print(args.output)
    return EXIT_OK


def load_argument(argument: str) -> Run:
    """Read ``[LABEL=]PATH``; raises ValueError that names the file."""
    label, equals, path = argument.partition("=")
    if not equals or not label or Path(argument).exists():
        return load(Path(argument))
    return load(Path(path), label)


def write(runs: list[Run], output: Path) -> None:
    """Write the page of some runs; raises ValueError when that cannot be done."""
    try:
        from uffd_selftests.report.page import render  # noqa: PLC0415  # slow to load, and few runs want it
    except ModuleNotFoundError as error:
        raise ValueError(f"no {error.name}, with which the page is made: pip install jinja2") from None
    page = render(runs).encode("utf-8", "replace")
    try:
        with output.open("wb") as file:
            _fill(file, page)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error.strerror}") from None


def _fill(file: BinaryIO, page: bytes) -> None:
    """Write a page; leave no half of one."""
    try:
        file.write(page)
        file.flush()
    except OSError:
        if Path(file.name).is_file():
            Path(file.name).unlink()
        raise
