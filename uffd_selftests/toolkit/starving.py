# SPDX-License-Identifier: GPL-2.0-only
"""Requests made when the memory of their process has run out: nothing more can be charged to its memory cgroup.

A child makes them, in a cgroup of its own. Its argument lies in a page whose (minor) fault waits until the cgroup is
exhausted: so the child is in the kernel already, and needs nothing for itself until there is memory again.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from uffd_selftests.abi import uapi
from uffd_selftests.abi.errors import KernelError, errno_name
from uffd_selftests.abi.uapi import PagefaultFlag
from uffd_selftests.machine.cgroup import HugetlbGroup, MemoryGroup
from uffd_selftests.toolkit.access import peek, poke, touch
from uffd_selftests.toolkit.expectations import DEADLINE, Skip, expect
from uffd_selftests.toolkit.handle import KERNEL_FAULTS, MINOR, MINOR_FAULTS, MISSING, Uffd
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    Advice,
    Range,
    advise,
    map_memory,
    mapped,
)
from uffd_selftests.toolkit.processes import Channel, Child
from uffd_selftests.toolkit.refusals import UNTOUCHED

__all__ = [
    "UNKILLABLE",
    "GREED",
    "TRIES",
    "DONE",
    "RELIEVED",
    "UNSEEN_SECONDS",
    "Request",
    "Refusal",
    "own_memory_group",
    "own_hugetlb_group",
    "starved",
    "expect_refused",
]

UNKILLABLE = "-1000"
GREED = 512
"""Pages: more than a processor charges beforehand (MEMCG_CHARGE_BATCH)."""
TRIES = 5
DONE = RELIEVED = b"!"
"""Written into the last byte of the argument's page by the child, and into the one before by its parent."""
UNSEEN_SECONDS = DEADLINE / 10
"""How long a request may take whose end does not show in its argument."""


@dataclass(frozen=True)
class Request:
    """A request of the child; the last word of its argument is the output field, which holds UNTOUCHED."""

    what: str
    uffd: Uffd
    number: int
    arg: ctypes.Structure
    then: Callable[[], object] | None = None
    """What is to be called without memory instead, once the request has been made."""


@dataclass(frozen=True)
class Refusal:
    """What became of a request without memory, and of the same with memory: the name of the errno, or "success"."""

    what: str
    outcome: str
    shows: bool
    """The request has an output field, of which output is what it held."""
    output: int
    later: str


def own_memory_group() -> AbstractContextManager[MemoryGroup]:
    """Have a memory cgroup, empty yet, whose processes end with the block; Skip where there is none to be had."""
    return _own_group(MemoryGroup())


def own_hugetlb_group() -> AbstractContextManager[HugetlbGroup]:
    """Have a cgroup that limits huge pages, in the same way."""
    return _own_group(HugetlbGroup())


G = TypeVar("G", bound=MemoryGroup)


@contextmanager
def _own_group(made: G) -> Iterator[G]:
    with ExitStack() as stack:
        try:
            stack.enter_context(made)
        except OSError as error:
            raise Skip(f"needs a {made.controller} cgroup of its own, as root: {error.strerror}") from None
        yield made


def starved(prepare: Callable[[], list[Request]], spared: Range) -> list[Refusal]:
    """Have a child prepare requests and make each of them without memory, and once more with it.

    All inherited memory is in place before, but for the range that is to be spared.
    Skip where there is no cgroup to be had.
    """
    if "nokmem" in _read("/proc/cmdline"):
        raise Skip("the kernel's own memory is not charged: boot without cgroup.memory=nokmem")
    with ExitStack() as stack:
        group = stack.enter_context(own_memory_group())
        if group.kills and _read("/proc/sys/vm/panic_on_oom").strip() == "2":
            raise Skip("the kernel would panic when the cgroup runs out of memory: sysctl vm.panic_on_oom=1")
        fd = os.memfd_create("argument")
        stack.callback(os.close, fd)
        os.ftruncate(fd, PAGE_SIZE)
        view = stack.enter_context(mapped(PAGE_SIZE, flags=MAP_SHARED, fd=fd))
        letter = stack.enter_context(mapped(PAGE_SIZE, flags=MAP_SHARED, fd=fd))
        child = stack.enter_context(Child(lambda channel: _live(channel, group, letter, prepare, spared)))
        try:
            (number, reason), fds = child.receive_fds()
            if reason:
                raise Skip(reason)
            holder = stack.enter_context(Uffd(fds[0]))
            return [_starve(child, group, holder, view, letter) for _ in range(number)][1:]
        except BaseException:
            if child.ended:
                child.wait()  # if it failed, it says why
            child.kill()
            raise


def _read(path: str) -> str:
    return Path(path).read_text() if os.path.exists(path) else ""


