# SPDX-License-Identifier: GPL-2.0-only
"""Contents are compared to the last byte."""

from __future__ import annotations

import pytest

from tests.helpers import needs_userfaultfd
from uffd_selftests.mem_types import SHMEM
from uffd_selftests.toolkit.access import peek, poke
from uffd_selftests.toolkit.contents import ContentError, expect_bytes
from uffd_selftests.toolkit.context import Context

pytestmark = [
    pytest.mark.isolated,  # a hang here must not hang the rest
    needs_userfaultfd,
]


def test_contents_are_compared_to_the_last_byte() -> None:
    """One wrong byte, the very last, is found and named."""
    with Context(SHMEM, nr_pages=3) as ctx:
        ctx.dst.fill()
        ctx.dst.expect_pattern(ctx.dst.range)
        last = ctx.dst.range.end - 1
        right = peek(last)[0]
        poke(last, bytes([right ^ 1]))
        with pytest.raises(ContentError, match=f"page 2 byte 0xfff: expected {right:#04x}, got {right ^ 1:#04x}"):
            ctx.dst.expect_pattern(ctx.dst.range)
        ctx.dst.release()
        ctx.dst.expect_zero()
        poke(last, b"\1")
        with pytest.raises(ContentError, match="page 2 byte 0xfff: expected 0x00, got 0x01"):
            ctx.dst.expect_zero()
        with pytest.raises(ContentError, match="byte 0x0: expected 0x02, got 0x00"):
            expect_bytes(ctx.dst.range, 2)


def test_the_head_of_a_page_is_what_it_begins_with() -> None:
    """A pattern tells the first bytes of a page without the page."""
    with Context(SHMEM, nr_pages=3) as ctx:
        ctx.dst.fill()
        for page in range(3):
            assert ctx.dst.pattern.head(page, 20) == peek(ctx.dst.page(page).start, 20)
