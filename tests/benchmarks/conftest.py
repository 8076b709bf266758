# SPDX-License-Identifier: GPL-2.0-only
"""The modules of benchmarks/, which is no package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.helpers import BENCHMARKS

if TYPE_CHECKING:
    from types import ModuleType


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import benchmarks/loop.py, which is no package's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import loop  # noqa: PLC0415

    return loop


@pytest.fixture
def workloads(loop: ModuleType) -> ModuleType:
    """Import benchmarks/workloads.py."""
    assert loop
    import workloads  # noqa: PLC0415

    return workloads


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import benchmarks/upstream.py, which is no package's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import upstream  # noqa: PLC0415

    return upstream
