# SPDX-License-Identifier: GPL-2.0-only
"""How long results take in a guest, so that the longest come first and no worker waits long for another one.

The table beside this file has what took longest on an emulated machine; what a run has measured is kept in the cache,
and counts for more.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from uffd_selftests.harness.results import declaration

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pytest

    from uffd_selftests.harness.results import Result

TABLE = Path(__file__).with_name("durations.txt")
LEAST_SECONDS = 0.5
"""What takes less is not told apart."""


def known(measured: Path) -> dict[str, float]:
    """Return the seconds of each result that takes long, by its name."""
    lines = (line.split(" ", 1) for line in TABLE.read_text().splitlines() if line and not line.startswith("#"))
    durations = {name: float(seconds) for seconds, name in lines}
    return {**durations, **_measured(measured)}


def _measured(path: Path) -> dict[str, float]:
    """Read what was kept; what makes no sense is not there."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}
    return {}


def remember(measured: Path, results: Iterable[Result]) -> None:
    """Keep how long these took, for the next run; if that cannot be written, it does without."""
    kept = _measured(measured)
    for result in results:
        kept.pop(result.name, None)
        if result.seconds >= LEAST_SECONDS:
            kept[result.name] = round(result.seconds, 1)
    draft = measured.with_name(f"{measured.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        draft.write_text(json.dumps(kept))
        draft.rename(measured)


def longest_first(items: Sequence[pytest.Item], durations: dict[str, float]) -> list[pytest.Item]:
    """Return items with the file first that has the longest result; what can share a process stays together."""
    files = [list(group) for _, group in itertools.groupby(items, key=lambda item: item.parent)]
    files.sort(key=lambda file: -max(_seconds(item, durations) for item in file))
    return list(itertools.chain.from_iterable(files))


def _seconds(item: pytest.Item, durations: dict[str, float]) -> float:
    case, variant, mem = declaration(item)
    return durations.get(case.result_name(variant, mem), 0.0) if case else 0.0
