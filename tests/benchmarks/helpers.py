# SPDX-License-Identifier: GPL-2.0-only
"""What several tests of the benchmarks need that are no fixtures."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

BENCHMARKS = ROOT / "benchmarks"


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the benchmarks."""
    command = [sys.executable, str(BENCHMARKS / program), *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
