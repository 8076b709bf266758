# SPDX-License-Identifier: GPL-2.0-only
"""Results of every sort to convert, and the conversion."""

from __future__ import annotations

from tests.report.helpers import DEFECT, Folder, result
from uffd_selftests.formats.command import main

ONE_OF_EACH = (
    result("good on anon"),
    result("bad on anon", "fail", diagnostics=["promise: The promise of bad.", "expected EEXIST; got EINVAL"]),
    result("stuck on anon", "timeout", reason="30 seconds", diagnostics=["blocked in handle_userfault"]),
    result("dead on anon", "error", reason="killed by SIGSEGV"),
    result("panic on anon", "error", reason="Kernel panic - not syncing: Oops", guest="1", died=True),
    result("late on anon", "skip", reason="never ran: the kernel was gone"),
    result("lacking on anon", "skip", reason="CONFIG_GUP_TEST: ENOENT"),
    result("known on anon", "xfail", reason="D-CP-99: It bites", defect=DEFECT),
    result("fixed on anon", "xpass", reason="D-CP-99: It bites", defect=DEFECT),
    {"name": "kernel-log", "outcome": "fail", "nodeid": "kernel-log", "diagnostics": ["WARNING: mm/userfaultfd.c:1"]},
)
HOSTILE = "a\0b\x1b[31m</pre> & <b>|`_\ud800\n\nnext"


def convert(name: str, folder: Folder, *arguments: object) -> str:
    """Return what a command makes."""
    output = folder.path / name
    assert main(name, [*map(str, arguments), "-o", str(output)]) == 0
    return output.read_text("utf-8")
