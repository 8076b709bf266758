# SPDX-License-Identifier: GPL-2.0-only
"""Plain cases, called without pytest's way there.

pytest's protocol costs several times what most cases do: it touches so many objects that parent and child part with a
thousand pages each.  A case that takes nothing but what this plugin gives it needs none of that.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from uffd_selftests.harness.gating import area_pages
from uffd_selftests.harness.results import declaration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from uffd_selftests.common import Context

GIVEN = {"ctx", "mem", "variant"}


class Passed(NamedTuple):
    """What a child sends when its case went well."""

    seconds: float


class Expected(NamedTuple):
    """What a child sends when its case failed as the declaration says: no traceback, for making one takes long."""

    seconds: float
    text: str


class Failed(NamedTuple):
    """What a child sends when its case failed, before pytest describes that, which takes longer than most cases do."""

    seconds: float
    message: str
    places: list[tuple[str, int]]
    """Path and line of each call, outermost first."""


def is_plain(item: pytest.Item) -> bool:
    """Whether a test is a case without fixtures, hooks around it or markers that are not this plugin's."""
    case, _, _ = declaration(item)
    if not case or not isinstance(item, pytest.Function) or item.cls:
        return False
    markers = {marker.name for marker in item.iter_markers()}
    taken, needed = item._fixtureinfo.argnames, {*GIVEN, "request"}  # which the fixture ctx takes
    allowed = {"xfail"} if case.defect else set()
    return GIVEN.issuperset(taken) and needed.issuperset(item.fixturenames) and markers <= allowed


def make_context(item: pytest.Item, area_bytes: int) -> Context:
    """Return the context that a case declares, not entered yet."""
    from uffd_selftests.common import Context  # noqa: PLC0415  # loaded by the case already

    case, _, mem = declaration(item)
    assert case
    assert mem
    return Context(
        mem,
        features=case.features,
        nr_pages=area_pages(case, mem, area_bytes),
        pre_alloc=case.pre_alloc,
        post_alloc=case.post_alloc,
    )


def perform(item: pytest.Function, area_bytes: int) -> Iterator[Passed | Expected | Failed | dict[str, Any]]:
    """Call a plain case and yield what became of it; of a skip, and of a failure that is shown, also pytest's report.

    That one is plain data.
    """
    _, variant, mem = declaration(item)
    arguments: dict[str, object] = {"variant": variant, "mem": mem}
    function: Callable[..., None] = item.function

    def body() -> None:
        with contextlib.ExitStack() as stack:
            if "ctx" in item.fixturenames:
                arguments["ctx"] = stack.enter_context(make_context(item, area_bytes))
            function(**{name: arguments[name] for name in item._fixtureinfo.argnames})

    call = pytest.CallInfo.from_call(body, "call")
    if not call.excinfo:
        yield Passed(call.duration)
        return
    if expected(item, call.excinfo.value):
        yield Expected(call.duration, call.excinfo.exconly())
        return
    if not is_skip(call.excinfo.value):
        places = [(str(entry.path), entry.lineno + 1) for entry in call.excinfo.traceback]
        yield Failed(call.duration, call.excinfo.exconly(tryshort=True), places)
        if item.config.option.tbstyle == "no":
            return
    report = item.ihook.pytest_runtest_makereport(item=item, call=call)
    yield item.config.hook.pytest_report_to_serializable(config=item.config, report=report)


def is_skip(error: BaseException) -> bool:
    """Whether an exception says that the case cannot run here."""
    from uffd_selftests.common import Skip  # noqa: PLC0415  # loaded by the case already

    return isinstance(error, (Skip, pytest.skip.Exception))


def expected(item: pytest.Item, error: BaseException | None = None) -> str:
    """Return why a case is expected to fail, with this error if one is given; empty when it is not."""
    marker = item.get_closest_marker("xfail")  # the plugin's, for a plain case has no others
    if not marker or (error and not marker.kwargs["raises"].matches(error)):
        return ""
    return str(marker.kwargs["reason"])
