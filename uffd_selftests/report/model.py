# SPDX-License-Identifier: GPL-2.0-only
"""results.json as the report sees it: checked where it could do harm, forgiving where something is only missing.

docs/results.md describes the format.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

FORMAT = 1
"""The format that a run writes, and the newest that the report reads."""

OUTCOMES = ("fail", "timeout", "error", "xpass", "xfail", "skip", "pass")
"""What can become of a result, what a reader should look at first in front."""
BROKEN = frozenset({"fail", "timeout", "error"})
"""The outcomes that break a promise."""

T = TypeVar("T")


@dataclass(frozen=True)
class Defect:
    """A known defect of kernels, as its case declares it."""

    id: str
    summary: str
    kernels: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Result:
    """One result of a run; the fields are those of results.json."""

    name: str
    outcome: str
    case: str
    reason: str = ""
    seconds: float = 0.0
    """Seconds of wall clock time."""
    diagnostics: tuple[str, ...] = ()
    nodeid: str = ""
    variant: str = ""
    mem: str = ""
    """The memory type; empty when the case has none."""
    promise: str = ""
    rows: tuple[str, ...] = ()
    kind: str = ""
    defect: Defect | None = None
    guest: str = ""
    """The virtual machine in which it ran, if it did."""
    died: bool = False
    """That machine died under it."""

    @property
    def line(self) -> str:
        """What the results of a case on all memory types have in common: its name, with the variant."""
        return f"{self.case} ({self.variant})" if self.variant else self.case

    @property
    def broken(self) -> bool:
        """Whether it breaks a promise."""
        return self.outcome in BROKEN


@dataclass
class Run:
    """One run of the suite."""

    label: str
    """What the page calls it; not empty, and unique on a page."""
    results: dict[str, Result]
    """By name, in the order in which they came."""
    path: Path = Path()
    """The file that it was read from."""
    interrupted: str = ""
    """Why it ended early; empty when it did not."""
    planned: int = 0
    """How many results were to come."""
    started: str = ""
    """When it began: a date of ISO 8601, in UTC; empty when unknown."""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def kernel(self) -> str:
        """The kernel's release, empty when unknown."""
        return self.versions.get("kernel", "")

    @property
    def facts(self) -> dict[str, Any]:
        """What was found on the machine (kernel.Facts); empty when unknown."""
        facts = self.environment.get("facts")
        return facts if isinstance(facts, dict) else {}

    @property
    def totals(self) -> Counter[str]:
        """How many results there are of each outcome."""
        return Counter(result.outcome for result in self.results.values())

    @property
    def deaths(self) -> list[str]:
        """The names of the results under which a guest has died."""
        return [result.name for result in self.results.values() if result.died]

    @property
    def missing(self) -> int:
        """How many results never came."""
        return max(0, self.planned - len(self.results))

    @property
    def unfinished(self) -> str:
        """Why the run is not whole, in one line; empty when it is."""
        lacking = f"{self.missing} of {self.planned} results never came" if self.missing else ""
        return ": ".join(each for each in (self.interrupted, lacking) if each)


def load(path: Path, label: str = "") -> Run:
    """Read results.json, or the one in a folder that ``-o`` wrote; raises ValueError that names the file."""
    if path.is_dir():
        path = path / "results.json"
    try:
        plain = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file: name the folder that a run wrote with -o") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not a JSON document: a run writes it with -o") from None
    try:
        return _run(plain, path, label)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _run(plain: Any, path: Path, label: str) -> Run:
    if not isinstance(plain, dict) or "results" not in plain:
        raise ValueError("not the results of a run: there is no list of results")
    version = _take(plain, "format", int, 0)
    if version > FORMAT:
        raise ValueError(f"format {version}, but this version reads up to {FORMAT}: take a newer uffd-selftests")
    results = [_result(each, number) for number, each in enumerate(_take(plain, "results", list, []), 1)]
    by_name = {result.name: result for result in results}
    if len(by_name) < len(results):
        twice = next(name for name, count in Counter(result.name for result in results).items() if count > 1)
        raise ValueError(f"two results are named {twice!r}")
    versions = {str(name): str(value) for name, value in _take(plain, "versions", dict, {}).items()}
    run = Run(
        label,
        by_name,
        path,
        _take(plain, "interrupted", str, ""),
        _take(plain, "planned", int, 0),
        _take(plain, "started", str, ""),
        _seconds(plain),
        versions,
        _take(plain, "options", dict, {}),
        _take(plain, "environment", dict, {}),
    )
    run.label = label or run.kernel or path.parent.name or path.name
    return run


def _result(plain: Any, number: int) -> Result:
    if not isinstance(plain, dict):
        raise ValueError(f"result {number} is not an object")
    try:
        name, outcome = _take(plain, "name", str, ""), _take(plain, "outcome", str, "")
        if not name:
            raise ValueError("no name")
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome {outcome!r} is none of {', '.join(OUTCOMES)}")
        return Result(
            name,
            outcome,
            _take(plain, "case", str, "") or name,
            _take(plain, "reason", str, ""),
            _seconds(plain),
            _strings(plain, "diagnostics"),
            _take(plain, "nodeid", str, ""),
            _take(plain, "variant", str, ""),
            _take(plain, "mem", str, ""),
            _take(plain, "promise", str, ""),
            _strings(plain, "rows"),
            _take(plain, "kind", str, ""),
            _defect(_take(plain, "defect", dict, {})),
            _take(plain, "guest", str, ""),
            plain.get("died") is True,
        )
    except ValueError as error:
        raise ValueError(f"result {number}: {error}") from None


def _defect(plain: dict[str, Any]) -> Defect | None:
    if not plain:
        return None
    names = ("id", "summary", "kernels", "advice")
    return Defect(*(_take(plain, name, str, "") for name in names))


def _take(plain: dict[str, Any], name: str, kind: type[T], default: T) -> T:
    """Return a value of the right type; the default for one that is missing or null."""
    value = plain.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name} is not {_IN_WORDS[kind]}")
    return value


_IN_WORDS: dict[type, str] = {str: "a string", int: "a whole number", list: "a list", dict: "an object"}


def _strings(plain: dict[str, Any], name: str) -> tuple[str, ...]:
    return tuple(str(each) for each in _take(plain, name, list, []))


def _seconds(plain: dict[str, Any]) -> float:
    value = plain.get("seconds")
    number = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
    return float(value) if number and value is not None else 0.0


def tell_apart(runs: list[Run]) -> None:
    """Give each run a label of its own, by whatever differs: machine, page size, folder, or else a number."""
    for more in (lambda run: run.facts.get("machine"), _page_size, lambda run: run.path.absolute().parent.name):
        if not (doubled := _doubled(runs)):
            return
        if len({more(run) for run in doubled}) > 1:
            for run in doubled:
                run.label = f"{run.label} {more(run) or ''}".rstrip()
    for number, run in enumerate(_doubled(runs), 1):
        run.label += f" #{number}"


def _page_size(run: Run) -> str:
    size = run.facts.get("page_size")
    return f"{size // 1024}K" if isinstance(size, int) else ""


def _doubled(runs: list[Run]) -> list[Run]:
    counts = Counter(run.label for run in runs)
    return [run for run in runs if counts[run.label] > 1]
