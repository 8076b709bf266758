# SPDX-License-Identifier: GPL-2.0-only
"""A kernel is booted and saved once, and whatever becomes of that file the results are right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import needs_userfaultfd
from tests.vm.helpers import FakeQemu, write_cases, write_image
from uffd_selftests import cli as command
from uffd_selftests.vm import images, machines
from uffd_selftests.vm import qemu as host
from uffd_selftests.vm.qemu import AUTO, KVM, TCG, Shape

if TYPE_CHECKING:
    from tests.vm.conftest import Lab
    from uffd_selftests.harness.guest import Machine

pytestmark = needs_userfaultfd

BOOTS, SAVES, STARTS = "boot tcg bzImage1", "save bzImage1", "restore bzImage1"
TWO = """
    @uffd_case("one")
    def test_one():
        '''It is so.'''

    @uffd_case("two")
    def test_two():
        '''It is so, too.'''
"""


@pytest.fixture
def cases(tmp_path: Path) -> str:
    """Return a file of cases that pass."""
    return write_cases(tmp_path / "test_inner.py", TWO)


# ---- kept from run to run -------------------------------------------------------------------------------------------


def make(qemu: FakeQemu, accelerator: str = TCG, said: list[str] | None = None, shape: Any = None) -> Machine:
    """Make the machine of a kernel, or find it."""
    image = qemu.folder / "bzImage1"
    kernel = images.find(str(image if image.exists() else write_image(image)), "x86_64")
    common = qemu.folder / f"common-{threading.get_ident()}"
    common.mkdir(exist_ok=True)
    wanted = Shape(**{"memory": "64M", **(shape or {})})
    maker = machines.Maker(wanted, accelerator, common, ([] if said is None else said).append)
    return maker.make(kernel, common, lambda _: 1.0, places=1, max_deaths=1)


def test_used_again(lab: Lab, cases: str) -> None:
    """The first run boots, saves and says so; the second starts from the file, and says nothing of it."""
    assert lab.run("--", cases)[0] == 0
    assert lab.said[0] == "6.99.1: booting, emulated"
    told = r"6\.99\.1: ready after \d\.\d seconds, saved \(\d+ MiB, \d+ in all: --vm-forget\) in (.*)"
    assert (found := re.fullmatch(told, lab.said[1]))
    assert [str(path.parent) for path in lab.qemu.saved] == [found[1]]
    assert lab.qemu.log == [BOOTS, SAVES, STARTS]
    assert lab.run("--", cases)[0] == 0
    assert lab.said == ["6.99.1: pass:2 fail:0 xfail:0 xpass:0 skip:0 error:0"]
    assert lab.qemu.log == [BOOTS, SAVES, STARTS, STARTS]
    console = (lab.output / "6.99.1/console-1.txt").read_text()
    assert console.splitlines()[0] == "[    0.000000] Linux version 6.99.0"  # of the boot long ago


def test_cut_off(qemu: FakeQemu) -> None:
    """A file that is not whole is made anew, and so is one of which nothing is known."""
    machine = make(qemu)
    size = os.path.getsize(machine.saved)
    os.truncate(machine.saved, 100)
    assert make(qemu) == machine
    (Path(machine.saved).parent / machines.NOTES).write_text("[")
    assert make(qemu) == machine
    assert qemu.log == 3 * [BOOTS, SAVES]
    assert os.path.getsize(machine.saved) == size


@pytest.mark.parametrize("workers", ["0", "2"])
def test_cannot_be_restored(lab: Lab, cases: str, workers: str) -> None:
    """A machine that does not start is removed, so that the next run makes another; this one says one line."""
    lab.run("--", cases)
    state = lab.qemu.saved[0]
    state.write_bytes(bytes(state.stat().st_size))
    code, lines = lab.run("-n", workers, "--", cases)
    assert code == 1
    assert not state.exists()
    assert lines[-2].startswith("not ok 1 6.99.1")
    why = "the saved machine cannot be started: "  # by the first worker; for the other it is gone
    assert [line for line in lines if why in line]
    assert len([line for line in lab.said if line.startswith(f"6.99.1: {why}")]) == 1
    assert lab.run("-n", workers, "--", cases)[0] == 0


def test_bad_from_the_start(qemu: FakeQemu) -> None:
    """QEMU can write what it cannot read: that is told, and the file is gone."""
    qemu.go_wrong("bad state")
    machine = make(qemu)
    (Path(machine.common) / "place-0").touch()
    with pytest.raises(EOFError, match="the saved machine cannot be started: qemu-system-x86_64: error while loading"):
        machine.source()().ask("survey")
    assert qemu.saved == []


OTHERS: dict[str, Any] = {"memory": "32M", "cpus": 2, "append": ("nokaslr",), "qemu": ("-cpu", "max")}
"""Fields of a Shape."""


@pytest.mark.parametrize("option", OTHERS)
def test_other_machines(qemu: FakeQemu, option: str) -> None:
    """What was booted with other options is another machine; both are kept."""
    for shape in ({}, {option: OTHERS[option]}, {}):
        make(qemu, shape=shape)
    assert qemu.log == 2 * [BOOTS, SAVES]
    assert len(qemu.saved) == 2


def test_other_qemu_or_kernel(qemu: FakeQemu) -> None:
    """So is one of another QEMU, or of a kernel that was built again."""
    make(qemu)
    qemu.go_wrong("version").write_text("QEMU emulator version 9.0.1")
    make(qemu)
    os.utime(qemu.folder / "bzImage1", (0, 0))
    make(qemu)
    assert qemu.log == 3 * [BOOTS, SAVES]


def test_forget(qemu: FakeQemu, capfd: pytest.CaptureFixture[str]) -> None:
    """Saved machines are removed on demand, and how much that gives back is said."""
    with open(make(qemu).saved, "ab") as file:
        os.posix_fallocate(file.fileno(), 0, 5 << 20)
    assert command.main(["--vm-forget"]) == 0
    assert capfd.readouterr().err == "uffd-selftests: 5 MiB of saved machines removed\n"
    assert not machines.folder().exists()
    assert command.main(["--vm-forget"]) == 0
    assert capfd.readouterr().err == "uffd-selftests: 0 MiB of saved machines removed\n"


def test_old_ones_go(qemu: FakeQemu) -> None:
    """A machine from which nothing was started for long goes when another is made; one in use stays."""
    old, young = make(qemu), make(qemu, shape={"cpus": 2})
    os.utime(old.saved, (0, 0))
    new = make(qemu, shape={"cpus": 3})
    assert sorted(map(str, qemu.saved)) == sorted([young.saved, new.saved])


# ---- what cannot be saved -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mishap", "why"),
    [
        ("no save", "State blocked by non-migratable device 'fake'"),
        ("full disk", "Unable to write to command: Broken pipe"),
    ],
)
def test_cannot_be_saved(lab: Lab, cases: str, mishap: str, why: str) -> None:
    """Then each guest boots, which takes longer and changes no result."""
    lab.qemu.go_wrong(mishap)
    code, lines = lab.run("--", cases)
    assert (code, lines[-2]) == (0, "ok 1 6.99.1")
    assert lab.said[1] == f"6.99.1: cannot be saved, each guest boots: {why}"
    assert [line for line in lab.qemu.log if line != SAVES] == [BOOTS, BOOTS]
    assert lab.qemu.saved == []
    assert list(machines.folder().glob("making-*")) == []


def test_each_guest_boots(lab: Lab, tmp_path: Path) -> None:
    """So does the guest that takes the place of one that died."""
    lab.qemu.go_wrong("no save")
    text = TWO.replace("'''It is so.'''", "die('BUG: it is over')")
    path = write_cases(tmp_path / "test_inner.py", text)
    code, lines = lab.run("--", path)
    assert (code, [line for line in lines if line.startswith(("  ok", "  not ok"))]) == (
        1,
        ["  not ok 1 one # ERROR BUG: it is over", "  ok 2 two"],
    )
    assert lab.qemu.log == [BOOTS, BOOTS, BOOTS]


def test_no_cache(lab: Lab, cases: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be kept at all, one line says so."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    code, _ = lab.run("--", cases)
    assert (code, lab.said) == (1, ["cannot write /dev/null/uffd-selftests/machines: Not a directory"])


# ---- several at once, and which accelerator -------------------------------------------------------------------------


def test_two_sessions(qemu: FakeQemu) -> None:
    """Sessions that begin at once make a machine once; the second waits for the first."""
    found: list[Machine] = []
    said: list[str] = []
    write_image(qemu.folder / "bzImage1")
    threads = [threading.Thread(target=lambda: found.append(make(qemu, said=said))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert qemu.log == [BOOTS, SAVES]
    assert len({machine.saved for machine in found}) == 1
    assert len(found) == 2
    assert len(said) == 2


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a host on which KVM can be opened."""
    monkeypatch.setattr(host, "kvm_present", lambda: True)
    monkeypatch.setattr(machines, "KVM_SECONDS", 20.0)


