# SPDX-License-Identifier: GPL-2.0-only
"""What the probe asks: things that kernels do differently, with no feature bit to tell them by."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from ctypes import addressof, c_uint64
from dataclasses import dataclass
from errno import EAGAIN, EINVAL

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.errors import KernelError, errno_name
from uffd_selftests.abi.uapi import Feature, PageCategory, RegisterMode
from uffd_selftests.mem_types import ANON, SHMEM, default_hugepage_size, pmd_size
from uffd_selftests.probe.categories import CATEGORIES
from uffd_selftests.probe.trials import WP_ASYNC, Stage, Trial
from uffd_selftests.toolkit.expectations import Skip
from uffd_selftests.toolkit.faulting import copy_held, unread_event
from uffd_selftests.toolkit.files import stored_bytes
from uffd_selftests.toolkit.handle import MINOR, MISSING, WP, Uffd
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_SHARED,
    PAGE_SIZE,
    Advice,
    Range,
    advise,
    map_memory,
    new_mapping,
    remap,
    unmap,
)
from uffd_selftests.toolkit.messages import Remapped
from uffd_selftests.toolkit.pagemap import Pagemap
from uffd_selftests.toolkit.refusals import UffdError
from uffd_selftests.toolkit.registered import expect_modes, in_modes
from uffd_selftests.toolkit.smaps import smaps_fields
from uffd_selftests.toolkit.sysv import SHM_HUGETLB, sysv_segment
from uffd_selftests.toolkit.threads import Waiter

MAP_DROPPABLE = 0x08  # include/uapi/linux/mman.h, Linux 6.11

ACCEPTED = "succeeds"


@dataclass(frozen=True)
class Question:
    """Something that kernels do differently, with no feature bit to tell by; the stage is one of anonymous memory."""

    key: str
    text: str
    trial: Trial
    """Its body returns the answer."""


def copy_onto_present(on: Stage) -> str:
    """Fill a page that is there: two handlers that race expect EEXIST."""
    on.resolve()
    return _answer(on.resolve)


def zeropage_with_unread_event(on: Stage) -> str:
    """Before Linux 6.15 the output field was left alone, and could not be told from progress."""
    with unread_event(on.uffd, on.dst.range):
        return _answer(lambda: on.uffd.zeropage(on.dst.range))


def wp_of_hole(on: Stage) -> str:
    """Without WP_UNPOPULATED, protecting a page that is not there is no error, and has no effect."""
    on.uffd.writeprotect(on.dst.range)
    return "protects" if Pagemap.uffd_wp(on.dst.start) else "has no effect"


def scan_of_dropped(on: Stage) -> str:
    """Until July 2026, PAGEMAP_SCAN missed it when asked for more than PAGE_IS_WRITTEN."""
    on.dst.fill()
    on.uffd.writeprotect(on.dst.range)
    advise(on.dst.range, Advice.DONTNEED)
    returned = PageCategory.WRITTEN | PageCategory.PRESENT
    found = Pagemap.scan(on.dst.range, PageCategory.WRITTEN, returned=returned).regions
    return "counts as written" if found else "is missed"


def scan_of_unwatched(on: Stage) -> str:
    """Since Linux 7.3, PAGE_IS_WRITTEN is of memory registered for write protection alone."""
    on.src.fill()
    found = Pagemap.scan(on.src.range, PageCategory.WRITTEN).regions
    return "counts as written" if found else "does not count as written"


def scan_of_hole(on: Stage) -> str:
    """Since Linux 7.3, a hole counts as written there, whatever else is asked for; hugetlb's never do."""
    returned = PageCategory.WRITTEN | PageCategory.PRESENT
    found = Pagemap.scan(on.dst.range, PageCategory.WRITTEN, returned=returned).regions
    return "counts as written" if found else "does not count as written"


def scan_categories(on: Stage) -> str:
    """PAGE_IS_GUARD came with Linux 6.15, PAGE_IS_ACCESSED with 7.3; others are EINVAL."""
    known = []
    for category in PageCategory:
        try:
            Pagemap.scan(on.dst.range, category)
        except OSError as error:
            if error.errno != EINVAL:
                raise
        else:
            known.append(category)
    return f"up to {max(known)}" if known else "none"


