# SPDX-License-Identifier: GPL-2.0-only
"""Plain cases, called without pytest's way there, in a process that need not have heard of pytest.

pytest's protocol costs several times what most cases do: it touches so many objects that parent and child part with a
thousand pages each.  A case that takes nothing but what this plugin gives it needs none of that.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import linecache
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from uffd_selftests.case import ATTRIBUTE
from uffd_selftests.harness import proc
from uffd_selftests.harness.gating import area_pages
from uffd_selftests.harness.health import HugepageUse, KernelLog

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from uffd_selftests.case import Case
    from uffd_selftests.harness.isolation import Ending, Send, Work
    from uffd_selftests.mem_types import MemType
    from uffd_selftests.toolkit.context import Context

GIVEN = {"ctx", "mem", "variant"}
"""What a plain case can take."""


@dataclass(frozen=True)
class Task:
    """One result of a plain case, as another process can have it."""

    nodeid: str
    module: str
    function: str
    arguments: tuple[str, ...]
    """What the function takes."""
    variant: str | None
    mem: str | None
    area_bytes: int
    """Size of each of the two areas of a case that names no number of pages."""
    cpus: frozenset[int]
    nice: int
    """How far its process lets others go first (setpriority(2))."""
    hugepages: int
    """How many it takes, if nobody else takes some meanwhile."""
    expected: bool
    """The defect that the case declares is expected to show."""
    captured: bool
    """What it prints is kept."""


@dataclass(frozen=True)
class Setting:
    """What holds for all tasks."""

    environ: dict[str, str]
    path: list[str]
    """Where Python looks for modules."""
    hugepage_size: int


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


def perform(task: Task, describe: Describe | None = None) -> Iterator[object]:
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
        send(leak)
    return bool(leaks)


def keep_to(cpus: frozenset[int]) -> None:
    """Have this process run on these CPUs only; when it does already, that costs nothing."""
    if os.sched_getaffinity(0) != cpus:
        os.sched_setaffinity(0, cpus)


# ---- in the launcher -----------------------------------------------------------------------------------------------


class Cases:
    """Plain cases as a launcher's jobs."""

    def __init__(self, describe: Describe | None = None) -> None:
        self._describe = describe

    def preload(self) -> None:
        """Load what all cases need."""
        importlib.import_module("uffd_selftests.common")
        gc.freeze()
        gc.enable()

    def set_up(self, settings: object) -> None:
        """Take over from pytest's process what cases can see of it."""
        assert isinstance(settings, Setting)
        os.environ.clear()
        os.environ.update(settings.environ)
        sys.path[:] = settings.path
        self._hugepage_size = settings.hugepage_size
        self._pages = HugepageUse(0)
        self._log = KernelLog()
        self._before: proc.Descriptors | None = None
        """Of a child, before its first case; it does another one only when that has changed nothing."""
        self._null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._captures = (_Capture(1, "stdout"), _Capture(2, "stderr"))

    def begin(self, task: object, *, early: bool) -> bool:
        """Look how many huge pages are taken; a case may be early while the kernel is silent and has enough of them."""
        assert isinstance(task, Task)
        if early and (self._log.read() or self._log.unreadable):
            return False
        self._pages = HugepageUse(self._hugepage_size if task.hugepages else 0)
        return self._pages.available >= task.hugepages

    def find(self, task: object) -> Work:
        """Make the process ready for a case and return what runs it."""
        assert isinstance(task, Task)
        keep_to(task.cpus)
        if os.getpriority(os.PRIO_PROCESS, 0) != task.nice:
            with contextlib.suppress(PermissionError):  # only the privileged can be less nice again
                os.setpriority(os.PRIO_PROCESS, 0, task.nice)
        if task.captured:
            os.dup2(self._null, 0)
            for capture in self._captures:
                capture.install()
        self._before = before = self._before or proc.Descriptors()
        return lambda send: self._call(task, send, before)

    def _call(self, task: Task, send: Send, descriptors: proc.Descriptors) -> bool:
        """Run a case and send what became of it; return whether it went as it should."""
        well = False
        for outcome in perform(task, self._describe):
            send(outcome, at_once=not isinstance(outcome, Passed))  # after which comes little
            if isinstance(outcome, Passed):
                well = descriptors.are_the_same() or not send_leaks(send)
            elif isinstance(outcome, Expected):
                well = True
        return well

    def get_ready(self, task: object) -> None:
        """Load the module of a case; what is wrong with it, the case will tell."""
        assert isinstance(task, Task)
        if task.module not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(task.module)
                gc.freeze()

    def end(self, task: object, ending: Ending) -> None:
        """Add lost huge pages and what was printed."""
        assert isinstance(task, Task)
        ending.leftovers += self._pages.lost()
        ending.printed = [section for capture in self._captures for section in capture.take()]


class _Capture:
    """Takes what is written to stdout or stderr."""

    def __init__(self, number: int, name: str) -> None:
        self._number = number
        self._name = name
        self._fd = os.memfd_create(name)
        self._file = io.TextIOWrapper(io.FileIO(self._fd, "w", closefd=False), errors="replace", write_through=True)

    def install(self) -> None:
        """Have this process, and those that it starts, write here."""
        if getattr(sys, self._name) is not self._file:
            os.dup2(self._fd, self._number)
            setattr(sys, self._name, self._file)

    def take(self) -> Iterator[tuple[str, str]]:
        """Yield the title and the text of what was written since the last call, if something was."""
        if size := os.fstat(self._fd).st_size:
            text = os.pread(self._fd, size, 0).decode(errors="replace")
            os.ftruncate(self._fd, 0)
            os.lseek(self._fd, 0, os.SEEK_SET)
            yield f"Captured {self._name}", text
