# SPDX-License-Identifier: GPL-2.0-only
"""Nothing that a case does can hang the run, end it, or pass for something else."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tap.parser import Parser  # type: ignore[import-untyped]

from tests.conftest import ROOT
from tests.helpers import needs_userfaultfd
from uffd_selftests.harness import isolation, proc
from uffd_selftests.harness.isolation import How, Isolator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Run, Starter

CROWD = str(ROOT / "tests" / "hostile" / "crowd.py")
DEADLINE = f"{float(os.environ.get('UFFD_DEADLINE_SCALE', '1')):g}"

TIMEOUT = f"{DEADLINE} seconds"

# Name of the test in the crowd: outcome, reason, and something that a line of its diagnostics must have.
EXPECTED = {
    "hang_in_fault": ("timeout", TIMEOUT, "in handle_userfault"),
    "hang_in_fault_with_gil": ("timeout", TIMEOUT, "in handle_userfault"),
    "hang_in_read": ("timeout", TIMEOUT, "in handle_userfault"),
    "hang_in_event": ("timeout", TIMEOUT, "in userfaultfd_event_wait_completion"),
    "hang_grandchild": ("timeout", TIMEOUT, "in handle_userfault"),
    "hang_ignoring_signals": ("timeout", TIMEOUT, "in sleep_for_ever"),
    "hang_stopped": ("timeout", TIMEOUT, ") T "),
    "hang_in_setup": ("timeout", TIMEOUT, "in hangs_in_setup"),
    "hang_in_teardown": ("timeout", TIMEOUT, "in hangs_in_teardown"),
    "hang_after_failure": ("timeout", TIMEOUT, ""),
    "hang_expected_failure": ("timeout", TIMEOUT, "in test_hang_expected_failure"),
    "die_sigsegv": ("error", "killed by SIGSEGV", "in test_die_sigsegv"),
    "die_sigbus": ("error", "killed by SIGBUS", "in test_die_sigbus"),
    "die_sigkill": ("error", "killed by SIGKILL", ""),
    "die_abort": ("error", "killed by SIGABRT", "in test_die_abort"),
    "die_exit": ("error", "exited with status 3 before its reports", "said before the exit"),
    "die_exit_zero": ("error", "exited with status 0 before its reports", ""),
    "die_system_exit": ("fail", "", "SystemExit: enough"),
    "die_keyboard_interrupt": ("error", "KeyboardInterrupt left the case", "in test_die_keyboard_interrupt"),
    "die_pytest_exit": ("error", "Exit left the case: no more", "in test_die_pytest_exit"),
    "die_memory": ("fail", "", "MemoryError"),
    "leak_child": ("fail", "", "left behind: process "),
    "leak_daemon": ("fail", "", "left behind: process "),
    "leak_program": ("fail", "", "(sleep)"),
    "leak_zombie": ("fail", "", ") Z"),
    "leak_userfaultfd": ("fail", "", "left behind: userfaultfd "),
    "noise_stdout": ("pass", "", ""),
    "noise_everywhere": ("error", "something wrote into the pipe of the harness", ""),
    "noise_close_everything": ("error", "exited with status 0 before its reports", ""),
    "noise_fork_falls_through": ("error", "forked by the case, returned into the harness", ""),
    "noise_threads": ("pass", "", ""),
    "noise_much": ("fail", "", "AssertionError: xxx"),
    "ordinary_pass": ("pass", "", ""),
    "ordinary_fail": ("fail", "", "AssertionError: six by nine"),
    "ordinary_raise": ("fail", "", "BlockingIOError: [Errno 11] EAGAIN"),
    "ordinary_skip": ("skip", "no luck # TODO", ""),
    "ordinary_skip_exception": ("skip", "needs a better machine", ""),
    "ordinary_skip_mark": ("skip", "marked", ""),
    "ordinary_xfail": ("xfail", "known defect", ""),
    "ordinary_xfail_skip_exception": ("skip", "needs a better machine", ""),
    "ordinary_xpass": ("xpass", "repaired defect", ""),
    "ordinary_xpass_strict": ("fail", "", "[XPASS(strict)] repaired defect"),
    "ordinary_setup_fails": ("fail", "", "RuntimeError: no setup"),
    "ordinary_teardown_fails": ("fail", "", "RuntimeError: no teardown (in the teardown)"),
    "ordinary_last": ("pass", "", ""),
}


@pytest.fixture(scope="module", params=["0", "2"], ids=["serial", "workers"])
def crowd(request: pytest.FixtureRequest, module_cli: Starter) -> Run:
    """Run the crowd once, serially and with workers."""
    return module_cli.run("--deadline", DEADLINE, "-n", request.param, "--", "--isolate-all", CROWD)


@needs_userfaultfd
@pytest.mark.parametrize("name", EXPECTED)
def test_crowd(crowd: Run, name: str) -> None:
    """Each of the crowd gets the result it deserves, with what there is to say about it."""
    result = crowd.results[f"test_{name}"]
    outcome, reason, line = EXPECTED[name]
    assert result["outcome"] == outcome
    assert reason in result["reason"]
    assert any(line in each for each in result["diagnostics"] or [""])


@needs_userfaultfd
def test_crowd_is_complete(crowd: Run) -> None:
    """No result is lost, the run fails, and nothing of it is left."""
    assert set(crowd.outcomes) == {f"test_{name}" for name in EXPECTED}
    assert crowd.code == 1
    assert crowd.survivors() == []


@needs_userfaultfd
def test_crowd_ktap(crowd: Run) -> None:
    """Its KTAP agrees with its results for an independent reader, in spite of those who print KTAP themselves."""
    lines = list(Parser().parse_text(crowd.stdout))
    tests = [line for line in lines if line.category == "test"]
    assert [line.category for line in lines if line.category in ("version", "plan", "bail", "unknown")] == [
        "version",
        "plan",
    ]
    assert [test.number for test in tests] == list(range(1, len(EXPECTED) + 1))
    for test in tests:
        outcome = crowd.results[test.description.rpartition("::")[2]]["outcome"]
        assert test.ok == (outcome in ("pass", "skip", "xfail", "xpass"))
        assert test.skip == (outcome == "skip")
    assert crowd.stdout.endswith("# Totals: pass:4 fail:24 xfail:1 xpass:1 skip:4 error:11\n")
    assert crowd.stdout == (crowd.folder / "results.tap").read_text()


@needs_userfaultfd
def test_crowd_prove(crowd: Run) -> None:
    """Perl's prove counts the same failures."""
    if not shutil.which("prove"):
        pytest.skip("prove is not installed: apt-get install perl")
    tap = crowd.folder / "results.tap"
    done = subprocess.run(["prove", "-e", "cat", str(tap)], capture_output=True, text=True, check=False)
    bad = sum(outcome in ("fail", "error", "timeout") for outcome in crowd.outcomes.values())
    assert f"Failed {bad}/{len(EXPECTED)} subtests" in done.stdout
    assert "Bad plan" not in done.stdout


