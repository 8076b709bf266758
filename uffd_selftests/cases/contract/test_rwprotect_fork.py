# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_RWPROTECT and fork(2): what of the protection a child has, and that each side keeps its own."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from uffd_selftests.case import Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, FORK, HUGETLB_PRIVATE, MISSING, MIXED, NEW, PRIVATE, READ_TRAPPED, RWP, SYNC_RWP, UNREGISTERED,
    WRITE_TRAPPED, Advice, Area, Channel, Child, Context, Pagemap, Uffd, advise, await_fault, expect, expect_modes,
    expect_rwp_free, expect_rwp_trapped, fixed_buffer, forked_child, huge_mixture, mixture, pmd_mapped, poke, promise,
    read_fork, rewrite, rwp_protected, touch, undisturbed,
)  # fmt: skip


def let_go_on(child: Child, uffd: Uffd, area: Area, page: int, *, write: bool = False) -> None:
    """Have the child's next fault be its access to this page, nobody else asleep, and resolve it."""
    await_fault(uffd, child, area.page(page).start, WRITE_TRAPPED if write else READ_TRAPPED)
    uffd.resolve(area.page(page))


# ---- without UFFD_FEATURE_EVENT_FORK -------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-fork",
    mem=ALL,
    features=SYNC_RWP,
    needs=("swap",),
    pages=MIXED,
    spare_hugepages=MIXED,
    rows=("RW-52",),
    kind=Kind.DETAIL,
)
def test_rwprotect_fork(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK a child reaches every page freely where its parent stays trapped."""
    mix = mixture(ctx)

    def child(_: Channel) -> None:
        expect_modes(mix.area.range, UNREGISTERED)
        mix.expect_unmarked("in the child")
        mix.expect_accessible()

    with promise("RW-52", "child"), Child(child) as process:
        process.expect_end(ctx.uffd)
    with promise("RW-52", "parent"):
        expect_modes(mix.area.range, RWP)
        mix.expect_marks("in the parent")
        mix.expect_trapped(ctx.uffd)


@uffd_case("rwprotect-thp-fork", mem=(ANON,), features=SYNC_RWP, needs=("thp",), rows=("RW-52",), kind=Kind.DETAIL)
def test_rwprotect_thp_fork(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK a child reaches huge pages freely, protected whole or in part or not."""
    mix = huge_mixture(ctx)

    def child(_: Channel) -> None:
        mix.expect_marks("in the child", pages=())
        expect(pmd_mapped(mix.area.range), 2 * mix.whole(0).len, "bytes mapped by PMD in the child")
        mix.expect_contents()
        touch(mix.area.range, mix.area.page_size, write=True)

    with Child(child) as process:
        process.expect_end(ctx.uffd)
    mix.expect_marks("in the parent")
    mix.expect_trapped(ctx.uffd)


@uffd_case(
    "rwprotect-fork-own-copies",
    mem=PRIVATE,
    features=SYNC_RWP,
    pages=4,
    spare_hugepages=6,
    rows=("RW-52",),
    kind=Kind.DETAIL,
)
def test_rwprotect_fork_own_copies(ctx: Context) -> None:
    """What a child writes to a page that is protected in its parent, or was resolved there, the parent never sees."""
    area = rwp_protected(ctx)
    ctx.uffd.resolve(area.page(2, 2))

    def child(channel: Channel) -> None:
        for page in (0, 2):
            poke(area.page(page).start, NEW)
        channel.send()
        channel.receive()
        for page in (1, 3):
            area.expect_pattern_of(area, page, 1)

    with Child(child) as process:
        process.receive()
        for page in (1, 3):
            ctx.uffd.resolve(area.page(page))
            undisturbed(ctx.uffd, partial(poke, area.page(page).start, NEW))
        process.send()
    ctx.uffd.resolve(area.page(0))
    for page in (0, 2):
        area.expect_pattern_of(area, page, 1)


# ---- with it -------------------------------------------------------------------------------------------------------


@uffd_case(
    "rwprotect-fork-event",
    mem=ALL,
    features=SYNC_RWP | FORK,
    needs=("swap",),
    pages=MIXED,
    spare_hugepages=MIXED,
    rows=("RW-53",),
)
def test_rwprotect_fork_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK a child is trapped where its parent is; its own descriptor says so and frees it."""
    mix = mixture(ctx)
    area, written = mix.area, {5}

    def child(channel: Channel) -> None:
        expect_modes(area.range, RWP)
        mix.expect_marks("in the child")
        for page in sorted(mix.free - {4}):
            touch(area.page(page), area.page_size, write=True)
        for page in sorted(mix.protected):
            mix.rewrite(page) if page in written else touch(area.page(page), area.page_size)
            Pagemap.expect_protected(area, {one for one in mix.protected if one > page}, f"after page {page}")
        mix.expect_contents()

    with promise("RW-53", "child"), forked_child(ctx, child) as (process, uffd):
        for page in sorted(mix.protected):
            let_go_on(process, uffd, area, page, write=page in written)
            ctx.uffd.expect_asleep(0)
            ctx.uffd.expect_no_message()
    with promise("RW-53", "parent"):
        expect_modes(area.range, RWP)
        mix.expect_marks("in the parent")
        mix.expect_trapped(ctx.uffd)


@uffd_case("rwprotect-thp-fork-event", mem=(ANON,), features=SYNC_RWP | FORK, needs=("thp",), rows=("RW-53",))
def test_rwprotect_thp_fork_event(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK huge pages are protected in the child as in the parent, whole or in part."""
    mix = huge_mixture(ctx)
    pages = (3, mix.count - 1, mix.cut[1])

    def child(_: Channel) -> None:
        mix.expect_marks("in the child")
        expect(pmd_mapped(mix.area.range), 2 * mix.whole(0).len, "bytes mapped by PMD in the child")
        for page in pages:
            touch(mix.area.page(page), mix.area.page_size)
        mix.expect_marks("in the child, some resolved", pages=mix.protected - set(pages))
        for page in (mix.cut[0] - 1, 2 * mix.count):
            touch(mix.area.page(page), mix.area.page_size, write=True)

    with forked_child(ctx, child) as (process, uffd):
        for page in pages:
            let_go_on(process, uffd, mix.area, page)
            ctx.uffd.expect_no_message()
    mix.expect_marks("in the parent")
    mix.expect_trapped(ctx.uffd)


@uffd_case(
    "rwprotect-fork-event-missing",
    mem=ALL,
    features=SYNC_RWP | FORK,
    pages=4,
    spare_hugepages=8,
    rows=("RW-53",),
)
def test_rwprotect_fork_event_missing(ctx: Context) -> None:
    """In a child of memory registered for both, a missing page is announced as such, and no page is protected twice."""
    area = ctx.dst
    area.fill(0, 2)
    ctx.src.fill()
    ctx.uffd.register(area.range, MISSING | RWP)
    ctx.uffd.rwprotect(area.page(0, 3))

    def child(_: Channel) -> None:
        expect_modes(area.range, MISSING | RWP)
        Pagemap.expect_protected(area, {0, 1}, "in the child")
        area.expect_pattern_of(ctx.src, 2, 1)
        area.expect_pattern_of(area, 1, 1)
        Pagemap.expect_protected(area, {0}, "in the child, one filled and one resolved")

    with forked_child(ctx, child) as (process, uffd):
        await_fault(uffd, process, area.page(2).start)
        uffd.copy(area.page(2).start, ctx.src.page(2).start, area.page_size)
        let_go_on(process, uffd, area, 1)
    Pagemap.expect_protected(area, {0, 1}, "in the parent")
    Pagemap.expect_present(area, 0, 1)
    expect_rwp_trapped(ctx.uffd, area, 0, 1)


@uffd_case("rwprotect-fork-wiped", mem=(ANON,), features=SYNC_RWP | FORK, pages=3, rows=("RW-53",), kind=Kind.DETAIL)
def test_rwprotect_fork_wiped(ctx: Context) -> None:
    """Under MADV_WIPEONFORK the child's memory is registered and empty: it fills, and nothing there is protected."""
    area = rwp_protected(ctx)
    advise(area.page(0, 2), Advice.WIPEONFORK)

    def child(_: Channel) -> None:
        expect_modes(area.range, RWP)
        Pagemap.expect_protected(area, {2}, "in the child")
        Pagemap.expect_present(area, 2)
        area.expect_zero(0, 2)
        Pagemap.expect_protected(area, {2}, "in the child, when it has filled two pages")
        rewrite(area, 2)

    with forked_child(ctx, child) as (process, uffd):
        let_go_on(process, uffd, area, 2, write=True)
    Pagemap.expect_protected(area, range(3), "in the parent")
    expect_rwp_trapped(ctx.uffd, area, 0, 1, 2)


@uffd_case(
    "rwprotect-fork-event-requests",
    mem=ALL,
    features=SYNC_RWP | FORK,
    pages=5,
    spare_hugepages=8,
    rows=("RW-53", "RW-55"),
    kind=Kind.DETAIL,
)
def test_rwprotect_fork_event_requests(ctx: Context) -> None:
    """What is protected or resolved on one side of a fork, through its handle, changes nothing on the other."""
    area = rwp_protected(ctx)
    ctx.uffd.resolve(area.page(3, 2))

    def child(channel: Channel) -> None:
        Pagemap.expect_protected(area, {0, 1, 2}, "in the child")
        for marked in ({0, 1, 2}, {0, 2, 4}):
            channel.send()
            channel.receive()
            Pagemap.expect_protected(area, marked, "in the child, after requests")
        for page in (1, 3):
            touch(area.page(page), area.page_size, write=True)
        area.expect_pattern_of(area, 4, 1)

    with forked_child(ctx, child) as (process, uffd):
        process.receive()
        ctx.uffd.resolve(area.page(0, 2))
        ctx.uffd.rwprotect(area.page(3))
        Pagemap.expect_protected(area, {2, 3}, "in the parent, after requests there")
        process.send()
        process.receive()
        uffd.resolve(area.page(1))
        uffd.rwprotect(area.page(4))
        Pagemap.expect_protected(area, {2, 3}, "in the parent, after requests for the child")
        process.send()
        let_go_on(process, uffd, area, 4)
    expect_rwp_free(ctx.uffd, area, 0, 1, 4)
    expect_rwp_trapped(ctx.uffd, area, 2, 3)


@uffd_case(
    "rwprotect-fork-grandchild",
    mem=(ANON, HUGETLB_PRIVATE),
    features=SYNC_RWP | FORK,
    pages=4,
    spare_hugepages=10,
    rows=("RW-55",),
    kind=Kind.DETAIL,
)
def test_rwprotect_fork_grandchild(ctx: Context) -> None:
    """A grandchild is trapped where the child is at that time, and a child forked later where the parent is then."""
    area = rwp_protected(ctx)

    def look(marked: set[int], page: int, _: Channel) -> None:
        Pagemap.expect_protected(area, marked, "in the youngest")
        rewrite(area, page)
        Pagemap.expect_protected(area, marked - {page}, "in the youngest, after its access")

    def child(channel: Channel) -> None:
        channel.send()
        channel.receive()
        with Child(partial(look, {1, 2, 3}, 1)):
            pass
        Pagemap.expect_protected(area, {1, 2, 3}, "in the child")

    with promise("RW-55", "grandchild"), forked_child(ctx, child) as (process, uffd):
        process.receive()
        uffd.resolve(area.page(0))
        ctx.uffd.resolve(area.page(1, 2))
        process.send()
        with read_fork(uffd) as grandchild:
            let_go_on(process, grandchild, area, 1, write=True)
            process.expect_end(uffd, ctx.uffd)
    Pagemap.expect_protected(area, {0, 3}, "in the parent")
    with promise("RW-55", "later child"), forked_child(ctx, partial(look, {0, 3}, 3)) as (process, uffd):
        let_go_on(process, uffd, area, 3, write=True)
    expect_rwp_trapped(ctx.uffd, area, 0, 3)


# ---- pages that somebody holds -------------------------------------------------------------------------------------


def in_child_of_pinned(ctx: Context, area: Area, *, event: bool) -> None:
    """Fork while pages 1 and 2 of the area are pinned, and 0 to 2 protected: the child has copies of those."""
    marked = {0, 1, 2} if event else set[int]()

    def child(_: Channel) -> None:
        Pagemap.expect_protected(area, marked, "in the child")
        for page in sorted(marked):
            touch(area.page(page), area.page_size)
        for page in range(area.nr_pages):
            area.expect_pattern_of(area, page, 1)
            poke(area.page(page).start, NEW)
        Pagemap.expect_protected(area, (), "in the child, at its end")

    area.fill()
    with fixed_buffer(area.page(1, 2)):
        ctx.uffd.register(area.range, RWP)
        ctx.uffd.rwprotect(area.page(0, 3))
        if event:
            with forked_child(ctx, child) as (process, uffd):
                for page in sorted(marked):
                    let_go_on(process, uffd, area, page)
        else:
            with Child(child) as process:
                process.expect_end(ctx.uffd)
    Pagemap.expect_protected(area, {0, 1, 2}, "in the parent")
    expect_rwp_free(ctx.uffd, area, 3)
    expect_rwp_trapped(ctx.uffd, area, 0, 1, 2)
    area.expect_pattern_of(area)


@uffd_case(
    "rwprotect-fork-pinned",
    mem=(ANON, HUGETLB_PRIVATE),
    features=SYNC_RWP,
    pages=4,
    spare_hugepages=8,
    rows=("RW-54",),
)
def test_rwprotect_fork_pinned(ctx: Context) -> None:
    """Without UFFD_FEATURE_EVENT_FORK a child's copies of protected pages that are pinned are free."""
    in_child_of_pinned(ctx, ctx.dst, event=False)


@uffd_case(
    "rwprotect-fork-event-pinned",
    mem=(ANON, HUGETLB_PRIVATE),
    features=SYNC_RWP | FORK,
    pages=4,
    spare_hugepages=8,
    rows=("RW-54",),
)
def test_rwprotect_fork_event_pinned(ctx: Context) -> None:
    """With UFFD_FEATURE_EVENT_FORK a child's copies of protected pages that are pinned are protected, others not."""
    in_child_of_pinned(ctx, ctx.dst, event=True)


@uffd_case(
    "rwprotect-thp-fork-pinned",
    mem=(ANON,),
    features=SYNC_RWP | FORK,
    needs=("thp",),
    rows=("RW-54",),
    kind=Kind.DETAIL,
)
def test_rwprotect_thp_fork_pinned(ctx: Context) -> None:
    """Huge pages that are pinned are split by a fork, and stay protected on both sides."""
    with ExitStack() as pin:
        mix = huge_mixture(
            ctx, before=lambda area: pin.enter_context(fixed_buffer(area.page(7, area.nr_pages // 3)))
        )
        pages = (0, mix.count - 1, mix.cut[0])

        def child(_: Channel) -> None:
            mix.expect_marks("in the child")
            for page in pages:
                touch(mix.area.page(page), mix.area.page_size)
                mix.area.expect_pattern_of(mix.area, page, 1)
            for page in (mix.cut[0] - 1, 2 * mix.count):
                touch(mix.area.page(page), mix.area.page_size, write=True)

        with forked_child(ctx, child) as (process, uffd):
            for page in pages:
                let_go_on(process, uffd, mix.area, page)
        mix.expect_marks("in the parent")
        mix.expect_trapped(ctx.uffd)
