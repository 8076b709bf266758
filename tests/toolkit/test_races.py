# SPDX-License-Identifier: GPL-2.0-only
"""Races count what happened, come to an end with their companions, and say who did not come to an end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from errno import EAGAIN, EBADF, EEXIST, ENOENT

import pytest

from tests.helpers import needs_userfaultfd
from uffd_selftests.abi.native import lib
from uffd_selftests.mem_types import ANON
from uffd_selftests.toolkit import races
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.handle import MISSING
from uffd_selftests.toolkit.memory import PAGE_SIZE, PROT_NONE, Advice, protect
from uffd_selftests.toolkit.races import (
    COMPANION,
    SUCCESS,
    Outcomes,
    Race,
    adviser,
    copier,
    run_race,
    toucher,
    vm_reader,
    zeroer,
)

pytestmark = [
    pytest.mark.isolated,  # a hang here must not hang the rest
    needs_userfaultfd,
]


@pytest.fixture
def ctx() -> Iterator[Context]:
    """A context with anonymous memory of eight pages, the source filled, the destination registered."""
    with Context(ANON, nr_pages=8) as context:
        context.src.fill()
        context.uffd.register(context.dst.range, MISSING)
        yield context


def test_outcomes_are_counted(ctx: Context) -> None:
    """Every step of every round counts once, by what became of it; the fills do what the ioctls do."""
    copies, touches = run_race(
        copier(ctx.uffd, ctx.dst.range, ctx.src.start, PAGE_SIZE, rounds=3),
        toucher(ctx.dst.range, PAGE_SIZE, backwards=True),
    )
    assert copies == {SUCCESS: 8, EEXIST: 16}
    assert touches == {SUCCESS: 8}
    ctx.dst.expect_pattern_of(ctx.src)
    (elsewhere,) = run_race(zeroer(ctx.uffd, ctx.src.range, PAGE_SIZE, backwards=True))
    assert elsewhere == {ENOENT: 8}
    (lookups,) = run_race(vm_reader(ctx.dst.range, PAGE_SIZE, rounds=2))
    assert lookups == {SUCCESS: 16}


def test_signals_are_outcomes(ctx: Context) -> None:
    """An access that is forbidden counts as its signal."""
    protect(ctx.src.page(3), PROT_NONE)
    (touches,) = run_race(toucher(ctx.src.range, PAGE_SIZE))
    assert touches == {SUCCESS: 7, lib.UFFD_RACE_SIGNALS + 11: 1}
    with pytest.raises(AssertionError, match="expected success; got 7 times success, 1 times SIGSEGV"):
        touches.expect_only(SUCCESS)


def test_companions_end_with_the_racers(ctx: Context) -> None:
    """A companion goes round while a racer works, and while the block lasts."""
    companion = adviser(ctx.src.range, PAGE_SIZE, Advice.WILLNEED, rounds=COMPANION)
    with Race(companion, toucher(ctx.src.range, PAGE_SIZE)) as race:
        race.reached(0, 100)
    advised, touches = race.outcomes
    assert advised[SUCCESS] >= 100
    assert touches == {SUCCESS: 8}
    assert race.run


def test_a_racer_that_hangs_is_named(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever does not come to its end within the deadline is told, with how far it came."""
    monkeypatch.setattr(races, "DEADLINE", 0.1)
    ctx.uffd.copy(ctx.dst.start, ctx.src.start, PAGE_SIZE)
    with pytest.raises(AssertionError, match=r"within 0\.1 seconds; reads of .*: 1 of 8 steps done, 1 times success"):
        run_race(toucher(ctx.dst.range, PAGE_SIZE), toucher(ctx.src.range, PAGE_SIZE))
    ctx.uffd.close()


def test_a_wrong_output_field_is_told(ctx: Context) -> None:
    """A fill whose output field does not fit its result fails the race; one that the kernel never saw does not."""
    good = zeroer(ctx.uffd, ctx.dst.range, PAGE_SIZE)
    with pytest.raises(AssertionError, match="8 times the output field is neither the length nor -errno"):
        run_race(replace(good, output=2))
    (closed,) = run_race(replace(good, fd=-1))
    assert closed == {EBADF: 8}


def test_steps_are_repeated(ctx: Context) -> None:
    """A step is repeated for as long as it says what it may say, and each time counts."""
    fill = replace(zeroer(ctx.uffd, ctx.src.range, PAGE_SIZE), again=(ENOENT, EAGAIN), count=1)
    with Race(fill) as race:
        while race.outcomes[0].total() < 50:
            pass
        ctx.src.release()
        ctx.uffd.register(ctx.src.range, MISSING)
    (fills,) = race.outcomes
    assert fills[SUCCESS] == 1
    assert fills[ENOENT] >= 49


def test_outcomes_read_well() -> None:
    """Outcomes go by the names of their errnos and signals."""
    outcomes = Outcomes("UFFDIO_COPY", {SUCCESS: 2, EEXIST: 1, lib.UFFD_RACE_SIGNALS + 7: 3})
    assert str(outcomes) == "2 times success, 1 times EEXIST, 3 times SIGBUS"
    outcomes.expect_only(SUCCESS, EEXIST, lib.UFFD_RACE_SIGNALS + 7)
