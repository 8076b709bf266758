# SPDX-License-Identifier: GPL-2.0-only
"""A run that is interrupted, killed or no longer read ends in order, and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.helpers import either_way, needs_userfaultfd

if TYPE_CHECKING:
    from tests.conftest import Run, Starter, SuiteWriter

HANGS = """
    @uffd_case("quick")
    def test_quick():
        pass

    @uffd_case("slow", mem=(ANON, SHMEM))
    def test_slow(mem):
        if not os.fork():
            os.setsid()
            open(f"started-{mem}.{os.getpid()}", "w").close()
        time.sleep(1000)
"""


def started(cli: Starter, *args: str) -> Run:
    """Start a run of HANGS, and wait until a case does what it says."""
    run = cli.start(*args)
    until = time.monotonic() + 60
    while not list(cli.folder.glob("started-*")):
        assert time.monotonic() < until
        assert run.process.poll() is None
        time.sleep(0.02)
    return run


@needs_userfaultfd
@either_way
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_interrupt(cli: Starter, suite: SuiteWriter, number: signal.Signals, way: list[str]) -> None:
    """A signal ends the run at once: bail-out, exit code of the signal, nothing left behind, reports written."""
    run = started(cli, "--deadline", "1000", *way, suite.write(HANGS))
    run.process.send_signal(number)
    run.wait()
    assert run.code == 128 + number
    assert run.stdout.splitlines()[-1] == f"Bail out! interrupted by {number.name}"
    assert run.survivors() == []
    assert run.document["interrupted"] == f"interrupted by {number.name}"
    assert "Traceback" not in run.stderr


LOADING = """
import os, runpy, signal, sys
class Interrupted:
    def find_spec(self, name, *_):
        if name == "uffd_selftests.{module}":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the tests were started with
sys.meta_path.insert(0, Interrupted())
sys.argv[1:] = {arguments}
runpy.run_module("uffd_selftests", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("module", "arguments"), [("cli", []), ("vm.session", ["--kernel", "none"]), ("soak.command", ["--soak", "1m"])]
)
def test_interrupt_while_loading(module: str, arguments: list[str]) -> None:
    """Before the run has begun Ctrl-C ends it without a word."""
    call = [sys.executable, "-c", LOADING.format(module=module, arguments=arguments)]
    result = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


@needs_userfaultfd
def test_reader_goes_away(cli: Starter, suite: SuiteWriter) -> None:
    """``run_tests.sh | head -1`` ends the run without a word."""
    path = suite.write("""
        @uffd_case("many", variants=tuple(map(str, range(50))))
        def test_many(variant):
            pass
    """)
    reader, writer = os.pipe()
    os.close(reader)
    run = cli.start("--", path, stdout=writer)
    os.close(writer)
    run.wait()
    assert run.code == 128 + signal.SIGPIPE
    assert len(run.document["results"]) < 50
    assert "Traceback" not in run.stderr


@needs_userfaultfd
@either_way
def test_killed(cli: Starter, suite: SuiteWriter, way: list[str]) -> None:
    """SIGKILL of a run ends its cases, too, and what they have started, with workers and without."""
    run = started(cli, "--deadline", "1000", *way, suite.write(HANGS))
    run.process.kill()
    run.wait()
    until = time.monotonic() + 60
    while run.survivors() and time.monotonic() < until:
        time.sleep(0.01)
    assert run.survivors() == []