@needs_userfaultfd
def test_crowd_output_is_bounded(crowd: Run) -> None:
    """A flood of output does not flood the diagnostics."""
    diagnostics = crowd.results["test_noise_much"]["diagnostics"]
    assert len(diagnostics) < 60
    assert all(len(line) <= 500 for line in diagnostics)


# ---- the isolator itself --------------------------------------------------------------------------------------------


@pytest.fixture
def isolator() -> Iterator[Isolator]:
    """Isolate in this process."""
    isolator = Isolator()
    yield isolator
    isolator.close()


def test_records_arrive_in_order(isolator: Isolator) -> None:
    """Records of any size come through, one by one."""
    sent = ["x" * size for size in (0, 1, 1 << 20, 3)]

    def work(send: isolation.Send) -> None:
        for record in sent:
            send(record)

    ending = isolator.run(work, deadline=30)
    assert (ending.how, ending.records, ending.leftovers) == (How.DONE, sent, [])


def test_records_before_a_crash_are_kept(isolator: Isolator) -> None:
    """What was reported before a crash is not lost with it."""

    def work(send: isolation.Send) -> None:
        send("first")
        os.kill(os.getpid(), signal.SIGKILL)

    ending = isolator.run(work, deadline=30)
    assert (ending.how, ending.reason, ending.records) == (How.ERROR, "killed by SIGKILL", ["first"])


