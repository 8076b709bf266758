# SPDX-License-Identifier: GPL-2.0-only
"""UFFDIO_POISON as the answer to missing faults."""

from __future__ import annotations

from signal import SIGBUS

from uffd_selftests.case import uffd_case
from uffd_selftests.common import ALL, MISSING, Action, Context, Feature, RangeIoctls, expect, touch_trapped


@uffd_case("poison", mem=ALL, features=Feature.POISON, pages=4, rows=("PO-01", "PO-07", "PO-09"))
def test_poison(ctx: Context) -> None:
    """Access to a page that UFFDIO_POISON marked raises SIGBUS; its neighbours do not suffer."""
    wanted = RangeIoctls.COPY | RangeIoctls.POISON
    expect(ctx.uffd.register(ctx.dst.range, MISSING) & wanted, wanted, "ioctls of the registered range")

    even_poisoned = [Action.COPY if page % 2 else Action.POISON for page in range(ctx.nr_pages)]
    with ctx.handler(plan=even_poisoned) as handler:
        traps = touch_trapped(ctx.dst.range, ctx.page_size)

    for page, trap in enumerate(traps):
        signal = (trap.signo, hex(trap.addr)) if trap else None
        expected = None if page % 2 else (SIGBUS, hex(ctx.dst.page(page).start))
        expect(signal, expected, f"signal and si_addr of page {page}")
        if page % 2:
            ctx.dst.expect_zero(page, 1)
    expect(handler.stats.missing, ctx.nr_pages, "missing faults")
