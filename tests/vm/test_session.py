# SPDX-License-Identifier: GPL-2.0-only
"""A run in other kernels is one document, whatever becomes of the machines.

In place of virtme-ng a shell says what a guest would say.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.vm.helpers import BEGINS, BUG, DIES, FATAL, PASSES, PLAN, write_image
from uffd_selftests import cli as command
from uffd_selftests.vm import session, vng
from uffd_selftests.vm.guests import Guest

if TYPE_CHECKING:
    from tests.conftest import Starter


# ---- what the guests are told ---------------------------------------------------------------------------------------


def test_plan(cli: Starter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest collects only the files that have something to run."""
    args = command.parser().parse_args(["-k", "unit and zeropage"])
    names, files = session._plan(args, [])
    assert names == [f"zeropage on {mem}" for mem in ("anon", "shmem", "shmem-private", "hugetlb", "hugetlb-private")]
    assert files == [Path(command.__file__).parent / "cases/unit/test_zeropage.py"]
    assert [session._is_ours(path) for path in (str(files[0]), "-x", f"{files[0]}::test_zeropage", "/proc")] == [
        *(True, False, False, False),
    ]
    listing = cli.run("-l", *(f"--case-file={path}" for path in files), "-k", "unit")
    assert listing.stdout.splitlines() == names


# ---- the whole document ---------------------------------------------------------------------------------------------


@dataclass
class Lab:
    """Runs --kernel with shells in place of virtual machines."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def run(self, *scripts: str, options: tuple[str, ...] = ()) -> tuple[int, list[str]]:
        """Run with a kernel for each script; returns the exit code and the lines of KTAP."""
        arguments = ["-o", str(self.folder), "--vm-accel", "tcg", *options]
        for number, script in enumerate(scripts, 1):
            image = write_image(self.folder / f"bzImage{number}", f"6.99.{number}")
            image.with_suffix(".sh").write_text(script)
            arguments += ["--kernel", str(image)]
        self.monkeypatch.setattr(vng, "missing", lambda _arch: None)
        self.monkeypatch.setattr(session, "_plan", lambda *_: session.Plan(PLAN, []))
        self.monkeypatch.setattr(vng, "command", lambda kernel, *_: ["/bin/sh", f"{kernel.path.with_suffix('.sh')}"])
        code = command.main(arguments)
        return code, self.capfd.readouterr().out.splitlines()


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Lab:
    """Return the means to run --kernel without virtual machines."""
    return Lab(tmp_path, monkeypatch, capfd)


INNER = [
    "  1..3",
    "  # Linux 6.99.0 x86_64",
    "  ok 1 move on anon",
    "  ok 2 move on shmem",
    "  ok 3 poison on anon # SKIP no",
    "  # Totals: pass:2 fail:0 xfail:0 xpass:0 skip:1 error:0",
]


@pytest.mark.parametrize("at_once", ["0", "2"])
def test_document(lab: Lab, at_once: str) -> None:
    """Each kernel is a subtest, in the order of the command line, whichever ends first; a copy is kept."""
    slow = BEGINS + "sleep 0.2; " + PASSES.removeprefix(BEGINS)
    code, lines = lab.run(slow, PASSES + "exit 1", options=("-n", at_once))
    assert code == 1
    assert lines == [
        *("KTAP version 1", "1..2"),
        *("  KTAP version 1", "  # Subtest: 6.99.1", *INNER, "ok 1 6.99.1"),
        *("  KTAP version 1", "  # Subtest: 6.99.2", *INNER, "not ok 2 6.99.2"),
        "# Totals: pass:1 fail:1 xfail:0 xpass:0 skip:0 error:0",
    ]
    assert (lab.folder / "results.tap").read_text().splitlines() == lines
    assert (lab.folder / "6.99.1/console.txt").read_text() == "Linux version 6.99.0\n"


def test_dead_kernel(lab: Lab) -> None:
    """The case that was running is to blame, what never ran is skipped, and the next kernel has its turn."""
    code, lines = lab.run(DIES, PASSES)
    assert code == 1
    assert lines[2:15] == [
        *("  KTAP version 1", "  # Subtest: 6.99.1", "  1..3", "  # Linux 6.99.0 x86_64", "  ok 1 move on anon"),
        *(f"  # console: {BUG}", f"  # console: {FATAL}"),
        "  not ok 2 move on shmem # ERROR kernel panic: Fatal",
        "  ok 3 poison on anon # SKIP never ran: the kernel was gone",
        "  # Totals: pass:1 fail:0 xfail:0 xpass:0 skip:1 error:1",
        "not ok 1 6.99.1 # ERROR kernel panic: Fatal in move on shmem",
        *("  KTAP version 1", "  # Subtest: 6.99.2"),
    ]
    document = json.loads((lab.folder / "6.99.1/results.json").read_text())
    assert [(result["name"], result["outcome"]) for result in document["results"]] == [
        *(("move on anon", "pass"), ("move on shmem", "error"), ("poison on anon", "skip")),
    ]
    assert (document["totals"], document["interrupted"]) == (
        {"pass": 1, "error": 1, "skip": 1},
        "kernel panic: Fatal in move on shmem",
    )
    inner = [line.removeprefix("  ") for line in lines[2:12]]
    kept = (lab.folder / "6.99.1/results.tap").read_text().splitlines()
    assert kept == ["TAP version 13", *inner[2:]]


def test_kernel_that_never_boots(lab: Lab) -> None:
    """There is nothing inside, and the outer result shows the console."""
    code, lines = lab.run("echo 'qemu: bad option' >&2; exit 1")
    assert (code, lines) == (
        1,
        [
            *("KTAP version 1", "1..1", "# console: qemu: bad option"),
            "not ok 1 6.99.1 # ERROR the kernel never said anything",
            "# Totals: pass:0 fail:0 xfail:0 xpass:0 skip:0 error:1",
        ],
    )


def test_nothing_testable(lab: Lab) -> None:
    """A kernel without userfaultfd is skipped; if all are, the exit code says so."""
    assert lab.run(PASSES + "exit 4")[0] == 4
    assert lab.run(PASSES + "exit 4", PASSES)[0] == 0


def test_old_results_are_gone(lab: Lab) -> None:
    """A kernel's folder has nothing of an earlier run."""
    lab.run(DIES)
    lab.run("exit 1")
    assert sorted(path.name for path in (lab.folder / "6.99.1").iterdir()) == [
        *("console.txt", "junit.xml", "report.html", "results.json"),
    ]
    document = json.loads((lab.folder / "6.99.1/results.json").read_text())
    assert (document["results"], document["interrupted"]) == ([], "the kernel never said anything")


