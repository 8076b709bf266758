# SPDX-License-Identifier: GPL-2.0-only
"""Pages bounced between two areas while threads race for them; every bounce is judged page by page.

It stands where uffd-stress.c stands upstream.  The threads are native (native/stress.h): workers touch pages, handlers
answer their faults, copiers fill pages on their own.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import IntEnum
from typing import Any

from uffd_selftests.abi import uapi
from uffd_selftests.abi.errors import errno_name
from uffd_selftests.abi.native import ffi, lib
from uffd_selftests.abi.uapi import PM_PRESENT, PM_UFFD_WP, Feature, PagefaultFlag, RegisterMode
from uffd_selftests.mem_types import HUGETLB_PRIVATE, SHMEM_PRIVATE, Area, Backing
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import DEADLINE, Skip
from uffd_selftests.toolkit.handle import DEFAULT_FLAGS, MISSING, RWP, WP, Uffd
from uffd_selftests.toolkit.memory import Advice, Range, drops_hugepages
from uffd_selftests.toolkit.pagemap import Pagemap, page_numbers, shows_uffd_wp

UNITS = max(2, min(len(os.sched_getaffinity(0)), 16))
"""Threads of each of the three kinds; upstream has one of each a CPU."""

SPARE_HUGEPAGES = 2 * UNITS
"""Everybody who copies, handlers and copiers, may hold a new huge page before finding that there is one already."""

RWP_FEATURES = Feature.RWP | Feature.RWP_ASYNC
WP_FEATURES = Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM | Feature.WP_UNPOPULATED


class Sabotage(IntEnum):
    """What a handler breaks on purpose, once in a bounce: see enum stress_sabotage."""

    SOUND = lib.STRESS_SOUND
    FILL_TWICE = lib.STRESS_FILL_TWICE
    DROP_FAULT = lib.STRESS_DROP_FAULT
    DROP_WP_FAULT = lib.STRESS_DROP_WP_FAULT
    SKIP_WAKE = lib.STRESS_SKIP_WAKE
    WRONG_PAGE = lib.STRESS_WRONG_PAGE
    TORN_PAGE = lib.STRESS_TORN_PAGE
    OLD_PAGE = lib.STRESS_OLD_PAGE
    UNPROTECTED = lib.STRESS_UNPROTECTED
    FILL_UNSEEN = lib.STRESS_FILL_UNSEEN
    SKIP_PROTECT = lib.STRESS_SKIP_PROTECT


class Protection(IntEnum):
    """How pages are protected against all accesses in a bounce, if at all: see enum stress_rwp."""

    NONE = lib.STRESS_NO_RWP
    SYNC = lib.STRESS_RWP_SYNC
    ASYNC = lib.STRESS_RWP_ASYNC
    SWITCHING = lib.STRESS_RWP_SWITCHING


IN_TURN = (Protection.SYNC, Protection.ASYNC, Protection.SWITCHING)
"""What the bounces of a run with read-write protection do, one after the other."""


# ---- options -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mode:
    """How one bounce goes; upstream's names."""

    random: bool
    """Workers draw their pages; else they go through them in order."""
    racing: bool
    """All workers go for the same pages at the same time."""
    verify: bool
    """Every byte is compared after the bounce; else what is wrong must show in later ones."""

    @classmethod
    def of(cls, number: int) -> Mode:
        """Return the mode of a bounce: eight in a row have each combination once."""
        return cls(bool(number & 1), bool(number & 2), bool(number & 4))

    def __str__(self) -> str:
        return " ".join(name for name in ("random", "racing", "verify") if getattr(self, name)) or "in order"


