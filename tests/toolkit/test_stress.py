# SPDX-License-Identifier: GPL-2.0-only
"""The stress run finds what a broken handler does, names the page, and repeats itself for as long as it is told."""

from __future__ import annotations

import os
import pty
import re
import signal
from array import array
from typing import TYPE_CHECKING

import pytest

from tests.helpers import needs_userfaultfd
from uffd_selftests.abi.uapi import Feature
from uffd_selftests.mem_types import ANON, SHMEM, SHMEM_PRIVATE, MemType
from uffd_selftests.toolkit.access import peek, poke
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import DEADLINE
from uffd_selftests.toolkit.handle import WP, Uffd
from uffd_selftests.toolkit.memory import PROT_NONE, protect
from uffd_selftests.toolkit.stress import (
    Mode,
    Options,
    Sabotage,
    Stress,
    StressError,
    Threads,
    differing,
    misaccessed,
    misprotected,
    unbalanced,
)

if TYPE_CHECKING:
    from tests.conftest import Starter

HANGS = {Sabotage.DROP_FAULT, Sabotage.DROP_WP_FAULT, Sabotage.SKIP_WAKE}
"""What leaves a thread asleep."""


def patience(sabotage: Sabotage) -> float:
    """Return the seconds without progress after which a bounce is given up: no longer than needed where that comes."""
    return DEADLINE / 5 if sabotage in HANGS else DEADLINE


CAUGHT = {
    Sabotage.FILL_TWICE: r"times filled: page (\d+): expected 1, got 2; wrong pages: \1",
    Sabotage.DROP_FAULT: r"sleeps in its first read of page \d+, .* filled 0 times, missing faults 1, answered 0",
    Sabotage.DROP_WP_FAULT: r"sleeps in a write to page \d+, .* write-protect faults 1, answered 0",
    Sabotage.SKIP_WAKE: r"sleeps in its first read of page \d+, .* filled 1 times, missing faults 1, answered 1",
    Sabotage.WRONG_PAGE: r"page (\d+) byte 0x[0-9a-f]+: expected 0x[0-9a-f]+, got 0x[0-9a-f]+, which is of page \d+",
    Sabotage.TORN_PAGE: r"page \d+ byte 0xff0: expected 0x[0-9a-f]+, got zero: the page is not filled to its end",
    Sabotage.OLD_PAGE: r"page \d+ byte 0x8: expected a count of 1 accesses, got zero",
    Sabotage.UNPROTECTED: r"page \d+: written, though protected \(0 of 1 write-protect faults answered before\)",
    Sabotage.FILL_UNSEEN: r"times filled: page (\d+): expected 1, got 0; wrong pages: \1",
}


@needs_userfaultfd
@pytest.mark.isolated
@pytest.mark.parametrize("blocking", [False, True], ids=["poll", "read"])
@pytest.mark.parametrize("sabotage", CAUGHT, ids=lambda sabotage: sabotage.name.lower().replace("_", "-"))
def test_broken_handler_is_caught(sabotage: Sabotage, *, blocking: bool) -> None:
    """Each kind of broken handler is caught in the bounce in which it happens, and the message names the page."""
    with Context(ANON, nr_pages=64) as ctx:
        stress = Stress(ctx, blocking=blocking, seed=7, patience=patience(sabotage), sabotage=sabotage)
        with pytest.raises(StressError) as caught:
            stress.bounce(Mode(random=False, racing=False, verify=True))
    first, *threads, last = str(caught.value).splitlines()
    assert re.search(CAUGHT[sabotage], first)
    assert first.startswith("bounce 0 (verify): ")
    assert [line.partition(":")[0] for line in threads] == ["workers", "handlers", "copiers"]
    assert last == "again: --stress-seed 7"


