# SPDX-License-Identifier: GPL-2.0-only
"""The page itself: one HTML document that needs nothing else, made by jinja2 from the templates beside this file."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup

import uffd_selftests
from uffd_selftests.report import environment, views
from uffd_selftests.report.model import OUTCOMES, tell_apart

if TYPE_CHECKING:
    from uffd_selftests.report.model import Run

MARKS = {
    "pass": ("p", "✓", "promise kept", "kept"),
    "fail": ("f", "✗", "promise broken", "broken"),
    "timeout": ("t", "T", "hung", "hung"),
    "error": ("e", "E", "died", "died"),
    "xpass": ("u", "!", "known defect that did not show", "unexpected pass"),
    "xfail": ("d", "D", "known defect of kernels", "known defect"),
    "skip": ("s", "\N{EN DASH}", "skipped", "skipped"),
}
"""Each outcome's CSS class, sign, meaning, and its name beside a number."""


def render(runs: list[Run]) -> str:
    """Return the page of some runs, which get labels that tell them apart; there must be at least one."""
    tell_apart(runs)
    lines = views.matrix(runs)
    style, script = _asset("page.css"), _asset("page.js")
    template = _engine().get_template("page.html.j2")
    return template.render(
        version=uffd_selftests.__version__,
        runs=runs,
        several=len(runs) > 1,
        kernels=len({run.kernel for run in runs}) == len(runs),
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        about=environment.about(runs[0]),
        headline=views.headline(runs, lines),
        outcomes=[outcome for outcome in reversed(OUTCOMES) if any(run.totals[outcome] for run in runs)],
        mems=views.memory_types(lines),
        broken=views.broken(lines, runs),
        differences=views.differences(lines, runs) if len(runs) > 1 else [],
        defects=views.defects(lines, runs),
        skips=views.skips(lines, runs),
        topics=views.topics(lines),
        clauses=views.clauses(lines, runs),
        facts=environment.facts(runs),
        features=environment.features(runs),
        versions=sorted({run.versions.get("uffd-selftests", "") for run in runs} - {""}),
    )


def _asset(name: str) -> Markup:
    """Return a file of the package's that goes into the page as it is."""
    return Markup(resources.files(__package__).joinpath(f"templates/{name}").read_text("utf-8"))


def _engine() -> jinja2.Environment:
    engine = jinja2.Environment(
        loader=jinja2.PackageLoader("uffd_selftests.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.globals.update(
        MARKS=MARKS,
        OUTCOMES=OUTCOMES,
        count=views.count,
        differ=views.differ,
        remarks=views.remarks,
        verdict=views.verdict,
    )
    return engine
