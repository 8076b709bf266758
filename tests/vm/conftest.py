# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of --kernel need: a host that has all the tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from uffd_selftests.vm import vng


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """Return a folder with everything that is looked for, none of which does anything."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("vng", vng.QEMU["x86_64"][0], *vng.TOOLS, *vng.GUEST_TOOLS):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return folder
