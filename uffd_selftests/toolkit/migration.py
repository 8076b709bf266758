# SPDX-License-Identifier: GPL-2.0-only
"""Pages that the kernel moves to other memory, which their user never notices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from uffd_selftests.abi import syscalls
from uffd_selftests.abi.errors import KernelError
from uffd_selftests.abi.native import ffi, lib
from uffd_selftests.abi.uapi import PM_PFN_MASK
from uffd_selftests.mem_types import Area
from uffd_selftests.toolkit.access import peek
from uffd_selftests.toolkit.expectations import Skip, eventually, expect
from uffd_selftests.toolkit.hwpoison import declared_sound
from uffd_selftests.toolkit.memory import Advice, advise
from uffd_selftests.toolkit.pagemap import Pagemap
from uffd_selftests.toolkit.processes import Child
from uffd_selftests.toolkit.races import COMPANION, Racer

__all__ = ["memory_nodes", "two_memory_nodes", "frames", "migrate", "migrator"]

MPOL_MF_MOVE = 2  # include/uapi/linux/mempolicy.h
_NODES = Path("/sys/devices/system/node")


def memory_nodes() -> list[int]:
    """Return the nodes that have memory; move_pages(2) takes pages from one to another where there are two."""
    nodes = []
    for path in _NODES.glob("node*/meminfo"):
        total = next(line.split()[3] for line in path.read_text().splitlines() if "MemTotal" in line)
        if int(total):
            nodes.append(int(path.parent.name.removeprefix("node")))
    return sorted(nodes)


def two_memory_nodes() -> list[int]:
    """Return two nodes between which pages can be moved; Skip where there is only one."""
    nodes = memory_nodes()
    if len(nodes) < 2:
        raise Skip("one memory node only: boot with numa=fake=2, or run on a machine with several")
    return nodes[:2]


def frames(area: Area, *pages: int) -> list[int]:
    """Return the frame number that is behind each page; 0 without CAP_SYS_ADMIN."""
    return [Pagemap.entry(area.page(page).start) & PM_PFN_MASK for page in pages]


@contextmanager
def migrate(area: Area, *pages: int) -> Iterator[None]:
    """Have the kernel move pages to other memory, and assert that it has; all is put right again after the block.

    With two memory nodes they go from one to the other (move_pages(2)). Else the kernel is told that their memory is
    about to break (MADV_SOFT_OFFLINE), which no huge page of hugetlb survives as such. Skip where neither is to be had;
    needs CAP_SYS_ADMIN.
    """
    before = frames(area, *pages)
    with ExitStack() as stack:
        if area.mem.hugetlb or len(memory_nodes()) > 1:
            nodes = two_memory_nodes()
            for page in pages:
                _to_other_node(area, page, nodes)
        else:
            for page in pages:
                stack.enter_context(declared_sound(area.page(page)))
            # By another process: the kernel gets at the page through its mapping, which might be watched here.
            with Child(lambda _: _soft_offline(area, pages)):
                pass
        for page, old, new in zip(pages, before, frames(area, *pages), strict=True):
            expect(new in (old, 0), False, f"whether page {page} is where it was")
        yield


def _soft_offline(area: Area, pages: tuple[int, ...]) -> None:
    for page in pages:
        peek(area.page(page).start)  # shared memory: a child begins without its pages
        advise(area.page(page), Advice.SOFT_OFFLINE)


def _to_other_node(area: Area, page: int, nodes: list[int]) -> None:
    status = ffi.new("int[]", 1)
    here = ffi.new("uint64_t[]", [area.page(page).start])

    def place(to: int | None) -> int:
        wanted = ffi.NULL if to is None else ffi.new("int[]", [to])
        args = [int(ffi.cast("uintptr_t", array)) for array in (here, wanted, status)]
        with suppress(KernelError):  # what became of the page is in its status
            syscalls.call("move_pages", 0, 1, *args, MPOL_MF_MOVE if to is not None else 0)
        return int(status[0])

    now = place(None)
    other = next(node for node in nodes if node != now)

    def there() -> bool:
        place(other)
        return place(None) == other

    eventually(there, f"page {page} to be moved from memory node {now} to {other}")


def migrator(*places: int) -> Racer:
    """A companion that migrates the pages at these addresses from node to node and back (move_pages(2)).

    The kernel takes many pages out of their mappings before it moves the first of them. Skip where there is one node.
    """
    count = len(places)
    pages = ffi.new("uint64_t[]", places)
    nodes = ffi.new("int[]", [node for node in two_memory_nodes() for _ in places])
    status = ffi.new("int[]", count)
    args = (0, count, *(int(ffi.cast("uintptr_t", array)) for array in (pages, nodes, status)), MPOL_MF_MOVE)
    number, strides = syscalls.number("move_pages"), (0, 0, 0, 4 * count)
    keeps = (pages, nodes, status)
    return Racer("move_pages(2)", lib.UFFD_RACE_SYSCALL, number, args, strides, 2, COMPANION, keeps=keeps)
