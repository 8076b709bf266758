# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_COPY that had to wait for its source, while the destination became another: where the data may go.

The kernel lets go of the destination while the source faults, and looks it up again. What it finds then may be of
another kind, another file, another part of the file, registered in other modes or with another handle. Until Linux 7.1
the data went to whatever was there and registered; since then EAGAIN says to look again. A kernel that offers
UFFD_FEATURE_RWP is a later one, and there each change has to be noticed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from errno import EAGAIN, EFAULT, EINVAL, ENOENT, ENOMEM
from functools import partial

from uffd_selftests.case import Defect, Kind, uffd_case
from uffd_selftests.common import (
    ALL, ANON, EACH_HUGETLB, FILE_BACKED, HUGETLB, HUGETLB_PRIVATE, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE,
    MAP_PRIVATE, MAP_SHARED, MISSING, NOT_HUGETLB, PM_PRESENT, PROT_READ, PROT_WRITE, RWP, SHMEM, SHMEM_PRIVATE,
    SYNC_RWP, UNREGISTERED, WP, WRITEPROTECT, Area, Context, CopyMode, Feature, MemType, Pagemap, Range, RegisterMode,
    Uffd, UffdError, copy_held, errno_name, expect, expect_rwp_free, expect_same, faulting, keep_small, map_memory,
    peek, promise, protect, remap, saw, stored_bytes, unmap,
)  # fmt: skip

DONE = 0
PAGES = 4
TARGET = 2
"""The page that is copied: there is a page before the mapping's last one, and two in front."""
AGAIN = (EAGAIN,)
WHEREVER = (DONE, EAGAIN)
"""Before Linux 7.1, and for changes that do not move the page: done, or to be done again."""


@dataclass
class Stand:
    """What one copy is about: an area, the handle, and what is mapped at the target."""

    ctx: Context
    uffd: Uffd
    area: Area
    mode: RegisterMode
    stack: ExitStack
    files: list[int] = field(default_factory=list)
    """Every file that had no page of data."""
    shared: tuple[int, int] | None = None
    """File and offset of what is mapped at the target, if that is shared."""

    @property
    def target(self) -> Range:
        """The page that is copied."""
        return self.area.page(TARGET)

    @property
    def strict(self) -> bool:
        """Whether this is a kernel that looks at all that may have changed."""
        return Feature.RWP in self.ctx.uffd.offered

    def new_file(self, mem: MemType) -> int:
        """Make a file for memory of a type, large enough for more than the area."""
        fd = os.memfd_create("uffd-successor", mem.memfd_flags)
        self.stack.callback(os.close, fd)
        os.ftruncate(fd, 2 * PAGES * max(mem.page_size, self.area.page_size))
        self.files.append(fd)
        return fd

    def put(self, mem: MemType, where: Range, fd: int | None = None, offset: int = 0) -> None:
        """Map other memory over a part of the area (or more), and register it as the area was."""
        if fd is None and mem is not ANON:
            fd = self.new_file(mem)
        flags = MAP_FIXED | MAP_NORESERVE | (MAP_SHARED if mem.shared else MAP_PRIVATE)
        flags |= MAP_ANONYMOUS if fd is None else 0
        map_memory(where.len, at=where.start, flags=flags, fd=-1 if fd is None else fd, offset=offset)
        self.uffd.register(where, self.mode)
        self.shared = (fd, offset + self.target.start - where.start) if mem.shared and fd is not None else None


@contextmanager
def stand(ctx: Context, mode: RegisterMode = MISSING) -> Iterator[Stand]:
    """Have a fresh area registered, its file empty."""
    with ExitStack() as stack:
        uffd = stack.enter_context(Uffd.open(ctx.features))
        area = stack.enter_context(closing(ctx.mem.allocate(PAGES)))
        keep_small(area.range)
        uffd.register(area.range, mode)
        made = Stand(ctx, uffd, area, mode, stack)
        if area.fd is not None:
            os.ftruncate(area.fd, 2 * PAGES * area.page_size)
            made.files.append(area.fd)
            if ctx.mem.shared:
                made.shared = (area.fd, TARGET * area.page_size)
        yield made


