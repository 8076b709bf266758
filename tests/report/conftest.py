# SPDX-License-Identifier: GPL-2.0-only
"""A place for documents and pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.helpers import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder for documents and pages."""
    return Folder(tmp_path)