@dataclass(frozen=True)
class Options:
    """How long and with which seed; the harness hands them on in the environment."""

    bounces: int = 8
    seed: int = 1
    duration: float = 0.0
    """Seconds; 0: bounces count."""
    progress: bool = False
    """Show on stderr, a terminal, how far it is."""
    log: str = ""
    """The path of a file in which each bounce leaves a line."""

    @classmethod
    def of_environment(cls) -> Options:
        """Return what UFFD_STRESS_*, UFFD_DURATION and UFFD_PROGRESS say."""
        get = os.environ.get
        return cls(
            int(get("UFFD_STRESS_BOUNCES") or cls.bounces),
            int(get("UFFD_STRESS_SEED") or cls.seed),
            float(get("UFFD_DURATION") or 0),
            bool(get("UFFD_PROGRESS")) and sys.stderr.isatty(),
            get("UFFD_STRESS_LOG") or "",
        )

    def modes(self) -> Iterator[Mode]:
        """Yield the mode of one bounce after the other; the last one verifies."""
        if self.duration:
            end = time.monotonic() + self.duration
            numbers: Iterator[int] = itertools.takewhile(lambda _: time.monotonic() < end, itertools.count())
        else:
            numbers = iter(range(self.bounces - 1))
        number = -1
        for number in numbers:
            yield Mode.of(number)
        yield replace(Mode.of(number + 1), verify=True)


# ---- one bounce ----------------------------------------------------------------------------------------------------

ROLES = ("worker", "handler", "copier")
COUNTERS = ("accesses", "missing", "wp", "filled", "eexist", "unprotected", "repeated")
BY_PAGE = (
    *("missing", "answered", "filled", "written_late"),
    *("wp_faults", "unprotecting", "unprotected", "settled"),
    *("touches", "touched_before", "unprotected_before"),
)
"""The arrays of struct stress_config that hold a number a page."""


@dataclass
class Threads:
    """What the threads of one kind have done, in native order."""

    role: str
    counters: dict[str, list[int]]

    def total(self, counter: str) -> int:
        """Return the sum over the threads."""
        return sum(self.counters[counter])

    def __str__(self) -> str:
        shown = [f"{name} {self.total(name)} ({'+'.join(map(str, parts))})" for name, parts in self.counters.items()
                 if any(parts)]  # fmt: skip
        return f"{self.role}s: {', '.join(shown) or 'nothing'}"


class StressError(AssertionError):
    """A bounce went wrong; the text names the pages, what they should be and what they are."""