def _starve(child: Child, group: MemoryGroup, holder: Uffd, view: Range, letter: Range) -> Refusal:
    """Let the child make its next request."""
    what, arg, shows, then = child.receive()
    poke(view.start, arg)
    output = Range(view.start + len(arg) - 8, 8)
    before = peek(output.start, output.len)
    child.send()
    holder.wait_fault(letter, PagefaultFlag.MINOR)
    group.exhaust()
    try:
        holder.continue_(letter)
        end = time.monotonic() + (DEADLINE if shows else UNSEEN_SECONDS)
        while time.monotonic() < end and peek(view.end - 1, 1) != DONE:
            if peek(output.start, output.len) != before and not then:
                break
            time.sleep(0.001)
    finally:
        group.relieve()
        poke(view.end - 2, RELIEVED)
    outcome, later = child.receive()
    (last,) = struct.unpack("=q", peek(output.start, output.len))
    return Refusal(what, outcome, shows, last, later)


def _live(
    channel: Channel, group: MemoryGroup, letter: Range, prepare: Callable[[], list[Request]], spared: Range
) -> None:
    """The child's life."""
    try:
        group.join()
        if group.kills:
            Path("/proc/self/oom_score_adj").write_text(UNKILLABLE)
    except OSError as error:
        channel.send((0, f"cannot run out of memory without being killed: {error}: needs CAP_SYS_RESOURCE"))
        return
    try:
        _own_memory(spared)
        requests = [_greedy(), *prepare()]
    except Skip as skip:
        channel.send((0, str(skip)))
        return
    holder = Uffd.open(MINOR_FAULTS, KERNEL_FAULTS)
    touch(letter, PAGE_SIZE)
    holder.register(letter, MINOR)
    channel.send((len(requests), ""), holder.fd)
    for request in requests:
        arg = bytes(request.arg)
        shows = arg.endswith(struct.pack("=q", UNTOUCHED))
        channel.send((request.what, arg, shows, bool(request.then)))
        channel.receive()
        if request.then:
            _outcome(request, letter.start)  # a rehearsal
        advise(letter, Advice.DONTNEED)
        outcome = _outcome(request, letter.start)
        poke(letter.end - 1, DONE)  # a message would need memory
        while peek(letter.end - 2, 1) != RELIEVED:
            os.sched_yield()
        poke(letter.end - 2, bytes(2))
        later = outcome if outcome == "success" else _outcome(request, ctypes.addressof(request.arg))
        channel.send((outcome, later))


def _greedy() -> Request:
    """Return a request that takes all the memory that a processor has in hand, whatever becomes of it.

    What was freed while the others were prepared comes back late, charged still, and would serve the first of them.
    """
    where = Range(map_memory(GREED * PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS), GREED * PAGE_SIZE)
    source = Range(map_memory(where.len, flags=MAP_PRIVATE | MAP_ANONYMOUS), where.len)
    touch(source, PAGE_SIZE)
    uffd = Uffd.open()
    uffd.register(where, MISSING)
    return Request("", uffd, uapi.UFFDIO_COPY, uapi.uffdio_copy(where.start, source.start, where.len, 0, UNTOUCHED))


def _own_memory(spared: Range) -> None:
    """Have every page of its own that this process inherited, so that it needs no memory for a while."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, permissions, *_ = line.split()
        start, end = (int(address, 16) for address in addresses.split("-"))
        if permissions == "rw-p" and not (start < spared.end and spared.start < end):
            with suppress(OSError, Skip):  # before Linux 5.14
                advise(Range(start, end - start), Advice.POPULATE_WRITE)


def _outcome(request: Request, address: int) -> str:
    try:
        request.uffd.raw_ioctl(request.number, address)
        if request.then:
            request.then()
    except KernelError as error:
        return errno_name(error.errno or 0)
    return "success"


def expect_refused(prepare: Callable[[], list[Request]], spared: Range) -> None:
    """Assert that requests without memory fail with ENOMEM, in errno and output field, and go through with memory.

    One may go through at once now and then: a processor has some memory in hand that is charged already.
    """
    open_requests: set[str] = set()
    for attempt in range(TRIES):
        refusals = starved(prepare, spared)
        if not attempt:
            open_requests = {refusal.what for refusal in refusals}
        for refusal in refusals:
            if refusal.outcome == "success":
                continue
            expect(refusal.outcome, "ENOMEM", f"{refusal.what}: errno without memory")
            if refusal.shows:
                expect(errno_name(refusal.output), "-ENOMEM", f"{refusal.what}: output field without memory")
            expect(refusal.later, "success", f"{refusal.what}: once there is memory again")
            open_requests.discard(refusal.what)
        if not open_requests:
            return
    lucky = ", ".join(sorted(open_requests))
    raise AssertionError(f"expected ENOMEM without memory; {TRIES} times there was success: {lucky}")
