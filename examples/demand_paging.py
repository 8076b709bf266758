#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Demand paging in user space: one thread touches memory, another makes each page at the moment it is touched.

This is the program of the manual page userfaultfd(2) in Python, and an introduction to both. Try it:

    .venv/bin/python examples/demand_paging.py 3

The main thread reads a byte in every kilobyte of a region that has no pages. Its first read in a page does not return:
the kernel puts the thread to sleep and a message into the userfaultfd. The handler thread reads the message, copies a
page of letters to where it is wanted, and that wakes the reader. Each page gets the next letter, from A to T and over.

At the end the program shows the answers to two questions that the draft of the manual page left open in 2017: what
poll(2) says of a userfaultfd whose reads may block, and what becomes of a sleeper when the userfaultfd is closed.
"""

from __future__ import annotations

import select
import sys
import threading
from os import O_NONBLOCK

from uffd_selftests.abi.uapi import Feature
from uffd_selftests.toolkit.access import peek, poke
from uffd_selftests.toolkit.faulting import faulting
from uffd_selftests.toolkit.handle import DEFAULT_FLAGS, MISSING, Uffd
from uffd_selftests.toolkit.memory import MAP_ANONYMOUS, MAP_PRIVATE, PAGE_SIZE, Range, mapped
from uffd_selftests.toolkit.messages import Fault

NOWHERE_YET = MAP_PRIVATE | MAP_ANONYMOUS
"""How to map a region of zeroes that has no pages until somebody touches them."""

turn = threading.Lock()
"""Held while a thread prints; the handler lets the main thread go on while it holds it, to be the first to print."""


def events(uffd: Uffd) -> int:
    """Wait in poll(2) until the userfaultfd has something to say, and return what."""
    poller = select.poll()
    poller.register(uffd.fd, select.POLLIN)
    ((_, found),) = poller.poll()
    return found


def told(found: int) -> str:
    """Say which of two events poll(2) has found."""
    return f"POLLIN = {int(bool(found & select.POLLIN))}; POLLERR = {int(bool(found & select.POLLERR))}"


def handle_faults(uffd: Uffd, region: Range) -> None:
    """Serve one fault for each page of the region."""
    with mapped(PAGE_SIZE, flags=NOWHERE_YET) as page:
        for number in range(region.len // PAGE_SIZE):
            found = events(uffd)
            (message,) = uffd.read()
            assert isinstance(message, Fault)
            with turn:
                print("\nfault_handler_thread():")
                print(f"    poll() returns: nready = 1; {told(found)}")
                print(f"    UFFD_EVENT_PAGEFAULT event: flags = {message.flags:x}; address = {message.address:x}")

                # Anybody who has the userfaultfd decides what the memory holds: here a letter, all over the page.
                poke(page.start, bytes([ord("A") + number % 20]) * PAGE_SIZE)

                # The address need not be that of a page (UFFD_FEATURE_EXACT_ADDRESS), what is copied to must be one.
                wanted = message.address // PAGE_SIZE * PAGE_SIZE
                print(f"        (uffdio_copy.copy returned {uffd.copy(wanted, page.start, PAGE_SIZE)})")


def page_on_demand(pages: int, features: Feature) -> None:
    """Read a byte in every kilobyte of a region whose pages another thread makes."""
    with Uffd.open(features) as uffd, mapped(pages * PAGE_SIZE, flags=NOWHERE_YET) as region:
        print(f"Address returned by mmap() = {region.start:#x}")
        uffd.register(region, MISSING)  # from here on a missing page is a message instead of zeroes
        handler = threading.Thread(target=handle_faults, args=(uffd, region))
        handler.start()

        # 0xf, so that faults are not at the beginning of a page. peek() reads without the interpreter's lock: a thread
        # that held it while it sleeps in a fault would stop the one that could wake it.
        for address in range(region.start + 0xF, region.end, 1024):
            letter = peek(address)
            with turn:
                print(f"Read address {address:#x} in main(): {letter.decode()}")
        handler.join()


def what_poll_says() -> None:
    """Poll a userfaultfd that lacks O_NONBLOCK: an error, for a message may be gone before the read that follows."""
    with Uffd.open(flags=DEFAULT_FLAGS & ~O_NONBLOCK) as uffd:
        print(f"\npoll() without O_NONBLOCK returns: nready = 1; {told(events(uffd))}")


def what_close_does() -> None:
    """Close a userfaultfd in whose fault a thread sleeps: it wakes and finds zero, as in any new memory."""
    with mapped(PAGE_SIZE, flags=NOWHERE_YET) as region, Uffd.open() as uffd:
        uffd.register(region, MISSING)
        with faulting(uffd, region.start) as sleeper:
            uffd.close()
            print(f"After close() the thread that slept read: {sleeper.result()!r}")


def main(arguments: list[str]) -> int:
    """Run the program; returns its exit status."""
    features = Feature.EXACT_ADDRESS if "--exact" in arguments else Feature(0)
    numbers = [argument for argument in arguments if argument != "--exact"]
    if len(numbers) != 1 or not numbers[0].isdecimal() or int(numbers[0]) == 0:
        print("Usage: demand_paging.py [--exact] num-pages", file=sys.stderr)
        return 1
    try:
        page_on_demand(int(numbers[0]), features)
        what_poll_says()
        what_close_does()
    except OSError as error:
        print(f"demand_paging.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
