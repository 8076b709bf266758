# SPDX-License-Identifier: GPL-2.0-only
"""A handle sent over a socket (SCM_RIGHTS) to a process that was there before, and has no privilege by now."""

from __future__ import annotations

import os
from functools import partial

from uffd_selftests.case import uffd_case
from uffd_selftests.common import (
    ALL, MINOR, MINOR_FAULTS, MISSING, PAGE_SIZE, SHARED, WP, WRITEPROTECT, Advice, Channel, Child, Context, CopyMode,
    Fault, Feature, PagefaultFlag, Pagemap, Skip, Uffd, Waiter, advise, become_nobody, enter_user_namespace, expect,
    expect_same, peek, promise, removed, touch,
)  # fmt: skip

PROTECTED = PagefaultFlag.WRITE | PagefaultFlag.WP
BECOME = {"nobody": become_nobody, "user namespace": enter_user_namespace}


def receive_handle(channel: Channel, variant: str, features: Feature) -> Uffd:
    """Give up what the variant says, and only then receive a handle; Skip where that is not permitted."""
    try:
        BECOME[variant]()
    except OSError as error:
        raise Skip(f"{error}: run as root, outside of a container") from None
    channel.send(os.getpid())
    _, (fd,) = channel.receive_fds()
    return Uffd(fd, features)


@uffd_case(
    "handed-on-socket",
    mem=ALL,
    variants=tuple(BECOME),
    features=WRITEPROTECT | Feature.EVENT_REMOVE,
    pages=5,
    rows=("PR-21",),
)
def test_handed_on_socket(ctx: Context, variant: str) -> None:
    """A handle that comes over a socket serves: messages, copies, wakes, protection, events, and an end of it all."""
    area, src, features = ctx.dst, ctx.src, WRITEPROTECT | Feature.EVENT_REMOVE
    src.fill()
    size = area.page_size

    def serve(channel: Channel) -> None:
        uffd = receive_handle(channel, variant, features)
        expect(uffd.wait("a missing page"), Fault(area.page(1).start, PagefaultFlag(0)), "the first message")
        uffd.copy(area.page(1).start, src.page(1).start, size, CopyMode.DONTWAKE)
        uffd.wake(area.page(1))
        uffd.copy(area.page(2).start, src.page(2).start, 2 * size, CopyMode.WP)
        uffd.writeprotect(area.page(1))
        uffd.unprotect(area.page(2))
        channel.send("protected")
        message = uffd.wait("a write to a protected page")
        expect(message, Fault(area.page(3).start, PROTECTED), "the second message")
        uffd.unprotect(area.page(3))
        expect(uffd.wait("an event"), removed(area.page(2)), "the third message")
        channel.send("read")
        channel.receive()
        uffd.expect_no_message()
        uffd.unregister(area.range)

    with promise("PR-21", variant), Child(serve) as child:
        child.receive()
        ctx.uffd.register(area.range, MISSING | WP)
        child.send(None, ctx.uffd.fd)
        with Waiter(lambda: peek(area.page(1).start)) as waiter:
            waiter.result()
        expect(child.receive(), "protected", "how far the holder is")
        Pagemap.expect_present(area, 1, 2, 3)
        Pagemap.expect_protected(area, (1, 3), "after the holder has protected two pages")
        with Waiter(partial(touch, area.page(3), PAGE_SIZE, write=True)) as waiter:
            waiter.result()
        Pagemap.expect_protected(area, (1,), "after the holder has let a write go on")
        with Waiter(partial(advise, area.page(2), Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED)) as waiter:
            waiter.result()
        expect(child.receive(), "read", "how far the holder is")
        Pagemap.expect_present(area, 1, 3)
        for page in (1, 3):
            expect_same(src.page(page).start, area.page(page).start, size)
        child.send()
        child.wait()
        touch(area.range, PAGE_SIZE, write=True)  # nothing is registered any more
    ctx.uffd.expect_no_message()


@uffd_case(
    "handed-on-minor", mem=SHARED, variants=tuple(BECOME), features=MINOR_FAULTS, pages=3, rows=("PR-21",)
)
def test_handed_on_minor(ctx: Context, variant: str) -> None:
    """A handle that comes over a socket serves minor faults."""
    area = ctx.dst
    with area.file_view() as view:
        area.pattern.fill(view.start, 0, 3)

    def serve(channel: Channel) -> None:
        uffd = receive_handle(channel, variant, MINOR_FAULTS)
        message = uffd.wait("a minor fault")
        expect(message, Fault(area.page(1).start, PagefaultFlag.MINOR), "the message")
        uffd.continue_(area.page(1))
        uffd.expect_no_message()

    with promise("PR-21", variant), Child(serve) as child:
        child.receive()
        ctx.uffd.register(area.range, MINOR)
        child.send(None, ctx.uffd.fd)
        with Waiter(lambda: peek(area.page(1).start)) as waiter:
            waiter.result()
        child.wait()
        Pagemap.expect_present(area, 1)
    ctx.uffd.unregister(area.range)
    area.expect_pattern_of(area)
