# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of the harness need that are no fixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., pytest.RunResult]


class FakePool:
    """A pool that can give nothing."""

    def __init__(self, size: int, wanted: int) -> None:
        self.size, self.wanted, self.added = size, wanted, 0
        self.shortage: str | None = "no memory"

    def __enter__(self) -> FakePool:
        """Give nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take nothing back."""
