# SPDX-License-Identifier: GPL-2.0-only
"""Requests that the kernel refuses: with which errno, and what is in their output field then."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from uffd_selftests.abi.errors import KernelError, errno_name
from uffd_selftests.toolkit.expectations import expect, saw
from uffd_selftests.toolkit.memory import PAGE_SIZE, Range

__all__ = ["UNTOUCHED", "UffdError", "output_text", "refuses", "may_refuse", "held_up", "expect_failed", "bad_ranges"]


UNTOUCHED = -0x5EED_0BAD_CAFE
"""Output fields hold this before the call; the kernel writes no such value."""


class UffdError(KernelError):
    """An ioctl of a userfaultfd failed. ``output`` is the output field afterwards, None where there is none."""

    def __init__(self, number: int, call: str, field: str | None = None, output: int | None = None) -> None:
        super().__init__(number, call)
        self.field = field
        self.output = output

    def __str__(self) -> str:
        return super().__str__() + output_text(self.field, self.output)


def output_text(field: str | None, output: int | None) -> str:
    """Say, behind the name of a request, what is in its output field; nothing where it has none."""
    if field is None or output is None:
        return ""
    return f" with {field} {'untouched' if output == UNTOUCHED else f'= {errno_name(output)}'}"


@contextmanager
def refuses(number: int, *, output: int | None = None, or_untouched: bool = False) -> Iterator[None]:
    """Assert that the one ioctl in the block fails with this errno.

    ``output`` is the value its output field must have then; by default -errno. UNTOUCHED stands for a field that
    the kernel must leave alone; ``or_untouched`` leaves it the choice. Requests without an output field only have the
    errno.
    """
    wanted = -number if output is None else output
    try:
        yield
    except UffdError as error:
        allowed = {None, wanted, *([UNTOUCHED] if or_untouched else [])}
        if error.errno != number or error.output not in allowed:
            text = errno_name(number) + (output_text(error.field, wanted))
            raise AssertionError(f"expected {text}; got {error}") from None
    else:
        raise AssertionError(f"expected {errno_name(number)}; the call succeeded")


@contextmanager
def may_refuse(*numbers: int) -> Iterator[None]:
    """Let the fill in the block succeed, or fail without progress with one of these errnos."""
    try:
        yield
    except UffdError as error:
        if error.errno not in numbers or error.output != -error.errno:
            raise AssertionError(f"expected success or {' or '.join(map(errno_name, numbers))}; got {error}") from None
        saw(errno_name(error.errno))
    else:
        saw("success")


def held_up() -> AbstractContextManager[None]:
    """Assert that the fill in the block says EAGAIN: an event is unread, or the operation behind it not over yet.

    The output field says so, too, or is left alone, as by kernels before 6.15; event-output-field tells which.
    """
    return refuses(errno.EAGAIN, or_untouched=True)


def expect_failed(error: UffdError, number: int) -> None:
    """Assert that a request failed with this errno and put it, negative, into its output field."""
    output = error.output if error.output is None else errno_name(error.output)
    expect((errno_name(error.errno or 0), output), (errno_name(number), errno_name(-number)), "errno and output field")


def bad_ranges(good: Range) -> dict[str, Range]:
    """Ranges that every request must refuse with EINVAL (validate_range of the kernel), made from a good one."""
    return {
        "start not page aligned": Range(good.start + 1, good.len),
        "len 0": Range(good.start, 0),
        "len 1": Range(good.start, 1),
        "len not a multiple of the page size": Range(good.start, good.len + 1),
        "start + len wraps": Range(good.start, (1 << 64) - PAGE_SIZE),
        "start beyond user space": Range((1 << 64) - PAGE_SIZE, PAGE_SIZE),
        "start with a tag in its top byte": Range(good.start | 1 << 57, good.len),  # arm64 took it, before Linux 5.14
    }