def copy_while(on: Stand, change: Callable[[], object], mode: CopyMode = CopyMode(0)) -> int:
    """Copy a page to the target, make the change while the copy waits for its source, and return the errno, or 0.

    The data must be at the target, wholly, and in what is mapped there, or nowhere.
    """
    answer: list[int] = []

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except UffdError as error:
            expect(error.output, -(error.errno or 0), "the output field")
            answer.append(error.errno or 0)
        else:
            answer.append(DONE)

    source = on.ctx.src.page(0)
    with copy_held(on.uffd, on.target.start, source, mode=mode, outcome=noted()):
        change()
    present = Pagemap.have(on.target, PM_PRESENT)
    expect(any(present), answer[0] == DONE, f"a page is there after {told(*answer)}")
    for number in (0, 1, 3):
        page = on.area.page(number)
        expect(any(Pagemap.have(page, PM_PRESENT)), False, f"page {number}, which nobody filled, is there")
    if answer[0] == DONE:
        expect_same(source.start, on.target.start, source.len, "the page filled")
    for fd in on.files:
        here = answer[0] == DONE and on.shared is not None and on.shared[0] == fd
        expect(stored_bytes(fd), source.len if here else 0, "bytes stored in a file")
        if here and on.shared:
            expect(os.pread(fd, 64, on.shared[1]), peek(source.start, 64), "bytes in the file at the target's offset")
    return answer[0]


def register_anew(on: Stand, mode: RegisterMode) -> None:
    """Unregister the area, and register it in another mode."""
    on.uffd.unregister(on.area.range)
    on.uffd.register(on.area.range, mode)


def move_away(on: Stand, place: Range, mode: RegisterMode) -> None:
    """Move the area elsewhere, and register it there, if in any mode."""
    remap(on.area.range, to=place.start)
    if mode:
        on.uffd.register(place, mode)


def told(*numbers: int) -> str:
    """Name answers."""
    return " or ".join(errno_name(number) if number else "success" for number in numbers)


def expect_answer(on: Stand, answer: int, what: str, now: tuple[int, ...], before: tuple[int, ...] = ()) -> None:
    """Assert the answer; ``before`` are those that older kernels may give besides."""
    allowed = now if on.strict else (*now, *before)
    if answer not in allowed:
        raise AssertionError(f"{what}: expected {told(*allowed)}, got {told(answer)}")
    if len({*now, *before}) > 1:
        saw(f"{what}: {told(answer)}")


def expect_repeated(on: Stand) -> None:
    """Assert that the same copy works when it is made again."""
    on.uffd.copy(on.target.start, on.ctx.src.start, on.target.len)
    expect_same(on.ctx.src.start, on.target.start, on.target.len, "the page filled by the repetition")


def expect_done_or_repeated(
    on: Stand, change: Callable[[], object], what: str, now: tuple[int, ...], before: tuple[int, ...] = ()
) -> None:
    """Copy while a change is made; assert the answer, and that the copy works when made again if it was refused."""
    answer = copy_while(on, change)
    expect_answer(on, answer, what, now, before)
    if answer:
        expect_repeated(on)


# ---- what does not concern the page --------------------------------------------------------------------------------


@uffd_case(
    "copy-retry-unchanged",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-32", "CP-52"),
    kind=Kind.DETAIL,
)
def test_copy_retry_unchanged(ctx: Context) -> None:
    """A copy that waits for its source is done if only other things changed: behind it, elsewhere, there and back."""
    ctx.src.fill()

    def there_and_back(on: Stand) -> None:
        protect(on.area.range, PROT_READ)
        protect(on.area.range, PROT_READ | PROT_WRITE)

    changes: dict[str, Callable[[Stand], object]] = {
        "nothing": lambda on: None,
        "the mapping cut behind the page": lambda on: protect(on.area.page(3), PROT_READ),
        "the page behind unmapped": lambda on: unmap(on.area.page(3)),
        "the page behind unregistered": lambda on: on.uffd.unregister(on.area.page(3)),
        "mprotect(2) there and back": there_and_back,
        "read-only": lambda on: protect(on.area.range, PROT_READ),
        "registered again": lambda on: on.uffd.register(on.area.range, on.mode),
        "other memory registered": lambda on: on.uffd.register(ctx.dst.range, WP),
    }
    for what, change in changes.items():
        with promise("CP-32", what), stand(ctx) as on:
            expect_answer(on, copy_while(on, partial(change, on)), what, (DONE,))
            on.uffd.expect_no_message()


