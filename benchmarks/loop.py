# SPDX-License-Identifier: GPL-2.0-only
"""The measuring loop of loop.c: built, called, and its histogram of latencies."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cffi import FFI

if TYPE_CHECKING:
    from collections.abc import Callable

    from uffd_selftests.toolkit.memory import Range

HERE = Path(__file__).resolve().parent
DEADLINE = 60.0 * float(os.environ.get("UFFD_DEADLINE_SCALE") or 1)
"""Seconds after which threads that still touch pages count as hanging."""


class BenchmarkError(Exception):
    """Nothing can be measured; the message says what to do."""


@dataclass
class Latencies:
    """How many accesses took how long: (nanoseconds, count) of each bucket that is not empty, in order.

    A bucket is named by the smallest latency that it counts, and is 3 % wide.
    """

    buckets: list[tuple[int, int]] = field(default_factory=list)
    slowest: int = 0
    """Nanoseconds."""

    def __add__(self, other: Latencies) -> Latencies:
        counts = dict(self.buckets)
        for latency, count in other.buckets:
            counts[latency] = counts.get(latency, 0) + count
        return Latencies(sorted(counts.items()), max(self.slowest, other.slowest))

    @property
    def count(self) -> int:
        """How many accesses there were."""
        return sum(count for _, count in self.buckets)

    def percentile(self, percent: float) -> int:
        """Return the latency in nanoseconds that so many percent of the accesses did not exceed, to 3 %."""
        left = self.count * percent / 100
        for latency, count in self.buckets:
            left -= count
            if left <= 0:
                return latency
        raise ValueError("no access was measured")


@dataclass(frozen=True)
class Touched:
    """What one call of the loop has measured."""

    seconds: float
    """From the first access of any thread to the end of the last one."""
    latencies: Latencies


@cache
def _library() -> tuple[FFI, Any]:
    """Build the library and load it; the file is not needed any longer then."""
    ffi = FFI()
    ffi.cdef((HERE / "loop.h").read_text())
    with tempfile.TemporaryDirectory(prefix="uffd-") as folder:
        target = Path(folder) / "loop.so"
        command = ["cc", "-std=gnu11", "-O2", "-shared", "-fPIC", "-pthread", str(HERE / "loop.c"), "-o", str(target)]
        try:
            result = subprocess.run(command, check=False, capture_output=True, text=True)
        except FileNotFoundError:
            raise BenchmarkError("no C compiler: apt-get install gcc") from None
        if result.returncode:
            raise BenchmarkError(f"cc {HERE / 'loop.c'}: {(result.stderr.splitlines() or ['failed'])[0]}")
        return ffi, ffi.dlopen(str(target))


def touch(where: Range, page_size: int, threads: int, *, write: bool, release: Callable[[], object]) -> Touched:
    """Touch every page of a range once, the threads each their own share.

    When a signal interrupts it, or the threads do not end in time (BenchmarkError), `release` is called: it has to let
    go those that sleep in a fault.
    """
    ffi, library = _library()
    loop = library.loop_start(
        ffi.new("struct loop_work *", [where.start, page_size, where.len // page_size, threads, write])
    )
    if loop == ffi.NULL:
        raise BenchmarkError(f"cannot start {threads} threads: {os.strerror(ffi.errno)}")
    result: Any = ffi.new("struct loop_result *")
    try:
        while library.loop_wait(loop, int(DEADLINE * 1000)):
            if ffi.errno != errno.EINTR:  # for a signal, Python calls its handler now
                raise BenchmarkError(f"{threads} threads hang: not all pages of {where} were touched in {DEADLINE:g} s")
    except BaseException:
        release()
        raise
    finally:
        library.loop_finish(loop, result)
    counts = ffi.unpack(result.count, library.LOOP_BUCKETS)
    buckets = [(library.loop_latency(bucket), count) for bucket, count in enumerate(counts) if count]
    return Touched(result.elapsed / 1e9, Latencies(buckets, result.slowest))