@pytest.mark.parametrize(
    "garbage",
    [b"x", b"uffd", isolation.HEADER.pack(b"uffd", 1 << 30, 0), isolation.HEADER.pack(b"uffd", 2, 1) + b"ab"],
    ids=["short", "header", "length", "checksum"],
)
def test_garbage_is_told_from_records(garbage: bytes) -> None:
    """Nothing but whole records with the right checksum is unpacked."""
    record = isolation._pack(isolation._Tag.RECORD, "good")
    messages, more = isolation._unpack(record + garbage)
    assert messages == [(isolation._Tag.RECORD, "good")]
    assert more


def test_endless_reports_are_cut_off(isolator: Isolator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that never stops reporting can take neither all memory nor more than its time."""
    monkeypatch.setattr(isolation, "MAX_REPORT_BYTES", 1 << 20)

    def work(send: isolation.Send) -> None:
        while True:
            send("x" * (1 << 16))

    assert isolator.run(work, deadline=0.5).how is How.TIMEOUT


def test_what_cannot_be_killed_is_left_behind(isolator: Isolator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not die is reported, and the next case runs and is not blamed."""
    monkeypatch.setattr(isolation, "KILL_SECONDS", 0.1)
    with monkeypatch.context() as powerless:
        powerless.setattr(signal, "pidfd_send_signal", lambda *_: None)
        powerless.setattr(os, "killpg", lambda *_: None)
        ending = isolator.run(lambda _: time.sleep(1000), deadline=0.2)
    stuck = [pid for pid in proc.children(os.getpid()) if f"process {pid} cannot be killed" in ending.leftovers]
    assert (ending.how, len(stuck)) == (How.TIMEOUT, 1)
    after = isolator.run(lambda send: send("fine"), deadline=30)
    assert (after.how, after.records, after.leftovers) == (How.DONE, ["fine"], [])
    assert isolation.kill(stuck[0], time.monotonic() + 10)


def test_a_look_that_hangs_is_given_up(isolator: Isolator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where even /proc blocks, a hung case is still ended."""
    monkeypatch.setattr(isolation, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(proc, "describe", lambda _: time.sleep(1000))
    ending = isolator.run(lambda _: time.sleep(1000), deadline=0.2)
    assert ending.how is How.TIMEOUT
    assert "did not come back" in ending.evidence[0]


def test_other_children_are_spared() -> None:
    """A process that was here before the harness is none of its business."""
    with subprocess.Popen(["sleep", "1000"]) as bystander:
        isolator = Isolator()
        try:
            ending = isolator.run(lambda send: send(None), deadline=30)
        finally:
            isolator.close()
        assert (ending.leftovers, bystander.poll()) == ([], None)
        bystander.kill()


def test_an_exception_ends_the_child(isolator: Isolator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a case runs leaves no process."""

    def interrupted(*_: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(isolation.Child, "wait", interrupted)
    before = set(proc.children(os.getpid()))
    with pytest.raises(KeyboardInterrupt):
        isolator.run(lambda _: time.sleep(1000), deadline=30)
    assert set(proc.children(os.getpid())) == before


def test_guarded_descriptors_do_not_reach_the_child() -> None:
    """Pipes of this process, and what it guards, are /dev/null in a child."""
    reader, writer = os.pipe()
    file = os.memfd_create("guarded")
    isolator = Isolator()
    isolator.guard(file)
    try:
        ending = isolator.run(lambda send: send([os.write(writer, b"noise"), os.write(file, b"noise")]), deadline=30)
        os.set_blocking(reader, False)
        with pytest.raises(BlockingIOError):
            os.read(reader, 1)
        assert (ending.how, os.fstat(file).st_size) == (How.DONE, 0)
    finally:
        isolator.close()
        for fd in (reader, writer, file):
            os.close(fd)


def test_children_die_with_the_harness(tmp_path: Path) -> None:
    """SIGKILL of the harness ends the case, which nobody else could."""
    program = f"""
import os, sys, time
from uffd_selftests.harness.isolation import Isolator

def work(send):
    with open({str(tmp_path / "pid")!r} + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename({str(tmp_path / "pid")!r} + ".new", {str(tmp_path / "pid")!r})
    time.sleep(1000)

Isolator().run(work, deadline=1000)
"""
    with subprocess.Popen([sys.executable, "-c", program]) as harness:
        _eventually((tmp_path / "pid").exists)
        child = os.pidfd_open(int((tmp_path / "pid").read_text()))
        harness.kill()
    ended, _, _ = select.select([child], [], [], 30)
    os.close(child)
    assert ended


def _eventually(condition: Any, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)
