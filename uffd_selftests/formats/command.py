# SPDX-License-Identifier: GPL-2.0-only
"""``uffd-selftests junit|kcidb|summary RESULTS.json...``: results for a CI system, from runs that were made anywhere.

Exit codes: 0 written, 2 the call was wrong or a file cannot be read or written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from uffd_selftests.command.program import EXIT_OK, EXIT_USAGE, PROGRAM, Parser
from uffd_selftests.formats import junit, kcidb, summary
from uffd_selftests.report.command import load_argument
from uffd_selftests.report.model import tell_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from uffd_selftests.report.model import Run

COMMANDS = {
    "junit": "JUnit XML, for Jenkins, GitLab and others",
    "kcidb": "a submission to KCIDB",
    "summary": "a summary in Markdown, for the page of a CI job",
}


def main(name: str, argv: Sequence[str]) -> int:
    """Run one of the commands and return the exit code."""
    args = parser(name).parse_args(argv)
    make: dict[str, Callable[[list[Run]], bytes]] = {
        "junit": junit.document,
        "kcidb": lambda runs: _kcidb(args.origin, args.build_id, runs),
        "summary": lambda runs: summary.document(runs).encode("utf-8", "replace"),
    }
    try:
        runs = [load_argument(argument) for argument in args.results]
        tell_apart(runs)
        _write(make[name](runs), args.output)
    except ValueError as error:
        sys.stderr.write(f"{PROGRAM} {name}: {error}\n")
        return EXIT_USAGE
    return EXIT_OK


def parser(name: str) -> Parser:
    """Return the parser of a command."""
    result = Parser(prog=f"{PROGRAM} {name}", allow_abbrev=False)
    result.description = f"Make of the results of one or more runs: {COMMANDS[name]}."
    add = result.add_argument
    add("results", nargs="+", metavar="[LABEL=]RESULTS", help="a results.json, or the folder of one")
    add("-o", "--output", metavar="FILE", type=Path, help="where to write it (stdout)")
    if name == "kcidb":
        add("--origin", required=True, type=_origin, help="the name of the CI system that submits: [a-z0-9_]+")
        add("--build-id", required=True, type=_build_id, metavar="ID", help="KCIDB's id of the tested build")
    return result


def _origin(text: str) -> str:
    if not re.fullmatch("[a-z0-9_]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} has more than lower case letters, digits and underscores")
    return text


def _build_id(text: str) -> str:
    if not re.fullmatch("[a-z0-9_]+:[^\0]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} does not begin with the name of a CI system and a colon")
    return text


def _kcidb(origin: str, build_id: str, runs: list[Run]) -> bytes:
    document = kcidb.Submission(origin, build_id).document(runs)
    return (json.dumps(document, indent=1) + "\n").encode()


def _write(document: bytes, output: Path | None) -> None:
    """Write to a file or to stdout; raises ValueError."""
    try:
        if output:
            output.write_bytes(document)
        else:
            with open(1, "wb", closefd=False) as stdout:
                stdout.write(document)
    except BrokenPipeError:  # whoever reads has read enough
        pass
    except OSError as error:
        raise ValueError(f"cannot write {output or 'to stdout'}: {error.strerror}") from None
