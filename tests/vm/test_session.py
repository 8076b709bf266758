# SPDX-License-Identifier: GPL-2.0-only
"""A run in other kernels is one document, whatever becomes of the machines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import FACTS, needs_userfaultfd
from tests.vm.helpers import BUG, FATAL, SMALL, FakeQemu, until, write_cases, write_image
from uffd_selftests.vm import machines, qemu, session

if TYPE_CHECKING:
    from tests.conftest import Starter
    from tests.vm.conftest import Lab

pytestmark = needs_userfaultfd

THREE = """
    @uffd_case("one")
    def test_one():
        '''It is so.'''
        if KERNEL == "bzImage1":
            time.sleep(0.3)

    @uffd_case("two")
    def test_two():
        '''It may not be so.'''
        assert KERNEL != "bzImage2"

    @uffd_case("three")
    def test_three():
        '''Nobody knows.'''
        raise Skip("no luck")
"""
INNER = ["  1..3", f"  # Linux {FACTS.release} {FACTS.machine}", "  ok 1 one"]
DIES = f"""
    @uffd_case("one")
    def test_one():
        '''It is so.'''

    @uffd_case("two")
    def test_two():
        '''It kills a kernel.'''
        if KERNEL == "bzImage1":
            die("{BUG}", "{FATAL}")

    @uffd_case("three")
    def test_three():
        '''It goes on.'''
"""
PASSES = """
    @uffd_case("one")
    def test_one():
        '''It is so.'''
"""


@pytest.fixture
def inner(tmp_path: Path) -> Path:
    """Return where the cases of a run are written."""
    return tmp_path / "test_inner.py"


def results(folder: Path) -> dict[str, Any]:
    """Return a kernel's results.json."""
    document: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return document


# ---- the whole document ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", ["0", "2"])
def test_document(lab: Lab, inner: Path, at_once: str) -> None:
    """Each kernel is a subtest, in the order of the command line, whichever ends first; a copy is kept."""
    code, lines = lab.run("-n", at_once, "--", write_cases(inner, THREE), kernels=2)
    assert code == 1
    if at_once != "0":  # then results come as they do
        assert sorted(re.sub(r"ok \d", "ok N", line) for line in lines if "ok" in line) == sorted(
            [
                *(2 * ["  ok N one", "  ok N three # SKIP no luck"]),
                *("  ok N two", "  not ok N two", "ok N 6.99.1", "not ok N 6.99.2"),
            ]
        )
    else:
        whole = [line for line in lines if not line.startswith("  # ") or "Totals" in line or "Sub" in line]
        plain = [*INNER[::2]]
        assert whole == [
            *("KTAP version 1", "1..2", "  KTAP version 1", "  # Subtest: 6.99.1", *plain),
            *("  ok 2 two", "  ok 3 three # SKIP no luck"),
            *("  # Totals: pass:2 fail:0 xfail:0 xpass:0 skip:1 error:0", "ok 1 6.99.1"),
            *("  KTAP version 1", "  # Subtest: 6.99.2", *plain, "  not ok 2 two", "  ok 3 three # SKIP no luck"),
            *("  # Totals: pass:1 fail:1 xfail:0 xpass:0 skip:1 error:0", "not ok 2 6.99.2"),
            "# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0",
        ]
    assert [line for line in lines if "Subtest" in line] == [f"  # Subtest: 6.99.{number}" for number in (1, 2)]
    assert (lab.output / "results.tap").read_text().splitlines() == lines
    assert {path.name for path in (lab.output / "6.99.1").glob("console*")} >= {
        "console-1.txt" if at_once == "0" else "console-gw0-1.txt"
    }


