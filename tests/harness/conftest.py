# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of the harness need: a run of pytest in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.vm.helpers import FakeQemu

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.helpers import Run

PREAMBLE = """
    import os, sys, time
    import pytest
    from uffd_selftests.case import Defect, Kind, uffd_case
    from uffd_selftests.common import Skip
    from uffd_selftests.mem_types import ALL, ANON, HUGETLB, SHMEM
    from uffd_selftests.abi.uapi import Feature
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run pytest on a text in this process; its cases run in children all the same."""
    for name in ("PYTEST_ADDOPTS", "UFFD_DEADLINE", "UFFD_REQUIRE", "UFFD_AREA_MIB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UFFD_DEADLINE_SCALE", "1")

    def run(text: str, *args: str) -> pytest.RunResult:
        pytester.makepyfile(PREAMBLE + text)
        return pytester.runpytest_inprocess("-p", "uffd_selftests.harness.plugin", "-p", "no:cacheprovider", *args)

    return run


@pytest.fixture
def qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    """Return a QEMU whose machines are processes of this host."""
    return FakeQemu.install(tmp_path, monkeypatch)
