# SPDX-License-Identifier: GPL-2.0-only
"""A virtual processor reads, writes, counts and stops as it is told, and a failure says where it stands."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import closing

import pytest

from uffd_selftests.machine.kvm import probe_kvm
from uffd_selftests.mem_types import ANON, Area
from uffd_selftests.toolkit.access import peek, poke
from uffd_selftests.toolkit.memory import PAGE_SIZE, Range
from uffd_selftests.toolkit.threads import Waiter
from uffd_selftests.toolkit.vcpu import CODE, PROGRAM, Machine, Processor, fetched, guest, sweeping

NOTHING = probe_kvm()["reason"]
VCPU = pytest.mark.skipif(bool(NOTHING), reason=str(NOTHING))


@pytest.fixture
def area() -> Iterator[Area]:
    """Map some pages, filled."""
    with closing(ANON.allocate(4)) as area:
        area.fill()
        yield area


@pytest.fixture
def cpu(area: Area) -> Iterator[Processor]:
    """Have a virtual processor with these pages."""
    with guest(area) as processor:
        yield processor


def test_programs() -> None:
    """Programs lie in one page, and none in another one."""
    places = sorted((program.place, program.place + len(program.code)) for program in PROGRAM.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
    assert places[0][0] >= CODE
    assert places[-1][1] <= CODE + PAGE_SIZE


@VCPU
@pytest.mark.parametrize("length", [1, 4, 7, PAGE_SIZE, 2 * PAGE_SIZE + 5])
def test_accesses(cpu: Processor, area: Area, length: int) -> None:
    """Bytes are read as they are, and written where they should, no further."""
    start = area.start + 16
    assert cpu.peek(start, length) == peek(start, length)
    data = bytes(byte ^ 0xFF for byte in peek(start, length))
    around = peek(start - 8, 8), peek(start + length, 8)
    cpu.poke(start, data)
    assert peek(start, length) == data
    assert (peek(start - 8, 8), peek(start + length, 8)) == around


@VCPU
def test_fetch(cpu: Processor, area: Area) -> None:
    """Code of the area is executed."""
    poke(area.page(2).start, fetched(b"\x01\x02\x03\x04"))
    assert cpu.fetch(area.page(2).start) == b"\x01\x02\x03\x04"


@VCPU
def test_counts(cpu: Processor, area: Area) -> None:
    """Words are incremented as often as told, each in its page, and other values are noticed."""
    for page in range(4):
        poke(area.page(page).start, bytes(8))
    cpu.increment(area.start)
    cpu.counting(area.start, 5)()
    assert peek(area.start, 8) == bytes([6, 0, 0, 0, 0, 0, 0, 0])
    assert cpu.steps == 5
    cpu.sweeping(area.range, PAGE_SIZE, 7)()
    assert [peek(area.page(page).start)[0] for page in range(4)] == [13, 7, 7, 7]
    assert cpu.steps == 7
    cpu.checking(area.range, PAGE_SIZE, 3, 7)()
    assert (cpu.steps, cpu.wrong) == (3, 3)


@VCPU
def test_sweeping(area: Area) -> None:
    """A processor at work ends at the end of its round, and counters that differ are told."""
    for page in range(4):
        poke(area.page(page).start, bytes(8))
    with guest(area) as cpu:
        with sweeping(cpu, area.range, PAGE_SIZE) as work:
            work.await_sweeps(3)
        counts = {peek(area.page(page).start, 4) for page in range(4)}
        assert len(counts) == 1
        assert int.from_bytes(counts.pop(), "little") == cpu.steps >= 3
        with pytest.raises(AssertionError, match="as against the first one: expected"):
            with sweeping(cpu, area.range, PAGE_SIZE) as work:
                work.await_sweeps(1)
                poke(area.page(3).start + 3, b"\x40")


@VCPU
def test_several(area: Area) -> None:
    """Processors count in the same page at once, and lose nothing."""
    poke(area.start, bytes(4))
    with Machine(area, processors=3) as machine:
        waiters = [Waiter(cpu.counting(area.start, 1000)) for cpu in machine.processors]
        for waiter in waiters:
            waiter.__enter__()
        for waiter in waiters:
            waiter.result()
    assert int.from_bytes(peek(area.start, 4), "little") == 3000


@VCPU
def test_nowhere(cpu: Processor, area: Area) -> None:
    """An address that is not in the guest's memory is refused, and what lies beside it tells where it was met."""
    with pytest.raises(ValueError, match="is not in the guest's memory"):
        cpu.peek(area.range.end)
    with pytest.raises(AssertionError, match=r"got KVM_EXIT_MMIO of guest address 0x30000000 at eip 0x1000"):
        cpu.execute("load", rdi=0x30000000)


@VCPU
def test_nothing_stays(area: Area) -> None:
    """Closing leaves no descriptor and no mapping."""

    def state() -> tuple[int, int]:
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum("kvm" in line for line in maps)

    with guest(area):
        pass
    before = state()
    with guest(Range(area.start, PAGE_SIZE)):
        assert state() != before
    assert state() == before