@uffd_case(
    "copy-retry-cut-before",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-52", "CP-34"),
    kind=Kind.DETAIL,
)
def test_copy_retry_cut_before(ctx: Context) -> None:
    """A copy whose mapping was cut in front of its page is done there or says EAGAIN, and repeated it is done."""
    ctx.src.fill()
    changes: dict[str, Callable[[Stand], object]] = {
        "mprotect(2) in front": lambda on: protect(on.area.page(0, 2), PROT_READ),
        "the page in front unregistered": lambda on: on.uffd.unregister(on.area.page(1)),
        "the pages in front registered otherwise": lambda on: on.uffd.register(on.area.page(0, 2), MISSING | WP),
        "the pages in front unmapped": lambda on: unmap(on.area.page(0, 2)),
    }
    for what, change in changes.items():
        with promise("CP-52", what), stand(ctx) as on:
            expect_done_or_repeated(on, partial(change, on), what, WHEREVER)


# ---- another mapping at its place ----------------------------------------------------------------------------------


@uffd_case(
    "copy-retry-other-kind",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-34",),
    bugs=(45,),
    kind=Kind.VERSION,
)
def test_copy_retry_other_kind(ctx: Context) -> None:
    """A copy whose page is of another kind of memory meanwhile says EAGAIN, huge pages ENOENT, and goes nowhere.

    Before Linux 7.1 it could go, wholly, to what is there.
    """
    ctx.src.fill()
    for mem in (mem for mem in NOT_HUGETLB if mem.backing is not ctx.mem.backing):
        for where in ("the page", "the whole"):
            with promise("CP-34", f"{mem} memory in place of {where}"), stand(ctx) as on:
                place = on.target if where == "the page" else on.area.range
                expect_done_or_repeated(
                    on, partial(on.put, mem, place), "the copy", (ENOENT,) if ctx.mem.hugetlb else AGAIN, (DONE,)
                )


@uffd_case(
    "copy-retry-other-file",
    mem=FILE_BACKED,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-34",),
    kind=Kind.VERSION,
)
def test_copy_retry_other_file(ctx: Context) -> None:
    """A copy whose page is of another file, or another part of the file, goes nowhere else: EAGAIN.

    Before Linux 7.1, and for huge pages until today, it may go, wholly, to what is there.
    """
    ctx.src.fill()
    twin = {SHMEM: SHMEM_PRIVATE, SHMEM_PRIVATE: SHMEM, HUGETLB: HUGETLB_PRIVATE, HUGETLB_PRIVATE: HUGETLB}[ctx.mem]
    size = ctx.page_size
    changes: dict[str, Callable[[Stand], object]] = {
        "another file": lambda on: on.put(ctx.mem, on.area.range),
        "another file at the page alone": lambda on: on.put(ctx.mem, on.target, offset=TARGET * size),
        "a page further in the file": lambda on: on.put(ctx.mem, on.area.range, on.area.fd, size),
        "a page further, the page alone": lambda on: on.put(ctx.mem, on.target, on.area.fd, 3 * size),
        "private instead of shared, or shared": lambda on: on.put(twin, on.area.range, on.area.fd),
    }
    for what, change in changes.items():
        with promise("CP-34", what), stand(ctx) as on:
            expect_done_or_repeated(on, partial(change, on), what, WHEREVER if ctx.mem.hugetlb else AGAIN, (DONE,))


SAME_OFFSET = Defect(
    id="D-CP-54",
    summary="UFFDIO_COPY that waits for its source does not notice that another part of the same file is mapped at its "
    "place, if the new mapping begins where in the file the old one began: the data go to the wrong page of the file",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4 (before 7.1 of any part and any file)",
    advice="do not map anything over a range while a copy to it is under way",
    shows=r"the page alone, the file's first page: expected EAGAIN, got success",
)


