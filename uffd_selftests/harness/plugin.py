# SPDX-License-Identifier: GPL-2.0-only
"""The pytest plugin: it multiplies declared cases, gives them their fixtures and puts the harness together.

xdist's controller collects nothing and runs nothing, its workers report to it; without xdist one process does all.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from uffd_selftests.case import ATTRIBUTE, Case
from uffd_selftests.command.interrupts import Signals
from uffd_selftests.harness import durations, items, launchpad
from uffd_selftests.harness.guest import Machine
from uffd_selftests.harness.isolation import end_with
from uffd_selftests.harness.items import SETTINGS, VARIANTS, CaseFile, CaseItem
from uffd_selftests.harness.jobs import Cases
from uffd_selftests.harness.launcher import Launcher
from uffd_selftests.harness.launchpad import Launchpad
from uffd_selftests.harness.plain import make_context
from uffd_selftests.harness.reporter import Reporter
from uffd_selftests.harness.results import LAST, Planned, declaration, skipped_for
from uffd_selftests.harness.runner import Runner
from uffd_selftests.harness.settings import Settings, add_options
from uffd_selftests.harness.site import Site
from uffd_selftests.harness.steward import TURNS, Steward, hand_in
from uffd_selftests.machine.facts import Facts

if TYPE_CHECKING:
    from uffd_selftests.mem_types import MemType
    from uffd_selftests.toolkit.context import Context

SIGNALS = pytest.StashKey[Signals]()
REPORTER = pytest.StashKey[Reporter]()
STEWARD = pytest.StashKey[Steward]()
FACTS = pytest.StashKey[Facts]()
LAUNCHER = pytest.StashKey[Launcher | Launchpad]()
"""Given by whoever had one started before pytest."""
PACKED = "uffd_packed"
"""The field of a report on its way that holds all of it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the harness's options."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Put together what this process needs."""
    config.addinivalue_line("markers", "isolated: run this test in a child process of its own")
    settings = config.stash[SETTINGS] = Settings.of(config)
    settings.export(progress=settings.brief and config.getoption("dist", "no") == "no" and not _is_worker(config))
    signals = config.stash[SIGNALS] = Signals()
    config.add_cleanup(signals.close)
    if settings.machine:
        config.stash[VARIANTS] = Machine.load(settings.machine).survey.get("variants", {})
    if config.option.collectonly:
        return
    workerinput = getattr(config, "workerinput", None)
    if workerinput is not None:
        _be_worker(config, settings, json.loads(workerinput["uffd"]))
    else:
        _be_first(config, settings, signals)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def _be_worker(config: pytest.Config, settings: Settings, given: dict[str, Any]) -> None:
    end_with(os.getppid(), signal.SIGTERM)  # xdist's worker would notice only when it next reports
    facts = config.stash[FACTS] = Facts.from_dict(given["facts"])
    name = config.workerinput["workerid"]  # type: ignore[attr-defined]
    site, turns = None, None
    if settings.machine:
        site = Site(Machine.load(settings.machine).source(name), remote=True)
    else:
        turns = Path(given["folder"]) / TURNS
        if address := given["launchpad"]:
            site = Site(lambda: launchpad.connect(address) or Launcher.start(Cases()))
    number = int(name.removeprefix("gw"))
    sole = settings.machine is not None
    _register(config, Runner(settings, facts, site, turns=turns, sole=sole, cpu=number, shows=given["shows"]))


def _be_first(config: pytest.Config, settings: Settings, signals: Signals) -> None:
    reporter = None
    if settings.ktap_fd is not None or settings.folder:
        reporter = config.stash[REPORTER] = Reporter(settings, signals)
        _register(config, reporter)
    given = config.stash.get(LAUNCHER, None)
    serial = config.getoption("dist", "no") == "no"
    guarded = reporter.descriptors if reporter else []
    machine = Machine.load(settings.machine) if settings.machine else None
    first = [given] if isinstance(given, Launcher) else []
    if machine:
        source = machine.source(first=len(first) + 1)
        site = Site(lambda: first.pop() if first else source(), remote=True) if serial else None
    elif isinstance(given, Launchpad):
        address = given.address
        site = Site(lambda: launchpad.connect(address) or Launcher.start(Cases(), guarded))
    else:
        site = Site(lambda: first.pop() if first else Launcher.start(Cases(), guarded))
    steward = config.stash[STEWARD] = Steward(config, settings, signals, reporter, site=site, machine=machine)
    if isinstance(given, Launchpad):
        steward.launchpad = given.address
    config.stash[FACTS] = steward.facts
    _register(config, steward)
    if serial:
        shows = reporter is not None and reporter.shows
        own = site if given or machine else None  # what somebody describes failures for is forked when all are known
        runner = Runner(settings, steward.facts, own, sole=True, guarded=guarded, shows=shows)
        steward.runner = runner
        _register(config, runner)


