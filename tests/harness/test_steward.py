# SPDX-License-Identifier: GPL-2.0-only
"""A run's huge pages are asked for once, workers take turns, and their plans come together."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.helpers import FACTS, needs_userfaultfd
from uffd_selftests.harness import jobs
from uffd_selftests.harness.results import Planned
from uffd_selftests.harness.steward import hand_in
from uffd_selftests.machine.hugepages import HugepagePool

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.helpers import Run

pytest_plugins = ["pytester"]


@needs_userfaultfd
@pytest.mark.skipif(not FACTS.hugepage_size, reason="the kernel has no huge pages")
@pytest.mark.parametrize("shortage", [None, "no memory"])
def test_turns(
    run: Run, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester, tmp_path: Path, shortage: str | None
) -> None:
    """Workers that cannot all have their huge pages take them in turns; each page wanted is asked for."""
    asked = tmp_path / "asked"  # by another process

    class Pool(HugepagePool):
        def __enter__(self) -> Pool:
            super().__enter__()
            if self.shortage:
                asked.write_text(self.shortage)
            asked.write_text(f"{self.wanted}")
            self.shortage = shortage  # which is not true
            return self

    monkeypatch.setattr(jobs, "HugepagePool", Pool)
    # They want a huge page, but take none: with turns, each finds itself alone.
    result = run(
        f"""
    import pathlib
    here = pathlib.Path({str(pytester.path)!r})

    @uffd_case("takes", variants=tuple("abcdef"), spare_hugepages=1)
    def test_takes(variant):
        (here / f"in-{{variant}}").touch()
        time.sleep(0.05)
        alone = len(list(here.glob("in-*"))) == 1
        (here / f"in-{{variant}}").unlink()
        assert alone or {shortage!r} is None

    @uffd_case("most", spare_hugepages=3)
    def test_most():
        pass
    """,
        "-n2",
    )
    assert asked.read_text() == "6"
    result.assert_outcomes(passed=7)


def test_worker_papers(tmp_path: Path) -> None:
    """A plan survives the way from a worker to the controller."""
    planned = Planned("id", "name", "case", "variant", "anon", "promise.", ("R-1",), "promise", {"id": "D"}, 3)
    hand_in(tmp_path, "gw0", [planned], "")
    paper = json.loads((tmp_path / "gw0.json").read_text())
    assert [Planned.from_dict(each) for each in paper["plan"]] == [planned]
