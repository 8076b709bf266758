# SPDX-License-Identifier: GPL-2.0-only
"""Each way in which a machine can end has its verdict."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.vm.helpers import BEGINS, BOOTS, BUG, CASE, DIES, FATAL, PANIC, PASSES, run_shell
from uffd_selftests.vm.verdict import judge


@pytest.mark.parametrize(
    ("script", "outcome", "reason"),
    [
        (PASSES, "pass", ""),
        (PASSES + "exit 1", "fail", ""),
        (PASSES + "exit 4", "skip", "nothing could be tested"),
        (PASSES + PANIC + "exit 255", "error", "kernel panic: Fatal"),
        (PASSES + "exit 255", "error", "the virtual machine went away"),
        (DIES, "error", "kernel panic: Fatal in move on shmem"),
        (BEGINS + CASE.format("move on anon") + "exit 255", "error", "the virtual machine went away in move on anon"),
        (BEGINS + "exit 1", "error", "the suite ended early (exit code 1)"),
        (BOOTS + "exit 127", "error", "the kernel did not get as far as the suite (exit code 127)"),
        (BOOTS + PANIC + "exit 255", "error", "kernel panic: Fatal"),
        ("echo 'qemu: no such machine' >&2; exit 1", "error", "the kernel never said anything"),
    ],
)
def test_ending(script: str, outcome: str, reason: str, tmp_path: Path) -> None:
    """Each end of a machine has its verdict."""
    result = judge("6.99.0", run_shell(script, tmp_path))
    assert (result.outcome, result.reason) == (outcome, reason)


def test_last_words(tmp_path: Path) -> None:
    """A dead kernel's console is shown from its complaint on, and kept as a whole."""
    noise = "i=0; while [ $i -lt 50 ]; do echo line $i; i=$((i+1)); done >&2; "
    result = judge("6.99.0", run_shell(BEGINS + noise + PANIC + "exit 255", tmp_path))
    assert result.diagnostics == [f"console: {BUG}", f"console: {FATAL}"]
    assert "line 0\nline 1\n" in (tmp_path / "console.txt").read_text()


@pytest.mark.parametrize(
    ("said", "shown"), [("", "the console was silent since the case began"), ("rcu: stall", "console: rcu: stall")]
)
def test_last_words_of_a_case(said: str, shown: str, tmp_path: Path) -> None:
    """Nobody is shown what the console said before the case that is to blame."""
    script = BOOTS + BEGINS + CASE.format("move on anon") + (f"echo '{said}' >&2; " if said else "") + "exit 255"
    assert judge("6.99.0", run_shell(script, tmp_path)).diagnostics == [shown]


def test_kernel_without_9p(tmp_path: Path) -> None:
    """A kernel that cannot read the host's files is told from one with a bug."""
    panic = "echo 'Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)' >&2; exit 255"
    result = judge("6.99.0", run_shell(BOOTS + panic, tmp_path))
    assert result.diagnostics[0].startswith("it cannot read the host's files: give it the options in ")
