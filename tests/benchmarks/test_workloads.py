# SPDX-License-Identifier: GPL-2.0-only
"""A measurement is of what it says, or it is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from uffd_selftests.mem_types import ANON

if TYPE_CHECKING:
    from types import ModuleType


def test_a_lost_fault_is_noticed(workloads: ModuleType) -> None:
    """Handlers that have answered fewer faults than there are pages make the measurement an error."""
    with pytest.raises(workloads.BenchmarkError, match="missing on anon: expected 16 faults, the handlers answered 8"):
        with workloads.MissingFaults(ANON, 8) as workload:
            workload.run(1)
            workload.reset = lambda: None  # all pages are there: no fault
            workload.run(1)
