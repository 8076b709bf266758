# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of the probe need: what it finds here."""

from __future__ import annotations

import pytest

from tests.probe.helpers import AREA
from uffd_selftests.probe import suite
from uffd_selftests.probe.command import probe
from uffd_selftests.probe.report import Report


@pytest.fixture(scope="package")
def found() -> Report:
    """Return what the probe finds here."""
    return probe(AREA)


@pytest.fixture(scope="package")
def results() -> list[suite.Expected]:
    """Return all results."""
    return list(suite.expected())