def wp_after_move(on: Stage) -> str:
    """UFFDIO_MOVE takes a page along, and loses its protection."""
    on.src.fill()
    on.uffd.register(on.src.range, WP)
    on.uffd.writeprotect(on.src.range)
    on.uffd.move(on.dst.start, on.src.start, on.page_size)
    return "is kept" if Pagemap.uffd_wp(on.dst.start) else "is lost"


def register_without_wp(on: Stage) -> str:
    """Until Linux 7.3 this was accepted, and protected pages were left behind."""
    on.dst.fill()
    on.uffd.writeprotect(on.dst.range)
    answer = _answer(lambda: on.uffd.register(on.dst.range, MISSING))
    if answer == ACCEPTED:
        answer += ", the page " + ("stays protected" if Pagemap.uffd_wp(on.dst.start) else "is not protected any more")
    return answer


def unregister_foreign(on: Stage) -> str:
    """Until Linux 6.18 that took the range from its owner."""
    with Uffd.open() as other:
        answer = _answer(lambda: other.unregister(on.dst.range))
    if answer == ACCEPTED:
        expect_modes(on.dst.range, RegisterMode(0))
    return answer


def register_droppable(on: Stage) -> str:
    """In Linux 6.11 to 6.17 the check was of no effect."""
    try:
        where = new_mapping(PAGE_SIZE, MAP_DROPPABLE | MAP_ANONYMOUS)
    except KernelError as error:
        raise Skip(f"mmap(MAP_DROPPABLE): {errno_name(error.errno or 0)} (Linux 6.11)") from None
    return _answer(lambda: on.uffd.register(where, MISSING))


def register_sysv_hugetlb(on: Stage) -> str:
    """Since Linux 7.1 it is refused, by oversight."""
    with contextlib.suppress(Skip), sysv_segment(default_hugepage_size(), SHM_HUGETLB) as where:
        return _answer(lambda: on.uffd.register(where, MISSING))
    raise Skip("no huge page to be had by shmget(2)")


def copy_onto_guard(on: Stage) -> str:
    """A guard page of MADV_GUARD_INSTALL was overwritten by Linux 6.18; 7.3 says EEXIST."""
    on.src.fill()
    try:
        advise(on.dst.range, Advice.GUARD_INSTALL)
    except KernelError as error:
        raise Skip(f"MADV_GUARD_INSTALL: {errno_name(error.errno or 0)} (Linux 6.13)") from None
    return _answer(on.resolve)


@contextlib.contextmanager
def beyond_end(on: Stage, mode: RegisterMode) -> Iterator[Range]:
    """Have a page of shared memory registered that lies behind the end of its file."""
    on.src.fill()
    with contextlib.closing(SHMEM.allocate(2)) as area:
        on.uffd.register(area.range, mode)
        os.ftruncate(area.fd or -1, PAGE_SIZE)
        yield area.page(1)


def copy_beyond_end(on: Stage) -> str:
    """EFAULT until Linux 7.0, ENOMEM since."""
    with beyond_end(on, MISSING) as page:
        return _answer(lambda: on.uffd.copy(page.start, on.src.start, PAGE_SIZE))


def continue_beyond_end(on: Stage) -> str:
    """EINVAL until Linux 7.0, EFAULT since."""
    with beyond_end(on, MINOR) as page:
        return _answer(lambda: on.uffd.continue_(page))


def copy_overtaken(on: Stage) -> str:
    """Until Linux 7.1 the data went to whatever was mapped there when the source was."""
    answers: list[str] = []

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except UffdError as error:
            answers.append(_said(error))
        else:
            answers.append("goes to what is mapped there now")

    on.src.fill()
    with (
        contextlib.closing(SHMEM.allocate(1)) as other,
        copy_held(on.uffd, on.dst.start, on.src.range, outcome=noted()),
    ):
        map_memory(PAGE_SIZE, at=on.dst.start, flags=MAP_SHARED | MAP_FIXED, fd=other.fd or -1)
        on.uffd.register(on.dst.range, MISSING)
    return answers[0]