CAUGHT_LATER = {
    Sabotage.FILL_TWICE: r"times filled: page \d+: expected 1, got 2|expected a count of",  # with a write in between
    Sabotage.DROP_FAULT: r"missing faults answered: page \d+: expected \d+, got|sleeps in its first read of page \d+",
    Sabotage.DROP_WP_FAULT: r"sleeps in a write to page \d+|write-protect faults answered: page \d+: expected",
    Sabotage.SKIP_WAKE: r"sleeps in its first read of page \d+",
    Sabotage.TORN_PAGE: r"page \d+ byte 0x[0-9a-f]+: expected 0x[0-9a-f]+, got zero",
    Sabotage.SKIP_PROTECT: r"page \d+: written, though protected \(1 of 2 write-protect faults answered before\)",
}


@needs_userfaultfd
@pytest.mark.isolated
@pytest.mark.parametrize("mem", [SHMEM, SHMEM_PRIVATE], ids=str)
@pytest.mark.parametrize("sabotage", CAUGHT_LATER, ids=lambda sabotage: sabotage.name.lower().replace("_", "-"))
def test_one_slip_among_many_faults_is_caught(sabotage: Sabotage, mem: MemType) -> None:
    """One wrong answer in the middle of a bounce, when copiers may hide it, is caught too."""
    with Context(mem, nr_pages=2048) as ctx:
        stress = Stress(ctx, seed=7, patience=patience(sabotage), sabotage=sabotage, sabotage_at=20)
        with pytest.raises(StressError, match=CAUGHT_LATER[sabotage]):
            for _ in range(50):  # in which there are fewer faults, or another thread's message has set it right
                stress.bounce(Mode(random=True, racing=False, verify=True))


@needs_userfaultfd
@pytest.mark.isolated
def test_changed_byte_is_found() -> None:
    """What is no longer as it was after the last bounce is found, be it by a thread or by the comparison."""
    with Context(SHMEM, nr_pages=64) as ctx:
        stress = Stress(ctx)
        stress.bounce(Mode.of(0))
        place = ctx.dst.page(63).start + 0x808
        poke(place, bytes([peek(place)[0] ^ 1]))
        with pytest.raises(StressError, match="page 63 byte 0x808: expected 0x[0-9a-f]+, got 0x[0-9a-f]+"):
            stress.bounce(Mode.of(7))


@needs_userfaultfd
@pytest.mark.isolated
def test_refused_request_is_told() -> None:
    """A request that fails is told with its page, errno and output field."""
    with Context(ANON, nr_pages=4) as ctx:
        stress = Stress(ctx)
        protect(ctx.src.range, PROT_NONE)
        message = r"\w+ \d: UFFDIO_COPY of page \d: expected success, got EFAULT with output -EFAULT\n"
        with pytest.raises(StressError, match=message):
            stress.bounce(Mode.of(0))


@needs_userfaultfd
@pytest.mark.isolated
def test_threads_add_up() -> None:
    """The counters of all threads are there after a bounce, and agree with each other."""
    with Context(ANON, nr_pages=256) as ctx:
        stress = Stress(ctx, blocking=True)
        stress.bounce(Mode.of(1))
        workers, handlers, copiers = stress.threads
        assert len(workers.counters["accesses"]) == stress.units >= 2
        assert all(workers.counters["accesses"])
        assert handlers.total("filled") + copiers.total("filled") == 256
        assert stress.faults == handlers.total("missing") + handlers.total("wp") > 0
        assert re.match(r"copiers: filled \d+ \(\d+\+\d+", str(copiers))


def test_protection_is_compared_with_pagemap() -> None:
    """A page without its protection, and one that has it in spite of a write."""
    none, all_pages = array("I", [0] * 4), array("I", [1] * 4)
    with Context(SHMEM, features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM, nr_pages=4) as ctx:
        ctx.dst.fill()
        ctx.uffd.register(ctx.dst.range, WP)
        ctx.uffd.writeprotect(ctx.dst.page(0, 2))
        assert list(misprotected(ctx.dst, none, none)) == [
            "protection lost without a write-protect fault (PM_UFFD_WP in pagemap): pages 2-3"
        ]
        assert list(misprotected(ctx.dst, all_pages, all_pages)) == [
            "still protected, though written since (PM_UFFD_WP in pagemap): pages 0-1"
        ]
        assert list(misprotected(ctx.dst, array("I", [0, 0, 1, 1]), array("I", [0, 0, 1, 1]))) == []