def test_overviews(lab: Lab) -> None:
    """A page shows the kernels side by side, dead ones too, and so does junit.xml."""
    lab.run(DIES, "exit 1")
    junit = (lab.folder / "junit.xml").read_text()
    assert 'name="move on shmem"' in junit
    assert 'message="ERROR kernel panic: Fatal' in junit
    assert 'classname="6.99.2.uffd-selftests" name="run"' in junit
    page = (lab.folder / "report.html").read_text()
    assert "6.99.1" in page
    assert "6.99.2" in page
    assert "kernel panic: Fatal in move on shmem" in page


def test_full_disk(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document on stdout is whole, and that its copy is not makes the run fail."""
    document = session.Document(Path("/dev/full"))
    monkeypatch.setattr(session, "Document", lambda _: document)
    code, lines = lab.run(PASSES)
    assert (code, lines[-2]) == (1, "ok 1 6.99.1")
    assert document.trouble == "cannot write /dev/full: No space left on device"


def test_full_disk_in_the_guest(lab: Lab) -> None:
    """A kernel of which no result failed, but which is a failure, says why."""
    code, lines = lab.run(PASSES + "echo 'uffd-selftests: cannot write the results: No space' >&2; exit 1")
    assert (code, lines[-3:-1]) == (1, ["# cannot write the results: No space", "not ok 1 6.99.1"])


def test_full_disk_before_anything_boots(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document is not left without a result: it bails out."""

    def unwritable(*_: object) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Guest, "run", unwritable)
    code, lines = lab.run(PASSES)
    assert (code, lines[-1]) == (1, "Bail out! cannot write the results: No space left on device")


# ---- early ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["full", "gone"])
def test_nobody_reads(reader: str, cli: Starter, tools: Path, tmp_path: Path) -> None:
    """When the document cannot be written the exit code says so, and nothing else complains."""
    image = write_image(tmp_path / "bzImage")
    (tools / "vng").write_text("#!/bin/sh\nexec sleep 1000\n")
    env = {"PATH": f"{tools}:{os.environ['PATH']}"}
    arguments = ["--kernel", str(image), "--vm-accel", "tcg", "-f", "UFFDIO_API"]
    if reader == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        end, stdout = os.pipe()
        os.close(end)
    run = subprocess.run(
        [sys.executable, "-m", "uffd_selftests", *arguments],
        stdout=stdout, stderr=subprocess.PIPE, text=True, env={**os.environ, **env}, check=False,
    )  # fmt: skip
    os.close(stdout)
    said = ["uffd-selftests: cannot write the results: No space left on device"] if reader == "full" else []
    assert run.stderr.splitlines() == ["uffd-selftests: 6.99.0-test: booting, emulated", *said]
    assert run.returncode == (1 if reader == "full" else 128 + signal.SIGPIPE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted(number: signal.Signals, cli: Starter, tools: Path, tmp_path: Path) -> None:
    """Whatever ends the run ends the machines, too, and removes what they left in the temporary folder."""
    begun = tmp_path / "begun"
    os.mkfifo(begun)
    (tools / "vng").write_text(f"#!/bin/sh\ntouch $TMPDIR/file\n(sleep 1000 & echo >{begun}; wait) & wait\n")
    image = write_image(tmp_path / "bzImage")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(scratch)}
    run = cli.start("--kernel", str(image), "--vm-accel", "tcg", "-f", "UFFDIO_API", env=env)
    begun.read_text()
    assert list(scratch.glob("*/file"))
    run.process.send_signal(number)
    run.wait()
    if number == signal.SIGKILL:
        assert run.code == -number
    else:
        assert (run.code, run.stdout.splitlines()[-1]) == (128 + number, f"Bail out! interrupted by {number.name}")
    until = time.monotonic() + 10
    while (left := [*run.survivors(), *map(str, scratch.iterdir())]) and time.monotonic() < until:
        time.sleep(0.01)
    assert left == []