def test_dead_kernel(lab: Lab, inner: Path) -> None:
    """The case that was running is to blame, others run in another guest, and the next kernel has its turn."""
    code, lines = lab.run("--", write_cases(inner, DIES), kernels=2)
    assert code == 1
    console = lab.output / "6.99.1/console-1.txt"
    assert lines[2:19] == [
        *("  KTAP version 1", "  # Subtest: 6.99.1", *INNER),
        *("  # promise: It kills a kernel.", f"  # console: {console}"),
        *(f"  # console: [    2.000000] {text}" for text in (BUG, FATAL)),
        *("  # Before it, its process had run:", "  #   one", f"  not ok 2 two # ERROR {BUG}", "  ok 3 three"),
        *("  # 1 guest died, under two", "  # Totals: pass:2 fail:0 xfail:0 xpass:0 skip:0 error:1"),
        *("not ok 1 6.99.1", "  KTAP version 1"),
    ]
    assert lines[-2:] == ["ok 2 6.99.2", "# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0"]
    found = [(each["name"], each["guest"], each["died"]) for each in results(lab.output / "6.99.1")["results"]]
    assert found == [("one", "1", False), ("two", "1", True), ("three", "2", False)]
    inside = [line.removeprefix("  ") for line in lines[4:17]]
    kept = (lab.output / "6.99.1/results.tap").read_text().splitlines()
    assert kept == ["TAP version 13", *inside]
    assert BUG in console.read_text()


@pytest.mark.parametrize(
    ("mishap", "reason", "shown"),
    [
        ("no boot", "qemu-system-x86_64: could not load kernel", []),
        ("panic", "Kernel panic - not syncing: no init", ["[    1.000000] Kernel panic - not syncing: no init"]),
    ],
)
def test_kernel_that_never_boots(lab: Lab, inner: Path, mishap: str, reason: str, shown: list[str]) -> None:
    """There is nothing inside, and the outer result shows the console's last words."""
    lab.qemu.go_wrong(mishap)
    code, lines = lab.run("--", write_cases(inner, PASSES))
    told = lines[2:-2]
    assert (code, lines[:2], lines[-1]) == (
        *(1, ["KTAP version 1", "1..1"]),
        "# Totals: pass:0 fail:0 xfail:0 xpass:0 skip:0 error:1",
    )
    assert told[: len(shown)] == [f"# console: {line}" for line in shown]
    assert told[-1].endswith(reason)
    assert lines[-2].startswith("not ok 1 6.99.1 # ERROR does not boot: ")
    assert lines[-2].endswith(reason)
    assert [line for line in lab.said if "booting" not in line] == [f"6.99.1: {lines[-2].partition('ERROR ')[2]}"]


