# SPDX-License-Identifier: GPL-2.0-only
"""Names for consumers that allow few characters in one: letters, digits, hyphen and underscore, dots between parts."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uffd_selftests.report.model import Result

ROOT = "uffd"


def paths(results: Iterable[Result]) -> dict[str, str]:
    """Return the path of each result by its name: ``uffd.case.variant.mem``, and no path twice.

    Where characters that had to go were all that told two names apart, both end in a checksum of the name.
    """
    found = {result.name: path(result) for result in results}
    counts = Counter(found.values())
    return {
        name: f"{plain}-{zlib.crc32(name.encode('utf-8', 'replace')):08x}" if counts[plain] > 1 else plain
        for name, plain in found.items()
    }


def path(result: Result) -> str:
    """Return the path of a result; it depends on nothing but the result's name."""
    parts = (result.case, result.variant, result.mem)
    return ".".join([ROOT, *(_word(part) for part in parts if part)])


def _word(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-") or "-"
