# SPDX-License-Identifier: GPL-2.0-only
"""Plain cases as pytest's items: a result each, without the fixtures and calls of pytest's own functions.

A case that takes nothing but what this plugin gives it needs none of what makes a pytest.Function slow to collect, to
ask and to report.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
from functools import cached_property
from inspect import signature
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests.case import ATTRIBUTE, Case
from uffd_selftests.catalog.bugs import known_bugs
from uffd_selftests.harness import plain
from uffd_selftests.harness.settings import Settings
from uffd_selftests.machine.requirements import REQUIREMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from pluggy import HookRelay

    from uffd_selftests.mem_types import MemType


SETTINGS = pytest.StashKey[Settings]()
"""The options of the run, in pytest's configuration."""


class CaseItem(pytest.Item):
    """One result of a plain case."""

    case: Case
    variant: str | None
    mem: MemType | None
    function: Callable[..., None]
    arguments: tuple[str, ...]
    """What the function takes."""
    area_bytes: int

    @property
    def ihook(self) -> HookRelay:
        """The hooks of its file; to work them out for each item takes longer than most of them."""
        assert isinstance(self.parent, CaseFile)
        return self.parent.hooks

    @property
    def result_name(self) -> str:
        """Its name in every report."""
        return self.case.result_name(self.variant, self.mem)

    @cached_property
    def location(self) -> tuple[str, int | None, str]:
        """Path from the root on, line and name."""
        assert isinstance(self.parent, CaseFile)
        return self.parent.place, self.function.__code__.co_firstlineno - 1, self.name

    def reportinfo(self) -> tuple[str, int | None, str]:
        """Say where it stands, for pytest."""
        return str(self.path), self.location[1], self.name

    def runtest(self) -> None:
        """Call the case in pytest's own process, for a debugger."""
        with contextlib.ExitStack() as stack:
            given = plain.arguments(
                stack, self.case, self.arguments, variant=self.variant, mem=self.mem, area_bytes=self.area_bytes
            )
            self.function(**given)

    def _traceback_filter(self, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
        """Show a failure from the case on."""
        return excinfo.traceback.cut(path=self.function.__code__.co_filename)


VARIANTS = pytest.StashKey[dict[str, list[str]]]()
"""Those of cases on the kernel under test, by their names, where that is another one than this."""


def results(case: Case, variants: Sequence[str] | None = None) -> Iterator[tuple[str | None, MemType | None]]:
    """Yield the variant and the memory type of each result, in the order of the declaration."""
    return itertools.product((case.variants if variants is None else variants) or (None,), case.mem or (None,))


class CaseFile(pytest.Module):
    """A file that may have nothing but plain cases in it."""

    @cached_property
    def hooks(self) -> HookRelay:
        """Those of the plugins and of the conftest.py files that concern it."""
        return self.ihook

    @cached_property
    def place(self) -> str:
        """Its path from the root on."""
        return os.path.relpath(self.path, self.config.rootpath)

    @cached_property
    def is_special(self) -> bool:
        """Whether markers or fixtures of the file, or of what it lies in, are for all tests in it."""
        return any(self.iter_markers()) or any(self.session._fixturemanager._getautousenames(self))

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Return the items of its cases; leave it to pytest when there is more in it than plain cases."""
        tests = [
            (name, value)
            for name, value in vars(self.obj).items()
            if self.funcnamefilter(name) or self.classnamefilter(name)
        ]
        plain_cases = all(isinstance(getattr(value, ATTRIBUTE, None), Case) for _, value in tests)
        if plain_cases and not any(map(_is_for_pytest, vars(self.obj).items())):
            settings = self.config.stash[SETTINGS]
            made = [make(self, name, value, settings) for name, value in tests]
            if None not in made:
                return [item for some in made if some for item in some]
        return super().collect()


def _is_for_pytest(binding: tuple[str, object]) -> bool:
    """Whether pytest has to know of a name in a module: a fixture, a marker, a function by which it sets up."""
    name, value = binding
    return name.startswith(("setup", "teardown", "pytest")) or type(value).__module__.startswith("_pytest")


DECLARED = re.compile(r'@\w*uffd_case\(\s*(?:"([^"\\]*)"|)')
"""A case in the text of a file, with its name if that is a plain string; files may have decorators of their own."""
TEST = re.compile(r"^(?:def|class) test", re.MULTILINE | re.IGNORECASE)


def may_match(path: Path, settings: Settings) -> bool:
    """Whether a file may have cases that the filters leave, by its text: to import it takes twenty times longer."""
    text = path.read_text("utf-8", "replace")
    names = DECLARED.findall(text)
    if "" in names or len(names) < len(TEST.findall(text)):
        return True
    stems = [part.lstrip("=").partition(" on ")[0].partition(" (")[0] for part in settings.filters]
    return any(stem in name or ")" in stem for stem in stems for name in names)


def make(collector: CaseFile, name: str, function: Callable[..., None], settings: Settings) -> list[CaseItem] | None:
    """Return the items of a plain case that the filters leave; None of one that needs pytest's way."""
    case: Case = getattr(function, ATTRIBUTE)
    arguments = tuple(signature(function).parameters)
    if not plain.GIVEN.issuperset(arguments) or getattr(function, "pytestmark", None) or collector.is_special:
        return None
    if getattr(sys.modules.get(collector.obj.__name__), name, None) is not function:
        return None
    check(case, name, {*arguments, *(["mem"] if "ctx" in arguments else [])})
    items = []
    for variant, mem in results(case, collector.config.stash.get(VARIANTS, {}).get(case.name)):
        if not settings.wants(case, variant, mem):
            continue
        ids = "-".join([*([variant] if variant else []), *([mem.name] if mem else [])])
        item = CaseItem.from_parent(collector, name=f"{name}[{ids}]" if ids else name)
        item.case, item.variant, item.mem, item.function, item.arguments = case, variant, mem, function, arguments
        item.area_bytes = settings.area_bytes_of(case)
        items.append(item)
    return items


def check(case: Case, function: str, taken: Iterable[str]) -> None:
    """Refuse a case that declares one thing and takes another, or names what there is not."""
    for name, values in (("variant", case.variants), ("mem", case.mem)):
        if bool(values) != (name in taken):
            problem = "is declared but not taken" if values else "is taken but not declared"
            raise pytest.Collector.CollectError(f"case {case.name}: {name} {problem} by {function}")
    for what, named, there in ("requirement", case.needs, REQUIREMENTS), ("bug", case.bugs, known_bugs()):
        if unknown := [str(each) for each in named if each not in there]:
            raise pytest.Collector.CollectError(f"case {case.name}: there is no {what} {', '.join(unknown)}")