def test_launcher_that_never_answers(lab: Lab, inner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that boots, but not as far as the launcher, is given up after a while."""
    monkeypatch.setitem(machines.BOOT_SECONDS, qemu.TCG, 0.5)
    lab.qemu.go_wrong("no launcher")
    code, lines = lab.run("--", write_cases(inner, PASSES))
    assert (code, lines[2:4]) == (
        1,
        [
            "# console: [    0.000000] Linux version 6.99.0",
            "not ok 1 6.99.1 # ERROR does not boot: the guest does not answer: [ 0.000000] Linux version 6.99.0",
        ],
    )


def test_nothing_testable(lab: Lab, inner: Path) -> None:
    """A kernel in which all is skipped is skipped; if all are, the exit code says so."""
    path = write_cases(
        inner,
        """
        @uffd_case("one")
        def test_one():
            '''It cannot be known.'''
            if KERNEL == "bzImage1":
                raise Skip("no luck")
        """,
    )
    code, lines = lab.run("--", path, kernels=2)
    whole = [line for line in lines if line.startswith("ok ")]
    assert (code, whole) == (0, ["ok 1 6.99.1 # SKIP nothing could be tested", "ok 2 6.99.2"])
    assert lab.run("--", path)[0] == 4


def test_old_results_are_gone(lab: Lab, inner: Path) -> None:
    """A kernel's folder has nothing of an earlier run."""
    lab.run("--", write_cases(inner, PASSES))
    assert (lab.output / "6.99.1/console-1.txt").exists()
    lab.saved_are_gone()
    lab.qemu.go_wrong("no boot")
    lab.run("--", str(inner))
    assert sorted(path.name for path in (lab.output / "6.99.1").iterdir()) == [
        *("junit.xml", "report.html", "results.json"),
    ]
    document = results(lab.output / "6.99.1")
    assert document["results"] == []
    assert document["interrupted"].startswith("does not boot: ")


def test_overviews(lab: Lab, inner: Path) -> None:
    """A page shows the kernels side by side, dead ones too, and so does junit.xml."""
    lab.qemu.go_wrong("no boot.of-bzImage2")
    lab.run("--", write_cases(inner, DIES), kernels=2)
    junit = (lab.output / "junit.xml").read_text()
    assert 'name="two"' in junit
    assert f'message="ERROR {BUG}' in junit
    assert 'classname="6.99.2.uffd-selftests" name="run"' in junit
    page = (lab.output / "report.html").read_text()
    for text in ("6.99.1", "6.99.2", BUG, "does not boot"):
        assert text in page
    assert (lab.output / "6.99.1/report.html").exists()


def test_suites_own_cases(lab: Lab) -> None:
    """The suite's own cases run as well, each result knows its guest, and the document is that of the kernel."""
    assert lab.run("-f", "=UFFDIO_API (with syscall)")[0] == 0
    document = results(lab.output / "6.99.1")
    assert [(each["outcome"], each.get("guest")) for each in document["results"]] == [("pass", "1")]


def test_stays_off_the_host(lab: Lab, inner: Path) -> None:
    """A guest is told of the host's environment what begins with UFFD_, the time, and random numbers of its own."""
    lab.run("-n", "2", "--", write_cases(inner, THREE))
    settings = [json.loads(path.read_text()) for path in lab.qemu.control.glob("setting-*.json")]
    assert settings
    for setting in settings:
        assert [name for name in setting["environ"] if not name.startswith("UFFD_")] == []
        assert "path" not in setting
        assert len(setting["entropy"]) == 64
        assert setting["kmsg"]
    assert len({setting["entropy"] for setting in settings}) == len(settings)


# ---- disks that are full --------------------------------------------------------------------------------------------


def test_full_disk(lab: Lab, inner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document on stdout is whole, and that its copy is not makes the run fail."""
    document = session.Document(Path("/dev/full"))
    monkeypatch.setattr(session, "Document", lambda _: document)
    code, lines = lab.run("--", write_cases(inner, PASSES))
    assert (code, lines[-2:]) == (1, ["ok 1 6.99.1", "# Totals: pass:1 fail:0 xfail:0 xpass:0 skip:0 error:0"])
    assert document.trouble == "cannot write /dev/full: No space left on device"
    assert lab.said[-1] == document.trouble


def test_full_disk_in_the_run(lab: Lab, inner: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of which no result failed, but which is a failure, says why."""
    plugin = """
        import errno
        from uffd_selftests.harness.reporter import Reporter

        def fail(self, documents):
            raise OSError(errno.ENOSPC, "No space left on device")

        Reporter.write_files = fail
    """
    (inner.parent / "full_disk.py").write_text(textwrap.dedent(plugin))
    monkeypatch.setenv("PYTHONPATH", str(inner.parent), prepend=os.pathsep)
    code, lines = lab.run("--", "-p", "full_disk", write_cases(inner, PASSES))
    assert (code, lines[-2]) == (1, "not ok 1 6.99.1")
    assert lab.said[-1] == "6.99.1: cannot write the results: No space left on device"


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(lab: Lab, *arguments: str) -> str:
    """Return the one line that says why a run was refused, before any kernel is judged."""
    code, lines = lab.run(*arguments)
    assert code == 2
    assert not [line for line in lines if "ok" in line]
    told = [line for line in lab.said if "booting" not in line and "ready after" not in line]
    assert len(told) == 1
    return told[0]


def test_too_little_memory(lab: Lab) -> None:
    """Guests that do not fit are none."""
    said = refused(lab, "--vm-memory", "64M", "-n", "8", "--vm-memory", "9000G")
    assert re.fullmatch(r"8 guests of 9000G need more memory than the \d+ MiB that are available: .*", said)
    assert lab.qemu.log == []


def test_wrong_filter(lab: Lab) -> None:
    """A filter that leaves nothing is refused as without --kernel, not taken for a kernel's fault."""
    assert refused(lab, "-f", "no such case") == "nothing matches the given -f no such case"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_fixtures(lab: Lab, inner: Path, workers: str) -> None:
    """A case that takes more of pytest than a guest has is refused, too."""
    text = """
        import pytest

        @pytest.fixture
        def mine():
            return 1

        @uffd_case("one")
        def test_one(mine):
            '''It is so.'''
    """
    said = refused(lab, "-n", workers, "--", write_cases(inner, text))
    why = "test_inner.py::test_one cannot run in another kernel: it takes more of pytest than ctx, mem and variant"
    assert said.removeprefix("ERROR: ") == why


def test_wrong_file(lab: Lab, inner: Path) -> None:
    """So is a file that cannot be collected."""
    code, lines = lab.run("--", write_cases(inner, "import nothing_of_that_name"))
    assert (code, [line for line in lines if "ok" in line]) == (2, [])
    assert any("No module named 'nothing_of_that_name'" in line for line in lab.said)  # in pytest's words


def test_qemu_is_missing(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Who lacks QEMU is told its package."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(lab) == "missing for --kernel: apt-get install qemu-system-x86"


def test_qemu_is_too_old(lab: Lab) -> None:
    """A QEMU that nobody has tried is refused."""
    lab.qemu.go_wrong("version").write_text("QEMU emulator version 4.2.1 (Debian 1:4.2-3ubuntu6)")
    assert refused(lab) == "qemu-system-x86_64 4.2.1 is too old: --kernel needs QEMU 5.2 or later"


# ---- early ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["full", "gone"])
def test_nobody_reads(reader: str, qemu: FakeQemu, inner: Path) -> None:
    """When the document cannot be written the exit code says so, and nothing else complains."""
    qemu.go_wrong("silent")
    image = write_image(qemu.folder / "bzImage")
    if reader == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        end, stdout = os.pipe()
        os.close(end)
    call = ["--kernel", str(image), *SMALL, "--", write_cases(inner, PASSES)]
    run = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", *call],
        stdout=stdout, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(stdout)
    said = ["cannot write the results: No space left on device"] if reader == "full" else []
    told = [line.removeprefix("uffd-selftests: ") for line in run.stderr.splitlines()]
    assert [line for line in told if "booting" not in line] == said
    assert run.returncode == (1 if reader == "full" else 128 + signal.SIGPIPE)


RUNS_LONG = """
    @uffd_case("one")
    def test_one():
        '''It takes its time.'''
        (CONTROL / "running").touch()
        time.sleep(60)
"""


BEGUN = {"booting": "boot tcg bzImage", "saving": "save bzImage"}
PHASES = [
    *((signal.SIGINT, "booting"), (signal.SIGTERM, "saving"), (signal.SIGINT, "running")),
    *((signal.SIGKILL, "booting"), (signal.SIGKILL, "saving"), (signal.SIGKILL, "running")),
    *((signal.SIGTERM, "running in workers"), (signal.SIGKILL, "running in workers")),
]


@pytest.mark.parametrize(("number", "phase"), PHASES)
def test_interrupted(number: signal.Signals, phase: str, qemu: FakeQemu, cli: Starter, inner: Path) -> None:
    """Whatever ends the run ends the machines, too, and soon; in order, no temporary folder stays behind."""
    scratch = qemu.folder / "scratch"
    scratch.mkdir()
    if mishap := {"booting": "silent", "saving": "slow save"}.get(phase):
        qemu.go_wrong(mishap)
    image = write_image(qemu.folder / "bzImage")
    call = ["--kernel", str(image), *SMALL, "-n", "2" if "workers" in phase else "0"]
    run = cli.start(*call, "--", write_cases(inner, RUNS_LONG), env={"TMPDIR": str(scratch)})
    until(lambda: BEGUN[phase] in qemu.log if phase in BEGUN else (qemu.control / "running").exists())
    run.process.send_signal(number)
    until(lambda: run.process.poll() is not None, 5)
    run.wait()
    until(lambda: not run.survivors())
    if number == signal.SIGKILL:
        assert run.code == -number
        return
    assert (run.code, run.stdout.splitlines()[-1]) == (128 + number, f"Bail out! interrupted by {number.name}")
    assert [*scratch.glob("uffd-*"), *machines.folder().glob("making-*")] == []


def test_killed(qemu: FakeQemu, cli: Starter, inner: Path) -> None:
    """What a run leaves behind that was killed while it saved a machine is removed, at the latest by the next."""
    scratch = qemu.folder / "scratch"
    scratch.mkdir()
    stuck = qemu.go_wrong("slow save")
    image = write_image(qemu.folder / "bzImage")
    call = ["--kernel", str(image), *SMALL, "--", write_cases(inner, PASSES)]
    run = cli.start(*call, env={"TMPDIR": str(scratch)})
    until(lambda: BEGUN["saving"] in qemu.log)
    run.process.kill()
    run.wait()
    until(lambda: not run.survivors())
    stuck.unlink()
    assert cli.run(*call, env={"TMPDIR": str(scratch)}).code == 0
    assert list(machines.folder().glob("making-*")) == []
    assert list(scratch.glob("uffd-*")) == []