def _register(config: pytest.Config, part: Reporter | Steward | Runner) -> None:
    config.pluginmanager.register(part, f"uffd-{type(part).__name__.lower()}")
    config.add_cleanup(part.close)


# ---- collection ----------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage meanwhile: there is none among so many objects that are new and stay."""
    was = gc.isenabled()
    gc.disable()
    try:
        return (yield)
    finally:
        if was:
            gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not load a file in which no case can pass the filters; but of one that was named pytest wants to know."""
    settings = config.stash[SETTINGS]
    if not settings.filters or collection_path.suffix != ".py" or items.may_match(collection_path, settings):
        return None
    named = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return None if collection_path in named else True


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> CaseFile:
    """Collect files of plain cases in a way that is faster."""
    return CaseFile.from_parent(parent, path=module_path)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: Callable[..., None]
) -> list[CaseItem] | None:
    """Multiply a plain case by its variants and its memory types; leave all else to pytest."""
    if not isinstance(getattr(obj, ATTRIBUTE, None), Case) or not isinstance(collector, CaseFile):
        return None
    if not collector.istestfunction(obj, name):
        return None
    return items.make(collector, name, obj, collector.config.stash[SETTINGS])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Multiply a case by its variants and its memory types."""
    case = getattr(metafunc.function, ATTRIBUTE, None)
    if not isinstance(case, Case):
        return
    items.check(case, metafunc.function.__name__, metafunc.fixturenames)
    if case.variants:
        metafunc.parametrize("variant", case.variants, ids=str)
    if case.mem:
        metafunc.parametrize("mem", case.mem, ids=str)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let -k find a case by the name that reports give it, and expect a known defect to show."""
    case, variant, mem = declaration(item)
    if case:
        item.extra_keyword_matches.update((case.name, case.result_name(variant, mem)))
    if case and case.defect and not item.config.stash[SETTINGS].strict:
        reason = f"{case.defect.id}: {case.defect.summary}"
        known = pytest.RaisesExc(AssertionError, check=case.defect.explains)
        item.add_marker(pytest.mark.xfail(raises=known, reason=reason, strict=False))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what --filter and --documented-only leave, and put last what may hang the kernel."""
    settings = config.stash[SETTINGS]
    wanted = [item for item in items if _wanted(item, settings)]
    if len(wanted) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if not _wanted(item, settings)])
    if settings.machine and (_is_worker(config) or config.getoption("dist", "no") != "no"):
        items[:] = durations.longest_first(wanted, Machine.load(settings.machine).durations)
    else:
        items[:] = sorted(wanted, key=_lateness)


def _lateness(item: pytest.Item) -> tuple[bool, int]:
    """Tell what comes last: what may hang the kernel, and before that what wants all CPUs, the longest of it first.

    Beside a case that keeps to one CPU the threads of a race have to wait for each other; beside another race less so.
    And when what comes last is short, no worker waits long for another one.
    """
    case, _, _ = declaration(item)
    return (case.may_hang_kernel, case.smp * (1 if case.stress else 2)) if case else (False, 0)


