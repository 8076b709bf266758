# SPDX-License-Identifier: GPL-2.0-only
"""The native layer and the handle around it: signals are survived, wrong answers are told with what was expected."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator

import pytest

from uffd_selftests import uapi
from uffd_selftests.common import (
    MISSING,
    Action,
    Context,
    Fault,
    HandlerError,
    UffdError,
    parse_message,
    refuses,
    stats_report,
)
from uffd_selftests.kernel import no_userfaultfd, probe
from uffd_selftests.mem_types import ANON, SHMEM
from uffd_selftests.memory import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_NONE,
    AccessError,
    ContentError,
    Range,
    expect_bytes,
    map_memory,
    peek,
    poke,
    touch_trapped,
    unmap,
)
from uffd_selftests.native import ffi, lib
from uffd_selftests.processes import Channel, Child, ChildError, Waiter, faulting

pytestmark = [
    pytest.mark.isolated,  # a hang here must not hang the rest
    pytest.mark.skipif(no_userfaultfd(probe()) is not None, reason=str(no_userfaultfd(probe()))),
]


@pytest.fixture
def forbidden() -> Iterator[Range]:
    """A page that nobody may touch."""
    page = Range(map_memory(PAGE_SIZE, prot=PROT_NONE, flags=MAP_PRIVATE | MAP_ANONYMOUS), PAGE_SIZE)
    yield page
    unmap(page)


@pytest.fixture
def context() -> Iterator[Context]:
    """Four pages of anonymous memory, registered for missing faults."""
    with Context(ANON, nr_pages=4) as ctx:
        ctx.uffd.register(ctx.dst.range, MISSING)
        yield ctx


def test_guarded_access_reports_the_signal(forbidden: Range) -> None:
    """A forbidden access is told with its signal and address, and the next one works."""
    for access in (lambda: peek(forbidden.start + 5), lambda: poke(forbidden.start + 5, b"x")):
        with pytest.raises(AccessError) as caught:
            access()
        assert (caught.value.trap.signo, caught.value.trap.addr) == (signal.SIGSEGV, forbidden.start + 5)
    traps = touch_trapped(forbidden, PAGE_SIZE, write=True)
    assert [trap and trap.signo for trap in traps] == [signal.SIGSEGV]


def test_unguarded_access_still_kills(forbidden: Range) -> None:
    """The guard keeps nobody alive who did not ask for it."""
    with pytest.raises(AccessError):
        peek(forbidden.start)
    with pytest.raises(ChildError, match="killed by SIGSEGV"), Child(lambda _: lib.uffd_fill(*_pattern(forbidden))):
        pass


def _pattern(where: Range) -> tuple[object, ...]:
    return where.start, ffi.new("struct uffd_pattern *", [PAGE_SIZE, 1, 0]), 0, 1


def test_contents_are_compared_to_the_last_byte() -> None:
    """One wrong byte, the very last, is found and named."""
    with Context(SHMEM, nr_pages=3) as ctx:
        ctx.dst.fill()
        ctx.dst.expect_pattern(ctx.dst.range)
        last = ctx.dst.range.end - 1
        right = peek(last)[0]
        poke(last, bytes([right ^ 1]))
        with pytest.raises(ContentError, match=f"page 2 byte 0xfff: expected {right:#04x}, got {right ^ 1:#04x}"):
            ctx.dst.expect_pattern(ctx.dst.range)
        ctx.dst.release()
        ctx.dst.expect_zero()
        poke(last, b"\1")
        with pytest.raises(ContentError, match="page 2 byte 0xfff: expected 0x00, got 0x01"):
            ctx.dst.expect_zero()
        with pytest.raises(ContentError, match="byte 0x0: expected 0x02, got 0x00"):
            expect_bytes(ctx.dst.range, 2)


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
    assert handler.messages == [
        Fault(context.dst.page(page).start, uapi.PagefaultFlag(0)) for page in range(4)
    ]
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


def test_refusals_are_compared(context: Context) -> None:
    """The errno and the output field of a refusal are both part of the promise."""
    page = context.dst.page(0)
    context.uffd.zeropage(page)
    with refuses(errno.EEXIST):
        context.uffd.zeropage(page)
    with pytest.raises(AssertionError, match="expected EINVAL with zeropage = -EINVAL; got .*EEXIST with zeropage"):
        with refuses(errno.EINVAL):
            context.uffd.zeropage(page)
    with pytest.raises(AssertionError, match="expected EEXIST with zeropage untouched; got .* = -EEXIST"):
        with refuses(errno.EEXIST, output=-0x5EED_0BAD_CAFE):
            context.uffd.zeropage(page)
    with pytest.raises(AssertionError, match="expected EEXIST; the call succeeded"), refuses(errno.EEXIST):
        context.uffd.wake(page)
    with pytest.raises(UffdError, match=r"UFFDIO_ZEROPAGE\(\[0x[0-9a-f]+, 0x[0-9a-f]+\), 0\): EEXIST with"):
        context.uffd.zeropage(page)


def test_messages_are_read_strictly() -> None:
    """Bytes that an event does not define must be zero, and an unknown event is an error."""
    fork = bytearray(32)
    fork[0], fork[8] = 0x13, 7
    assert parse_message(bytes(fork)).ufd == 7  # type: ignore[union-attr]
    fork[20] = 1
    with pytest.raises(AssertionError, match="reserved bytes of UFFD_EVENT_FORK are not zero"):
        parse_message(bytes(fork))
    with pytest.raises(AssertionError, match="unknown event 0x99"):
        parse_message(b"\x99" + bytes(31))


def test_wrong_fault_is_told(context: Context) -> None:
    """A fault elsewhere, or of another kind, than the case expects."""
    with faulting(context.uffd, context.dst.start, read=False):
        with pytest.raises(AssertionError, match="expected a page fault at .* with flags .*WRITE, got Fault"):
            context.uffd.wait_fault(context.dst.start, uapi.PagefaultFlag.WRITE)
        context.uffd.zeropage(context.dst.page(0))


def test_child_talks_and_tells(context: Context) -> None:
    """Values and descriptors cross between processes; a child's failure is told in its own words."""

    def target(channel: Channel) -> None:
        channel.send({"page": 3}, context.uffd.fd)
        assert channel.receive() == "go"
        raise AssertionError("this broke")

    with pytest.raises(ChildError, match=r"in the child process: this broke \(at test_native.py:\d+\)"):
        with Child(target) as child:
            value, fds = child.receive_fds()
            assert value == {"page": 3}
            assert len(fds) == 1
            os.close(fds[0])
            child.send("go")
