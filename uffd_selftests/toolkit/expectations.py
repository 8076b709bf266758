# SPDX-License-Identifier: GPL-2.0-only
"""What a case asserts, and how its failure reads."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

from uffd_selftests.abi.errors import errno_name

__all__ = [
    "DEADLINE", "SAW", "Skip", "Unexplained", "expect", "expect_errno", "expect_one_of", "saw", "promise", "fails",
    "eventually",
]  # fmt: skip


DEADLINE = 10.0 * float(os.environ.get("UFFD_DEADLINE_SCALE") or 1)
"""Seconds after which something awaited counts as not happening."""


SAW = "saw: "
"""How a printed line begins that tells which of several documented forms came; a result shows it, whatever it is."""


class Skip(Exception):
    """Something the case needs is missing; the text is the reason, with the remedy."""


class Unexplained(AssertionError):
    """A failure that reads like a known defect, on a kernel that is known not to have it any more: see mended()."""

    unexplained = True
    """No defect explains it (Defect.explains)."""


def expect(observed: object, expected: object, what: str) -> None:
    """Assert equality; a failure says ``what: expected X, got Y``."""
    if observed != expected:
        raise AssertionError(f"{what}: expected {_told(expected)}, got {_told(observed)}")


def saw(form: str) -> None:
    """Tell which of several documented forms the kernel has; the result shows it, also when it is a pass."""
    print(f"{SAW}{form}")


def expect_one_of(observed: object, forms: Sequence[object], what: str) -> None:
    """Assert that the observed value is one of several documented ones, and tell which where there is a choice."""
    if observed not in forms:
        wanted = " or ".join(str(_told(form)) for form in forms)
        raise AssertionError(f"{what}: expected {wanted}, got {_told(observed)}")
    if len(forms) > 1:
        saw(f"{what}: {_told(observed)}")


def _told(value: object) -> object:
    """Return what names a value, in a container too: str() of a signal is its number, repr() of flags has both."""
    if isinstance(value, signal.Signals):
        return value.name
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):  # not the named ones: they tell themselves
        parts = ", ".join(f"{_told(part)}" if isinstance(part, (Enum, tuple, list)) else repr(part) for part in value)
        return f"[{parts}]" if isinstance(value, list) else f"({parts})"
    return value


def expect_errno(error: OSError, numbers: int | Sequence[int], what: str) -> None:
    """Assert that a call failed with this errno, or with one of several documented ones; a failure names them."""
    forms = [numbers] if isinstance(numbers, int) else numbers
    expect_one_of(errno_name(error.errno or 0), [errno_name(number) for number in forms], what)


@contextmanager
def promise(row: str, when: str = "") -> Iterator[None]:
    """Name the promise (a row of the contract, or several) that the block checks, and the instance of it.

    A failure of the block begins with these.
    """
    try:
        yield
    except (AssertionError, OSError) as error:
        raise AssertionError(f"{row}{f', {when}' if when else ''}: {error}") from error


@contextmanager
def fails(*numbers: int) -> Iterator[None]:
    """Assert that the one system call in the block fails with one of these; for ioctls of a userfaultfd: refuses()."""
    wanted = " or ".join(map(errno_name, numbers))
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise AssertionError(f"expected {wanted}; got {error}") from None
        if len(numbers) > 1:
            saw(errno_name(error.errno))
    else:
        raise AssertionError(f"expected {wanted}; the call succeeded")


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until a state is reached that another thread or process must reach; AssertionError after the deadline."""
    end = time.monotonic() + DEADLINE
    pause = 0.00002
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"expected {what} within {DEADLINE:g} seconds")
        # Not sched_yield: on the same CPU, one that does not sleep would go on until its time is over.
        time.sleep(pause)
        pause = min(1.5 * pause, 0.01)
