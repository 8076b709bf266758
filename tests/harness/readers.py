# SPDX-License-Identifier: GPL-2.0-only
"""What the programs that read KTAP are given.

UFFD_TEST_LINUX names a kernel source tree with the kernel's programs; without it /usr/src/linux or the running
kernel's own source will do.
"""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from uffd_selftests.harness import ktap
from uffd_selftests.harness.results import Planned, Result

if TYPE_CHECKING:
    from collections.abc import Sequence


SOURCES = (os.environ.get("UFFD_TEST_LINUX", ""), f"/lib/modules/{os.uname().release}/source", "/usr/src/linux")

GOOD = (
    ("move on anon", "pass", ""),
    ("wp-fork-pin on shmem-private", "skip", "CONFIG_GUP_TEST: /sys/kernel/debug/gup_test: ENOENT"),
    ("unregister-wakes-wp on anon", "xfail", "D-UNR-11: a thread sleeps on"),
    ("UFFDIO_API (with /dev/userfaultfd)", "xpass", ""),
)
BAD = (
    ("zeropage on hugetlb", "fail", ""),
    ("events on anon", "timeout", "30 seconds"),
    ("sigbus (a, b) on shmem", "error", "killed by SIGSEGV"),
)


def document(results: Sequence[tuple[str, str, str]], planned: int | None = None) -> str:
    """Return the KTAP of a run, with a line of every sort."""
    stream = io.StringIO()
    writer = ktap.Writer(stream)
    writer.plan(len(results) if planned is None else planned, ["Linux 7.1 x86_64"])
    for name, outcome, reason in results:
        broken = outcome in ktap.FAILURES
        diagnostics = ["promise: it works.", "", "ok 99 is not a result here"] if broken else []
        writer.result(Result(Planned(name, name, name), outcome, reason, diagnostics))
    writer.totals({})
    return stream.getvalue()


def linux(path: str) -> Path:
    """Return a file of the kernel source; skips without one."""
    for source in filter(None, SOURCES):
        if (found := Path(source, path)).exists():
            return found
    pytest.skip(f"no kernel source with {path}: name one in UFFD_TEST_LINUX")
