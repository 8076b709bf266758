# SPDX-License-Identifier: GPL-2.0-only
"""A soak repeats the suite with short memory, and fails for what differs or is left behind."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.machine.scarcity import needs_soak
from uffd_selftests.machine.repair import repair
from uffd_selftests.soak.command import agree
from uffd_selftests.soak.traces import Machine

if TYPE_CHECKING:
    from tests.conftest import Run, Starter, SuiteWriter

ROUNDS = """
    from pathlib import Path
    def round():
        count = Path({counter!r})
        count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))
        return int(count.read_text())
"""


@pytest.fixture
def rounds(tmp_path: Path) -> str:
    """The definition of a function that says how often it was called, for a test that runs once a round."""
    return ROUNDS.format(counter=str(tmp_path / "rounds"))


def run_soak(cli: Starter, path: str, duration: str = "1s") -> Run:
    """Run a soak of one file, and see that the machine is as it was."""
    before = Machine.now()
    run = cli.run(f"--soak={duration}", "--", path)
    assert list(Machine.now().changes(before)) == []
    assert left_groups(run) == []
    return run


def left_groups(run: Run) -> list[Path]:
    """Return the cgroups of a run that are still there."""
    return list(Path("/sys/fs/cgroup").glob(f"**/uffd-selftests-{run.process.pid}"))


@needs_soak
def test_soak(cli: Starter, suite: SuiteWriter) -> None:
    """It says how many rounds, results and faults there were; there are two rounds at least."""
    run = run_soak(cli, suite.write("def test_one(): pass\ndef test_two(): pytest.skip('never')"))
    assert (run.code, run.outcomes) == (0, {"test_one": "pass", "test_two": "skip"}), run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert lines[:3] == ["TAP version 13", "1..2", "# a soak of 1 seconds"]
    assert lines[-1] == "# Totals: pass:1 fail:0 xfail:0 xpass:0 skip:1 error:0"
    rounds = [line for line in lines if line.startswith("# round ")]
    assert len(rounds) >= 2
    assert lines[-2].startswith(f"# {len(rounds)} rounds, {2 * len(rounds)} results, ")
    assert {path.name for path in run.folder.iterdir()} == {
        *("results.tap", "results.json", "environment.json", "dmesg.txt", "junit.xml", "report.html"),
        "round-1",
    }
    assert run.document["options"]["soak"] == 1


@needs_soak
def test_result_that_differs(cli: Starter, suite: SuiteWriter, rounds: str) -> None:
    """It fails, and names the round, its seed and both verdicts; the folder of that round stays."""
    text = rounds + "    def test_once():\n        assert round() == 1, 'twice'\n"
    run = run_soak(cli, suite.write(text))
    assert (run.code, run.outcomes) == (1, {"test_once": "fail"})
    first, second, *_ = run.results["test_once"]["diagnostics"]
    assert first.startswith("round 2 (--stress-seed ")
    assert first.endswith("): fail; in the first round: pass")
    assert "twice" in second
    assert (run.folder / "round-2/results.json").exists()


@needs_soak
def test_what_is_left_behind(cli: Starter, suite: SuiteWriter) -> None:
    """A process that outlives its round is named and ended; so is memory that nobody has."""
    run = run_soak(
        cli,
        suite.write("""
            import subprocess
            def test_daemon():
                subprocess.Popen(["sleep", "1000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        """),
    )
    assert (run.code, run.outcomes) == (1, {"test_daemon": "pass", "left-behind": "fail"}), run.stdout
    assert "(sleep)" in run.results["left-behind"]["diagnostics"][0]
    assert run.survivors() == []


@needs_soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_end_by_signal(cli: Starter, suite: SuiteWriter, tmp_path: Path, number: signal.Signals) -> None:
    """The machine is put back at once, or after SIGKILL by the next run."""
    before = Machine.now()
    begun = tmp_path / "begun"
    text = f"from pathlib import Path\ndef test_long():\n    Path({str(begun)!r}).touch()\n    time.sleep(2)"
    run = cli.start("--soak=1m", "--", suite.write(text))
    until = time.monotonic() + 60
    while not begun.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    run.process.send_signal(number)
    run.wait()
    assert run.code == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:
        repair()
    else:
        assert f"Bail out! interrupted by {number.name}" in run.stdout
    assert list(Machine.now().changes(before)) == []
    assert left_groups(run) == []
    assert run.survivors() == []


@pytest.mark.parametrize(
    ("expected", "seen", "same"),
    [
        ("pass", "pass", True),
        ("xfail", "xpass", True),
        ("xpass", "xfail", True),
        ("pass", "skip", False),
        ("skip", "pass", False),
        ("xfail", "fail", False),
        ("fail", "pass", False),
    ],
)
def test_agree(expected: str, seen: str, same: bool) -> None:
    """A known defect may show or not; everything else is the same each time."""
    assert agree({"outcome": expected}, {"outcome": seen}) == same


@pytest.mark.parametrize("text", ["", "0", "soon"])
def test_bad_duration(cli: Starter, text: str) -> None:
    """A time that is none is a wrong call."""
    run = cli.run(f"--soak={text}")
    assert (run.code, run.stdout) == (2, "")
    assert run.stderr.startswith(f"uffd-selftests: argument --soak: {text!r} is not a duration like 90s, 10m or 1h30m")
