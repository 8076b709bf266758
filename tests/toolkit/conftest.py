# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of the toolkit need: registered memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from uffd_selftests.mem_types import ANON
from uffd_selftests.toolkit.context import Context
from uffd_selftests.toolkit.handle import MISSING


@pytest.fixture
def context() -> Iterator[Context]:
    """Four pages of anonymous memory, registered for missing faults."""
    with Context(ANON, nr_pages=4) as ctx:
        ctx.uffd.register(ctx.dst.range, MISSING)
        yield ctx
