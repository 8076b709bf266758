# SPDX-License-Identifier: GPL-2.0-only
"""A machine is ended with all its processes, and KVM is used where it works."""

from __future__ import annotations

import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.helpers import BEGINS, BOOTS, CASE, PASSES, run_shell
from uffd_selftests.vm import guests, vng
from uffd_selftests.vm.guests import Accelerator, Ending, Guest
from uffd_selftests.vm.images import Kernel
from uffd_selftests.vm.verdict import judge
from uffd_selftests.vm.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable


# ---- one machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (BEGINS + CASE.format("move on anon") + "exec sleep 1000", "0.2 seconds without progress in move on anon"),
        (BEGINS + "while :; do echo 'rcu: stall' >&2; sleep 0.01; done", "0.2 seconds without progress"),
        (BOOTS + "sleep 1000 & wait", "0.2 seconds without getting as far as the suite"),
    ],
)
def test_hang(script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that makes no progress is ended with all its processes, whatever it still says on its console."""
    monkeypatch.setitem(guests.BOOT_SECONDS, vng.TCG, 0.2)
    result = judge("6.99.0", run_shell(script, tmp_path, patience=0.2))
    assert (result.outcome, result.reason) == ("timeout", reason)


def test_last_of_a_machine(tmp_path: Path) -> None:
    """The folder of a machine is not removed before all its processes have gone, which would write there."""
    mark = tmp_path / "mark"
    script = f"(sleep 0.2; touch {mark}) & exit 255"
    with subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shell:
        shell.wait()
        assert not mark.exists()
        guests._await_end(shell)
    assert mark.exists()


def test_console_cannot_be_written(tmp_path: Path) -> None:
    """The run goes on, and the trouble is told."""
    (tmp_path / "console.txt").symlink_to("/dev/full")
    ending = run_shell(PASSES, tmp_path)
    assert (ending.code, ending.trouble) == (0, "cannot write console.txt: No space left on device")


# ---- KVM or not -----------------------------------------------------------------------------------------------------


def lively(watch: Watch) -> Watch:
    """Return a watch of a kernel that came to life."""
    watch.console("Linux version 6.99.0")
    return watch


def test_kvm_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """KVM is tried once, by the first to boot; who comes later does as that found out."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    accelerator = Accelerator("auto")
    tried: list[str] = []
    said: list[str] = []

    def boot(how: str, alive: Callable[[], None]) -> Ending:
        tried.append(how)
        if how == "tcg":
            alive()
        return Ending(Watch(), 255)

    threads = [threading.Thread(target=accelerator.run, args=(boot, said.append)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tried == ["kvm", "tcg", "tcg"]
    assert said == ["KVM is there but boots no kernel"]


@pytest.mark.parametrize("works", [True, False])
def test_kvm_is_tried_early(works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is ended once it lives tells whether KVM works; in vain it is not tried with that kernel again."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    accelerator = Accelerator("auto")
    said = "Linux version 6.99.0" if works else "nothing"
    guest = Guest(Kernel(tmp_path, "6.99.0", tmp_path), tmp_path)
    started = time.monotonic()
    accelerator.try_early(guest, lambda: ["/bin/sh", "-c", f"echo {said} >&2; {'sleep 1000' if works else ''}"])
    assert time.monotonic() - started < 500, "the machine was not ended"
    tried = []

    def boot(how: str, _alive: Callable[[], None]) -> Ending:
        tried.append(how)
        return Ending(Watch(), 255)

    accelerator.run(boot, pytest.fail, "6.99.0")
    accelerator.run(boot, pytest.fail, "other")
    assert tried == (["kvm", "kvm"] if works else ["tcg", "kvm", "tcg"])


def test_kvm_and_what_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What boots nowhere says nothing about KVM: the next kernel tries it."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    accelerator = Accelerator("auto")
    tried = []

    def boot(how: str, _alive: Callable[[], None]) -> Ending:
        tried.append(how)
        return Ending(Watch(), 255)

    for _ in range(2):
        accelerator.run(boot, pytest.fail)
    assert tried == ["kvm", "tcg"] * 2


def test_kvm_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was ended says nothing about KVM, and no other follows."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    tried = []

    def boot(how: str, _alive: Callable[[], None]) -> Ending:
        tried.append(how)
        return Ending(Watch(), 255, stopped=True)

    Accelerator("auto").run(boot, pytest.fail)
    assert tried == ["kvm"]


def test_kvm_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as a kernel is alive the others may boot; that it dies later is not KVM's fault."""
    monkeypatch.setattr(vng, "kvm_present", lambda: True)
    accelerator = Accelerator("auto")
    second = threading.Event()

    def boot(how: str, alive: Callable[[], None]) -> Ending:
        assert how == "kvm"
        alive()
        if not second.is_set():
            second.set()
            other = threading.Thread(target=accelerator.run, args=(boot, pytest.fail))
            other.start()
            other.join(10)
            assert not other.is_alive()
        return Ending(lively(Watch()), 255)

    accelerator.run(boot, pytest.fail)


@pytest.mark.parametrize(
    ("wanted", "present", "used"), [("auto", False, "tcg"), ("tcg", True, "tcg"), ("kvm", False, "kvm")]
)
def test_accelerator_that_was_chosen(wanted: str, present: bool, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for is used, and without KVM there is only one way."""
    monkeypatch.setattr(vng, "kvm_present", lambda: present)
    tried = []

    def boot(how: str, _alive: Callable[[], None]) -> Ending:
        tried.append(how)
        return Ending(Watch(), 255)

    Accelerator(wanted).run(boot, pytest.fail)
    assert tried == [used]
