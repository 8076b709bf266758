# SPDX-License-Identifier: GPL-2.0-only
"""benchmarks/faults.py and compare_faults.py measure what they say, and say in one line what is wrong."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests.common import MISSING, Uffd, eventually
from uffd_selftests.mem_types import ANON

if TYPE_CHECKING:
    from types import ModuleType

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import benchmarks/loop.py, which is no package's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loop  # noqa: PLC0415

    return loop


@pytest.fixture
def workloads(loop: ModuleType) -> ModuleType:
    """Import benchmarks/workloads.py."""
    assert loop
    import workloads  # noqa: PLC0415

    return workloads


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the benchmarks."""
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


# ---- the loop ------------------------------------------------------------------------------------------------------


def test_warnings() -> None:
    """The compiler has nothing to say."""
    options = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-c", "-o", "/dev/null"]
    subprocess.run(["cc", *options, str(BENCHMARKS / "loop.c")], check=True)


def test_every_access_is_counted(loop: ModuleType) -> None:
    """Each thread touches its share, and no page is left out or counted twice, however the pages are shared out."""
    area = ANON.allocate(7)
    try:
        for threads in (1, 2, 3, 7):
            touched = loop.touch(area.range, area.page_size, threads, write=True, release=lambda: None)
            assert touched.latencies.count == 7
            assert touched.seconds > 0
        area.expect_zero()
    finally:
        area.close()


def test_buckets(loop: ModuleType) -> None:
    """The buckets of the histogram begin where the one before ends, and are 3 % wide."""
    _, library = loop._library()
    starts = [library.loop_latency(bucket) for bucket in range(library.LOOP_BUCKETS)]
    assert starts[:64] == list(range(64))
    assert all(before < after <= before * 33 / 32 for before, after in itertools.pairwise(starts[64:]))
    assert starts[-1] < 1 << 64 <= starts[-1] * 33 / 32


def test_percentiles(loop: ModuleType) -> None:
    """Half of the accesses took p50 or less; sums of histograms count both."""
    first = loop.Latencies([(10, 98), (500, 1)], 510)
    both = first + loop.Latencies([(10, 1), (70, 100)], 75)
    assert both.buckets == [(10, 99), (70, 100), (500, 1)]
    assert (both.slowest, both.count) == (510, 200)
    assert [both.percentile(percent) for percent in (49, 50, 99, 99.5, 100)] == [10, 70, 70, 70, 500]


def test_a_hang_ends(loop: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that nobody answers are let go after the deadline, and it is an error."""
    monkeypatch.setattr(loop, "DEADLINE", 0.1)
    area = ANON.allocate(2)
    try:
        with Uffd.open() as uffd:
            uffd.register(area.range, MISSING)
            with pytest.raises(loop.BenchmarkError, match="2 threads hang"):
                loop.touch(area.range, area.page_size, 2, write=False, release=lambda: uffd.release(area.range))
    finally:
        area.close()


def test_a_lost_fault_is_noticed(workloads: ModuleType) -> None:
    """Handlers that have answered fewer faults than there are pages make the measurement an error."""
    with pytest.raises(workloads.BenchmarkError, match="missing on anon: expected 16 faults, the handlers answered 8"):
        with workloads.MissingFaults(ANON, 8) as workload:
            workload.run(1)
            workload.reset = lambda: None  # all pages are there: no fault
            workload.run(1)


# ---- faults.py -----------------------------------------------------------------------------------------------------


def test_faults(tmp_path: Path) -> None:
    """Every kind on base pages: a line and a result for each number of threads; the counts agree with each other."""
    mems = ("anon", "shmem", "shmem-private")
    arguments = [word for mem in mems for word in ("--mem", mem)]
    arguments += ["--sizes", "1", "--threads", "1,2", "--rounds", "2", "--json", str(tmp_path / "faults.json")]
    result = run("faults.py", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads((tmp_path / "faults.json").read_text())
    kinds = {"missing": mems, "minor": ("shmem",), "wp": mems, "move": ("anon",), "wp-async": mems}
    assert [(entry["kind"], entry["memory"], entry["threads"]) for entry in document["results"]] == [
        (kind, mem, threads) for kind, own in kinds.items() for mem in own for threads in (1, 2)
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
    assert (scan is not None) == (entry["kind"] == "wp-async")
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


# ---- compare_faults.py ---------------------------------------------------------------------------------------------


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


def test_newer_tree(loop: ModuleType, tmp_path: Path) -> None:
    """A tree whose handler takes other arguments is refused with advice, not with the compiler's complaints."""
    assert loop
    import upstream  # noqa: PLC0415

    folder = tmp_path / "linux" / upstream.SELFTESTS / "mm"
    folder.mkdir(parents=True)
    (folder / "local_config.h").touch()  # the tree counts as prepared
    (folder / "uffd-common.h").write_text("void *uffd_poll_thread(void *); struct uffd_global_test_opts;")
    with pytest.raises(upstream.UpstreamError, match=r"since Linux 6\.18: use linux-source-6\.12"):
        upstream.build_faults(tmp_path, None)
