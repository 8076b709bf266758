# SPDX-License-Identifier: GPL-2.0-only
"""What a launcher does to the machine it is on, and when that machine is no longer fit for more."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests.harness import jobs
from uffd_selftests.harness.isolation import Ending, How
from uffd_selftests.harness.jobs import Cases, Setting

if TYPE_CHECKING:
    from pathlib import Path

SETTING = Setting(environ={"UFFD_TOLD": "1"}, hugepage_size=0, sole=True, kmsg=False)
GIB = 1 << 30


def ending(*leftovers: str) -> Ending:
    """Return the end of a case that went well, or left something."""
    return Ending(How.DONE, "", [], [], list(leftovers), 0.1)


class Guest:
    """Cases of a machine whose health the test knows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.complaints: list[str] = []
        self.lost: list[str] = []
        self.available = 4 * GIB
        monkeypatch.setattr(jobs, "available_memory", lambda: self.available)
        monkeypatch.setattr(jobs, "_cpus_at_first", {0})
        monkeypatch.setattr(os, "environ", {})
        self.cases = Cases(own_machine=True)
        health: Any = SimpleNamespace(complaints=lambda: self.complaints)
        self.cases._health = health

    def set_up(self, **more: Any) -> dict[str, Any]:
        """Make it ready."""
        setting: Any = {**SETTING, **more}
        return self.cases.ask_set_up(setting)

    def end(self, *leftovers: str) -> Ending:
        """Complete the end of a case."""
        pages: Any = SimpleNamespace(lost=lambda: self.lost)
        self.cases._pages = pages
        self.cases.end([], told := ending(*leftovers))
        return told


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Guest:
    """Return a machine for cases alone."""
    return Guest(monkeypatch)


def test_as_it_was(machine: Guest) -> None:
    """A machine that is as it was goes on, even if a case has left a process that could be killed."""
    machine.set_up()
    for told in (machine.end(), machine.end("process 1 (x) S")):
        assert not told.damaged
        assert told.complaints == []


def test_complaints(machine: Guest) -> None:
    """One that complains does not."""
    machine.set_up()
    machine.complaints = ["kernel log: BUG"]
    told = machine.end()
    assert (told.damaged, told.complaints) == (True, ["kernel log: BUG"])


def test_lost_pages(machine: Guest) -> None:
    """Nor does one that has lost huge pages, which is said with what else is left."""
    machine.set_up()
    machine.lost = ["2 huge pages not given back"]
    told = machine.end("process 1 (x) S")
    assert (told.damaged, told.leftovers) == (True, ["process 1 (x) S", "2 huge pages not given back"])


def test_immortal(machine: Guest) -> None:
    """Nor one with a process that nothing ends."""
    machine.set_up()
    assert machine.end("process 1 (x) S", "process 2 cannot be killed").damaged


def test_short_of_memory(machine: Guest) -> None:
    """Nor one in which half of the memory is gone; what it had when it was set up counts."""
    machine.set_up()
    machine.available = 2 * GIB + 1
    assert not machine.end().damaged
    machine.available = 2 * GIB - 1
    assert machine.end().damaged
    machine.set_up()
    assert not machine.end().damaged


def test_others_are_there(machine: Guest) -> None:
    """Where others run cases, too, nobody can be blamed for what the kernel says."""
    machine.set_up(sole=False)
    machine.complaints, machine.lost = ["kernel log: BUG"], ["2 huge pages not given back"]
    told = machine.end()
    assert (told.damaged, told.complaints, told.leftovers) == (False, [], [])


def test_environment(machine: Guest) -> None:
    """Another machine keeps its own environment, and gets what it is told."""
    os.environ["PATH"] = "/bin"
    machine.set_up()
    assert os.environ.items() >= {("PATH", "/bin"), ("UFFD_TOLD", "1")}


def test_path(machine: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this one, the environment and the modules are those of whoever runs the cases."""
    monkeypatch.setattr(sys, "path", ["/old"])
    os.environ["PATH"] = "/bin"
    machine.set_up(path=["/new"])
    assert dict(os.environ) == {"UFFD_TOLD": "1"}
    assert sys.path == ["/new"]


def test_clock_and_random_numbers(machine: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine from a file is told what time it is, and gets random numbers; if it cannot be, it does without."""
    clock: list[object] = []
    stirred: list[bytes] = []

    def set_time(*arguments: object) -> None:
        clock.append(arguments)
        raise PermissionError

    monkeypatch.setattr(time, "clock_settime", set_time)
    monkeypatch.setattr(jobs, "_stir", stirred.append)
    machine.set_up(now=12.5, entropy="00ff")
    assert (clock, stirred) == ([(time.CLOCK_REALTIME, 12.5)], [b"\0\xff"])
    assert machine.cases.ready


def test_supply(machine: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are there, to the byte, and can be imported; those of a package as such."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    texts = {"supplied_one.py": "VALUE = 1\n", "supplied/__init__.py": "", "supplied/two.py": "# \udcff\nVALUE = 2\n"}
    for _ in range(2):
        machine.cases.ask_supply(str(tmp_path), texts)
    assert sys.path.count(str(tmp_path)) == 1
    assert (tmp_path / "supplied/two.py").read_bytes() == b"# \xff\nVALUE = 2\n"
    assert __import__("supplied_one").VALUE == 1
    assert __import__("supplied")


def test_huge_pages(machine: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for a number of huge pages, even none, has the machine cared for; others do not."""
    cared: list[int] = []
    monkeypatch.setattr(machine.cases, "_care", cared.append)
    assert machine.set_up() == {"shortage": None, "hugepages": None}
    machine.set_up(hugepages=0)
    machine.set_up(hugepages=7)
    assert cared == [0, 7]


def test_unknown_module(machine: Guest) -> None:
    """A module that cannot be loaded is the matter of the case, not of the launcher."""
    task: list[Any] = ["id", "name", "no.such.module", "f", [], None, None, 0, None, 0, 0, False, False]
    machine.cases.get_ready(task)
    assert "no.such.module" not in sys.modules


def test_variants_are_told() -> None:
    """Where all cases are loaded their variants are told, which may depend on the kernel."""
    cases = Cases(own_machine=True)
    cases.preload()
    variants: Any = cases.ask_survey()["variants"]
    assert "zeropage" not in variants
    assert variants["wp-mremap-thp"]


@pytest.mark.parametrize("own_machine", [False, True])
def test_machine_is_held(monkeypatch: pytest.MonkeyPatch, own_machine: bool) -> None:
    """On a machine of its own one virtual machine is kept: with the first of them the kernel changes its code."""
    held: list[int] = []

    def hold() -> list[int]:
        held.append(1)
        return held

    monkeypatch.setattr(jobs, "hold_machine", hold)
    monkeypatch.setattr(jobs, "probe_kvm", lambda: {"reason": None, "accesses": "emulation"})
    cases = Cases(own_machine=own_machine)
    for _ in range(2):
        assert cases.ask_kvm() == {"reason": None, "accesses": "emulation"}
    assert held == [1] * own_machine