def remap_several(on: Stage) -> str:
    """EFAULT until Linux 6.17; since then mappings of no handle are moved together, and one of a handle stops it."""
    with contextlib.closing(ANON.allocate(3)) as area, contextlib.closing(ANON.allocate(3)) as place:
        on.uffd.register(area.page(2), MISSING)
        try:
            remap(area.range, to=place.start)
        except KernelError as error:
            first = bool(list(smaps_fields(area.page(0))))
            rest = "moves none" if first else "moves those before the registered one"
            return f"{errno_name(error.errno or 0)}, {rest}"
        return "moves all"


def remap_shrunk(on: Stage) -> str:
    """The original length until Linux 6.17, the new one since."""
    with contextlib.closing(ANON.allocate(2)) as area, contextlib.closing(ANON.allocate(2)) as place:
        on.uffd.register(area.range, MISSING)
        with Waiter(lambda: remap(area.range, PAGE_SIZE, to=place.start)):
            message = on.uffd.wait("UFFD_EVENT_REMAP")
    if not isinstance(message, Remapped):
        raise AssertionError(f"expected UFFD_EVENT_REMAP, got {message}")
    return "the original one" if message.len == 2 * PAGE_SIZE else "the new one"


def moved_beside(on: Stage) -> str:
    """Older kernels put both together, and then the neighbour was not registered any more."""
    with contextlib.closing(ANON.allocate(2)) as area, contextlib.closing(ANON.allocate(2)) as place:
        unmap(area.page(1))
        on.uffd.register(area.page(0), MISSING)
        on.uffd.register(place.page(1), MISSING)
        remap(place.page(1), to=area.page(1).start)
        return "stays registered" if in_modes(area.page(0)) else "loses its registration"


def process_madvise_own(on: Stage) -> str:
    """EINVAL until Linux 6.13, and then an event for each range."""
    own = syscalls.call("pidfd_open", os.getpid(), 0)
    vector = (c_uint64 * 2)(on.dst.start, on.page_size)
    with on.watched() as handler:
        try:
            syscalls.call("process_madvise", own, addressof(vector), 1, int(Advice.DONTNEED), 0)
        except KernelError as error:
            return errno_name(error.errno or 0)
        finally:
            os.close(own)
    return f"drops them, with {handler.stats.remove} UFFD_EVENT_REMOVE"


