# SPDX-License-Identifier: GPL-2.0-only
"""A handler serves, counts, does what it is told for each page, and raises what it meets."""

from __future__ import annotations

import pytest

from tests.helpers import needs_userfaultfd
from uffd_selftests.abi import uapi
from uffd_selftests.toolkit.access import peek
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.handle import MISSING
from uffd_selftests.toolkit.handler import Action, HandlerError, stats_report
from uffd_selftests.toolkit.memory import PAGE_SIZE, Range
from uffd_selftests.toolkit.messages import Fault
from uffd_selftests.toolkit.threads import Waiter

pytestmark = [
    pytest.mark.isolated,  # a hang here must not hang the rest
    needs_userfaultfd,
]


@pytest.mark.parametrize("blocking", [False, True], ids=["poll", "blocking read"])
def test_handler_serves_and_counts(context: Context, *, blocking: bool) -> None:
    """Each page is one fault, in order, with either way to wait for messages."""
    context.src.fill()
    if blocking:
        uapi_flags = 0
        context.uffd.close()
        context.uffd = context.uffd.open(flags=uapi.UFFD_USER_MODE_ONLY | uapi_flags)
        context.uffd.register(context.dst.range, MISSING)
    with context.handler(blocking=blocking) as handler:
        context.dst.expect_pattern_of(context.src)
    assert handler.stats.missing == handler.stats.resolved == handler.stats.messages == 4
    assert handler.messages == [Fault(context.dst.page(page).start, uapi.PagefaultFlag(0)) for page in range(4)]
    assert stats_report([handler, handler]) == "userfaults: 8 missing (4+4)"


def test_handler_follows_a_plan(context: Context) -> None:
    """The action of a fault can depend on its page."""
    context.src.fill()
    with context.handler(plan=[Action.COPY, Action.ZEROPAGE, Action.COPY, Action.ZEROPAGE], retry=True):
        context.dst.expect_pattern_of(context.src, 0, 1)
        context.dst.expect_zero(1, 1)
        context.dst.expect_pattern_of(context.src, 2, 1)
        context.dst.expect_zero(3, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"missing": Action.CONTINUE}, "UFFDIO_CONTINUE at 0x[0-9a-f]+: expected success, got EINVAL"),
        ({"src": Range(PAGE_SIZE, PAGE_SIZE)}, "UFFDIO_COPY at 0x[0-9a-f]+: expected success, got EFAULT"),
        ({"where": Range(PAGE_SIZE, PAGE_SIZE)}, "page fault at 0x[0-9a-f]+, outside the registered area"),
    ],
    ids=["refused", "bad source", "outside"],
)
def test_handler_errors_end_the_fault_and_are_raised(
    context: Context, options: dict[str, object], message: str
) -> None:
    """What the handler meets fails the block, and nobody sleeps on because of it."""
    failing = context.handler(**options)
    with pytest.raises(HandlerError, match=message), failing, Waiter(lambda: peek(context.dst.start)) as waiter:
        if "where" in options:
            while not failing.stats.messages:
                pass
            context.uffd.release(context.dst.range)  # the handler's area is elsewhere, so are those it can release
        assert waiter.result() == b"\0"
