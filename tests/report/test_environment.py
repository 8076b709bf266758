# SPDX-License-Identifier: GPL-2.0-only
"""Kernels, machines and runs are described in a person's words."""

from __future__ import annotations

from uffd_selftests.report import environment


def test_times_are_said_as_people_do() -> None:
    """The unit fits the time."""
    times = {0.0008: "0.8 ms", 0.25: "250 ms", 12.34: "12.3 s", 59.99: "1 min 0 s", 125: "2 min 5 s"}
    assert {seconds: environment.duration(seconds).replace("\xa0", " ") for seconds in times} == times