def shmem_huge(on: Stage) -> str:
    """A write through the file makes a whole huge page present; who watches a mapping of it is not told of the rest."""
    on.src.fill()
    size = pmd_size()
    if not size:
        raise Skip("no transparent huge pages")
    try:
        root = syscalls.mount_nowhere("tmpfs", huge="always", size=str(2 * size))
    except KernelError as error:
        raise Skip(f"tmpfs of one's own, huge=always: {errno_name(error.errno or 0)}") from None
    fd = os.open("file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=root)
    os.close(root)
    os.ftruncate(fd, size)
    os.pwrite(fd, b"\1", 0)
    stored = stored_bytes(fd)
    os.close(fd)
    pages = stored // PAGE_SIZE
    return f"makes {pages} pages present, of which nobody is told" if pages > 1 else "makes that page present"


def eagain(on: Stage) -> str:
    """It ends when the call behind the event is over, not when the event is read, and nothing is readable then."""
    on.src.fill()
    with unread_event(on.uffd, on.dst.range):
        try:
            on.resolve()
        except UffdError as error:
            if error.errno != EAGAIN:
                raise
        else:
            return "succeeds meanwhile"
    told = on.uffd.readable()
    return f"EAGAIN until the call behind it is over; poll(2) {'tells' if told else 'does not tell'}"


def _said(error: UffdError) -> str:
    """Return errno and output field of a request that was refused."""
    return str(error).rpartition("): ")[2]


def _answer(call: Callable[[], object]) -> str:
    """Return what came of a call: the errno and the output field."""
    try:
        call()
    except UffdError as error:
        return _said(error)
    return ACCEPTED


QUESTIONS = (
    Question("copy-onto-present", "UFFDIO_COPY onto a page that is there", Trial("COPY", copy_onto_present)),
    Question(
        "unread-event",
        "UFFDIO_ZEROPAGE while an event is unread",
        Trial("ZEROPAGE", zeropage_with_unread_event, features=Feature.EVENT_REMOVE),
    ),
    Question(
        "wp-of-hole",
        "write protection where no page is, without WP_UNPOPULATED",
        Trial("WRITEPROTECT", wp_of_hole, mode=WP),
    ),
    Question(
        "scan-of-dropped",
        "a page dropped under WP_ASYNC, for PAGEMAP_SCAN",
        Trial("WP_ASYNC", scan_of_dropped, mode=WP, features=WP_ASYNC),
    ),
    Question(
        "scan-of-unwatched",
        "a page that nobody watches, for PAGE_IS_WRITTEN",
        Trial("PAGEMAP_SCAN", scan_of_unwatched, features=Feature.WP_ASYNC),
    ),
    Question(
        "scan-of-hole",
        "a hole in memory registered for WP, for PAGE_IS_WRITTEN",
        Trial("PAGEMAP_SCAN", scan_of_hole, mode=WP, features=Feature.WP_ASYNC),
    ),
    Question(
        "scan-categories",
        "the categories of PAGEMAP_SCAN",
        Trial("PAGEMAP_SCAN", scan_categories, features=Feature.WP_ASYNC),
    ),
    Question(
        "wp-after-move",
        "the write protection of a page, after UFFDIO_MOVE",
        Trial("MOVE", wp_after_move, mode=MISSING | WP),
    ),
    Question(
        "register-without-wp",
        "UFFDIO_REGISTER without WP, where WP was",
        Trial("WRITEPROTECT", register_without_wp, mode=WP),
    ),
    Question(
        "unregister-foreign", "UFFDIO_UNREGISTER of another handle's memory", Trial("UNREGISTER", unregister_foreign)
    ),
    Question("register-droppable", "UFFDIO_REGISTER of MAP_DROPPABLE memory", Trial("UNREGISTER", register_droppable)),
    Question(
        "register-sysv-hugetlb",
        "UFFDIO_REGISTER of System V huge pages",
        Trial("UNREGISTER", register_sysv_hugetlb),
    ),
    Question("copy-onto-guard", "UFFDIO_COPY onto a guard page", Trial("COPY", copy_onto_guard)),
    Question("copy-beyond-end", "UFFDIO_COPY beyond the end of a shared file", Trial("COPY", copy_beyond_end)),
    Question(
        "continue-beyond-end",
        "UFFDIO_CONTINUE beyond the end of a shared file",
        Trial("CONTINUE", continue_beyond_end, features=Feature.MINOR_SHMEM),
    ),
    Question(
        "copy-overtaken",
        "UFFDIO_COPY whose mapping is replaced meanwhile",
        Trial("COPY", copy_overtaken, kernel_faults=True),
    ),
    Question("remap-several", "mremap(2) of several mappings, one registered", Trial("EVENT_REMAP", remap_several)),
    Question(
        "remap-shrunk",
        "the length in UFFD_EVENT_REMAP of a mapping that shrinks",
        Trial("EVENT_REMAP", remap_shrunk, features=Feature.EVENT_REMAP),
    ),
    Question(
        "moved-beside",
        "memory beside which its like is moved, without the event",
        Trial("EVENT_REMAP", moved_beside),
    ),
    Question(
        "process-madvise",
        "process_madvise(2) that drops pages of its own process",
        Trial("EVENT_REMOVE", process_madvise_own, features=Feature.EVENT_REMOVE),
    ),
    Question(
        "eagain-ends",
        "UFFDIO_COPY while an event is unread",
        Trial("COPY", eagain, features=Feature.EVENT_REMOVE),
    ),
    Question("shmem-huge", "a byte written to a file of tmpfs with huge=always", Trial("MISSING_SHMEM", shmem_huge)),
    *(
        Question(key, f"PAGEMAP_SCAN for {category}", trial)
        for key, category, trial in CATEGORIES
    ),
)
