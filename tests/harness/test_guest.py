# SPDX-License-Identifier: GPL-2.0-only
"""What a case does to its machine costs one result, and never the run.

The machines are processes of this host (tests/vm/fake_qemu.py); runs are started as --kernel starts them.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers import needs_userfaultfd
from tests.vm.helpers import BUG, FATAL, FakeQemu, until, write_cases
from uffd_selftests.harness import launcher
from uffd_selftests.harness.guest import Guest, Machine
from uffd_selftests.harness.isolation import How
from uffd_selftests.harness.launcher import Order
from uffd_selftests.harness.site import Spent
from uffd_selftests.vm.qemu import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Run, Starter

pytestmark = needs_userfaultfd

SHAPE = Shape(memory="64M")
either_way = pytest.mark.parametrize("workers", ["0", "2"])

AROUND = """
    @uffd_case("before")
    def test_before():
        '''It comes first.'''

    @uffd_case("harms")
    def test_harms():
        '''It does no harm.'''
        {harm}

    @uffd_case("after")
    def test_after():
        '''It comes last.'''
"""


@dataclass
class Guests:
    """Runs cases in guests."""

    qemu: FakeQemu
    cli: Starter

    def run(self, cases: str, *options: str, workers: str = "0", plugin: str = "", **fields: object) -> Run:
        """Run a file of cases in guests of a machine."""
        self.qemu.machine(SHAPE, **fields).save(path := self.qemu.folder / "machine.json")
        call = [f"--machine={path}", "--kmsg", "--data-only", "-n", workers, *options, "--"]
        env = {}
        if plugin:
            (self.qemu.folder / "inner_plugin.py").write_text(textwrap.dedent(plugin))
            call += ["-p", "inner_plugin"]
            env["PYTHONPATH"] = f"{self.qemu.folder}:{os.environ['PYTHONPATH']}"
        return self.cli.run(*call, write_cases(self.qemu.folder / "test_inner.py", cases), env=env)


@pytest.fixture
def guests(qemu: FakeQemu, cli: Starter) -> Guests:
    """Return the means to run cases in guests."""
    return Guests(qemu, cli)


def where(run: Run) -> list[tuple[str, str, str]]:
    """Return name, outcome and guest of each result, in the order in which they came."""
    return [(each["name"], each["outcome"], each.get("guest", "")) for each in run.document["results"]]


# ---- guests that die ------------------------------------------------------------------------------------------------


def test_panic(guests: Guests) -> None:
    """A panic is the error of the case that ran, in the kernel's words; what was before and what comes next passes."""
    run = guests.run(AROUND.format(harm=f"die('{BUG}', 'Oops: 0002', '{FATAL}')"))
    assert run.code == 1
    assert where(run) == [("before", "pass", "1"), ("harms", "error", "1"), ("after", "pass", "2")]
    harms = run.results["harms"]
    assert (harms["reason"], harms["died"]) == (BUG, True)
    console = guests.qemu.folder / "consoles/console-1.txt"
    assert harms["diagnostics"][:5] == [
        *("promise: It does no harm.", f"console: {console}"),
        *(f"console: [    2.000000] {text}" for text in (BUG, "Oops: 0002", FATAL)),
    ]


def test_gone_without_a_word(guests: Guests) -> None:
    """Of a machine that just goes away the console's last line is shown."""
    run = guests.run(AROUND.format(harm="die('virtio: all is well')"))
    assert run.outcomes == {"before": "pass", "harms": "error", "after": "pass"}
    reason = "the virtual machine went away: [    2.000000] virtio: all is well"
    assert run.results["harms"]["reason"] == reason


def test_old_words_are_not_new(guests: Guests) -> None:
    """What the kernel said at an earlier case is no reason for the end of a later one."""
    run = guests.run("""
        @uffd_case("early")
        def test_early():
            '''It says something that looks bad.'''
            say("Oops: that was not me")

        @uffd_case("dies")
        def test_dies():
            '''It ends.'''
            die("all is well")
    """)
    assert run.outcomes == {"early": "fail", "dies": "error"}
    assert "Oops" not in run.results["dies"]["reason"]


def test_workers_have_guests_of_their_own(guests: Guests) -> None:
    """Each worker's guests are numbered, and one that dies is not the other's."""
    cases = "".join(
        f"""
        @uffd_case("case {number}")
        def test_{number}():
            '''It is so.'''
            {"die('Oops: it is over')" if number == 2 else "time.sleep(0.05)"}
        """
        for number in range(8)
    )
    run = guests.run(cases, workers="2")
    outcomes = [run.results[f"case {number}"]["outcome"] for number in range(8)]
    assert outcomes == [*2 * ["pass"], "error", *5 * ["pass"]]
    names = {name for _, _, name in where(run)}
    assert all(re.fullmatch(r"gw[01]-[12]", name) for name in names)
    dead = run.results["case 2"]["guest"]
    assert dead.endswith("-1")
    assert {name for name in names if name.endswith("-2")} <= {dead.replace("-1", "-2")}


