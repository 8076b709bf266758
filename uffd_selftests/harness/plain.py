# SPDX-License-Identifier: GPL-2.0-only
"""Plain cases, called without pytest's way there, in a process that need not have heard of pytest.

pytest's protocol costs several times what most cases do: it touches so many objects that parent and child part with a
thousand pages each.  A case that takes nothing but what this plugin gives it needs none of that.
"""

from __future__ import annotations

import importlib
import linecache
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from uffd_selftests.case import ATTRIBUTE
from uffd_selftests.harness import proc
from uffd_selftests.harness.gating import area_pages

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from uffd_selftests.case import Case
    from uffd_selftests.harness.isolation import Send
    from uffd_selftests.mem_types import MemType
    from uffd_selftests.toolkit.context import Context

GIVEN = {"ctx", "mem", "variant"}
"""What a plain case can take."""


class Task(NamedTuple):
    """One result of a plain case, as another process can have it: plain data."""

    nodeid: str
    name: str
    """That of the result."""
    module: str
    function: str
    arguments: tuple[str, ...]
    """What the function takes."""
    variant: str | None
    mem: str | None
    area_bytes: int
    """Size of each of the two areas of a case that names no number of pages."""
    cpu: int | None
    """The only CPU it runs on, by its place among those there are; None: on all."""
    nice: int
    """How far its process lets others go first (setpriority(2))."""
    hugepages: int
    """How many it takes."""
    expected: bool
    """The defect that the case declares is expected to show."""
    captured: bool
    """What it prints is kept."""


# ---- what a child sends --------------------------------------------------------------------------------------------


class Passed(NamedTuple):
    """The case went well."""

    seconds: float


class Skipped(NamedTuple):
    """The case cannot run here."""

    seconds: float
    reason: str


class Expected(NamedTuple):
    """The case failed as the declaration says."""

    seconds: float
    text: str


class Failed(NamedTuple):
    """The case failed; said before pytest describes that, if it does, which takes longer than most cases do."""

    seconds: float
    message: str
    places: list[tuple[str, int]]
    """Path and line of each call, outermost first."""


class Leak(NamedTuple):
    """Something is left at the child's own end."""

    line: str


class Lacking(NamedTuple):
    """The case never began: there are too few huge pages."""

    reason: str


KINDS: dict[str, type[Any]] = {each.__name__: each for each in (Passed, Skipped, Expected, Failed, Leak, Lacking)}
Record = Passed | Skipped | Expected | Failed | Leak | Lacking


def pack(record: Record) -> list[object]:
    """Return plain data, from which unpack() makes the same again."""
    return [type(record).__name__, *record]


def unpack(data: object) -> Record | None:
    """Return the record that a child has sent, who need not be trusted; None when it is none."""
    kind, *values = data if isinstance(data, list) and data else [None]
    record_type = KINDS.get(str(kind))
    if not record_type or len(values) != len(record_type._fields):
        return None
    record: Record = record_type(*values)
    seconds = getattr(record, "seconds", 0.0)
    texts = [getattr(record, name, "") for name in ("reason", "text", "message", "line")]
    places = getattr(record, "places", [])
    sane = isinstance(seconds, float) and all(isinstance(text, str) for text in texts) and isinstance(places, list)
    return record if sane and all(isinstance(path, str) and isinstance(line, int) for path, line in places) else None


Describe = Callable[[str, BaseException], dict[str, Any]]
"""Makes pytest's report, as plain data, of the test of this nodeid and of what it raised."""


# ---- in the child --------------------------------------------------------------------------------------------------


def make_context(case: Case, mem: MemType, area_bytes: int) -> Context:
    """Return the context that a case declares, not entered yet."""
    from uffd_selftests.toolkit.context import Context  # noqa: PLC0415  # loaded by the case already

    return Context(
        mem,
        features=case.features,
        nr_pages=area_pages(case, mem, area_bytes),
        pre_alloc=case.pre_alloc,
        post_alloc=case.post_alloc,
    )


def arguments(
    stack: ExitStack, case: Case, names: Iterable[str], *, variant: str | None, mem: MemType | None, area_bytes: int
) -> dict[str, object]:
    """Return what a case takes; its context is entered on the stack."""
    given: dict[str, object] = {"variant": variant, "mem": mem}
    if mem and "ctx" in names:
        given["ctx"] = stack.enter_context(make_context(case, mem, area_bytes))
    return {name: given[name] for name in names}


def perform(task: Task, describe: Describe | None = None) -> Iterator[Record | dict[str, Any]]:
    """Call a plain case and yield what became of it; of a failure also pytest's report, if somebody makes one."""
    function: Callable[..., None] = getattr(importlib.import_module(task.module), task.function)
    case: Case = getattr(function, ATTRIBUTE)
    mem = next((mem for mem in case.mem if mem.name == task.mem), None)
    raised: BaseException | None = None
    started = time.perf_counter()
    try:
        with ExitStack() as stack:
            given = arguments(stack, case, task.arguments, variant=task.variant, mem=mem, area_bytes=task.area_bytes)
            function(**given)
    except BaseException as error:
        raised = error
    seconds = time.perf_counter() - started
    if not raised:
        yield Passed(seconds)
    elif _is_skip(raised):
        yield Skipped(seconds, str(raised))
    elif task.expected and case.defect and case.defect.explains(raised):
        text = _text(raised)
        raised = None  # with its traceback, and all that it keeps
        yield Expected(seconds, text)
    else:
        places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(raised.__traceback__)]
        text = _text(raised)
        if text == "AssertionError":  # of a bare assert
            text += f": {linecache.getline(*places[-1]).strip()}"
        yield Failed(seconds, text, places)
        if describe:
            yield describe(task.nodeid, raised)


def _is_skip(error: BaseException) -> bool:
    """Whether an exception says that the case cannot run here."""
    from uffd_selftests.toolkit.expectations import Skip  # noqa: PLC0415  # loaded by the case already

    outcomes = sys.modules.get("_pytest.outcomes")
    return isinstance(error, Skip) or (outcomes is not None and isinstance(error, outcomes.Skipped))


def _text(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).rstrip()


def send_leaks(send: Send) -> bool:
    """Send what a test left open, if anything; not after a failure, whose traceback keeps its frames."""
    leaks = [Leak(f"userfaultfd {fd} is open") for fd in proc.userfaultfds()]
    for leak in leaks:
        send(pack(leak))
    return bool(leaks)


def keep_to(cpus: set[int]) -> None:
    """Have this process run on these CPUs only; when it does already, that costs nothing."""
    if os.sched_getaffinity(0) != cpus:
        os.sched_setaffinity(0, cpus)