@pytest.mark.usefixtures("kvm")
def test_kvm(qemu: FakeQemu) -> None:
    """Where KVM works it is taken, and what boots beside it is ended."""
    said: list[str] = []
    machine = make(qemu, AUTO, said)
    assert machine.command[machine.command.index("-accel") + 1] == KVM
    assert said[0] == "6.99.0-test: booting, with KVM"
    assert [line for line in qemu.log if line != BOOTS] == ["boot kvm bzImage1", SAVES]
    assert not list(machines.folder().glob("no-kvm-*"))
    assert make(qemu, AUTO, said).saved == machine.saved


@pytest.mark.usefixtures("kvm")
@pytest.mark.parametrize("mishap", ["no kvm", "no kvm boot"])
def test_kvm_that_does_not_work(qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch, mishap: str) -> None:
    """Where no kernel says a word with KVM it is emulated, and nobody tries again as long as the host runs."""
    monkeypatch.setattr(machines, "KVM_SECONDS", 2.0)
    qemu.go_wrong(mishap)
    said: list[str] = []
    machine = make(qemu, AUTO, said)
    assert machine.command[machine.command.index("-accel") + 1] == TCG
    assert said[0] == "6.99.0-test: booting, emulated"
    assert len(list(machines.folder().glob("no-kvm-*"))) == 1
    os.unlink(machine.saved)
    make(qemu, AUTO, said)
    assert qemu.log.count("boot kvm bzImage1") == 1


def test_without_kvm(qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where KVM cannot be opened nobody tries."""
    monkeypatch.setattr(host, "kvm_present", lambda: False)
    make(qemu, AUTO, [])
    assert qemu.log == [BOOTS, SAVES]


def test_fake_is_called_as_qemu(qemu: FakeQemu) -> None:
    """What these tests rest on: the program is found, and tells its version."""
    call = [sys.executable, "-c", "from uffd_selftests.vm import qemu; print(qemu.version_of('x86_64'))"]
    said = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    assert said == "QEMU emulator version 9.0.0 (Debian 1:9.0.0)\n"
    assert qemu.log == []