@either_way
def test_spent(guests: Guests, workers: str) -> None:
    """A kernel that has died so often is given up: what is left is an error each, and the run ends in order."""
    cases = "".join(
        f"""
        @uffd_case("case {number}")
        def test_{number}():
            '''It is not so.'''
            die("Oops: it is over")
        """
        for number in range(6)
    )
    run = guests.run(cases, workers=workers, max_deaths=2)
    assert run.code == 1
    reasons = [each["reason"] for each in run.document["results"]]
    assert len(reasons) == 6
    assert {each["outcome"] for each in run.document["results"]} == {"error"}
    assert set(reasons) <= {"Oops: it is over", "never ran: 2 guests have died", "never ran: 3 guests have died"}
    # With workers, one may be about to die when the other does.
    assert 2 <= reasons.count("Oops: it is over") <= (2 if workers == "0" else 3)


@either_way
def test_dies_when_set_up(guests: Guests, workers: str) -> None:
    """A guest that cannot be made ready ends the run: one line says why."""
    guests.qemu.go_wrong("no set_up")
    run = guests.run(AROUND.format(harm="pass"), workers=workers)
    assert run.code == 1
    assert "INTERNALERROR" not in run.stderr
    reason = "the virtual machine went away: [    0.000000] Linux version 6.99.0"
    assert run.stdout.splitlines()[-1] == f"Bail out! {' '.join(reason.split())}"
    assert run.document["interrupted"] == reason
    assert len(guests.qemu.log) <= 4


@either_way
def test_dies_once_when_set_up(guests: Guests, workers: str) -> None:
    """One that could not be made ready, once, is replaced."""
    guests.qemu.go_wrong("no set_up.once")
    run = guests.run(AROUND.format(harm="pass"), workers=workers)
    assert (run.code, set(run.outcomes.values())) == (0, {"pass"})


# ---- guests that hang, and worse ------------------------------------------------------------------------------------


IMPATIENT = """
    from uffd_selftests.harness import launcher
    launcher.LATE_SECONDS = 0.5
"""


def test_stands_still(guests: Guests) -> None:
    """A machine that does nothing any more is ended soon after the deadline, and another one goes on."""
    harm = "die('rcu: nothing happens', number=signal.SIGSTOP)"
    run = guests.run(AROUND.format(harm=harm), "--deadline=1", plugin=IMPATIENT)
    assert where(run) == [("before", "pass", "1"), ("harms", "timeout", "1"), ("after", "pass", "2")]
    harms = run.results["harms"]
    assert harms["reason"] == "1 seconds"
    assert 1 <= harms["seconds"] < 30  # and not the minute that a patient launcher waits
    shown = "the guest does not answer: [    2.000000] rcu: nothing happens"
    assert shown in harms["diagnostics"]
    assert not run.survivors()


@pytest.mark.parametrize(
    ("babble", "said"),
    [
        ("b'is this a message?' * 10", "the guest sent nonsense: what came is no message: it begins with"),
        ("b'uffd\\1' + (64 << 20).to_bytes(4, 'big') + bytes(64 << 20)", "the guest sent nonsense: what came is no"),
        ("b'uffd\\1' + (2).to_bytes(4, 'big') + b'42'", "the guest sent nonsense"),
    ],
    ids=["nonsense", "flood", "no ending"],
)
def test_nonsense(guests: Guests, babble: str, said: str) -> None:
    """A guest that sends something else than an answer is not listened to any more."""
    harm = f"(CONTROL / 'babble').write_bytes({babble}); die(number=signal.SIGUSR1)"
    run = guests.run(AROUND.format(harm=harm))
    assert where(run) == [("before", "pass", "1"), ("harms", "error", "1"), ("after", "pass", "2")]
    assert run.results["harms"]["reason"].startswith(said)


def test_trickle(guests: Guests) -> None:
    """Half a message, and then nothing, is no answer."""
    harm = "(CONTROL / 'babble').write_bytes(b'uffd\\1\\0\\0\\1\\0'); os.kill(QEMU, signal.SIGUSR1); time.sleep(0.1)"
    harm += "; die(number=signal.SIGSTOP)"
    run = guests.run(AROUND.format(harm=harm), "--deadline=1", plugin=IMPATIENT)
    assert where(run)[1:] == [("harms", "timeout", "1"), ("after", "pass", "2")]


