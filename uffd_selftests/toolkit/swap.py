# SPDX-License-Identifier: GPL-2.0-only
"""Pages that are written to swap."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from uffd_selftests.abi import uapi
from uffd_selftests.machine.swap import NO_SWAP, Swap, keep_swap
from uffd_selftests.toolkit.access import poke, touch
from uffd_selftests.toolkit.expectations import DEADLINE, Skip
from uffd_selftests.toolkit.memory import MAP_ANONYMOUS, MAP_PRIVATE, PAGE_SIZE, Advice, Range, advise, mapped
from uffd_selftests.toolkit.pagemap import Pagemap

__all__ = ["page_out", "swap_out", "own_swap"]


def page_out(where: Range, gone: Callable[[], bool]) -> None:
    """Have pages written to swap (MADV_PAGEOUT) until ``gone`` says so.

    Skip where the kernel writes nothing to swap; AssertionError where it does with other pages.
    """
    keep_swap()
    if not _swap_space():
        raise Skip(NO_SWAP)
    if _paged_out(where, gone):
        return
    with mapped(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS) as other:
        poke(other.start, b"any")
        if _paged_out(other, lambda: bool(Pagemap.entry(other.start) & uapi.PM_SWAP)):
            raise AssertionError(f"expected MADV_PAGEOUT to write {where} to swap, as it does with other pages")
    raise Skip("MADV_PAGEOUT leaves all pages in memory: is the swap space full?")


def _swap_space() -> bool:
    """Whether there is any; /proc/swaps has a line of titles, and is missing without CONFIG_SWAP."""
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except FileNotFoundError:
        return False


def _paged_out(where: Range, gone: Callable[[], bool]) -> bool:
    end = time.monotonic() + DEADLINE / 10
    while time.monotonic() < end:
        advise(where, Advice.PAGEOUT)
        if gone():
            return True
    return False


def swap_out(where: Range) -> None:
    """Have every page of a private mapping written to swap."""
    page_out(where, lambda: all(Pagemap.have(where, uapi.PM_SWAP)))


@contextmanager
def own_swap(size: int = 4 << 20) -> Iterator[Swap]:
    """Have a swap disk of the case's own, to which this processor swaps in the block; Skip where none can be had."""
    with ExitStack() as stack:
        try:
            swap = stack.enter_context(Swap(size, own=True))
        except OSError as error:
            raise Skip(f"no swap disk of its own to be had, which takes root and zram: {error}") from None
        with mapped(2 * size, flags=MAP_PRIVATE | MAP_ANONYMOUS) as other:
            # A processor first uses up the places that it has set aside on another disk.
            for start in range(other.start, other.end, size // 16):
                some = Range(start, size // 16)
                touch(some, PAGE_SIZE, write=True)
                advise(some, Advice.PAGEOUT)
                if swap.used:
                    break
            else:
                raise Skip("the kernel does not use a swap disk of a higher priority")
        yield swap
