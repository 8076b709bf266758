# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of the harness need: a run of the command line, looked at from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
MARK = "UFFD_SELFTESTS_TEST_RUN"
PATIENCE = 120.0
"""Seconds after which a run that does not end is a failure of the test."""


@dataclass
class Run:
    """A run of the command line, as a child of the test."""

    process: subprocess.Popen[str]
    mark: str
    folder: Path
    stdout: str = ""
    stderr: str = ""
    code: int = -1
    started: int = field(default_factory=lambda: _started(Path("/proc/thread-self/stat").read_text()))

    def wait(self) -> Run:
        """Wait for its end and keep what it said."""
        try:
            self.stdout, self.stderr = self.process.communicate(timeout=PATIENCE)
        finally:
            self.process.kill()
        self.code = self.process.returncode
        return self

    @property
    def document(self) -> dict[str, Any]:
        """Its results.json."""
        document: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        return document

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Its results by the last part of their names."""
        return {result["name"].rpartition("::")[2]: result for result in self.document["results"]}

    @property
    def outcomes(self) -> dict[str, str]:
        """Its outcomes by the last part of the results' names."""
        return {name: result["outcome"] for name, result in self.results.items()}

    def survivors(self) -> list[str]:
        """Return the processes that it started, directly or not, and that still exist."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                stat = (folder / "stat").read_text()
                # Not of older ones: where the kernel has one in its grip for good, reading its environment hangs, too.
                if _started(stat) >= self.started and self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(stat)
            except OSError:
                continue
        return found


def _started(stat: str) -> int:
    """Return when a process was started, in clock ticks since the machine was (field 22 of /proc/PID/stat)."""
    return int(stat.rpartition(") ")[2].split()[19])


@dataclass
class Starter:
    """Starts runs, each with reports in a folder of its own."""

    folder: Path
    runs: list[Run] = field(default_factory=list)

    def start(
        self,
        *args: str,
        env: dict[str, str] | None = None,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> Run:
        """Start ``python -m uffd_selftests`` with these arguments."""
        mark = uuid.uuid4().hex
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("UFFD_", "PYTEST_"))}
        folder = self.folder / mark
        process = subprocess.Popen(
            [sys.executable, "-m", "uffd_selftests", "-o", str(folder), *args],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            cwd=self.folder,
            preexec_fn=_heed_interrupts,  # noqa: PLW1509  # there are no threads here
            env={**clean, "PYTHONPATH": str(ROOT), MARK: mark, **(env or {})},
        )
        self.runs.append(Run(process, mark, folder))
        return self.runs[-1]

    def run(self, *args: str, env: dict[str, str] | None = None) -> Run:
        """Start it and wait for its end."""
        return self.start(*args, env=env).wait()

    def close(self) -> None:
        """End what still runs."""
        for run in self.runs:
            run.process.kill()
            run.process.wait()
            for stream in (run.process.stdout, run.process.stderr):
                if stream:
                    stream.close()


def _heed_interrupts() -> None:
    """Undo what a shell does to its background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Starter]:
    """Start runs of the command line."""
    starter = Starter(tmp_path)
    yield starter
    starter.close()


@pytest.fixture(scope="module")
def module_cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Start runs of the command line that several tests look at."""
    starter = Starter(tmp_path_factory.mktemp("cli"))
    yield starter
    starter.close()


@pytest.fixture
def suite(tmp_path: Path) -> SuiteWriter:
    """Write test files for a run."""
    return SuiteWriter(tmp_path / "test_inner.py")


@dataclass
class SuiteWriter:
    """Writes a file of tests."""

    path: Path

    def write(self, text: str) -> str:
        """Write this text, which may use pytest, os and the declarations of cases; return the path."""
        imports = """
            import os, signal, time
            import pytest
            from uffd_selftests.case import Defect, Kind, uffd_case
            from uffd_selftests.mem_types import ALL, ANON, HUGETLB, SHMEM
            from uffd_selftests.abi.uapi import Feature
        """
        self.path.write_text(textwrap.dedent(imports) + textwrap.dedent(text))
        return str(self.path)