class Stress:
    """Bounces the pages of a context, there and back.

    ``blocking`` handlers sleep in read(2), others in poll(2).  With ``rwp`` pages are protected against all accesses,
    in each way of IN_TURN; else against writes, if the kernel has that for this memory (as upstream).  ``patience`` is
    how many seconds may pass without any progress; after that the bounce is given up and says who sleeps where.
    """

    def __init__(
        self,
        ctx: Context,
        *,
        blocking: bool = False,
        rwp: bool = False,
        seed: int = 1,
        patience: float = DEADLINE,
        sabotage: Sabotage = Sabotage.SOUND,
        sabotage_at: int = 0,
    ) -> None:
        self._areas = [ctx.src, ctx.dst]
        self._hugetlb = ctx.mem.hugetlb
        self.nr_pages = ctx.nr_pages
        self.seed = seed
        self.bounces = 0
        """How many are done."""
        self.faults = 0
        """Messages read in all of them."""
        self.threads: list[Threads] = []
        """Of the last bounce."""
        self._random = random.Random(seed)
        self._live = ffi.new("uint64_t[]", [1] * self.nr_pages)
        self._ledger = ffi.new("uint64_t[]", [1] * self.nr_pages)
        self._by_page = {name: ffi.new("uint32_t[]", self.nr_pages) for name in BY_PAGE}
        self.units = min(UNITS, self.nr_pages)
        self._threads = ffi.new("struct stress_thread[]", lib.STRESS_ROLES * self.units)
        self.rwp = rwp
        self._uffd = ctx.uffd = self._open(ctx, blocking, rwp)
        self.wp = self._uffd.features & Feature.PAGEFAULT_FLAG_WP != Feature(0)
        """Whether pages are write-protected."""
        self._mode = MISSING | (RWP if rwp else WP if self.wp else RegisterMode(0))
        if ctx.mem is HUGETLB_PRIVATE and not drops_hugepages():
            raise Skip("kernel cannot drop huge pages (Linux 5.18)")
        self._config = ffi.new(
            "struct stress_config *",
            {
                "uffd": self._uffd.fd,
                "blocking": blocking,
                "wp": self.wp,
                "private_file": ctx.mem is SHMEM_PRIVATE,
                "drop": Advice.REMOVE if ctx.mem.shared else Advice.DONTNEED,
                "page_size": ctx.page_size,
                "nr_pages": self.nr_pages,
                "units": self.units,
                "seed": self._random.getrandbits(64),
                "patience": round(patience * 1e9),
                "sabotage": int(sabotage),
                "sabotage_at": sabotage_at,
                "live": self._live,
                "ledger": self._ledger,
                "threads": self._threads,
                **self._by_page,
            },
        )
        lib.stress_fill(self._config, ctx.src.start)

    @staticmethod
    def _open(ctx: Context, blocking: bool, rwp: bool) -> Uffd:
        """Open a handle with what protects pages."""
        wanted = RWP_FEATURES
        if not rwp:
            with Uffd.open() as probe:
                wanted = probe.offered & WP_FEATURES
            anon = ctx.mem.backing is Backing.ANON
            if not wanted & (Feature.PAGEFAULT_FLAG_WP if anon else Feature.WP_HUGETLBFS_SHMEM):
                wanted = Feature(0)
        return Uffd.open(wanted, DEFAULT_FLAGS & ~os.O_NONBLOCK if blocking else DEFAULT_FLAGS)

    def bounce(self, mode: Mode) -> None:
        """Bring every page from one area to the other; raises StressError that names what went wrong."""
        src, dst = self._areas
        registered = [dst.range, dst.alias] if dst.mem.shared else [dst.range]
        for where in registered:
            self._uffd.register(where, self._mode)
        empty(dst)
        protection = IN_TURN[self.bounces % len(IN_TURN)] if self.rwp else Protection.NONE
        if self.rwp:
            self._set_async(protection is Protection.ASYNC)
        self._config.rwp = int(protection)
        written_out = pages_written_out()
        failure = self._run(src, dst, registered, mode)
        problem = self._describe(failure) if failure else ""
        if not problem:
            problem = "; ".join(self._judge(dst, reclaimed=pages_written_out() != written_out))
        if self.wp and not failure:
            self._uffd.unprotect(dst.range)
        if self.rwp and not problem:
            problem = self._verify_tracking(dst) if mode.verify else ""
            self._uffd.resolve(dst.range)
        for where in registered:
            self._uffd.unregister(where)
        if not problem and mode.verify:
            problem = self._verify(dst)
        if problem:
            raise StressError("\n".join([
                f"bounce {self.bounces} ({mode}{f', {protection.name.lower()}' if self.rwp else ''}): {problem}",
                *map(str, self.threads),
                f"again: --stress-seed {self.seed}",
            ]))  # fmt: skip
        self.bounces += 1
        self.faults += self._threads_of("handler").total("missing") + self._threads_of("handler").total("wp")
        self._areas = [dst, src]

    def _run(self, src: Area, dst: Area, registered: list[Range], mode: Mode) -> Any:
        """Let the threads loose; return the native failure, or None."""
        for values in (*self._by_page.values(), self._threads):
            ffi.buffer(values)[:] = bytes(ffi.sizeof(values))
        config = self._config
        config.src, config.dst = src.start, dst.start
        config.alias = registered[1].start if len(registered) > 1 else 0
        config.random, config.racing = mode.random, mode.racing
        config.draw = self._random.getrandbits(64)
        failure = ffi.new("struct stress_failure *")
        failed = lib.stress_bounce(config, failure)
        self.threads = [
            Threads(role, {
                name: [int(getattr(self._threads[number * self.units + unit], name)) for unit in range(self.units)]
                for name in COUNTERS
            })
            for number, role in enumerate(ROLES)
        ]  # fmt: skip
        return failure if failed else None

    def _threads_of(self, role: str) -> Threads:
        return self.threads[ROLES.index(role)]

    # -- what must hold after a bounce

    def _judge(self, dst: Area, *, reclaimed: bool) -> Iterator[str]:
        """Yield what does not add up; ``reclaimed`` says that pages were written to swap meanwhile."""
        pages = {name: array("I", bytes(ffi.buffer(values))) for name, values in self._by_page.items()}
        yield from differing("times filled", array("I", [1]) * self.nr_pages, pages["filled"])
        yield from differing("missing faults answered", pages["missing"], pages["answered"])
        yield from differing(f"{self._fault} faults answered", pages["wp_faults"], pages["unprotected"])
        counts = (array("Q", bytes(ffi.buffer(values))) for values in (self._ledger, self._live))
        yield from differing("accesses counted by the threads, and beside the page", *counts)
        if self.wp:
            yield from misprotected(dst, pages["unprotected"], pages["written_late"])
        if self.rwp:
            sync = self._config.rwp == Protection.SYNC and not reclaimed
            yield from misaccessed(dst, pages, sync=sync)
        yield from unbalanced(self.nr_pages, *self.threads)
        handlers = self._threads_of("handler")
        if not handlers.total("missing") or (self.wp and not handlers.total("wp")):
            yield "expected at least one fault of each kind"
        info = self._uffd.fdinfo
        if (info.pending, info.total) != (0, 0):
            yield f"faults that nobody waits for any more (fdinfo): pending {info.pending}, total {info.total}"

    def _set_async(self, wanted: bool) -> None:
        """Have accesses to protected pages go on by themselves, or be reported."""
        if wanted:
            self._uffd.set_mode(enable=Feature.RWP_ASYNC)
        else:
            self._uffd.set_mode(disable=Feature.RWP_ASYNC)

    def _verify_tracking(self, dst: Area) -> str:
        """Protect all pages, read every byte, asynchronously, and return what is wrong with bytes or protection."""
        self._set_async(True)
        self._uffd.rwprotect(dst.range)
        present, marks = (Pagemap.have(dst.range, bit, dst.page_size) for bit in (PM_PRESENT, PM_UFFD_WP))
        if bare := [page for page, mark in enumerate(marks) if not mark and present[page]]:
            return f"not protected after UFFDIO_RWPROTECT (PM_UFFD_WP in pagemap): pages {page_numbers(bare)}"
        if problem := self._verify(dst):
            return problem
        marks = Pagemap.have(dst.range, PM_UFFD_WP, dst.page_size)
        if kept := [page for page, mark in enumerate(marks) if mark]:
            return f"still protected, though read since (PM_UFFD_WP in pagemap): pages {page_numbers(kept)}"
        return ""

    def _verify(self, dst: Area) -> str:
        """Compare every byte with what it must be; return what is wrong."""
        wrong, failure = ffi.new("uint8_t[]", self.nr_pages), ffi.new("struct stress_failure *")
        if not lib.stress_verify(self._config, dst.start, wrong, failure):
            return ""
        pages = [page for page in range(self.nr_pages) if wrong[page]]
        return f"{self._describe_word(failure)}; wrong pages: {page_numbers(pages)}"

    # -- what to say

    @property
    def _fault(self) -> str:
        """What faults of a protection are called."""
        return "read-write-protect" if self.rwp else "write-protect"

    def _describe(self, failure: Any) -> str:
        """Say what a thread met."""
        who = f"{ROLES[failure.role]} {failure.thread}"
        call = uapi.IOCTL_NAMES.get(failure.request, "madvise of the source")
        error = errno_name(failure.err) if failure.err else "success"
        match failure.kind:
            case lib.STRESS_WORD:
                return f"{who}: {self._describe_word(failure)}"
            case lib.STRESS_IOCTL:
                wanted = "success" if failure.expected in (0, self._config.page_size) else "EEXIST"
                output = f" with output {errno_name(failure.output)}" if failure.output else ""
                return f"{who}: {call} of page {failure.page}: expected {wanted}, got {error}{output}"
            case lib.STRESS_UNSEEN:
                seen = f"{failure.observed} of {failure.expected} write-protect faults answered before"
                return f"{who}: page {failure.page}: written, though protected ({seen})"
            case lib.STRESS_FLAGS:
                flags = PagefaultFlag(failure.observed)
                return f"{who}: page {failure.page}: page fault with flags {flags}, though its first access is a read"
            case lib.STRESS_EVENT:
                return f"{who}: message of the unknown kind {failure.observed:#x}"
            case lib.STRESS_OUTSIDE:
                return f"{who}: page fault at {failure.observed:#x}, outside the area"
            case lib.STRESS_READ:
                return f"{who}: poll or read of the userfaultfd: {error}, result {failure.observed:#x}"
            case lib.STRESS_STUCK:
                return f"{who}: {self._describe_stuck(failure)}"
            case _:
                return f"{who} cannot be started: {error}: fewer threads, or more memory, are needed"

    def _describe_word(self, failure: Any) -> str:
        """Say which word of which page is wrong, and what it looks like."""
        last = self._config.page_size // 8 - 1
        place = f"page {failure.page} byte {failure.place * 8:#x}"
        if failure.place in (1, last):
            what = "zero" if not failure.observed else f"{failure.observed}"
            return f"{place}: expected a count of {failure.expected} accesses, got {what}"
        return f"{place}: expected {failure.expected:#018x}, got {self._word(failure)}"

    def _word(self, failure: Any) -> str:
        if not failure.observed:
            return "zero: the page is not filled to its end"
        odd = 0x9E37_79B9_7F4A_7C15
        page = ((failure.observed - failure.place) * pow(odd, -1, 1 << 64) - self._config.seed) % (1 << 64)
        return f"{failure.observed:#018x}" + (f", which is of page {page}" if page < self.nr_pages else "")

    def _describe_stuck(self, failure: Any) -> str:
        """Say who sleeps where, and what is known of that page."""
        by_page = {name: values[failure.page] for name, values in self._by_page.items()}
        known = (
            f"filled {by_page['filled']} times, missing faults {by_page['missing']}, answered {by_page['answered']}, "
            f"{self._fault} faults {by_page['wp_faults']}, answered {by_page['unprotected']}"
        )
        if self._hugetlb and by_page["answered"] and not by_page["filled"]:
            known += "; EEXIST of a page that nobody filled: the huge pages have run out (D-CP-28)"
        seconds = self._config.patience / 1e9
        match failure.place:
            case lib.STRESS_READING:
                doing = f"sleeps in its first read of page {failure.page}"
            case lib.STRESS_WRITING:
                doing = f"sleeps in a write to page {failure.page}"
            case lib.STRESS_COPYING:
                doing = f"does not come back from UFFDIO_COPY of page {failure.page}"
            case lib.STRESS_PROTECTING:
                request = "UFFDIO_RWPROTECT" if self.rwp else "UFFDIO_WRITEPROTECT"
                doing = f"does not come back from {request} from page {failure.page} on"
            case _:
                return f"nothing has moved for {seconds:g} seconds"
        return f"{doing}, and nothing has moved for {seconds:g} seconds: {known}"


