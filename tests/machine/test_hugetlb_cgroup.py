# SPDX-License-Identifier: GPL-2.0-only
"""Limits of cgroups on huge pages are seen before a touch beyond them is SIGBUS."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import needs_userfaultfd
from tests.machine.helpers import needs_root
from uffd_selftests.machine import hugetlb_cgroup
from uffd_selftests.machine.hugepages import lack_of_hugepages
from uffd_selftests.machine.hugetlb_cgroup import Limit, hugetlb_limit

SIZE = 2 << 20
NUMBER_WITHOUT_LIMIT = (1 << 63) - (1 << 12)
VERSIONS = {
    "v2": ("0::/pods/one\n", "cgroup2 cgroup2 rw", ("max", "current")),
    "v1": ("7:memory:/x\n3:hugetlb:/pods/one\n", "cgroup cgroup rw,hugetlb", ("limit_in_bytes", "usage_in_bytes")),
}


@pytest.fixture(params=VERSIONS)
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str, str]:
    """A process in a group of plain files: the place of the groups, and the names of limit and usage."""
    own, mount, names = VERSIONS[request.param]
    place = tmp_path / "groups"
    (place / "pods" / "one").mkdir(parents=True)
    (tmp_path / "cgroup").write_text(own)
    (tmp_path / "mountinfo").write_text(f"30 23 0:26 / {place} rw,nosuid shared:4 - {mount}\n")
    monkeypatch.setattr(hugetlb_cgroup, "PROC", tmp_path)
    return place, *names


def test_no_limit(tree: tuple[Path, str, str]) -> None:
    """Without files, and with one that says so, there is none."""
    place, limit, _ = tree
    assert hugetlb_limit(SIZE) is None
    (place / "pods" / f"hugetlb.2MB.{limit}").write_text("max" if limit == "max" else str(NUMBER_WITHOUT_LIMIT))
    assert hugetlb_limit(SIZE) is None
    assert hugetlb_limit(0) is None


def test_tightest_limit(tree: tuple[Path, str, str]) -> None:
    """The tightest of the group and all above it counts, less what is in use."""
    place, limit, usage = tree
    own, above = place / "pods" / "one", place / "pods"
    (own / f"hugetlb.2MB.{limit}").write_text(str(9 * SIZE))
    assert hugetlb_limit(SIZE) == Limit(9, own / f"hugetlb.2MB.{limit}")
    (above / f"hugetlb.2MB.{limit}").write_text(str(5 * SIZE))
    (above / f"hugetlb.2MB.{usage}").write_text(str(3 * SIZE))
    assert hugetlb_limit(SIZE) == Limit(2, above / f"hugetlb.2MB.{limit}")
    (own / f"hugetlb.2MB.rsvd.{limit}").write_text("0")
    assert hugetlb_limit(SIZE) == Limit(0, own / f"hugetlb.2MB.rsvd.{limit}")
    assert hugetlb_limit(1 << 30) is None
    reason = str(lack_of_hugepages(SIZE, 4))
    assert reason == f"needs 4 huge pages of 2048 kB, the cgroup allows 0 more: raise {own}/hugetlb.2MB.rsvd.{limit}"


def test_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the group is the root of what can be seen."""
    (tmp_path / "cgroup").write_text("0::/\n")
    (tmp_path / "mountinfo").write_text(f"30 23 0:26 / {tmp_path} ro - cgroup2 cgroup rw\n")
    (tmp_path / "hugetlb.1GB.max").write_text("0")
    monkeypatch.setattr(hugetlb_cgroup, "PROC", tmp_path)
    assert hugetlb_limit(1 << 30) == Limit(0, tmp_path / "hugetlb.1GB.max")


@pytest.fixture
def group() -> Iterator[Path]:
    """A real group that may have no huge pages."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    roots = [Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"]
    root = next((root for root in roots if "hugetlb" in (root / "cgroup.controllers").read_text().split()), None)
    if not root:
        pytest.skip("no cgroup2 with the hugetlb controller")
    control = root / "cgroup.subtree_control"
    before = "hugetlb" in control.read_text().split()
    control.write_text("+hugetlb")
    path = root / f"uffd-test-{os.getpid()}"
    path.mkdir()
    (path / "hugetlb.2MB.max").write_text("0")
    yield path
    path.rmdir()
    if not before:
        control.write_text("-hugetlb")


@needs_root
@needs_userfaultfd
def test_run_in_a_pod(group: Path) -> None:
    """Results on huge pages are skipped with the number and the file; the others are there."""
    run = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", "-f", "=copy-pages"],
        preexec_fn=lambda: (group / "cgroup.procs").write_text("0"),
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0
    assert "ok 1 copy-pages on anon\n" in run.stdout
    skipped = [line for line in run.stdout.splitlines() if " on hugetlb" in line]
    reason = f"huge pages of 2048 kB, the cgroup allows 0 more: raise {group}/hugetlb.2MB.max"
    assert len(skipped) == 2
    assert all("# SKIP needs " in line and line.endswith(reason) for line in skipped)
