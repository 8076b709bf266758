# SPDX-License-Identifier: GPL-2.0-only
"""The handle tells a fault that was not expected."""

from __future__ import annotations

import pytest

from tests.helpers import needs_userfaultfd
from uffd_selftests.abi import uapi
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.faulting import faulting

pytestmark = [
    pytest.mark.isolated,  # a hang here must not hang the rest
    needs_userfaultfd,
]


def test_wrong_fault_is_told(context: Context) -> None:
    """A fault elsewhere, or of another kind, than the case expects."""
    with faulting(context.uffd, context.dst.start, read=False):
        with pytest.raises(AssertionError, match="expected a page fault at .* with flags .*WRITE, got Fault"):
            context.uffd.wait_fault(context.dst.start, uapi.PagefaultFlag.WRITE)
        context.uffd.zeropage(context.dst.page(0))