def _wanted(item: pytest.Item, settings: Settings) -> bool:
    """Whether the options leave a test; of one that is no case, filters are part of pytest's name."""
    case, variant, mem = declaration(item)
    if case:
        return isinstance(item, CaseItem) or settings.wants(case, variant, mem)
    return not settings.filters or any(part in item.nodeid for part in settings.filters)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Hand the plan of an xdist worker in, before xdist reports that the worker has collected."""
    workerinput = getattr(session.config, "workerinput", None)
    if workerinput is not None:
        plan = _plan(session)
        error = _name_clash(plan) or _refusal(session)
        hand_in(Path(json.loads(workerinput["uffd"])["folder"]), workerinput["workerid"], plan, error)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Begin with the plan, or list it; xdist's controller has collected nothing, and its workers have handed it in."""
    config = session.config
    if not config.option.collectonly:
        gc.freeze()  # what was collected stays: no need to look for garbage in it again and again
        gc.enable()
    if hasattr(config, "workerinput") or config.getoption("dist", "no") != "no":
        return
    plan = _plan(session)
    if error := _name_clash(plan) or _refusal(session):
        raise pytest.UsageError(error)
    if not config.option.collectonly:
        if REPORTER in config.stash or any(declaration(item)[0] for item in session.items):
            config.stash[STEWARD].begin(plan)
    elif (fd := config.stash[SETTINGS].ktap_fd) is not None:
        with contextlib.suppress(BrokenPipeError), open(fd, "w", closefd=False) as listing:
            listing.writelines(f"{planned.name}\n" for planned in plan)


def _plan(session: pytest.Session) -> list[Planned]:
    settings, facts = session.config.stash[SETTINGS], session.config.stash.get(FACTS, None)
    return [Planned.of(item, settings.area_bytes_of(declaration(item)[0]), facts) for item in session.items]


def _name_clash(plan: list[Planned]) -> str:
    """Return a message when two results have the same name, else nothing."""
    seen: dict[str, Planned] = {}
    for planned in plan:
        other = seen.setdefault(planned.name, planned)
        if other is not planned:
            return f"two results are named {planned.name}: {other.nodeid} and {planned.nodeid}"
    return ""


def _refusal(session: pytest.Session) -> str:
    """Return why something cannot run in a guest, if so."""
    if session.config.stash[SETTINGS].machine:
        for item in session.items:
            if not isinstance(item, CaseItem):
                return f"{item.nodeid} cannot run in another kernel: it takes more of pytest than ctx, mem and variant"
    return ""


# ---- between xdist's processes -------------------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_report_to_serializable(report: pytest.CollectReport | pytest.TestReport) -> dict[str, Any] | None:
    """Pack a report that holds nothing but plain data: execnet takes as long for one field as pickle for all."""
    return {PACKED: pickle.dumps(vars(report))} if hasattr(report, LAST) and not report.failed else None


@pytest.hookimpl(tryfirst=True)
def pytest_report_from_serializable(data: dict[str, Any]) -> pytest.TestReport | None:
    """Unpack it, with what xdist has added."""
    if PACKED not in data:
        return None
    report = pytest.TestReport.__new__(pytest.TestReport)
    vars(report).update(pickle.loads(data.pop(PACKED)), **data)
    return report


# ---- what a case can take ------------------------------------------------------------------------------------------


@pytest.fixture
def variant(request: pytest.FixtureRequest) -> str:
    """The variant of the case that runs."""
    return str(request.param)


@pytest.fixture
def mem(request: pytest.FixtureRequest) -> MemType:
    """The memory type on which the case runs."""
    memory_type: MemType = request.param
    return memory_type


@pytest.fixture
def ctx(request: pytest.FixtureRequest, mem: MemType) -> Iterator[Context]:
    """Source and destination areas of the memory type, and a userfaultfd with the case's features."""
    case, _, _ = declaration(request.node)
    assert case
    with make_context(case, mem, request.config.stash[SETTINGS].area_bytes_of(case)) as context:
        yield context


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Make a skip of the Skip that a case or a hook raised."""
    reason = _skip_reason(call)
    if reason is not None:
        call.excinfo = pytest.CallInfo.from_call(lambda: pytest.skip(reason), "call").excinfo
    report = yield
    if reason is not None:
        report.longrepr = skipped_for(item, reason)
    return report


def _skip_reason(call: pytest.CallInfo[None]) -> str | None:
    module = sys.modules.get("uffd_selftests.toolkit.expectations")  # whoever raises its Skip has loaded it
    if module and call.excinfo and isinstance(call.excinfo.value, module.Skip):
        return str(call.excinfo.value)
    return None