# ---- guests that are not as they were -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("say('WARNING: CPU: 0 PID: 1 at mm/memory.c:1')", "kernel log: [    2.000000] WARNING: CPU: 0 PID: 1 at mm"),
        ("(CONTROL / f'tainted-{QEMU}').write_text('512')", "the kernel is tainted now: W"),
    ],
    ids=["message", "taint"],
)
def test_damaged(guests: Guests, harm: str, said: str) -> None:
    """A kernel that complains fails the case, and the next one has another kernel."""
    run = guests.run(AROUND.format(harm=harm))
    assert where(run) == [("before", "pass", "1"), ("harms", "fail", "1"), ("after", "pass", "2")]
    assert any(said in line for line in run.results["harms"]["diagnostics"])


def test_failure_is_no_damage(guests: Guests) -> None:
    """A case that fails, crashes or hangs leaves the kernel as it was, and the guest goes on."""
    run = guests.run(
        """
        @uffd_case("fails")
        def test_fails():
            '''It is not so.'''
            assert False

        @uffd_case("crashes")
        def test_crashes():
            '''It is not so.'''
            os.abort()

        @uffd_case("hangs")
        def test_hangs():
            '''It is not so.'''
            time.sleep(60)

        @uffd_case("passes")
        def test_passes():
            '''It is so.'''
        """,
        "--deadline=5",
    )
    assert where(run) == [
        *(("fails", "fail", "1"), ("crashes", "error", "1"), ("hangs", "timeout", "1"), ("passes", "pass", "1")),
    ]


@either_way
def test_pristine(guests: Guests, workers: str) -> None:
    """With --pristine no result has a guest in which another one was."""
    run = guests.run(AROUND.format(harm="pass"), "--pristine", workers=workers)
    assert run.code == 0
    assert len({guest for _, _, guest in where(run)}) == 3


# ---- what runs in a guest, and what does not ------------------------------------------------------------------------


@either_way
def test_fixtures_are_refused(guests: Guests, workers: str) -> None:
    """A case that needs pytest cannot run in a guest, which is said in one line before any guest is started."""
    run = guests.run(
        """
        import pytest

        @pytest.fixture
        def mine():
            return 1

        @uffd_case("one")
        def test_one(mine):
            '''It is so.'''
        """,
        workers=workers,
    )
    reason = "test_inner.py::test_one cannot run in another kernel: it takes more of pytest than ctx, mem and variant"
    assert run.code == 2
    assert [line for line in run.stderr.splitlines() if reason in line] == [f"ERROR: {reason}"]
    assert "INTERNALERROR" not in run.stderr


@either_way
def test_file_of_ones_own(guests: Guests, workers: str) -> None:
    """Case files come along with what is beside them, to each guest that is started."""
    (guests.qemu.folder / "beside.py").write_text("VALUE = 42\n")
    run = guests.run(
        """
        from beside import VALUE

        @uffd_case("one")
        def test_one():
            '''It is so.'''
            assert VALUE == 42 and str(CONTROL) in __file__
            die("Oops: it is over")

        @uffd_case("two", variants=("a", "b"))
        def test_two(variant):
            '''It is so.'''
            import beside
            assert str(CONTROL) in beside.__file__
        """,
        workers=workers,
    )
    assert run.outcomes == {"one": "error", "two (a)": "pass", "two (b)": "pass"}


def test_file_in_a_package(guests: Guests) -> None:
    """So do the packages in which they are."""
    folder = guests.qemu.folder / "mine/inner"
    folder.mkdir(parents=True)
    for package in (folder.parent, folder):
        (package / "__init__.py").write_text("")
    (folder / "beside.py").write_text("VALUE = 42\n")
    guests.qemu.machine(SHAPE).save(path := guests.qemu.folder / "machine.json")
    text = """
        from mine.inner.beside import VALUE

        @uffd_case("one")
        def test_one():
            '''It is so.'''
            assert VALUE == 42
    """
    run = guests.cli.run(f"--machine={path}", "--", write_cases(folder / "test_deep.py", text))
    assert (run.code, run.outcomes) == (0, {"one": "pass"})


def test_output_comes_along(guests: Guests) -> None:
    """What a case prints in a guest is shown if it fails."""
    run = guests.run(AROUND.format(harm="print('this is why'); assert False"))
    shown = [line.strip() for line in run.results["harms"]["diagnostics"]]
    assert shown[shown.index("Captured stdout:") + 1] == "this is why"


# ---- one guest, from near -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(machine: Machine, name: str = "1") -> Iterator[Guest]:
    """Have a guest, which is ended in any case."""
    made = Guest(machine, name)
    try:
        yield made
    finally:
        made.close()


