# SPDX-License-Identifier: GPL-2.0-only
"""Access to memory that may be registered, without the interpreter's lock.

A thread that touches registered memory sleeps in the kernel until the fault is resolved. Were it to hold the lock
meanwhile, no Python thread could resolve it. So no case dereferences a pointer: it calls these functions.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from uffd_selftests.abi.native import ffi, lib
from uffd_selftests.toolkit.memory import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    PAGE_SIZE,
    PROT_READ,
    Range,
    map_memory,
    protect,
    unmap,
)

__all__ = ["Trap", "AccessError", "peek", "poke", "touch", "touch_trapped", "expect_signals", "read_only"]


@dataclass(frozen=True, repr=False)
class Trap:
    """The signal that ended an access: siginfo_t's fields."""

    signo: signal.Signals
    code: int
    addr: int
    addr_lsb: int

    def __repr__(self) -> str:
        lost = f" si_addr_lsb={self.addr_lsb}" if self.addr_lsb else ""
        return f"{self.signo.name} si_code={self.code} si_addr={self.addr:#x}{lost}"


class AccessError(Exception):
    """A guarded access ended in SIGBUS or SIGSEGV; ``trap`` tells which."""

    def __init__(self, trap: Trap) -> None:
        super().__init__(str(trap))
        self.trap = trap


def _trap(c: Any) -> Trap:
    return Trap(signal.Signals(c.signo), c.code, c.addr, c.addr_lsb)


def peek(address: int, length: int = 1) -> bytes:
    """Read bytes; raises AccessError when a signal ends the access."""
    buf, trap = ffi.new("char[]", length), ffi.new("struct uffd_trap *")
    if lib.uffd_peek(address, buf, length, trap):
        raise AccessError(_trap(trap))
    return bytes(ffi.buffer(buf, length))


def poke(address: int, data: bytes) -> None:
    """Write bytes; raises AccessError when a signal ends the access."""
    trap = ffi.new("struct uffd_trap *")
    if lib.uffd_poke(address, data, len(data), trap):
        raise AccessError(_trap(trap))


def touch(where: Range, step: int, *, write: bool = False) -> None:
    """Access one byte every ``step`` bytes: a load, or a write access that changes nothing."""
    lib.uffd_touch(where.start, step, where.len // step, lib.UFFD_WRITE if write else lib.UFFD_READ, ffi.NULL)


def touch_trapped(where: Range, step: int, *, write: bool = False) -> list[Trap | None]:
    """Like touch, but survive the signals: for each access, the signal that ended it or None."""
    count = where.len // step
    traps = ffi.new("struct uffd_trap[]", count)
    lib.uffd_touch(where.start, step, count, lib.UFFD_WRITE if write else lib.UFFD_READ, traps)
    return [_trap(trap) if trap.signo else None for trap in traps]


def expect_signals(where: Range, step: int, signo: signal.Signals | None, what: str, *, write: bool = False) -> None:
    """Assert that an access every ``step`` bytes is ended by this signal at just its address, or by none at all."""
    trap = ffi.new("struct uffd_trap *")
    access = lib.UFFD_WRITE if write else lib.UFFD_READ
    count = where.len // step
    done = lib.uffd_touch_alike(where.start, step, count, access, int(signo or 0), trap)
    if done < count:
        wanted = f"{signo.name} with si_addr={where.start + done * step:#x}" if signo else "no signal"
        raise AssertionError(f"{what}, page {done}: expected {wanted}, got {_trap(trap) if trap.signo else None}")


@contextmanager
def read_only(data: bytes) -> Iterator[int]:
    """Yield the address of a copy of the data in a page that nobody can write."""
    page = Range(map_memory(PAGE_SIZE, flags=MAP_PRIVATE | MAP_ANONYMOUS), PAGE_SIZE)
    try:
        poke(page.start, data)
        protect(page, PROT_READ)
        yield page.start
    finally:
        unmap(page)