CAUGHT_RWP = {
    Sabotage.SKIP_PROTECT: r"accessed, though protected: without a fault answered before \(PM_UFFD_WP in pagemap\)",
    Sabotage.DROP_WP_FAULT: r"sleeps in \w|read-write-protect faults answered: page \d+: expected \d+, got",
}


@needs_userfaultfd
@pytest.mark.isolated
@pytest.mark.parametrize("sabotage", CAUGHT_RWP, ids=lambda sabotage: sabotage.name.lower().replace("_", "-"))
def test_broken_read_write_protection_is_caught(sabotage: Sabotage) -> None:
    """A protection that is left away, and a message that nobody answers, though the kernel resolves others itself."""
    with Uffd.open() as probe:
        if not probe.offered & Feature.RWP_ASYNC:
            pytest.skip("needs Linux 7.3")
    with Context(ANON, nr_pages=64) as ctx:
        stress = Stress(ctx, rwp=True, seed=7, patience=patience(Sabotage.DROP_WP_FAULT), sabotage=sabotage)
        with pytest.raises(StressError, match=CAUGHT_RWP[sabotage]):
            for _ in range(50):
                stress.bounce(Mode.of(7))


def test_accesses_are_compared_with_pagemap() -> None:
    """What was accessed must not be protected any more, the rest must be, and who was let through leaves a trace."""
    with Context(SHMEM, features=Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM, nr_pages=4) as ctx:
        ctx.dst.fill()
        ctx.uffd.register(ctx.dst.range, WP)
        ctx.uffd.writeprotect(ctx.dst.page(0, 2))
        sound = {
            "touched_before": [1, 3, 2, 0],
            "touches": [0, 2, 2, 0],
            "written_late": [0, 0, 1, 0],
            "unprotected_before": [0, 1, 1, 0],
            "unprotected": [0, 1, 2, 0],
        }

        def complaints(name: str = "touches", page: int = 0, value: int = 0, *, sync: bool = True) -> list[str]:
            changed = {**sound, name: [*sound[name][:page], value, *sound[name][page + 1 :]]}
            return list(misaccessed(ctx.dst, {key: array("I", values) for key, values in changed.items()}, sync=sync))

        assert complaints() == []
        seen = "(PM_UFFD_WP in pagemap): pages"
        assert complaints("touches", 2, 1) == [], "un-protected for a fault that was told of twice"
        assert complaints("written_late", 1, 1) == [f"still protected, though accessed since {seen} 1"]
        unseen = "accessed, though protected: without a fault answered before"
        assert complaints("unprotected", 2, 1) == [f"{unseen} {seen} 2"]
        assert complaints("unprotected", 2, 1, sync=False) == []
        sound["unprotected"][2] = 1
        assert complaints("touches", 2, 1) == [f"protection lost without an access {seen} 2"]


def test_sums_are_compared() -> None:
    """Each counter that is one too high or too low leaves a sum that does not agree."""
    sound = {
        "handler": {"missing": 5, "filled": 3, "eexist": 2, "wp": 4, "unprotected": 4},
        "copier": {"filled": 5, "eexist": 3},
    }

    def complaints(role: str = "", counter: str = "", more: int = 0) -> list[str]:
        threads = [Threads("worker", {})]
        for name, counters in sound.items():
            changed = {key: [value + more * (name == role and key == counter), 0] for key, value in counters.items()}
            threads.append(Threads(name, changed))
        return list(unbalanced(8, *threads))

    assert complaints() == []
    for role, counters in sound.items():
        for counter in counters:
            assert complaints(role, counter, 1), counter
            assert complaints(role, counter, -1), counter
    assert complaints("handler", "missing", 1) == ["missing faults, filled or found filled (EEXIST): expected 6, got 5"]


