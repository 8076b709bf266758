# SPDX-License-Identifier: GPL-2.0-only
"""--probe says what was found, to people and to programs, whoever they are."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable

import pytest

from tests.conftest import ROOT
from tests.helpers import FACTS, needs_userfaultfd
from tests.machine.processes import as_nobody, needs_root, unprivileged_userfaultfd, with_seccomp
from tests.probe.helpers import AREA, run, verdicts
from uffd_selftests import cli
from uffd_selftests.machine.facts import Facts
from uffd_selftests.machine.requirements import REQUIREMENTS, no_userfaultfd
from uffd_selftests.probe import config, suite
from uffd_selftests.probe.consumers import Verdict, judge
from uffd_selftests.probe.findings import look
from uffd_selftests.probe.report import Report

needs_kernel_faults = pytest.mark.skipif(
    REQUIREMENTS["kernel_faults"](FACTS) is not None, reason=str(REQUIREMENTS["kernel_faults"](FACTS))
)


@needs_userfaultfd
def test_text() -> None:
    """The verdicts come first; no line is too long for a terminal of moderate width, none ends in blanks."""
    done = run("--probe")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"Linux {FACTS.release} ")
    assert lines[2] == "Who gets what they need"
    assert lines[3].startswith("  QEMU post-copy migration ")
    assert [line for line in lines if len(line) > 125 or line != line.rstrip()] == []


@needs_userfaultfd
def test_json() -> None:
    """The keys are those of docs/probe.md."""
    done = run("--probe", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    described = (ROOT / "docs" / "probe.md").read_text()
    for key in document:
        assert f"`{key}`" in described, key
    for name, value in document.items():
        for key in value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else ():
            assert f"`{key}`" in described, f"{name}: {key}"
    assert document["format"] == 1
    assert document["available"] is True
    assert {each["name"]: each for each in document["features"]}["EVENT_REMAP"]["bit"] == 2
    assert document["memory"][0]["tried"]["COPY"] == {
        "answer": "works", "offered": True, "errno": None, "detail": None,
    }  # fmt: skip
    assert Facts.from_dict(document["facts"]).release == FACTS.release


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--json",), "--json needs --probe"),
        (("--probe", "-k", "move"), "--probe runs nothing"),
        (("--probe", "-o", "out"), "--probe runs nothing"),
        (("--probe", "--", "-x"), "--probe runs nothing"),
        (("--probe", "--deadline-scale", "0"), "--deadline-scale: '0' is not a positive number"),
    ],
)
def test_usage(args: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What a probe would ignore is refused."""
    assert cli.main(args) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"uffd-selftests: {message}")
    assert err.count("\n") == 1


def test_full_disk() -> None:
    """One line says why nothing was written."""
    with open("/dev/full", "w") as full:
        done = run("--probe", stdout=full.fileno())
    assert (done.returncode, done.stderr) == (2, "uffd-selftests: cannot write: ENOSPC\n")


@needs_userfaultfd
def test_interrupt() -> None:
    """A signal ends the probe while a trial hangs, and the trial with it."""
    program = """
import sys, time
from uffd_selftests.probe import command, findings, trials
def hang(on):
    sys.stdout.write("hanging\\n")
    sys.stdout.flush()
    time.sleep(600)
findings.BY_MEMORY = (trials.Trial("COPY", hang),)
sys.exit(command.main(as_json=False, area_bytes=1 << 20))
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "hanging\n"
        process.terminate()
        assert process.stdout.read() == ""  # the trial is gone as well: nobody holds the pipe
        assert process.wait(60) == 128 + signal.SIGTERM


# ---- processes that may do less -------------------------------------------------------------------------------------


def look_after(*preparations: Callable[[], None]) -> Report:
    """Return what a process finds that was prepared with these functions."""
    answer, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answer)
        try:
            for prepare in preparations:
                prepare()
            seen = look()
            with open(tell, "wb") as pipe:
                pickle.dump((seen, suite.prospect(seen.facts, AREA)), pipe)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(tell)
    with open(answer, "rb") as pipe:
        plain = pipe.read()
    os.waitpid(child, 0)
    seen, prospect = pickle.loads(plain)
    return Report(seen, judge(seen), config.examine(seen.facts), prospect)


@needs_root
@needs_kernel_faults
def test_ordinary_user(results: list[suite.Expected]) -> None:
    """Without privilege most is found out all the same; who needs more is told how to get it."""
    assert results
    with unprivileged_userfaultfd(0):
        found = look_after(as_nobody)
    judged = verdicts(found.findings)
    assert judged["qemu-postcopy"].verdict is Verdict.NO
    assert "or sysctl vm.unprivileged_userfaultfd=1" in judged["qemu-postcopy"].reasons[0]
    assert judged["criu-lazy-pages"].verdict is Verdict.NO
    anon = found.findings.columns[0].outcomes
    assert anon["COPY"].works
    assert anon["kernel faults"].errno == "EPERM"
    assert found.findings.handle["EVENT_FORK"].errno == "EPERM"
    text = found.text()
    assert "\n  EVENT_FORK          4.11   EPERM" in text
    assert "\n  userfaultfd(2)                        shut\n" in text


@needs_root
def test_forbidden(results: list[suite.Expected]) -> None:
    """With every door shut the reasons are said once, nothing is guessed, and no result could be had."""
    assert results
    found = look_after(as_nobody, with_seccomp(errno.EPERM))
    if no_userfaultfd(found.findings.facts) is None:
        pytest.skip("everybody may open /dev/userfaultfd here")
    assert {judgement.verdict for judgement in found.judgements} == {Verdict.NO}
    assert found.findings.features == ()
    assert found.findings.columns == ()
    assert found.prospect.skipped == found.prospect.results
    text = found.text()
    assert "forbidden by a seccomp filter: allow userfaultfd in the container's profile" in text
    assert "UFFD_FEATURE_ bits" not in text
    document = found.to_dict()
    assert document["available"] is False
    assert all(not way["open"] for way in document["access"])
