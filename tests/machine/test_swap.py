# SPDX-License-Identifier: GPL-2.0-only
"""Swap is there while it lasts, gone afterwards, and nobody is disturbed who keeps it."""

from __future__ import annotations

import os
import select
import signal

import pytest

from tests.machine.helpers import Child, needs_root
from uffd_selftests.machine import swap as swap_module
from uffd_selftests.machine.journal import Entry, Journal
from uffd_selftests.machine.repair import repair
from uffd_selftests.machine.swap import Swap, keep_swap, swap_files


@needs_root
@pytest.mark.usefixtures("journal")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("step", ["hot_add", "make_swap", "swap_on", "held"])
def test_killed_run_leaves_no_swap(monkeypatch: pytest.MonkeyPatch, step: str, own: bool) -> None:
    """At whatever step a run is killed that makes swap, the next one takes the disk away."""
    if swap_files() or not swap_module.ZRAM.exists():
        pytest.skip("needs a machine without swap, and zram")
    disks = swap_module._disks()

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hold(child: Child) -> None:
        if step == "hot_add":
            monkeypatch.setattr(Journal, "update", update)
        elif step != "held":
            monkeypatch.setattr(swap_module, step, die)
        with Swap(1 << 20, own=own):
            child.hold()

    def update(journal: Journal, entry: Entry, record: swap_module._SwapRecord) -> None:
        if record.disk is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        write(journal, entry, record)

    write = Journal.update
    child = Child(hold)
    if step == "held":
        child.wait_until_it_holds()
        assert swap_files()
    assert child.end(signal.SIGKILL if step == "held" else None) == -signal.SIGKILL
    assert swap_module._disks() != disks
    assert len(repair()) == 1
    assert (swap_module._disks(), swap_files()) == (disks, [])


@needs_root
@pytest.mark.usefixtures("journal")
def test_own_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """An own swap disk is used before the machine's and switched off alone; it waits for those who keep swap."""
    if not swap_module.ZRAM.exists():
        pytest.skip("needs zram")

    def keep(child: Child) -> None:
        monkeypatch.setattr(
            swap_module, "_swap_turn", swap_module._SwapTurn()
        )  # it is not the one that has swap for itself
        keep_swap()
        child.hold()

    monkeypatch.setattr(swap_module, "_swap_turn", swap_module._SwapTurn())
    monkeypatch.setattr(swap_module, "SWAP_SECONDS", 0.1)
    before = swap_files()
    with Swap(1 << 20):
        others = swap_files()
        with Swap(1 << 20, own=True) as swap:
            [own] = set(swap_files()) - set(others)
            lines = [line.split() for line in swap_module.SWAPS.read_text().splitlines()[1:]]
            assert max(lines, key=lambda line: int(line[-1]))[0] == own
            keep_swap()  # by the same process, which goes on to have it for itself
            child = Child(keep)
            assert not select.select([child._ready], [], [], 0.1)[0]
            swap.off()
            assert swap_files() == others
        child.wait_until_it_holds()
        with pytest.raises(OSError, match="other tests have memory in swap"), Swap(1 << 20, own=True):
            pass
        assert swap_files() == others
        child.end(signal.SIGKILL)
    assert swap_files() == before
