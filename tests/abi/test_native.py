# SPDX-License-Identifier: GPL-2.0-only
"""The native layer: what is not to be touched is told with its signal, and only to those who ask."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.helpers import needs_userfaultfd
from uffd_selftests.abi.native import ffi, lib
from uffd_selftests.toolkit.access import AccessError, peek, poke, touch_trapped
from uffd_selftests.toolkit.memory import MAP_ANONYMOUS, MAP_PRIVATE, PAGE_SIZE, PROT_NONE, Range, map_memory, unmap
from uffd_selftests.toolkit.processes import Child, ChildError

pytestmark = [
    pytest.mark.isolated,  # a hang here must not hang the rest
    needs_userfaultfd,
]


@pytest.fixture
def forbidden() -> Iterator[Range]:
    """A page that nobody may touch."""
    page = Range(map_memory(PAGE_SIZE, prot=PROT_NONE, flags=MAP_PRIVATE | MAP_ANONYMOUS), PAGE_SIZE)
    yield page
    unmap(page)


def test_guarded_access_reports_the_signal(forbidden: Range) -> None:
    """A forbidden access is told with its signal and address, and the next one works."""
    for access in (lambda: peek(forbidden.start + 5), lambda: poke(forbidden.start + 5, b"x")):
        with pytest.raises(AccessError) as caught:
            access()
        assert (caught.value.trap.signo, caught.value.trap.addr) == (signal.SIGSEGV, forbidden.start + 5)
    traps = touch_trapped(forbidden, PAGE_SIZE, write=True)
    assert [trap and trap.signo for trap in traps] == [signal.SIGSEGV]


def test_unguarded_access_still_kills(forbidden: Range) -> None:
    """The guard keeps nobody alive who did not ask for it."""
    with pytest.raises(AccessError):
        peek(forbidden.start)
    with pytest.raises(ChildError, match="killed by SIGSEGV"), Child(lambda _: lib.uffd_fill(*_pattern(forbidden))):
        pass


def _pattern(where: Range) -> tuple[object, ...]:
    return where.start, ffi.new("struct uffd_pattern *", [PAGE_SIZE, 1, 0]), 0, 1
