# SPDX-License-Identifier: GPL-2.0-only
"""A place for documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.helpers import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A folder for documents."""
    return Folder(tmp_path)