# ---- what the cases are made of -------------------------------------------------------------------------------------


def empty(area: Area) -> None:
    """Make every page of an area missing; in private memory of a file, take it out of the file, too.

    The file got pages when the private mapping was read or first written, and what a file has is not missing.
    """
    area.release()
    if area.mem is SHMEM_PRIVATE and area.fd is not None:
        os.ftruncate(area.fd, 0)
        os.ftruncate(area.fd, area.range.len)


def differing(what: str, expected: array[int], got: array[int]) -> Iterator[str]:
    """Yield a message if two arrays with a number a page differ."""
    wrong = [page for page, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1]]
    if wrong:
        first = wrong[0]
        values = f"page {first}: expected {expected[first]}, got {got[first]}"
        yield f"{what}: {values}; wrong pages: {page_numbers(wrong)}"


def misprotected(area: Area, unprotected: array[int], written_late: array[int]) -> Iterator[str]:
    """Yield a message if pagemap does not show a page as it must, all of which were filled protected.

    What no fault made un-protected is protected still; what was written after its last protection is not.
    """
    if not os.path.exists("/proc/self/pagemap") or not shows_uffd_wp():
        return
    marks = Pagemap.have(area.range, PM_UFFD_WP, area.page_size)
    lost = [page for page, mark in enumerate(marks) if not mark and not unprotected[page]]
    if lost:
        yield f"protection lost without a write-protect fault (PM_UFFD_WP in pagemap): pages {page_numbers(lost)}"
    kept = [page for page, mark in enumerate(marks) if mark and written_late[page]]
    if kept:
        yield f"still protected, though written since (PM_UFFD_WP in pagemap): pages {page_numbers(kept)}"