def test_machine_is_plain_data(qemu: FakeQemu) -> None:
    """A machine survives the way to a run's processes."""
    machine = qemu.machine(SHAPE)
    machine.save(path := qemu.folder / "machine.json")
    assert Machine.load(path) == machine


def test_places(qemu: FakeQemu) -> None:
    """No more guests run at once than there are places, whoever starts them."""
    machine = qemu.machine(SHAPE, places=1)
    waiting = threading.Event()

    def wait() -> None:
        with started(machine, "2"):
            waiting.set()

    with started(machine):
        thread = threading.Thread(target=wait)
        thread.start()
        assert not waiting.wait(0.2)
    assert waiting.wait(10)
    thread.join(10)


def test_answers(qemu: FakeQemu) -> None:
    """A guest is asked as any launcher, and is gone when it is closed."""
    with started(qemu.machine(SHAPE)) as made:
        survey = made.ask("survey")
        assert survey["unreadable"] == ""
        assert made.name == "1"
        pid = made.pid
        assert made.monitor.ask("query-status") == {"status": "running", "running": True}
    assert not Path(f"/proc/{pid}").exists()


def test_never_answers(qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that hangs between two cases is noticed as well."""
    monkeypatch.setattr(launcher, "LATE_SECONDS", 0.1)
    qemu.go_wrong("no launcher")
    machine = qemu.machine(SHAPE, boot_seconds=0.3)
    with started(machine) as made:
        until(made.last_lines)
        with pytest.raises(EOFError, match=r"the guest does not answer: .* Linux version 6\.99\.0"):
            made.ask("survey")
        assert not made.alive
    with started(machine, "2") as made:
        ending = made.run(Order([], 0.1))
        assert (ending.how, ending.reason, ending.died) == (How.TIMEOUT, "0.1 seconds", True)
    assert machine.deaths.stat().st_size == 1


def test_given_up(qemu: FakeQemu) -> None:
    """After so many deaths nothing is started, and who is told why needs no console."""
    machine = qemu.machine(SHAPE, max_deaths=2)
    machine.deaths.write_text("..")
    with pytest.raises(Spent, match="never ran: 2 guests have died"):
        machine.source()()
    assert qemu.log == []


def test_names(qemu: FakeQemu) -> None:
    """Guests are numbered, behind the name of a worker."""
    source = qemu.machine(SHAPE).source("gw3")
    for name in ("gw3-1", "gw3-2"):
        with contextlib.closing(source()) as made:
            assert isinstance(made, Guest)
            assert made.name == name
            assert made.console.name == f"console-{name}.txt"


def test_setting_of_its_own(qemu: FakeQemu) -> None:
    """Each is told the time and random numbers, for machines from one file have had the same."""
    with started(qemu.machine(SHAPE)) as made:
        one, other = made.own_setting(), made.own_setting()
    assert abs(one["now"] - time.time()) < 10
    assert len(bytes.fromhex(one["entropy"])) == 32
    assert one["entropy"] != other["entropy"]


def test_console(qemu: FakeQemu) -> None:
    """The console is shown from the last case on, without what only a terminal understands."""
    with started(qemu.machine(SHAPE)) as made:
        made.ask("survey")
        made.console.write_bytes(
            b"\x1b[0m[    1.0] Oops: long ago\r\n[    2.0] uffd-selftests: case one\n\n[    3.0] \x07fine\r\n"
        )
        assert made.last_lines() == ["[    3.0] fine"]
        with made.console.open("ab") as file:
            file.write(b"[    4.0] kernel BUG at mm/memory.c:1\n[    5.0] R13: \xff\n")
        os.kill(made.pid, signal.SIGKILL)
        assert made.last_lines()[0] == "[    4.0] kernel BUG at mm/memory.c:1"
        assert made.last_words("died") == "kernel BUG at mm/memory.c:1"
        made.console.unlink()
        assert made.last_lines() == []


def test_path_with_a_comma(qemu: FakeQemu) -> None:
    """A folder's name cannot be taken for an option of QEMU."""
    folder = qemu.folder / "a,b=c d"
    folder.mkdir()
    with started(qemu.machine(SHAPE, folder=str(folder))) as made:
        made.ask("survey")
        assert "Linux version" in (folder / "console-1.txt").read_text()


def test_monitor_complains(qemu: FakeQemu) -> None:
    """What QEMU refuses is an error with its words."""
    qemu.go_wrong("no save")
    with started(qemu.machine(SHAPE)) as made:
        with pytest.raises(ValueError, match="State blocked by non-migratable device 'fake'"):
            made.monitor.ask("migrate", uri="exec:cat")
        os.kill(made.pid, signal.SIGKILL)
        with pytest.raises((OSError, EOFError)):
            made.monitor.ask("query-status")
