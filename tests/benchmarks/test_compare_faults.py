# SPDX-License-Identifier: GPL-2.0-only
"""compare_faults.py compares with upstream's handler, and says in one line what is wrong."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.benchmarks.helpers import run


def compare(tmp_path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Compare with a shell script instead of upstream's program."""
    program = tmp_path / "upstream_faults"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    options = ["--kind", "missing", "--mem", "anon", "--size", "1", "--rounds", "2", "--build-dir", str(tmp_path)]
    return run("compare_faults.py", *options, *arguments)


def test_compare(tmp_path: Path) -> None:
    """One that takes a second a pass is slower than ours; one that takes a nanosecond is not."""
    report = tmp_path / "report.json"
    result = compare(tmp_path, "while read -r _; do echo 1000000000; done", "--at-least", "1", "--json", str(report))
    assert result.returncode == 0, result.stderr
    results = json.loads(report.read_text())["results"]
    assert [(entry["threads"], entry["handlers"]) for entry in results] == [(1, 1), (2, 2)]
    assert all(len(entry["faults_per_second"]) == 2 and entry["ratio"] > 1 for entry in results)
    assert all(pair["upstream"] == 256 for entry in results for pair in entry["faults_per_second"])
    result = compare(tmp_path, "while read -r _; do echo 1; done", "--at-least", "1")
    assert result.returncode == 1, result.stderr


@pytest.mark.parametrize(
    "script",
    [
        "read -r _; echo 'ERROR: lost a fault' >&2; exit 1",
        "while read -r _; do echo 1; done; echo 'ERROR: lost a fault' >&2; exit 1",
    ],
    ids=["at once", "in the end"],
)
def test_upstreams_failure(tmp_path: Path, script: str) -> None:
    """What upstream's program says last is the one line, whenever it dies."""
    result = compare(tmp_path, script)
    assert result.returncode == 2
    line = "compare_faults.py: upstream: missing on anon, 4 kB pages, area of 1 MB: ERROR: lost a fault\n"
    assert result.stderr == line
