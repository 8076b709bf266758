# SPDX-License-Identifier: GPL-2.0-only
"""upstream.py reads what upstream's program prints, in all its forms, and refuses a tree that it cannot build."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.outputs import KSELFTEST, LINES, OURS

if TYPE_CHECKING:
    from types import ModuleType

OUTCOMES = {
    "UFFDIO_API (with syscall)": "ok",
    "UFFDIO_API (with /dev/userfaultfd)": "skip",
    "zeropage on anon": "ok",
    "wp-fork-pin on shmem": "skip",
    "poison on hugetlb-private": "fail",
}


@pytest.mark.parametrize("output", [LINES, KSELFTEST], ids=["lines", "kselftest"])
def test_upstreams_output(upstream: ModuleType, output: str) -> None:
    """Each verdict is read with its name and reason, whichever form the version prints."""
    verdicts, complete = upstream.parse(output)
    assert {name: verdict.outcome for name, verdict in verdicts.items()} == OUTCOMES
    assert verdicts["UFFDIO_API (with /dev/userfaultfd)"].reason == "cannot open userfaultfd handle"
    assert complete


def test_our_output(upstream: ModuleType) -> None:
    """Ours has the name first, and outcomes that upstream does not know."""
    verdicts, complete = upstream.parse(OURS)
    assert {name: verdict.outcome for name, verdict in verdicts.items()} == {
        **OUTCOMES,
        "unregister-wakes on anon": "xfail",
    }
    assert str(verdicts["poison on hugetlb-private"]) == "fail (TIMEOUT 30 seconds)"
    assert complete


@pytest.mark.parametrize("output", [LINES, KSELFTEST, OURS], ids=["lines", "kselftest", "ours"])
def test_early_end(upstream: ModuleType, output: str) -> None:
    """A program that died is not taken for one that ran to its end."""
    lines = output.splitlines(keepends=True)
    _, complete = upstream.parse("".join(lines[:4]))
    assert not complete


def test_death_within_a_case(upstream: ModuleType) -> None:
    """The case that upstream's program died in has no verdict."""
    verdicts, complete = upstream.parse("Testing zeropage on anon... done\nTesting events on anon... ")
    assert verdicts["events on anon"].outcome == "none"
    assert not complete


def test_newer_tree(loop: ModuleType, tmp_path: Path) -> None:
    """A tree whose handler takes other arguments is refused with advice, not with the compiler's complaints."""
    assert loop
    import upstream  # noqa: PLC0415

    folder = tmp_path / "linux" / upstream.SELFTESTS / "mm"
    folder.mkdir(parents=True)
    (folder / "local_config.h").touch()  # the tree counts as prepared
    (folder / "uffd-common.h").write_text("void *uffd_poll_thread(void *); struct uffd_global_test_opts;")
    with pytest.raises(upstream.UpstreamError, match=r"since Linux 6\.18: use linux-source-6\.12"):
        upstream.build_faults(tmp_path, None)
