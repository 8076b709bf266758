# SPDX-License-Identifier: GPL-2.0-only
"""What memory holds: patterns by which every page can be told, and comparisons to the last byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from uffd_selftests.abi.native import ffi, lib
from uffd_selftests.toolkit.memory import PAGE_SIZE, Range

__all__ = ["ContentError", "expect_bytes", "expect_same", "Pattern"]


class ContentError(AssertionError):
    """Memory does not hold what was promised; the text says where, with the expected and the observed byte."""


def _content_error(what: str, mismatch: Any, page_size: int) -> ContentError:
    page, offset = divmod(mismatch.offset, page_size)
    return ContentError(
        f"{what}, page {page} byte {offset:#x}: expected {mismatch.expected:#04x}, got {mismatch.observed:#04x}"
    )


def expect_bytes(where: Range, value: int, what: str = "memory", page_size: int = PAGE_SIZE) -> None:
    """Assert that every byte of the range equals ``value``; pages are counted from its start."""
    mismatch = ffi.new("struct uffd_mismatch *")
    if lib.uffd_verify_byte(where.start, where.len, value, mismatch):
        raise _content_error(what, mismatch, page_size)


def expect_same(expected: int, observed: int, length: int, what: str = "memory") -> None:
    """Assert that two ranges hold the same bytes."""
    mismatch = ffi.new("struct uffd_mismatch *")
    if lib.uffd_compare(expected, observed, length, mismatch):
        raise _content_error(what, mismatch, PAGE_SIZE)


@dataclass(frozen=True)
class Pattern:
    """Contents by which every page and every word of it can be told: see struct uffd_pattern."""

    page_size: int
    seed: int = 1
    flipped: bool = False

    def _native(self) -> Any:
        return ffi.new("struct uffd_pattern *", [self.page_size, self.seed, (1 << 64) - 1 if self.flipped else 0])

    def fill(self, address: int, first: int, count: int) -> None:
        """Write pages ``first`` to ``first + count - 1`` of an area whose page 0 is at ``address``."""
        lib.uffd_fill(address, self._native(), first, count)

    def head(self, page: int, length: int = 8) -> bytes:
        """Return the first bytes that this page has."""
        copy = ffi.new("char[]", self.page_size)
        self.fill(int(ffi.cast("uintptr_t", copy)) - page * self.page_size, page, 1)
        return bytes(ffi.buffer(copy, length))

    def verify(self, address: int, first: int, count: int, *, write_back: bool = False, what: str = "area") -> None:
        """Assert the contents of these pages to the last byte; then, if asked, write each first word back.

        The first access to each page is a read.
        """
        mismatch = ffi.new("struct uffd_mismatch *")
        flags = lib.UFFD_WRITE_BACK if write_back else 0
        if lib.uffd_verify(address, self._native(), first, count, flags, mismatch):
            raise _content_error(what, mismatch, self.page_size)
