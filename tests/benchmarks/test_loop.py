# SPDX-License-Identifier: GPL-2.0-only
"""The loop counts every access, and ends when nobody answers."""

from __future__ import annotations

import itertools
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.helpers import BENCHMARKS
from uffd_selftests.mem_types import ANON
from uffd_selftests.toolkit.handle import MISSING, Uffd

if TYPE_CHECKING:
    from types import ModuleType


def test_warnings() -> None:
    """The compiler has nothing to say."""
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-c", "-o", "/dev/null"]
    subprocess.run(["cc", *options, str(BENCHMARKS / "loop.c")], check=True)


def test_every_access_is_counted(loop: ModuleType) -> None:
    """Each thread touches its share, and no page is left out or counted twice, however the pages are shared out."""
    area = ANON.allocate(7)
    try:
        for threads in (1, 2, 3, 7):
            touched = loop.touch(area.range, area.page_size, threads, write=True, release=lambda: None)
            assert touched.latencies.count == 7
            assert touched.seconds > 0
        area.expect_zero()
    finally:
        area.close()


def test_buckets(loop: ModuleType) -> None:
    """The buckets of the histogram begin where the one before ends, and are 3 % wide."""
    _, library = loop._library()
    starts = [library.loop_latency(bucket) for bucket in range(library.LOOP_BUCKETS)]
    assert starts[:64] == list(range(64))
    assert all(before < after <= before * 33 / 32 for before, after in itertools.pairwise(starts[64:]))
    assert starts[-1] < 1 << 64 <= starts[-1] * 33 / 32


def test_percentiles(loop: ModuleType) -> None:
    """Half of the accesses took p50 or less; sums of histograms count both."""
    first = loop.Latencies([(10, 98), (500, 1)], 510)
    both = first + loop.Latencies([(10, 1), (70, 100)], 75)
    assert both.buckets == [(10, 99), (70, 100), (500, 1)]
    assert (both.slowest, both.count) == (510, 200)
    assert [both.percentile(percent) for percent in (49, 50, 99, 99.5, 100)] == [10, 70, 70, 70, 500]


def test_a_hang_ends(loop: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that nobody answers are let go after the deadline, and it is an error."""
    monkeypatch.setattr(loop, "DEADLINE", 0.1)
    area = ANON.allocate(2)
    try:
        with Uffd.open() as uffd:
            uffd.register(area.range, MISSING)
            with pytest.raises(loop.BenchmarkError, match="2 threads hang"):
                loop.touch(area.range, area.page_size, 2, write=False, release=lambda: uffd.release(area.range))
    finally:
        area.close()
