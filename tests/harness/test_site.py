# SPDX-License-Identifier: GPL-2.0-only
"""Whoever runs the cases can be replaced, and the next one knows all that was told before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import FACTS
from uffd_selftests.harness import site as site_module
from uffd_selftests.harness.isolation import Ending, How
from uffd_selftests.harness.jobs import Setting
from uffd_selftests.harness.launcher import Launcher, Order
from uffd_selftests.harness.site import Lost, Site, Spent, setting

if TYPE_CHECKING:
    from pathlib import Path

    from uffd_selftests.harness.settings import Settings

SETTING = Setting(environ={}, hugepage_size=0, sole=True, kmsg=False)


class FakeLauncher(Launcher):
    """Answers, or not, as its number is in the list of those that do."""

    def __init__(self, number: int, mute: set[int], heard: list[tuple[Any, ...]]) -> None:
        self.alive, self.number = True, number
        self._mute, self._heard = mute, heard

    def own_setting(self) -> dict[str, Any]:
        """Return its number."""
        return {"number": self.number}

    def ask(self, name: str, *arguments: object) -> Any:
        """Keep what was asked."""
        if self.number in self._mute:
            raise EOFError(f"number {self.number} is mute")
        self._heard.append((self.number, name, *arguments))
        return {"done": self.number}

    def run(self, order: Order, then: Order | None = None) -> Ending:
        """Die of an order that says so."""
        self.alive = order.task != "die"
        return Ending(How.DONE if self.alive else How.ERROR, "", [], [], [], 0.0)

    def finish(self, *_: object) -> Any:
        """Say what it has lost, if it is not mute."""
        self.ask("finish")
        return {"lost": [f"page of {self.number}"], "tainted": "W"}

    def close(self) -> None:
        """Keep that, too."""
        self._heard.append((self.number, "close"))


class Lab:
    """A site with launchers that are numbered from 1 on."""

    def __init__(self, *mute: int, remote: bool = True) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self._mute = set(mute)
        self._number = 0
        self.site = Site(self._next, remote=remote)

    def _next(self) -> Launcher:
        self._number += 1
        return FakeLauncher(self._number, self._mute, self.heard)

    @property
    def names(self) -> list[tuple[Any, ...]]:
        """What was heard, without arguments."""
        return [each[:2] for each in self.heard]


def test_set_up_again() -> None:
    """What was told the first launcher is told the next, with what is its own."""
    lab = Lab()
    assert lab.site.set_up(SETTING) == {"done": 1}
    assert lab.site.is_set_up
    lab.site.replace()
    assert lab.site.ask("survey") == {"done": 2}
    assert lab.heard == [
        (1, "set_up", {**SETTING, "number": 1}),
        (1, "finish"),
        (1, "close"),
        (2, "set_up", {**SETTING, "number": 2}),
        (2, "survey"),
    ]


def test_replaced_when_dead() -> None:
    """A launcher that has died is not asked again."""
    lab = Lab()
    lab.site.set_up(SETTING)
    assert lab.site.run(Order("live", 1), None).how is How.DONE
    assert lab.site.run(Order("die", 1), None).how is How.ERROR
    assert lab.names == [(1, "set_up"), (1, "close")]
    lab.site.run(Order("live", 1), None)
    assert lab.names[2:] == [(2, "set_up")]


def test_one_more_try() -> None:
    """One that cannot be made ready is replaced, two are too many."""
    lab = Lab(2)
    lab.site.set_up(SETTING)
    lab.site.replace()
    assert lab.site.ask("survey") == {"done": 3}
    lab = Lab(2, 3)
    lab.site.set_up(SETTING)
    lab.site.replace()
    with pytest.raises(Lost, match="number 2 is mute"):
        lab.site.ask("survey")


def test_one_more_try_at_first() -> None:
    """That holds for the first one of all as well."""
    lab = Lab(1)
    assert lab.site.set_up(SETTING) == {"done": 2}
    with pytest.raises(Lost, match="number 1 is mute"):
        Lab(1, 2).site.set_up(SETTING)


def test_spent() -> None:
    """Where nothing more is to run there is no second try."""
    tries = []

    def spend() -> Launcher:
        tries.append(1)
        raise Spent("never ran")

    with pytest.raises(Spent):
        Site(spend).ask("survey")
    assert len(tries) == 1


def test_finish() -> None:
    """What all launchers have to say at their ends is known at the end; of none, or a mute one, nothing is."""
    lab = Lab()
    assert lab.site.finish() == {}
    lab.site.set_up(SETTING)
    lab.site.replace()
    lab.site.ask("survey")
    lab._mute = {3}
    lab.site.replace()
    lab.site._launcher = lab._next()
    assert lab.site.finish() == {"lost": ["page of 1", "page of 2"], "tainted": "W"}
    assert lab.names[-1] == (3, "close")


def test_close() -> None:
    """Who only wants an end hears nothing more."""
    lab = Lab()
    lab.site.set_up(SETTING)
    lab.site.close()
    assert lab.names == [(1, "set_up"), (1, "close")]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder of packages with case files."""
    for name in (
        "mine/__init__.py",
        "mine/inner/__init__.py",
        "mine/inner/test_a.py",
        "mine/inner/beside.py",
        "top.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"# {name} ".encode() + b"\xff\n")
    return tmp_path


def test_supply(tree: Path) -> None:
    """A case file comes with its packages and what is beside it, once to each launcher."""
    lab = Lab()
    lab.site.set_up(SETTING)
    for _ in range(2):
        lab.site.supply(tree / "mine/inner/test_a.py", "mine.inner.test_a")
        lab.site.supply(tree / "top.py", "top")
    deep, flat = lab.heard[1:]
    assert (deep[:3], flat[:3]) == ((1, "supply", str(tree)), (1, "supply", str(tree)))
    assert sorted(deep[3]) == [
        *("mine/__init__.py", "mine/inner/__init__.py", "mine/inner/beside.py", "mine/inner/test_a.py"),
    ]
    assert deep[3]["mine/inner/beside.py"].encode("utf-8", "surrogateescape") == b"# mine/inner/beside.py \xff\n"
    assert list(flat[3]) == ["top.py"]
    lab.site.replace()
    lab.site.ask("survey")
    assert [(*each[:3], sorted(each[3])) for each in lab.heard if each[:2] == (2, "supply")] == [
        (2, "supply", str(tree), sorted([*deep[3], "top.py"])),
    ]


@pytest.mark.parametrize("remote", [True, False])
def test_nothing_to_supply(tree: Path, *, remote: bool) -> None:
    """The package's own files are there, and on this machine all are."""
    lab = Lab(remote=remote)
    lab.site.set_up(SETTING)
    lab.site.supply(site_module.PACKAGE / "cases/unit/test_api.py", "uffd_selftests.cases.unit.test_api")
    if not remote:
        lab.site.supply(tree / "top.py", "top")
    assert lab.names == [(1, "set_up")]


def test_supply_to_one_that_dies(tree: Path) -> None:
    """A launcher that dies of it leaves nothing that the next one is not told."""
    lab = Lab()
    lab.site.set_up(SETTING)
    lab.site.supply(tree / "top.py", "top")
    lab._mute = {2}
    lab.site.replace()
    lab.site.ask("survey")
    assert lab.names[-3:] == [(3, "set_up"), (3, "supply"), (3, "survey")]


class FakeSettings:
    """All that is asked of them."""

    kmsg = True
    folder = None


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an environment with a secret."""
    monkeypatch.setenv("UFFD_OF_MINE", "1")
    monkeypatch.setenv("SECRET", "2")


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize("remote", [True, False])
def test_setting(*, remote: bool) -> None:
    """Another machine learns what of the environment begins with UFFD_, and not where this one has its modules."""
    settings: Settings = FakeSettings()  # type: ignore[assignment]
    told = setting(settings, FACTS, sole=True, remote=remote)
    assert told["environ"]["UFFD_OF_MINE"] == "1"
    assert ("SECRET" in told["environ"], "path" in told) == (not remote, not remote)
    assert (told["sole"], told["kmsg"], told["hugepage_size"]) == (True, True, FACTS.hugepage_size)
