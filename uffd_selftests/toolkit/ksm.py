# SPDX-License-Identifier: GPL-2.0-only
"""Pages of the same contents that the kernel makes one of (KSM)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from uffd_selftests.machine.settings import Sysctl
from uffd_selftests.machine.system import OWN_MACHINE
from uffd_selftests.mem_types import Area
from uffd_selftests.toolkit.access import peek, poke
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.expectations import Skip, eventually
from uffd_selftests.toolkit.memory import PAGE_SIZE, Advice, advise
from uffd_selftests.toolkit.migration import frames

__all__ = ["alike", "merging", "merged", "let_merge"]

KSM = Path("/sys/kernel/mm/ksm")
SCANS = 8
"""Passes over all mergeable memory after which the kernel has done what it will; it takes two or three."""


def alike(area: Area, pages: Iterable[int]) -> None:
    """Give pages the contents of the first of them."""
    first, *others = pages
    data = peek(area.page(first).start, PAGE_SIZE)
    for page in others:
        poke(area.page(page).start, data)


def merged(area: Area, *pages: int) -> bool:
    """Whether these pages are one and the same in memory, which only root is told."""
    places = set(frames(area, *pages))
    return len(places) == 1 and 0 not in places


@contextmanager
def merging(ctx: Context) -> Iterator[None]:
    """Have KSM for this case alone, for let_merge(); at the end of the block nothing is merged or watched any more.

    Skip where pages are merged already, or the machine is not the suite's own, or it cannot be had.
    """
    try:
        idle = (KSM / "run").read_text().strip() == "0" and int((KSM / "pages_shared").read_text()) == 0
    except OSError:
        raise Skip(f"{KSM}: ENOENT: boot a kernel with CONFIG_KSM") from None
    if not idle or OWN_MACHINE not in os.environ:
        raise Skip(f"pages of other programs would be merged: run it in a guest (--kernel), or with {OWN_MACHINE}=1")
    with ExitStack() as stack:
        try:
            for name, value in (("sleep_millisecs", 0), ("pages_to_scan", 1000)):
                stack.enter_context(Sysctl(KSM / name, value))
        except OSError as error:
            raise Skip(f"{KSM} cannot be written: {error.strerror}: run as root") from None
        try:
            yield
        finally:
            ctx.uffd.close()
            with Sysctl(KSM / "run", 2):  # which undoes all merging
                pass


def let_merge(area: Area, done: Callable[[], bool]) -> bool:
    """Offer an area for merging, and have the kernel do it until ``done`` says so or nothing more will come of it.

    Returns which. To be called within merging().
    """
    advise(area.range, Advice.MERGEABLE)
    scans = KSM / "full_scans"
    last = int(scans.read_text()) + SCANS
    with Sysctl(KSM / "run", 1):
        eventually(lambda: done() or int(scans.read_text()) >= last, "the kernel to look for equal pages")
    return done()
