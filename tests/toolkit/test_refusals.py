# SPDX-License-Identifier: GPL-2.0-only
"""A wrong answer of the kernel is told with what was expected."""

from __future__ import annotations

import errno

import pytest

from tests.helpers import needs_userfaultfd
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.refusals import UffdError, refuses

pytestmark = [
    pytest.mark.isolated,  # a hang here must not hang the rest
    needs_userfaultfd,
]


def test_refusals_are_compared(context: Context) -> None:
    """The errno and the output field of a refusal are both part of the promise."""
    page = context.dst.page(0)
    context.uffd.zeropage(page)
    with refuses(errno.EEXIST):
        context.uffd.zeropage(page)
    with pytest.raises(AssertionError, match="expected EINVAL with zeropage = -EINVAL; got .*EEXIST with zeropage"):
        with refuses(errno.EINVAL):
            context.uffd.zeropage(page)
    with pytest.raises(AssertionError, match="expected EEXIST with zeropage untouched; got .* = -EEXIST"):
        with refuses(errno.EEXIST, output=-0x5EED_0BAD_CAFE):
            context.uffd.zeropage(page)
    with pytest.raises(AssertionError, match="expected EEXIST; the call succeeded"), refuses(errno.EEXIST):
        context.uffd.wake(page)
    with pytest.raises(UffdError, match=r"UFFDIO_ZEROPAGE\(\[0x[0-9a-f]+, 0x[0-9a-f]+\), 0\): EEXIST with"):
        context.uffd.zeropage(page)