def misaccessed(area: Area, pages: dict[str, array[int]], *, sync: bool) -> Iterator[str]:
    """Yield a message if pages are not protected against accesses as they must be.

    Those that were there at the last protection are protected unless somebody has accessed them since, and then they
    are not; ``sync``: somebody must have un-protected them before. What is not in the page table shows nothing.

    A handler un-protects a page without an access, too: one that a wake for other reasons sent through its fault once
    more leaves a second message behind.
    """
    if not os.path.exists("/proc/self/pagemap"):
        return
    present, marks = (Pagemap.have(area.range, bit, area.page_size) for bit in (PM_PRESENT, PM_UFFD_WP))
    lost, kept, unseen = [], [], []
    for page, before in enumerate(pages["touched_before"]):
        late = pages["written_late"][page]
        resolved = pages["unprotected"][page] != pages["unprotected_before"][page]
        if late and marks[page]:
            kept.append(page)
        elif before and present[page] and not marks[page] and pages["touches"][page] == before - 1 and not resolved:
            lost.append(page)
        elif before and late and sync and not resolved:
            unseen.append(page)
    for what, wrong in (
        ("protection lost without an access", lost),
        ("still protected, though accessed since", kept),
        ("accessed, though protected: without a fault answered before", unseen),
    ):
        if wrong:
            yield f"{what} (PM_UFFD_WP in pagemap): pages {page_numbers(wrong)}"