@uffd_case(
    "copy-retry-same-offset",
    mem=(SHMEM, SHMEM_PRIVATE),
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    rows=("CP-54",),
    kind=Kind.DETAIL,
    defect=SAME_OFFSET,
)
def test_copy_retry_same_offset(ctx: Context) -> None:
    """A copy does not go to the first page of a file because a mapping that begins with it is at its place now."""
    ctx.src.fill()
    with promise("CP-54"), stand(ctx) as on:
        answer = copy_while(on, lambda: on.put(ctx.mem, on.target, on.area.fd, 0))
        expect(told(answer), told(EAGAIN), "the page alone, the file's first page")


@uffd_case(
    "copy-retry-same-again",
    mem=FILE_BACKED,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-34",),
    kind=Kind.DETAIL,
)
def test_copy_retry_same_again(ctx: Context) -> None:
    """A copy whose mapping was replaced by one of the same page of the file is done there, or says EAGAIN."""
    ctx.src.fill()

    def anew(on: Stand) -> None:
        fd = os.open(f"/proc/self/fd/{on.area.fd}", os.O_RDWR | os.O_CLOEXEC)
        on.stack.callback(os.close, fd)
        on.put(ctx.mem, on.area.range, fd)
        on.shared = (on.area.fd or -1, TARGET * ctx.page_size) if ctx.mem.shared else None

    changes: dict[str, Callable[[Stand], object]] = {
        "the same mapping": lambda on: on.put(ctx.mem, on.area.range, on.area.fd),
        "the page alone": lambda on: on.put(ctx.mem, on.target, on.area.fd, TARGET * ctx.page_size),
        "opened anew": anew,
    }
    for what, change in changes.items():
        with promise("CP-34", what), stand(ctx) as on:
            expect_done_or_repeated(on, partial(change, on), what, WHEREVER)


@uffd_case(
    "copy-retry-moved",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=6,
    rows=("CP-32", "CP-34"),
    kind=Kind.DETAIL,
)
def test_copy_retry_moved(ctx: Context) -> None:
    """A copy does not follow its mapping to another place: ENOENT, and nothing is at either."""
    ctx.src.fill()
    place = ctx.allocate(PAGES)
    for what, again in ("registered there", MISSING), ("not registered there", UNREGISTERED):
        with promise("CP-32", what), stand(ctx) as on:
            on.shared = None
            expect_answer(on, copy_while(on, partial(move_away, on, place.range, again)), what, (ENOENT,))
            expect(any(Pagemap.have(place.range, PM_PRESENT)), False, "a page is at the new place")


# ---- otherwise registered ------------------------------------------------------------------------------------------


@uffd_case(
    "copy-retry-modes",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-32", "CP-34"),
    kind=Kind.VERSION,
)
def test_copy_retry_modes(ctx: Context) -> None:
    """A copy whose range has other modes meanwhile says EAGAIN; to huge pages, or by older kernels, it may be done."""
    ctx.src.fill()
    modes = [MISSING, WP, MISSING | WP]
    for old in modes:
        for new in modes:
            if old == new:
                continue
            with promise("CP-34", f"{old}, then {new}"), stand(ctx, old) as on:
                answer = copy_while(on, partial(register_anew, on, new))
                expect_answer(on, answer, "the copy", WHEREVER if ctx.mem.hugetlb else AGAIN, (DONE,))
                Pagemap.expect_protected(on.area, (), "after the copy")
                if answer:
                    expect_repeated(on)


@uffd_case(
    "copy-retry-rwp",
    mem=ALL,
    features=SYNC_RWP,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-34", "RW-24"),
    kind=Kind.DETAIL,
)
def test_copy_retry_rwp(ctx: Context) -> None:
    """A copy whose range lost RWP meanwhile, or got it, says EAGAIN, or does it; no page comes protected."""
    ctx.src.fill()
    for old, new in (MISSING, MISSING | RWP), (MISSING | RWP, MISSING), (RWP, RWP | MISSING), (RWP, MISSING):
        with promise("CP-34", f"{old}, then {new}"), stand(ctx, old) as on:
            answer = copy_while(on, partial(register_anew, on, new))
            expect_answer(on, answer, "the copy", WHEREVER if ctx.mem.hugetlb else AGAIN)
            Pagemap.expect_protected(on.area, (), "after the copy")
            if answer:
                expect_repeated(on)
            expect_rwp_free(on.uffd, on.area, TARGET)


