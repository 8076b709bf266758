# SPDX-License-Identifier: GPL-2.0-only
"""faults.py measures what it says, and says in one line what is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.helpers import BENCHMARKS, run
from uffd_selftests.abi.uapi import Feature
from uffd_selftests.machine.facts import probe
from uffd_selftests.machine.requirements import missing_features
from uffd_selftests.toolkit.expectations import eventually


def test_faults(tmp_path: Path) -> None:
    """Every kind on base pages: a line and a result for each number of threads; the counts agree with each other."""
    mems = ("anon", "shmem", "shmem-private")
    arguments = [word for mem in mems for word in ("--mem", mem)]
    arguments += ["--sizes", "1", "--threads", "1,2", "--rounds", "2", "--json", str(tmp_path / "faults.json")]
    result = run("faults.py", *arguments)
    rwp = not missing_features(probe(), Feature.RWP | Feature.RWP_ASYNC)
    told = "" if rwp else "left out: rwp on anon, "
    assert (result.returncode, result.stderr[: len(told) or None]) == (0, told)
    document = json.loads((tmp_path / "faults.json").read_text())
    kinds = {"missing": mems, "minor": ("shmem",), "wp": mems, "rwp": mems, "move": ("anon",), "wp-async": mems}
    kinds["rwp-async"] = mems
    assert [(entry["kind"], entry["memory"], entry["threads"]) for entry in document["results"]] == [
        (kind, mem, threads)
        for kind, own in kinds.items()
        if rwp or "rwp" not in kind
        for mem in own
        for threads in (1, 2)
    ]
    for entry in document["results"]:
        check_entry(entry)
    head, *lines = result.stdout.splitlines()[1:]
    assert len(lines) == len(document["results"])
    for column in ("page", "area", "threads", "faults/s", "p50 us", "p99 us"):
        end = head.index(column) + len(column)
        assert all(line[end - 1] != " " and line[end] == " " for line in lines), column


def check_entry(entry: dict[str, Any]) -> None:
    """Compare what a result says with the rest of it."""
    rate, latency, scan = entry["faults_per_second"], entry["latency_ns"], entry["scan_ns_per_page"]
    assert entry["faults"] == 2 * entry["area_size"] // entry["page_size"]
    assert sum(count for _, count in latency["histogram"]) == entry["faults"]
    assert 0 < rate["min"] <= rate["median"] <= rate["max"]
    assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
    assert (scan is not None) == entry["kind"].endswith("-async")
    assert scan is None or scan.keys() == {"written", "clean"}


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib: pip install '.[bench]'")
def test_plot(tmp_path: Path) -> None:
    """A picture of everything, with a scan's cost and a line that ends early for want of pages."""
    picture = tmp_path / "faults.svg"
    arguments = ["--kind", "wp-async", "--kind", "move", "--mem", "anon", "--sizes", "1,2", "--threads", "1,300"]
    result = run("faults.py", *arguments, "--rounds", "1", "--plot", str(picture))
    assert result.returncode == 0, result.stderr
    assert result.stderr.startswith("left out: move on anon, 4 kB pages, area of 1 MB, 300 threads;")
    assert "</svg>" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--threads", "0"], 2, "argument --threads: invalid list of numbers value: '0'"),
        (["--kind", "move", "--mem", "shmem"], 2, "no --kind that is asked for is there on a --mem that is"),
        (["--json", "/nonexistent/file"], 2, "there is no folder /nonexistent"),
        (["--plot", "picture.txt"], 2, "--plot"),
        (["--mem", "hugetlb", "--hugepage-size", "3MB"], 4, "kernel lacks huge pages of this size"),
        (["--mem", "anon", "--sizes", "1000000000"], 4, "it takes 1000000000 MB, there are "),
    ],
    ids=["usage", "nothing", "folder", "format", "page size", "memory"],
)
def test_errors(arguments: list[str], code: int, line: str) -> None:
    """What is wrong is said in one line, the last one, before anything is measured."""
    result = run("faults.py", *arguments, "--rounds", "1")
    assert (result.returncode, result.stdout) == (code, "")
    assert line in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_interrupted(tmp_path: Path) -> None:
    """A signal ends it in the midst of measuring, quietly, and nothing is left."""
    report = tmp_path / "faults.json"
    command = [sys.executable, str(BENCHMARKS / "faults.py"), "--kind", "missing", "--mem", "anon"]
    command += ["--rounds", "100000", "--json", str(report)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        eventually(lambda: has_uffd(process.pid), "a userfaultfd of the benchmark")
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 128 + signal.SIGTERM
        assert not report.exists()
    finally:
        process.kill()
        process.wait()


def has_uffd(pid: int) -> bool:
    """Whether a process has a userfaultfd."""
    try:
        return any("[userfaultfd]" in os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return False