def pages_written_out() -> int:
    """Return how many pages the kernel has written to swap since it was booted (pswpout of /proc/vmstat)."""
    with open("/proc/vmstat") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("pswpout ")), 0)


def unbalanced(nr_pages: int, _workers: Threads, handlers: Threads, copiers: Threads) -> Iterator[str]:
    """Yield a message for each sum that does not agree with what others have counted."""
    missing = handlers.total("filled") + handlers.total("eexist")
    copies = copiers.total("filled") + copiers.total("eexist")
    for what, expected, got in (
        ("pages filled by handlers and copiers", nr_pages, handlers.total("filled") + copiers.total("filled")),
        ("pages that copiers filled or found filled", nr_pages, copies),
        ("pages that copiers found filled (EEXIST)", handlers.total("filled"), copiers.total("eexist")),
        ("missing faults, filled or found filled (EEXIST)", handlers.total("missing"), missing),
        ("faults of a protection, un-protected", handlers.total("wp"), handlers.total("unprotected")),
    ):
        if expected != got:
            yield f"{what}: expected {expected}, got {got}"


class Watch:
    """Tells how far a run is: on stderr, if that is a terminal, and in a file; seldom in a run that lasts."""

    INTERVAL = 0.5
    """Seconds between two lines about a run that lasts."""

    def __init__(self, name: str, options: Options) -> None:
        self._name = name
        self._options = options
        self._started = self._told = time.monotonic()

    def tell(self, stress: Stress, mode: Mode) -> None:
        """Tell of the bounce that has just ended, if it is time to."""
        now = time.monotonic()
        if self._options.duration and now - self._told < self.INTERVAL:
            return
        self._told = now
        bounce = f"bounce {stress.bounces - 1} ({mode})"
        if self._options.log:
            parts = "; ".join(map(str, stress.threads))
            with open(self._options.log, "a") as log:
                log.write(f"{self._name}, seed {stress.seed}, {bounce}: {parts}\n")
        if self._options.progress and self._options.duration:
            done, goal = (timedelta(seconds=int(part)) for part in (now - self._started, self._options.duration))
            self._show(f"{self._name}: {done} of {goal}, {stress.faults} faults, {bounce}")

    @staticmethod
    def _show(text: str) -> None:
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0 where nobody knows
        sys.stderr.write(f"\r\033[K{text[: width - 1]}")
        sys.stderr.flush()


def run(ctx: Context, name: str, options: Options, *, blocking: bool, rwp: bool = False) -> Stress:
    """Bounce as often or as long as the options say; the last bounce is verified."""
    stress = Stress(ctx, blocking=blocking, rwp=rwp, seed=options.seed)
    watch = Watch(name, options)
    for mode in options.modes():
        stress.bounce(mode)
        watch.tell(stress, mode)
    return stress