@uffd_case(
    "copy-retry-other-handle",
    mem=ALL,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-43", "CP-34"),
    kind=Kind.DETAIL,
)
def test_copy_retry_other_handle(ctx: Context) -> None:
    """A copy whose range another handle has taken over is refused, or done, but wakes nobody of that handle.

    That a handle fills the range of another at all is D-CP-43.
    """
    ctx.src.fill()
    with promise("CP-43"), stand(ctx) as on, Uffd.open(ctx.features) as other, ExitStack() as stack:

        def change() -> None:
            on.uffd.unregister(on.area.range)
            other.register(on.area.range, MISSING)
            stack.enter_context(faulting(other, on.target.start))

        answer = copy_while(on, change)
        expect_answer(on, answer, "the copy", (DONE, EAGAIN, ENOENT, EINVAL))
        other.expect_still_asleep(1)
        on.uffd.expect_no_message()
        if answer:
            other.copy(on.target.start, ctx.src.start, on.target.len)
        else:
            other.wake(on.target)


@uffd_case(
    "copy-retry-truncated",
    mem=FILE_BACKED,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-24", "CP-32"),
    kind=Kind.VERSION,
)
def test_copy_retry_truncated(ctx: Context) -> None:
    """A copy whose file ends in front of its page meanwhile is refused, EFAULT or ENOMEM, and the file stays short.

    A private mapping of huge pages asks the file for nothing.
    """
    ctx.src.fill()
    with promise("CP-24"), stand(ctx) as on:
        fd = on.area.fd or -1
        answer = copy_while(on, lambda: os.ftruncate(fd, ctx.page_size))
        allowed = (EFAULT, ENOMEM, DONE) if ctx.mem is HUGETLB_PRIVATE else (EFAULT, ENOMEM)
        expect_answer(on, answer, "the copy", allowed)
        expect(os.fstat(fd).st_size, ctx.page_size, "size of the file")


# ---- huge pages ----------------------------------------------------------------------------------------------------

NO_SECOND_LOOK = Defect(
    id="D-CP-53",
    summary="UFFDIO_COPY to huge pages that waits for its source does not look again at what is mapped there and how: "
    "with MODE_WP it marks a page as protected in a range without WP, and data go to another file",
    kernels="6.1.192, 6.12.117, 6.18.44, 7.3.4",
    advice="do not unregister, or map anew, a range of huge pages while a copy to it is under way",
    shows=r"copy-retry: expected (EINVAL|EAGAIN or ENOENT), got success|expected PM_UFFD_WP in pagemap on exactly",
)


@uffd_case(
    "copy-retry-hugetlb-mode",
    mem=EACH_HUGETLB,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-53", "CP-05"),
    defect=NO_SECOND_LOOK,
)
def test_copy_retry_hugetlb_mode(ctx: Context) -> None:
    """A copy with MODE_WP to huge pages that are not registered for it any more is refused, and marks nothing."""
    ctx.src.fill()
    with promise("CP-53"), stand(ctx, MISSING | WP) as on:
        answer = copy_while(on, partial(register_anew, on, MISSING), CopyMode.WP)
        expect(told(answer), told(EINVAL), "copy-retry")
        Pagemap.expect_protected(on.area, (), "after the copy")


@uffd_case(
    "copy-retry-hugetlb-file",
    mem=EACH_HUGETLB,
    features=WRITEPROTECT,
    needs=("kernel_faults",),
    pages=4,
    spare_hugepages=2,
    rows=("CP-53", "CP-34"),
    defect=NO_SECOND_LOOK,
)
def test_copy_retry_hugetlb_file(ctx: Context) -> None:
    """A copy to huge pages of one file does not go to another file that is mapped there meanwhile."""
    ctx.src.fill()
    with promise("CP-53"), stand(ctx) as on:
        answer = copy_while(on, lambda: on.put(ctx.mem, on.area.range))
        seen = told(EAGAIN, ENOENT) if answer in (EAGAIN, ENOENT) else told(answer)
        expect(seen, told(EAGAIN, ENOENT), "copy-retry")
