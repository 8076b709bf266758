# SPDX-License-Identifier: GPL-2.0-only
"""The program of the manual page, examples/demand_paging.py, and what it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from uffd_selftests.case import uffd_case
from uffd_selftests.common import DEADLINE, PAGE_SIZE, Feature, Skip, expect, promise

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "examples" / "demand_paging.py"

WITHOUT_O_NONBLOCK = "poll() without O_NONBLOCK returns: nready = 1; POLLIN = 0; POLLERR = 1"
AFTER_CLOSE = r"After close() the thread that slept read: b'\x00'"


def run(*arguments: str) -> tuple[int, str, str]:
    """Run the program; return its exit status and what it wrote to stdout and stderr."""
    if not PROGRAM.exists():
        raise Skip(f"{PROGRAM} is not there: run the suite from a checkout")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def expected_lines(start: int, pages: int, offset: int) -> list[str]:
    """Return what is printed of the pages, with faults reported at this offset in the page."""
    lines = [f"Address returned by mmap() = {start:#x}"]
    for page in range(pages):
        address, letter = start + page * PAGE_SIZE, chr(ord("A") + page % 20)
        lines += [
            "",
            "fault_handler_thread():",
            "    poll() returns: nready = 1; POLLIN = 1; POLLERR = 0",
            f"    UFFD_EVENT_PAGEFAULT event: flags = 0; address = {address + offset:x}",
            f"        (uffdio_copy.copy returned {PAGE_SIZE})",
        ]
        lines += [f"Read address {address + at:#x} in main(): {letter}" for at in range(0xF, PAGE_SIZE, 1024)]
    return lines


def expect_tour(pages: int, *options: str, offset: int = 0) -> list[str]:
    """Assert what the program prints of so many pages; return the lines that follow."""
    status, out, err = run(*options, str(pages))
    expect((status, err), (0, ""), "exit status and stderr")
    found = re.match(r"Address returned by mmap\(\) = (0x[0-9a-f]+)\n", out)
    expect(found is not None, True, f"the address of the region in {out[:80]!r}")
    expected = expected_lines(int(found[1], 16) if found else 0, pages, offset)
    lines = out.splitlines()
    for number, (line, wanted) in enumerate(zip(lines, expected, strict=False)):
        expect(repr(line), repr(wanted), f"line {number + 1}")
    expect(len(lines) >= len(expected), True, f"at least {len(expected)} lines, not {len(lines)}")
    return lines[len(expected) :]


@uffd_case("demo", rows=("DM-01", "DM-02", "DM-05", "PL-02", "CL-01"))
def test_demo() -> None:
    """Each page read is one message and one copy, and holds its letter from A to T; then come the two answers.

    The letters begin again after twenty pages. The answers are to what the manual's draft of 2017 asked: what poll(2)
    says without O_NONBLOCK, and what close(2) does to a thread that sleeps in a fault.
    """
    with promise("DM-01, DM-02, DM-05"):
        answers = expect_tour(22)
    expect(answers, ["", WITHOUT_O_NONBLOCK, AFTER_CLOSE], "PL-02, CL-01: the two answers")


@uffd_case("demo-exact", features=Feature.EXACT_ADDRESS, rows=("DM-02",))
def test_demo_exact() -> None:
    """With UFFD_FEATURE_EXACT_ADDRESS a message has the address of the byte, as the manual prints it."""
    with promise("DM-02", "--exact"):
        expect_tour(1, "--exact", offset=0xF)


@uffd_case("demo-usage", rows=("DM-04",))
def test_demo_usage() -> None:
    """Without an argument the program prints its usage to stderr, nothing to stdout, and fails."""
    status, out, err = run()
    with promise("DM-04"):
        expect((status, out), (1, ""), "exit status and stdout")
        expect(err, "Usage: demand_paging.py [--exact] num-pages\n", "stderr")