def test_differing_pages_are_named() -> None:
    """The first page with both values, then all of them."""
    assert list(differing("times", array("I", [1, 1, 1]), array("I", [1, 1, 1]))) == []
    (message,) = differing("times", array("I", [1, 1, 1, 1]), array("I", [1, 2, 0, 1]))
    assert message == "times: page 1: expected 1, got 2; wrong pages: 1-2"


def test_modes() -> None:
    """Eight bounces have each combination once, the last one compares everything, and so it is for any number."""
    modes = list(Options(bounces=8).modes())
    assert len(set(modes)) == 8
    for bounces in (1, 2, 8, 9):
        modes = list(Options(bounces=bounces).modes())
        assert len(modes) == bounces
        assert modes[-1].verify
    assert [str(Mode.of(number)) for number in (0, 3, 7)] == ["in order", "random racing", "random racing verify"]


@needs_userfaultfd
def test_duration_moves_the_deadline(cli: Starter) -> None:
    """A stress case lasts for as long as asked for, and its deadline begins behind that; the seed is in the results."""
    run = cli.run("-f", "stress (poll) on anon", "--duration", "3s", "--deadline", "2.5", "--stress-seed", "5",
                  "--stress-mib", "1")  # fmt: skip
    assert run.outcomes == {"stress (poll) on anon": "pass"}
    assert run.results["stress (poll) on anon"]["seconds"] >= 3
    assert run.document["options"]["stress_seed"] == 5
    log = (run.folder / "stress.log").read_text().splitlines()
    assert re.match(r"stress \(poll\) on anon, seed 5, bounce \d+ \(.*\): workers: accesses \d+ .*; copiers: ", log[0])


@needs_userfaultfd
def test_killed_run_tells_its_seed(cli: Starter) -> None:
    """A stress case that the harness has to kill cannot say with which seed it ran; the harness does."""
    run = cli.run("-f", "stress (poll) on anon", "--stress-seed", "5", "--stress-bounces", "1000000", "--deadline", "1")
    result = run.results["stress (poll) on anon"]
    assert result["outcome"] == "timeout"
    assert result["diagnostics"][-1] == "again: --stress-seed 5"


@needs_userfaultfd
def test_long_run_can_be_watched_and_ended(cli: Starter) -> None:
    """On a terminal a line shows how far it is; Ctrl-C ends everything at once."""
    terminal, stderr = pty.openpty()
    run = cli.start("-f", "stress (read) on anon", "--duration", "2h", stderr=stderr)
    os.close(stderr)
    seen = b""
    while b" faults, bounce " not in seen:
        seen += os.read(terminal, 1 << 12)
    run.process.send_signal(signal.SIGINT)
    run.wait()
    os.close(terminal)
    assert b" of 2:00:00, " in seen
    assert run.code == 128 + signal.SIGINT
    assert "Bail out! interrupted by SIGINT" in run.stdout
    assert run.survivors() == []


@needs_userfaultfd
def test_workers_share_the_seed(cli: Starter) -> None:
    """With -n every worker has the seed of the results."""
    chosen = ("-f", "stress (poll) on anon", "-f", "stress (read) on anon")
    run = cli.run("-n", "2", *chosen, "--stress-mib", "1", "--stress-bounces", "2")
    assert run.outcomes == {"stress (poll) on anon": "pass", "stress (read) on anon": "pass"}
    seed = run.document["options"]["stress_seed"]
    lines = (run.folder / "stress.log").read_text().splitlines()
    assert len(lines) == 4
    assert all(f", seed {seed}, bounce " in line for line in lines)
